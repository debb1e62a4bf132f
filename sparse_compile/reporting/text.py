"""The report in a terminal."""

import os
from collections.abc import Iterable

from tabulate import tabulate

from sparse_compile.printable import printable
from sparse_compile.reporting.health import HEALTH_LIMITS, over_time
from sparse_compile.reporting.model import (
    GraphReport,
    GraphTiming,
    Measurement,
    ReportData,
    Row,
    Spread,
    fold,
    per_cent,
    precise,
    shares,
)


def as_text(report: ReportData) -> str:
    if not report.graphs:
        return "sparse_compile: no graph was compiled with backend 'sste'"
    parts = [_graph(number, graph) for number, graph in enumerate(report.graphs)]
    return printable("\n\n".join([*parts, *_summary(report)]))


def _graph(number: int, graph: GraphReport) -> str:
    lines = [f"graph {number}: {graph.rewritten} of {len(graph.rows)} linears rewritten, {graph.execution}"]
    if any(row.dense_us for row in graph.rows):
        lines[0] += f", predicted to save {graph.predicted_gain_ms:.1f} ms a step"
    lines += [f"  {line}" for line in about(graph)]
    if flops := graph.flops():
        lines.append(f"  share of FLOPs: {covered(shares(flops))}")
    if graph.measured is not None:
        lines += [f"  measured: {line}" for line in measured(graph.measured)]
    if graph.rows:
        lines += ["", _table(graph)]
    return "\n".join(lines)


def about(graph: GraphReport) -> list[str]:
    """Where the graph comes from, why it ends, what changes."""
    lines = []
    if graph.origin:
        inside = f", its linears are in {graph.modules}" if graph.modules else ""
        calls = "1 call" if graph.calls == 1 else f"{graph.calls} calls"
        lines.append(f"[{graph.id}] traced from {graph.origin} ({short(graph.origin_at)}){inside}; {calls}")
    if graph.ends:
        lines.append(f"ends: {graph.ends}" + (f" ({short(graph.ends_at)})" if graph.ends_at else ""))
    if graph.hint:
        lines.append(f"dynamo's hint: {graph.hint}")
    if graph.dynamic:
        lines.append(f"dynamic: {', '.join(graph.dynamic)}")
    if graph.not_measured:
        lines.append(f"not measured: {graph.not_measured}")
    return lines


def measured(measurement: Measurement) -> list[str]:
    dense, now = measurement.dense, measurement.rewritten
    lines = [f"{measurement.speedup:.2f}x, medians of {measurement.rounds} alternating runs of each"]
    lines += [f"{name} {_passes(passes)}" for name, passes in (("dense", dense), ("now  ", now))]
    own = (("weights", measurement.weights_ms), ("casts", measurement.casts_ms), ("MVUE", measurement.mvue_ms))
    whole = now.total + measurement.weights_ms
    parts = [f"{name} {time:.3f} ms ({per_cent(time / whole)})" for name, time in own if time is not None]
    return [*lines, f"of which {', '.join(parts)}; weights are made once per optimizer step"]


def steps(report: ReportData) -> str:
    """How long a training step takes, and what its graphs gain of it."""
    step, dense = report.step(), report.dense_step_ms()
    if step is None:
        return ""
    count = "1 step" if len(report.step_ms) == 1 else f"{len(report.step_ms)} steps"
    line = f"{step.median:.1f} ms a step (8 of 10 take {step.low:.1f} to {step.high:.1f}; last {count})"
    if dense is not None:
        line += f"; about {dense:.1f} ms if the measured graphs were dense: {dense / step.median:.2f}x"
    if report.waits_for_host():
        line += "; the GPU waits for the host (docs/limits.md#my-model-is-not-faster)"
    if report.recorded_a_step > 0.1:
        line += f"; in each, {report.recorded_a_step:.1f} CUDA graphs are recorded anew: TORCH_LOGS=cudagraphs says why"
    return line


def covered(coverage: dict[str, float]) -> str:
    """``2:4 fp8 44 %, fp8 50 %``."""
    return ", ".join(f"{precision} {per_cent(share)}" for precision, share in coverage.items())


