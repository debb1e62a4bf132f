"""The report as one HTML file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from sparse_compile.reporting.health import HEALTH_LIMITS, over_time
from sparse_compile.reporting.html_page import Markup, page, table, tag
from sparse_compile.reporting.html_plot import Line, keys, plot
from sparse_compile.reporting.model import (
    GraphReport,
    Measurement,
    Passes,
    ReportData,
    Row,
    Spread,
    fold,
    longest_first,
    per_cent,
    precise,
    shares,
)
from sparse_compile.reporting.text import about, called_at, short, steps


def as_html(report: ReportData) -> str:
    body = [tag("h1", "sparse_compile: what was done to this model"), _environment(report)]
    if not report.graphs:
        body.append(tag("p", "No graph was compiled with backend 'sste'."))
    body += [*_overview(report), *_graphs_side_by_side(report), *_gains(report)]
    body += [_graph(number, graph) for number, graph in enumerate(report.graphs)]
    body += _health(report)
    return page("sparse_compile report", *body)


def _environment(report: ReportData) -> Markup:
    return tag("p", " · ".join(filter(None, (report.device, f"PyTorch {report.torch}"))), class_="faint")


def _overview(report: ReportData) -> Iterable[Markup]:
    rewritten, total = sum(graph.rewritten for graph in report.graphs), len(report.rows)
    graphs = "1 graph" if len(report.graphs) == 1 else f"{len(report.graphs)} graphs"
    yield tag("p", f"{rewritten} of {total} linears rewritten, in {graphs}.")
    coverage = report.coverage()
    if coverage:
        yield tag("h2", "Share of all products' FLOPs")
        yield from _coverage(coverage)
        note = "Forward and backward, 2·M·N·K for a matrix product; each graph as often as it was called."
        yield tag("p", note, class_="faint")
    if whole := steps(report):
        yield tag("h2", "Training step")
        yield tag("p", whole)
        step, dense = report.step(), report.dense_step_ms()
        if step is not None and dense is not None:
            yield _bars([("dense", [(dense, "dense")], ""), ("now", [(step.median, "sparse")], "")])
        note = "From a step of an optimizer to its next, without steps in which something was compiled or measured."
        yield tag("p", note, class_="faint")
    if report.fallbacks:
        yield tag("h2", "Run eagerly")
        yield from (tag("p", line) for line in report.fallbacks)


def _graphs_side_by_side(report: ReportData) -> Iterable[Markup]:
    """Where there are several, on one scale."""
    bars: list[_Bar] = []
    for number, graph in enumerate(report.graphs):
        if (times := _dense_and_now(graph)) is not None:
            dense, now, how = times
            bars.append((f"{number} dense", [(dense, "dense")], ""))
            bars.append((f"{number} now", [(now, "sparse")], f", {dense / now:.2f}x {how}"))
    if len(bars) > 2:
        yield tag("h2", "A call of each graph and its backward")
        yield _bars(bars)


def _dense_and_now(graph: GraphReport) -> tuple[float, float, str] | None:
    """Milliseconds of a call and its backward, and how they are known."""
    if graph.measured is not None:
        return graph.measured.dense.total, graph.measured.rewritten.total + graph.measured.weights_ms, "measured"
    timed = [row for row in graph.rows if row.dense_us is not None and row.rewritten_us is not None]
    if not timed:
        return None
    dense, now = (sum(getattr(row, name) for row in timed) / 1e3 for name in ("dense_us", "rewritten_us"))
    return dense, now, f"predicted of {len(timed)} linears"


def _coverage(coverage: Mapping[str, float]) -> Iterable[Markup]:
    parts = [_piece(share, _colour(precision)) for precision, share in coverage.items()]
    yield tag("div", *parts, class_="bar", role="img", aria_label=", ".join(_said(coverage)))
    yield _keys([(_colour(precision), text) for precision, text in zip(coverage, _said(coverage), strict=True)])


def _said(coverage: Mapping[str, float]) -> list[str]:
    return [f"{precision} {per_cent(share)}" for precision, share in coverage.items()]


def _colour(precision: str) -> str:
    if precision.startswith("2:4"):
        return "sparse"
    return "fp8" if precision == "fp8" else "dense"


def _piece(share: float, colour: str) -> Markup:
    return tag("span", class_=colour, style=f"width:{share:.2%}")


def _gains(report: ReportData) -> Iterable[Markup]:
    gains = report.gains()
    if not gains:
        return
    yield tag("h2", "To gain more, the largest first")
    items = []
    for gain in gains:
        size = [f"{per_cent(gain.share)} of the FLOPs"] if gain.share is not None else []
        size += [f"{gain.microseconds:.0f} µs a call"] if gain.microseconds is not None else []
        lines = [tag("strong", gain.modules), " ", tag("small", ", ".join(size))]
        lines += [tag("p", text) for text in (gain.reason, gain.advice) if text]
        items.append(tag("li", *lines))
    yield tag("ol", *items)


def _graph(number: int, graph: GraphReport) -> Markup:
    execution = f"{graph.rewritten} of {len(graph.rows)} linears rewritten, {graph.execution}"
    parts = [tag("h2", f"Graph {number}: {graph.origin or graph.id}"), tag("p", execution)]
    parts += [tag("p", line, class_="faint") for line in about(graph)]
    if flops := graph.flops():
        parts += _coverage(shares(flops))
    if graph.measured is not None:
        parts += _measured(graph.measured)
    elif (times := _dense_and_now(graph)) is not None:
        dense, now, how = times
        parts += [
            tag("h3", f"{dense / now:.2f}x {how}"),
            _bars([("dense", [(dense, "dense")], ""), ("now", [(now, "sparse")], "")]),
        ]
    if graph.rows:
        parts.append(_table(graph.rows))
    return tag("section", *parts)


def _measured(measurement: Measurement) -> Iterable[Markup]:
    dense, now, weights = measurement.dense, measurement.rewritten, measurement.weights_ms
    yield tag("h3", f"Measured: {measurement.speedup:.2f}x")
    yield _bars([("dense", _pieces(dense, "dense", 0.0), ""), ("now", _pieces(now, "sparse", weights), "")])
    yield _keys([("sparse", "forward"), ("sparse half", "backward"), ("sparse faded", "weights")])
    whole = now.total + weights
    own = [_part(time, whole) for time in (weights, measurement.casts_ms, measurement.mvue_ms)]
    yield table(
        ("", "forward", "backward", "peak memory", "weights", "casts", "MVUE"),
        [
            ("dense", _spread(dense.forward), _spread(dense.backward), _mebibytes(dense), "", "", ""),
            ("now", _spread(now.forward), _spread(now.backward), _mebibytes(now), *own),
        ],
    )
    note = (
        f"Medians of {measurement.rounds} runs of each, in turns, with the range. Weights are pruned and cast once per "
        "optimizer step, the time of which is in the bar. Casts and MVUE are parts of forward and backward, without "
        "what the compiler fuses into other operations."
    )
    yield tag("p", note, class_="faint")


# A name, the milliseconds and colours of its pieces, and what follows their sum.
_Bar = tuple[str, list[tuple[float, str]], str]


def _pieces(passes: Passes, colour: str, weights: float) -> list[tuple[float, str]]:
    backward = passes.backward.median if passes.backward else 0.0
    return [(passes.forward.median, colour), (backward, f"{colour} half"), (weights, f"{colour} faded")]


def _bars(bars: Sequence[_Bar]) -> Markup:
    """On one scale."""
    totals = [sum(time for time, _ in pieces) for _, pieces, _ in bars]
    cells = []
    for (name, pieces, more), total in zip(bars, totals, strict=True):
        drawn = [_piece(time / max(totals), colour) for time, colour in pieces if time]
        cells += [tag("span", name), tag("div", *drawn, class_="bar"), tag("span", _times(total) + more)]
    return tag("div", *cells, class_="bars")


def _mebibytes(passes: Passes) -> str:
    return "" if passes.peak_bytes is None else f"{passes.peak_bytes / 2**20:.0f} MiB"


def _part(time: float | None, whole: float) -> str:
    return "" if time is None else f"{_times(time)}, {per_cent(time / whole)}"


def _times(milliseconds: float | None) -> str:
    return "" if milliseconds is None else f"{_number(milliseconds)} ms"


def _number(value: float) -> str:
    """Three digits, and all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else f"{_number(spread.median)} ms ({_number(spread.low)} to {_number(spread.high)})"


