"""The report as one HTML file that needs nothing else: no script, no network.

Text is escaped wherever it comes from: only what ``_tag`` made passes as it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from sparse_compile.report import (
    HEALTH_LIMITS,
    GraphReport,
    Measurement,
    Report,
    Row,
    Spread,
    fold,
    longest_first,
    per_cent,
    shares,
)
from sparse_compile.report_text import about, short

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1d1f23; --faint: #666c76; --line: #dcdfe4; --card: #f5f6f8;
  --sparse: #1a7f5a; --fp8: #2f6fd0; --dense: #c46a1b; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --text: #e6e8ec; --faint: #9aa1ac; --line: #333841;
  --card: #1d2026; --sparse: #3fb98a; --fp8: #6ea3f0; --dense: #e39a55; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
summary, code, strong { overflow-wrap: anywhere; } summary { cursor: pointer; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .25rem; } h3 { font-size: 1rem; }
p { margin: .25rem 0; } .faint, small { color: var(--faint); } code { font-size: .85em; }
.bar { display: flex; height: 1.5rem; border-radius: .25rem; overflow: hidden; background: var(--card); }
.bar > span, .key { background: var(--dense); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.bar > span { display: block; height: 100%; }
.bar > .half { opacity: .6; }
.sparse { background: var(--sparse) !important; } .fp8 { background: var(--fp8) !important; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; margin-right: .35rem; }
.keys { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; list-style: none; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .4rem .75rem; align-items: center;
  margin: .75rem 0; }
ol { padding-left: 1.6rem; } ol > li { margin-bottom: .5rem; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; margin-top: .75rem; }
th { white-space: nowrap; }
th, td { text-align: left; padding: .35rem .6rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.number { text-align: right; white-space: nowrap; }
details ul { margin: .25rem 0; padding-left: 1rem; }
figure { margin: 1rem 0; } svg { display: block; width: 100%; height: 8rem; background: var(--card); }
@media (max-width: 45rem) {
  thead { display: none; } tr { display: block; padding: .5rem 0; border-bottom: 1px solid var(--line); }
  td { display: flex; gap: .75rem; border: 0; padding: .1rem 0; } td:empty { display: none; }
  td::before { content: attr(data-label); flex: 0 0 6.5rem; color: var(--faint); }
  .number { text-align: left; }
  .bars { grid-template-columns: 1fr; gap: .1rem; } .bars > .bar { margin-bottom: .5rem; }
}
@media print { body { max-width: none; font-size: 11pt; } tr, li, .bars { break-inside: avoid; } }
"""
# No request leaves the page, whatever stands in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Markup(str):
    """HTML, as opposed to text."""

    __slots__ = ()


def as_html(report: Report) -> str:
    body = [_tag("h1", "sparse_compile: what was done to this model"), _environment(report)]
    if not report.graphs:
        body.append(_tag("p", "No graph was compiled with backend 'sste'."))
    body += [*_overview(report), *_gains(report)]
    body += [_graph(number, graph) for number, graph in enumerate(report.graphs)]
    body += _health(report)
    head = _tag(
        "head",
        _tag("meta", charset="utf-8"),
        _tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _tag("title", "sparse_compile report"),
        _tag("style", Markup(_STYLE)),
    )
    return f"<!DOCTYPE html>\n{_tag('html', head, _tag('body', *body), lang='en')}\n"


def _tag(element: str, *children: str, **attributes: str) -> Markup:
    """An element; ``class_`` for class, ``data_label`` for data-label.  Children that are no Markup are escaped."""
    given = "".join(
        f' {attribute.rstrip("_").replace("_", "-")}="{escape(value)}"' for attribute, value in attributes.items()
    )
    inside = "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    if element == "meta":
        return Markup(f"<{element}{given}>")
    newline = "\n" if element in ("p", "li", "tr", "section", "table", "div") else ""
    return Markup(f"<{element}{given}>{inside}</{element}>{newline}")


def _environment(report: Report) -> Markup:
    return _tag("p", " · ".join(filter(None, (report.device, f"PyTorch {report.torch}"))), class_="faint")


