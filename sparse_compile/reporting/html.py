"""The report as one HTML file: what its template shows."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from sparse_compile.reporting.health import HEALTH_LIMITS, over_time
from sparse_compile.reporting.html_page import Bar, Column, Piece, Table, render, table
from sparse_compile.reporting.html_plot import Line, Plot
from sparse_compile.reporting.model import (
    Gain,
    GraphReport,
    GraphTiming,
    Measurement,
    ReportData,
    Row,
    Spread,
    fold,
    longest_first,
    per_cent,
    precise,
    shares,
)
from sparse_compile.reporting.text import about, called_at, steps

_TIMES = (
    Column("name", ""),
    Column("forward", "forward"),
    Column("backward", "backward"),
    Column("peak", "peak memory"),
    Column("weights", "weights"),
    Column("casts", "casts"),
    Column("mvue", "MVUE"),
)
_LINEARS = (
    Column("name", "linear"),
    Column("role", "role"),
    Column("shape", "M × K → N", "whole"),
    Column("fprop", "fprop", "whole"),
    Column("dgrad", "dgrad", "whole"),
    Column("wgrad", "wgrad", "whole"),
    Column("dense_us", "dense µs", "number"),
    Column("rewritten_us", "now µs", "number"),
    Column("why", "reason and advice"),
)
_WEIGHTS = (
    Column("name", "weight"),
    Column("step", "step"),
    Column("flips", "flips"),
    Column("zeros", "zeros"),
    Column("underflow", "underflow"),
    Column("saturated", "saturated"),
    Column("noise", "noise"),
    Column("grad_underflow", "grad underflow"),
    Column("scale", "scale beta"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gain:
    """What could gain more: by how much, why, and what to do."""

    modules: str
    size: str
    texts: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Graph:
    """A section of the page.

    Attributes:
        speed, bars: of a call and its backward; empty if no times are known.
        rounds, times: of a measurement; 0 and None without one.
    """

    name: str
    rewritten: str
    about: list[str]
    coverage: list[Piece]
    speed: str
    bars: list[Bar]
    rounds: int
    times: Table | None
    linears: Table | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Health:
    """A quantity over time."""

    plot: Plot
    keys: list[tuple[str, str]]
    meaning: str
    limit: str


def as_html(report: ReportData) -> str:
    step, dense = report.step(), report.dense_step_ms()
    return render(
        "report.html",
        environment=" · ".join(filter(None, (report.device, f"PyTorch {report.torch}"))),
        rewritten=sum(graph.rewritten for graph in report.graphs),
        linears=len(report.rows),
        coverage=_coverage(report.coverage()),
        step=steps(report),
        step_bars=[] if step is None or dense is None else _dense_and_now(dense, step.median),
        fallbacks=report.fallbacks,
        graph_bars=_side_by_side(report),
        gains=[_gain(gain) for gain in report.gains()],
        graphs=[_graph(graph) for graph in report.graphs],
        plots=list(_health(report)),
        weights=_weights(report),
    )


def _coverage(coverage: Mapping[str, float]) -> list[Piece]:
    return [
        Piece(share=share, colour=_colour(precision), text=f"{precision} {per_cent(share)}")
        for precision, share in coverage.items()
    ]


def _colour(precision: str) -> str:
    if precision.startswith("2:4"):
        return "sparse"
    return "fp8" if precision == "fp8" else "dense"


def _gain(gain: Gain) -> _Gain:
    size = [f"{per_cent(gain.share)} of the FLOPs"] if gain.share is not None else []
    size += [f"{gain.microseconds:.0f} µs a call"] if gain.microseconds is not None else []
    return _Gain(modules=gain.modules, size=", ".join(size), texts=_filled(gain.reason, gain.advice))


def _graph(graph: GraphReport) -> _Graph:
    measured, predicted = graph.measured, _call_times(graph)
    if measured is not None:
        speed, bars = f"Measured: {measured.speedup:.2f}x", _measured_bars(measured)
    elif predicted is not None:
        dense, now, how = predicted
        speed, bars = f"{dense / now:.2f}x {how}", _dense_and_now(dense, now)
    else:
        speed, bars = "", []
    return _Graph(
        name=graph.origin or graph.id,
        rewritten=f"{graph.rewritten} of {len(graph.rows)} linears rewritten, {graph.execution}",
        about=about(graph),
        coverage=_coverage(shares(graph.flops())),
        speed=speed,
        bars=bars,
        rounds=measured.rounds if measured else 0,
        times=_measured_times(measured) if measured else None,
        linears=_linears(graph.rows) if graph.rows else None,
    )


def _call_times(graph: GraphReport) -> tuple[float, float, str] | None:
    """Milliseconds of a call and its backward, dense and now, and how they are known."""
    if graph.measured is not None:
        return graph.measured.dense.total, graph.measured.rewritten.total + graph.measured.weights_ms, "measured"
    timed = [row for row in graph.rows if row.dense_us is not None and row.rewritten_us is not None]
    if not timed:
        return None
    dense, now = (sum(getattr(row, name) for row in timed) / 1e3 for name in ("dense_us", "rewritten_us"))
    return dense, now, f"predicted for {len(timed)} linears"


# A name, the milliseconds and colours of its pieces, and what follows their sum.
_Times = tuple[str, list[tuple[float, str]], str]


def _side_by_side(report: ReportData) -> list[Bar]:
    """Of all graphs, if there are several, on one scale."""
    times: list[_Times] = []
    for number, graph in enumerate(report.graphs):
        if (known := _call_times(graph)) is not None:
            dense, now, how = known
            times.append((f"{number} dense", [(dense, "dense")], ""))
            times.append((f"{number} now", [(now, "sparse")], f", {dense / now:.2f}x {how}"))
    return _bars(times) if len(times) > 2 else []


def _dense_and_now(dense: float, now: float) -> list[Bar]:
    return _bars([("dense", [(dense, "dense")], ""), ("now", [(now, "sparse")], "")])


def _measured_bars(measurement: Measurement) -> list[Bar]:
    def pieces(passes: GraphTiming, colour: str, weights: float) -> list[tuple[float, str]]:
        backward = passes.backward.median if passes.backward else 0.0
        return [(passes.forward.median, colour), (backward, f"{colour} half"), (weights, f"{colour} faded")]

    dense = pieces(measurement.dense, "dense", 0.0)
    now = pieces(measurement.rewritten, "sparse", measurement.weights_ms)
    return _bars([("dense", dense, ""), ("now", now, "")])


def _bars(times: Sequence[_Times]) -> list[Bar]:
    """On one scale."""
    totals = [sum(time for time, _ in pieces) for _, pieces, _ in times]
    return [
        Bar(
            name=name,
            pieces=[Piece(share=time / max(totals), colour=colour) for time, colour in pieces if time],
            text=_milliseconds(total) + more,
        )
        for (name, pieces, more), total in zip(times, totals, strict=True)
    ]


def _measured_times(measurement: Measurement) -> Table:
    dense, now = measurement.dense, measurement.rewritten
    whole = now.total + measurement.weights_ms
    parts = {"weights": measurement.weights_ms, "casts": measurement.casts_ms, "mvue": measurement.mvue_ms}
    own = {
        name: "" if time is None else f"{_milliseconds(time)}, {per_cent(time / whole)}" for name, time in parts.items()
    }
    return table(_TIMES, [_passes("dense", dense) | dict.fromkeys(parts, ""), _passes("now", now) | own])


def _passes(name: str, passes: GraphTiming) -> dict[str, str]:
    peak = "" if passes.peak_bytes is None else f"{passes.peak_bytes / 2**20:.0f} MiB"
    return {"name": name, "forward": _spread(passes.forward), "backward": _spread(passes.backward), "peak": peak}


def _milliseconds(time: float) -> str:
    return f"{_number(time)} ms"


def _number(value: float) -> str:
    """Three digits, and all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _spread(spread: Spread | None) -> str:
    return "" if spread is None else f"{_number(spread.median)} ms ({_number(spread.low)} to {_number(spread.high)})"


