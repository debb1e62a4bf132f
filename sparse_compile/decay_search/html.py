"""The search of a decay as one HTML file: flip rates over steps, mu over decays."""

from collections.abc import Iterable
from math import log10

from sparse_compile.decay_search.table import HIGHEST, LOWEST, DecayTable
from sparse_compile.reporting.html_page import Markup, page, table, tag
from sparse_compile.reporting.html_plot import Line, keys, plot
from sparse_compile.reporting.model import precise


def as_html(result: DecayTable) -> str:
    advice, *usage = result.advice().splitlines()
    return page(
        "sparse_compile tune-decay",
        tag("h1", f"Which decay suits recipe {result.recipe}"),
        tag("p", tag("strong", advice)),
        *(tag("p", tag("code", line.strip())) for line in usage),
        *_mu(result),
        *_flip_rates(result),
        *(tag("p", note, class_="faint") for note in result.notes()),
    )


def _mu(result: DecayTable) -> Iterable[Markup]:
    points = [(log10(run.decay or 1.0), result.mu(run)) for run in result.runs]
    ends = [points[0][0], points[-1][0]]
    top = 1.1 * max(HIGHEST, *(mu for _, mu in points))
    lines = [Line(points=[(x, limit) for x in ends], colour="var(--faint)", dashed=True) for limit in (LOWEST, HIGHEST)]
    lines.append(Line(points=points, colour="var(--sparse)", dots=True))
    said = ", ".join(f"{run.decay:g}: {result.mu(run):.3f}" for run in result.runs)
    first, last = (f"decay {run.decay:g}" for run in (result.runs[0], result.runs[-1]))
    caption = (
        "The share of mask bits that flip in a step, over that of the dense run, whose masks are virtual. Dashed: "
        f"{LOWEST:.2f} and {HIGHEST:.2f}, between which a decay is accepted. The horizontal axis is logarithmic."
    )
    yield tag("h2", "mu of each decay")
    yield _figure(caption, plot(lines, said, top=top, labels=(f"{top:.2f}", f"0, {first}", last)))
    yield table(("decay", "flip rate", "mu", "verdict"), result.lines())


def _flip_rates(result: DecayTable) -> Iterable[Markup]:
    # From blue, the weakest, to red.
    hues = [220 - 220 * index / max(1, len(result.runs) - 1) for index in range(len(result.runs))]
    colours = ["var(--text)", *(f"hsl({hue:.0f} 65% 45%)" for hue in hues)]
    runs = [(run.name, list(enumerate(run.rates(), 1))) for run in (result.dense, *result.runs)]
    top = 1.1 * max(rate for _, rates in runs for _, rate in rates)
    lines = [Line(points=rates, colour=colour) for colour, (_, rates) in zip(colours, runs, strict=True)]
    last = max(len(rates) for _, rates in runs)
    said = f"flip rates of {', '.join(name for name, _ in runs)} in steps 1 to {last}"
    caption = "The share of mask bits that differ from those before the step, of all weights together."
    yield tag("h2", "Flip rate in each optimizer step")
    plotted = plot(lines, said, top=top, labels=(precise(top), "0 %, step 1", f"step {last}"))
    yield _figure(caption, plotted, keys(zip(colours, (name for name, _ in runs), strict=True)))


def _figure(caption: str, *drawn: Markup) -> Markup:
    return tag("figure", tag("figcaption", tag("p", caption, class_="faint")), *drawn)