def _overview(report: Report) -> Iterable[Markup]:
    rewritten, total = sum(graph.rewritten for graph in report.graphs), len(report.rows)
    graphs = "1 graph" if len(report.graphs) == 1 else f"{len(report.graphs)} graphs"
    yield _tag("p", f"{rewritten} of {total} linears rewritten, in {graphs}.")
    coverage = report.coverage()
    if coverage:
        yield _tag("h2", "Share of the linears' FLOPs")
        yield from _coverage(coverage)
        note = "fprop, dgrad and wgrad of each linear, 2·M·N·K each, each graph as often as it was called."
        yield _tag("p", note, class_="faint")


def _coverage(coverage: Mapping[str, float]) -> Iterable[Markup]:
    parts = [_piece(share, _colour(precision)) for precision, share in coverage.items()]
    yield _tag("div", *parts, class_="bar", role="img", aria_label=", ".join(_said(coverage)))
    keys = [
        _tag("li", _tag("span", class_=f"key {_colour(precision)}"), text)
        for precision, text in zip(coverage, _said(coverage), strict=True)
    ]
    yield _tag("ul", *keys, class_="keys")


def _said(coverage: Mapping[str, float]) -> list[str]:
    return [f"{precision} {per_cent(share)}" for precision, share in coverage.items()]


def _colour(precision: str) -> str:
    return {"2:4 fp8": "sparse", "2:4 bf16": "sparse", "fp8": "fp8"}.get(precision, "dense")


def _piece(share: float, colour: str) -> Markup:
    return _tag("span", class_=colour, style=f"width:{share:.2%}")


def _gains(report: Report) -> Iterable[Markup]:
    gains = report.gains()
    if not gains:
        return
    yield _tag("h2", "To gain more, the largest first")
    items = []
    for gain in gains:
        size = [f"{per_cent(gain.share)} of the FLOPs"] if gain.share is not None else []
        size += [f"{gain.microseconds:.0f} µs a call"] if gain.microseconds is not None else []
        lines = [_tag("strong", gain.modules), " ", _tag("small", ", ".join(size))]
        lines += [_tag("p", text) for text in (gain.reason, gain.advice) if text]
        items.append(_tag("li", *lines))
    yield _tag("ol", *items)


def _graph(number: int, graph: GraphReport) -> Markup:
    execution = f"{graph.rewritten} of {len(graph.rows)} linears rewritten, {graph.execution}"
    parts = [_tag("h2", f"Graph {number}: {graph.origin or graph.id}"), _tag("p", execution)]
    parts += [_tag("p", line, class_="faint") for line in about(graph)]
    if flops := graph.flops():
        parts += _coverage(shares(flops))
    if graph.measured is not None:
        parts += _measured(graph.measured)
    elif any(row.dense_us for row in graph.rows):
        parts += _predicted(graph)
    if graph.rows:
        parts.append(_table(graph.rows))
    return _tag("section", *parts)


def _measured(measurement: Measurement) -> Iterable[Markup]:
    dense, now, weights = measurement.dense, measurement.rewritten, measurement.weights_ms
    yield _tag("h3", f"Measured: {measurement.speedup:.2f}x")
    longest = max(dense.total, now.total + weights)
    bars = []
    for name, passes, colour, own in (("dense", dense, "dense", 0.0), ("now", now, "sparse", weights)):
        backward = passes.backward.median if passes.backward else 0.0
        pieces = [
            _tag("span", class_=f"{colour}{shade}", style=f"width:{time / longest:.2%}")
            for time, shade in ((passes.forward.median, ""), (backward, " half"), (own, ""))
        ]
        peak = "" if passes.peak_bytes is None else f", peak {passes.peak_bytes / 2**20:.0f} MiB"
        bars += [
            _tag("span", name),
            _tag("div", *pieces, class_="bar"),
            _tag("span", _times(passes.total + own) + peak),
        ]
    yield _tag("div", *bars, class_="bars")
    headers = ("", "forward", "backward", "weights", "casts", "MVUE")
    own_times = [_times(time) for time in (weights, measurement.casts_ms, measurement.mvue_ms)]
    yield _rows(
        headers,
        [
            ("dense", _spread(dense.forward), _spread(dense.backward), "", "", ""),
            ("now", _spread(now.forward), _spread(now.backward), *own_times),
        ],
    )
    note = (
        f"Medians of {measurement.rounds} runs of each, in turns, with the range. Weights are pruned and cast once per "
        "optimizer step, the time of which is in the bar. Casts and MVUE are parts of forward and backward, without "
        "what the compiler fuses into other operations."
    )
    yield _tag("p", note, class_="faint")