def _linears(rows: Iterable[Row]) -> Table:
    rows = list(rows)
    timed = any(row.dense_us is not None for row in rows)
    lines = []
    for name, members in fold(longest_first(rows)):
        row = members[0]
        times = {"dense_us": row.dense_us, "rewritten_us": row.rewritten_us}
        lines.append(
            {
                "name": name,
                "called_at": called_at(members),
                "rows": members,
                "role": row.role,
                "shape": row.shape.replace(" x ", " × ").replace("->", "→"),
                "fprop": row.fprop,
                "dgrad": row.dgrad,
                "wgrad": row.wgrad,
                "why": _filled(row.reason, row.advice),
            }
            | {column: f"{time:.0f}" if timed and time is not None else "" for column, time in times.items()}
        )
    return table(_LINEARS, lines)


def _filled(*texts: str) -> list[str]:
    return [text for text in texts if text]


def _health(report: ReportData) -> Iterable[_Health]:
    for quantity, (limit, meaning) in HEALTH_LIMITS.items():
        points = over_time(report.health, quantity)
        if not points:
            continue
        step, median, largest = points[-1]
        said = f"{quantity.replace('_', ' ')} at step {step}: median {precise(median)}, largest {precise(largest)}"
        if largest:
            at_last = {name: getattr(samples[-1], quantity) for name, samples in report.health.items()}
            said += f" in {max(at_last, key=lambda name: at_last[name] or 0.0)}"
        keys = [("var(--sparse)", "median of the weights"), ("var(--dense)", "largest")]
        yield _Health(plot=_plot(points, limit, said), keys=keys, meaning=meaning, limit=precise(limit))


def _plot(over_time: Sequence[tuple[int, float, float]], limit: float, title: str) -> Plot:
    """Median and largest over steps, and the limit, dashed."""
    first, last = over_time[0][0], over_time[-1][0]
    top = 1.1 * max(limit, *(largest for _, _, largest in over_time))
    lines = [
        Line(points=[(first, limit), (last, limit)], colour="var(--faint)", dashed=True),
        Line(points=[(x, largest) for x, _, largest in over_time], colour="var(--dense)"),
        Line(points=[(x, median) for x, median, _ in over_time], colour="var(--sparse)"),
    ]
    return Plot(
        lines=lines,
        title=title,
        top=top,
        top_label=precise(top),
        left_label=f"0 %, step {first}",
        right_label=f"step {last}",
    )


def _weights(report: ReportData) -> Table:
    """Each at its last sample."""
    lines = []
    for name, samples in report.health.items():
        step, *quantities, beta, source, nonfinite = asdict(samples[-1]).values()
        shown = {
            column.key: "" if value is None else precise(value)
            for column, value in zip(_WEIGHTS[2:-1], quantities, strict=True)
        }
        scale = "" if beta is None else f"{beta:.3f}, {source}"
        if nonfinite:
            scale = "holds NaN or infinity"
        lines.append({"name": name, "step": str(step)} | shown | {"scale": scale})
    return table(_WEIGHTS, lines)