def _table(rows: Iterable[Row]) -> Markup:
    rows = list(rows)
    timed = any(row.dense_us is not None for row in rows)
    columns = ("dense µs", "now µs") if timed else ()
    headers = ("linear", "role", "M × K → N", "fprop", "dgrad", "wgrad", *columns, "why, and what to do")
    lines = []
    for name, members in fold(longest_first(rows)):
        row = members[0]
        times = ["" if time is None else f"{time:.0f}" for time in (row.dense_us, row.rewritten_us) if timed]
        texts = [tag("p", text) for text in (row.reason, row.advice) if text]
        why = tag("div", *texts) if texts else ""
        shape = row.shape.replace(" x ", " × ").replace("->", "→")
        lines.append((_names(name, members), row.role, shape, row.fprop, row.dgrad, row.wgrad, *times, why))
    return table(headers, lines, whole=("M × K → N", "fprop", "dgrad", "wgrad"))


def _names(name: str, members: Sequence[Row]) -> Markup:
    """A name that opens to the modules it stands for, and where each is called."""
    items = []
    for row in members:
        called = [tag("code", f"{short(row.source)}: {row.code}", title=row.source)] if row.source else []
        items.append(tag("li", row.module, " ", *called))
    return tag("details", tag("summary", name, " ", tag("small", called_at(members))), tag("ul", *items))


