"""The search of a decay as one HTML file: flip rates over steps, mu over decays."""

from math import log10

from sparse_compile.decay_search.table import HIGHEST, LOWEST, DecayTable
from sparse_compile.reporting.html_page import Column, render, table
from sparse_compile.reporting.html_plot import Line, Plot
from sparse_compile.reporting.model import precise

_DECAYS = (Column("decay", "decay"), Column("rate", "flip rate"), Column("mu", "mu"), Column("verdict", "verdict"))


def as_html(result: DecayTable) -> str:
    advice, *usage = result.advice().splitlines()
    names = [run.name for run in (result.dense, *result.runs)]
    colours = _colours(result)
    keys = [column.key for column in _DECAYS]
    return render(
        "decay_search.html",
        recipe=result.recipe,
        advice=advice,
        usage=[line.strip() for line in usage],
        lowest=f"{LOWEST:.2f}",
        highest=f"{HIGHEST:.2f}",
        mu=_mu(result),
        decays=table(_DECAYS, [dict(zip(keys, line, strict=True)) for line in result.lines()]),
        flip_rates=_flip_rates(result, colours),
        runs=list(zip(colours, names, strict=True)),
        notes=result.notes(),
    )


def _mu(result: DecayTable) -> Plot:
    points = [(log10(run.decay or 1.0), result.mu(run)) for run in result.runs]
    ends = [points[0][0], points[-1][0]]
    top = 1.1 * max(HIGHEST, *(mu for _, mu in points))
    lines = [Line(points=[(x, limit) for x in ends], colour="var(--faint)", dashed=True) for limit in (LOWEST, HIGHEST)]
    lines.append(Line(points=points, colour="var(--sparse)", dots=True))
    first, last = (f"decay {run.decay:g}" for run in (result.runs[0], result.runs[-1]))
    return Plot(
        lines=lines,
        title=", ".join(f"{run.decay:g}: {result.mu(run):.3f}" for run in result.runs),
        top=top,
        top_label=f"{top:.2f}",
        left_label=f"0, {first}",
        right_label=last,
    )


def _colours(result: DecayTable) -> list[str]:
    """Of the dense run, and of the others: from blue, the weakest decay, to red."""
    hues = [220 - 220 * index / max(1, len(result.runs) - 1) for index in range(len(result.runs))]
    return ["var(--text)", *(f"hsl({hue:.0f} 65% 45%)" for hue in hues)]


def _flip_rates(result: DecayTable, colours: list[str]) -> Plot:
    runs = [(run.name, list(enumerate(run.rates(), 1))) for run in (result.dense, *result.runs)]
    top = 1.1 * max(rate for _, rates in runs for _, rate in rates)
    last = max(len(rates) for _, rates in runs)
    return Plot(
        lines=[Line(points=rates, colour=colour) for colour, (_, rates) in zip(colours, runs, strict=True)],
        title=f"flip rates of {', '.join(name for name, _ in runs)} in steps 1 to {last}",
        top=top,
        top_label=precise(top),
        left_label="0 %, step 1",
        right_label=f"step {last}",
    )