def _predicted(graph: GraphReport) -> Iterable[Markup]:
    timed = [row for row in graph.rows if row.dense_us is not None and row.rewritten_us is not None]
    dense, now = (sum(getattr(row, name) for row in timed) / 1e3 for name in ("dense_us", "rewritten_us"))
    yield _tag("h3", f"Predicted for {len(timed)} linears in a step")
    bars = []
    for name, time, colour in (("dense", dense, "dense"), ("now", now, "sparse")):
        bar = _tag("div", _piece(time / max(dense, now), colour), class_="bar")
        bars += [_tag("span", name), bar, _tag("span", _times(time))]
    yield _tag("div", *bars, class_="bars")


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
        texts = [_tag("p", text) for text in (row.reason, row.advice) if text]
        why = _tag("div", *texts) if texts else ""
        shape = row.shape.replace(" x ", " × ").replace("->", "→")
        lines.append((_names(name, members), row.role, shape, row.fprop, row.dgrad, row.wgrad, *times, why))
    return _rows(headers, lines)


def _names(name: str, members: Iterable[Row]) -> Markup:
    """A name that opens to the modules it stands for, and where each is called."""
    items = []
    for row in members:
        called = [_tag("code", f"{short(row.source)}: {row.code}", title=row.source)] if row.source else []
        items.append(_tag("li", row.module, " ", *called))
    return _tag("details", _tag("summary", name), _tag("ul", *items))


def _health(report: Report) -> Iterable[Markup]:
    if not report.health:
        return
    yield _tag("h2", f"Health of {len(report.health)} pruned weights")
    for quantity, (limit, meaning) in HEALTH_LIMITS.items():
        over_time = report.health_over_time(quantity)
        if not over_time:
            continue
        latest = {name: getattr(samples[-1], quantity) for name, samples in report.health.items()}
        worst = max(latest, key=lambda name: latest[name] or 0.0)
        step, median, largest = over_time[-1]
        said = f"{quantity} at step {step}: median {median:.2%}, largest {largest:.2%} in {worst}"
        limited = f"Dashed: {limit:.1%}, above which one should look closer, by rule of thumb."
        caption = _tag("figcaption", _tag("strong", said), _tag("p", f"{meaning} {limited}", class_="faint"))
        yield _tag("figure", caption, _plot(over_time, limit, said))


def _plot(over_time: Sequence[tuple[int, float, float]], limit: float, title: str) -> Markup:
    """Median and largest over steps, and the limit, dashed; the vertical axis begins at zero."""
    first, last = over_time[0][0], over_time[-1][0]
    top = 1.1 * max(limit, *(largest for _, _, largest in over_time))

    def line(points: Iterable[tuple[float, float]], **attributes: str) -> Markup:
        drawn = " ".join(
            f"{1000 * (x - first) / max(1, last - first):.1f},{100 * (1 - y / top):.2f}" for x, y in points
        )
        return _tag("polyline", points=drawn, fill="none", vector_effect="non-scaling-stroke", **attributes)

    lines = [
        line([(first, limit), (last, limit)], stroke="var(--faint)", stroke_dasharray="6 4"),
        line([(x, largest) for x, _, largest in over_time], stroke="var(--dense)", stroke_width="2"),
        line([(x, median) for x, median, _ in over_time], stroke="var(--sparse)", stroke_width="2"),
    ]
    plot = _tag("svg", _tag("title", title), *lines, viewBox="0 0 1000 100", preserveAspectRatio="none", role="img")
    axis = _tag("p", f"steps {first} to {last}, 0 to {top:.2%}", class_="faint")
    keys = [
        _tag("li", _tag("span", class_=f"key {colour}"), text)
        for colour, text in (("sparse", "median of the weights"), ("dense", "largest"))
    ]
    return _tag("div", plot, axis, _tag("ul", *keys, class_="keys"))


def _rows(headers: Iterable[str], lines: Iterable[Iterable[str]]) -> Markup:
    headers = list(headers)
    kinds = {header: {"class_": "number"} if "µs" in header else {} for header in headers}
    head = _tag("thead", _tag("tr", *(_tag("th", header, **kinds[header]) for header in headers)))
    body = [
        _tag("tr", *(_tag("td", cell, data_label=h, **kinds[h]) for h, cell in zip(headers, line, strict=True)))
        for line in lines
    ]
    return _tag("table", head, _tag("tbody", *body))