def _health(report: ReportData) -> Iterable[Markup]:
    if not report.health:
        return
    yield tag("h2", f"Health of {len(report.health)} pruned weights")
    for quantity, (limit, meaning) in HEALTH_LIMITS.items():
        points = over_time(report.health, quantity)
        if not points:
            continue
        step, median, largest = points[-1]
        name = quantity.replace("_", " ")
        said = f"{name} at step {step}: median {precise(median)}, largest {precise(largest)}"
        if largest:
            at_last = {name: getattr(samples[-1], quantity) for name, samples in report.health.items()}
            said += f" in {max(at_last, key=lambda name: at_last[name] or 0.0)}"
        limited = f"Dashed: {precise(limit)}, above which one should look closer, by rule of thumb."
        caption = tag("figcaption", tag("strong", said), tag("p", f"{meaning} {limited}", class_="faint"))
        yield tag("figure", caption, _plot(points, limit, said))
    yield tag("details", tag("summary", "Each weight at its last sample"), _health_table(report))


def _health_table(report: ReportData) -> Markup:
    lines = []
    for name, samples in report.health.items():
        step, *quantities, beta, source = asdict(samples[-1]).values()
        scale = "" if beta is None else f"{beta:.3f}, {source}"
        lines.append((name, str(step), *("" if value is None else precise(value) for value in quantities), scale))
    headers = ("weight", "step", "flips", "zeros", "underflow", "saturated", "noise", "grad underflow", "scale beta")
    return table(headers, lines)


def _plot(over_time: Sequence[tuple[int, float, float]], limit: float, title: str) -> Markup:
    """Median and largest over steps, and the limit, dashed; the vertical axis begins at zero."""
    first, last = over_time[0][0], over_time[-1][0]
    top = 1.1 * max(limit, *(largest for _, _, largest in over_time))

    lines = [
        Line(points=[(first, limit), (last, limit)], colour="var(--faint)", dashed=True),
        Line(points=[(x, largest) for x, _, largest in over_time], colour="var(--dense)"),
        Line(points=[(x, median) for x, median, _ in over_time], colour="var(--sparse)"),
    ]
    plotted = plot(lines, title, top=top, labels=(precise(top), f"0 %, step {first}", f"step {last}"))
    return tag("div", plotted, keys([("var(--sparse)", "median of the weights"), ("var(--dense)", "largest")]))


def _keys(classes: Iterable[tuple[str, str]]) -> Markup:
    """What the colours mean."""
    return tag("ul", *(tag("li", tag("span", class_=f"key {colour}"), text) for colour, text in classes), class_="keys")