def short(location: str) -> str:
    """``file.py:12`` of a path."""
    return os.path.basename(location)


def _passes(passes: GraphTiming) -> str:
    parts = [f"forward {_spread(passes.forward)}"]
    if passes.backward is not None:
        parts.append(f"backward {_spread(passes.backward)}")
    if passes.peak_bytes is not None:
        parts.append(f"peak {passes.peak_bytes / 2**20:.0f} MiB")
    return ", ".join(parts)


def _spread(spread: Spread) -> str:
    return f"{spread.median:.3f} ms ({spread.low:.3f} to {spread.high:.3f})"


def _table(graph: GraphReport) -> str:
    headers = ["module", "role", "called at", "M x K -> N", "decision"]
    timed = any(row.dense_us is not None or row.rewritten_us is not None for row in graph.rows)
    lines: list[list[str | float | None]] = []
    for name, rows in fold(graph.rows):
        row = rows[0]
        # Before the table is laid out: to it, more characters than one break a line.
        lines.append([printable(text) for text in (name, row.role, called_at(rows), row.shape, row.decision)])
        if timed:
            lines[-1] += [row.dense_us, row.rewritten_us]
    texts = list(range(len(headers)))
    headers += ["dense us", "now us"] if timed else []
    return tabulate(lines, headers=headers, floatfmt=".0f", disable_numparse=texts)


def called_at(rows: Iterable[Row]) -> str:
    """``file.py:12``, of all that stand together; of several places the first, and how many more there are."""
    places = list(dict.fromkeys(row.source for row in rows if row.source))
    more = f" +{len(places) - 1}" if len(places) > 1 else ""
    return short(places[0]) + more if places else ""


def _summary(report: ReportData) -> list[str]:
    """Of all graphs: the coverage, then what could gain more."""
    parts = []
    if coverage := report.coverage():
        parts.append(f"share of all FLOPs: {covered(coverage)}")
    if whole := steps(report):
        parts.append(f"training: {whole}")
    if gains := report.gains():
        lines = ["what could gain more, largest first:"]
        for number, gain in enumerate(gains, 1):
            size = [per_cent(gain.share)] if gain.share is not None else []
            size += [f"{gain.microseconds:.0f} us a call"] if gain.microseconds is not None else []
            lines.append(f"{number:3}. {gain.modules}" + (f" ({', '.join(size)})" if size else ""))
            lines += [f"     {text}" for text in (gain.reason, gain.advice) if text]
        parts.append("\n".join(lines))
    if report.health:
        parts.append("\n".join(_health(report)))
    if report.fallbacks:
        parts.append("\n".join(report.fallbacks))
    return parts


def _health(report: ReportData) -> Iterable[str]:
    yield f"health of {len(report.health)} pruned weights at the last sample, median and largest:"
    for quantity, limit in {"zeros": 1.0, **{name: limit for name, (limit, _) in HEALTH_LIMITS.items()}}.items():
        if points := over_time(report.health, quantity):
            step, median, largest = points[-1]
            look = f", above {precise(limit)}: see the HTML report" if largest > limit else ""
            yield f"  {quantity.replace('_', ' ')} at step {step}: {precise(median)}, {precise(largest)}{look}"
    if broken := [name for name, samples in report.health.items() if samples[-1].nonfinite]:
        yield f"  NaN or infinity in {', '.join(broken)}"
    betas = {name: samples[-1] for name, samples in report.health.items() if samples[-1].beta is not None}
    if betas:
        values = sorted(sample.beta for sample in betas.values() if sample.beta is not None)
        yield f"  scale beta: {values[0]:.2f} to {values[-1]:.2f}"
        for why, names in (
            ("outside 1.25 to 2", [name for name, sample in betas.items() if sample.unusual_beta]),
            ("a prior, not fitted", [name for name, sample in betas.items() if sample.beta_source == "prior"]),
        ):
            if names:
                yield f"  scale beta {why}: {', '.join(names)}"
