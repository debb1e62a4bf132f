"""What a report says: what was done to each linear of every graph, what it gained, what stands in the way of more."""

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sparse_compile.reporting.health import Health

# Of the JSON; a file of another version is not read.
VERSION = 3
DENSE = "dense"
# How products that are no linears appear in the coverage.
ATTENTION = "attention"
CONVOLUTION = "convolutions"
PRODUCTS_OF_ACTIVATIONS = "products of activations"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One product with a parameter: a linear, or what is not rewritten for another reason.

    Attributes:
        module: dotted name of the module, or of the parameter.
        role: ``ffn up``, ``ffn down``, ``head``, ``last`` or ``other``, see ``Role``.
        shape: ``tokens x in_features -> out_features``, and how many experts, where a weight is that of several.
        decision: the recipe and its three GEMMs, or ``dense``.
        reason: why it stays dense; empty for a rewritten linear.
        advice: what the user can do about it, or to gain more.
        source, code: ``file:line`` of the user's code that calls it, and that line.
        tokens, in_features, out_features: M, K, N; None where the graph does not tell.
        fprop, dgrad, wgrad: how each product runs: ``2:4 fp8``, ``fp8``, or a dtype such as ``bf16``; empty where the
            graph has no such product.
        forwards: how often fprop runs in a step: twice where a checkpointed region needs its result again.
        dense_flops: of a step, as ``fprop`` says, where the product is no linear with tokens and features.
        dense_us, rewritten_us: predicted microseconds in a step, dense and as it is now; None if not measured.
    """

    module: str
    role: str
    shape: str
    decision: str
    reason: str
    advice: str = ""
    source: str = ""
    code: str = ""
    tokens: int | None = None
    in_features: int | None = None
    out_features: int | None = None
    fprop: str = ""
    dgrad: str = ""
    wgrad: str = ""
    forwards: int = 1
    dense_flops: int | None = None
    dense_us: float | None = None
    rewritten_us: float | None = None

    def flops(self) -> Counter[str]:
        """FLOPs of a step by how they run, dense-equivalent: 2 M N K a product; empty where a size is unknown."""
        counted: Counter[str] = Counter()
        if self.dense_flops and self.fprop:
            counted[self.fprop] += self.dense_flops
        if self.tokens and self.in_features and self.out_features:
            product = 2 * self.tokens * self.in_features * self.out_features
            for precision, times in ((self.fprop, self.forwards), (self.dgrad, 1), (self.wgrad, 1)):
                if precision:
                    counted[precision] += product * times
        return counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Of a time measured several times, in milliseconds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphTiming:
    """One way of running a graph, measured.

    Attributes:
        forward, backward: their times; no backward where the graph ran without gradients.
        peak_bytes: allocated by a forward and its backward beyond what was there; None on a CPU.
    """

    forward: Spread
    backward: Spread | None
    peak_bytes: int | None

    @property
    def total(self) -> float:
        """Milliseconds of both, by their medians."""
        return self.forward.median + (self.backward.median if self.backward else 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """A graph and its dense baseline, run in turns on the inputs of its first call.

    Attributes:
        weights_ms: once per optimizer step: pruning, casting and compressing all weights of the graph.
        casts_ms, mvue_ms: of one forward and backward: ops that cast and transpose, and MVUE sampling; without what
            the compiler fuses into other operations.  None where that can't be told.
    """

    dense: GraphTiming
    rewritten: GraphTiming
    rounds: int
    weights_ms: float
    casts_ms: float | None
    mvue_ms: float | None

    @property
    def speedup(self) -> float:
        """Dense time over the time now, with the weights made anew each time: one optimizer step for each call."""
        return self.dense.total / (self.rewritten.total + self.weights_ms)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Linears that could gain more, which differ in nothing but the numbers of their names.

    Attributes:
        share: of the FLOPs of the model's products; None where a size is unknown.
        microseconds: that they take now in a call and its backward, by prediction; None if not measured.
    """

    modules: str
    reason: str
    advice: str
    share: float | None
    microseconds: float | None


@dataclass(kw_only=True, slots=True)
class GraphReport:
    """The products of one compiled graph.

    Attributes:
        rows: those with a parameter.
        others: FLOPs of a call and its backward in those without: ``attention``, ``products of activations``.
        execution: ``kernels``; ``emulated: <why>`` where the eager reference runs; ``dense`` if nothing is rewritten.
        id: dynamo's, as in its own logs: ``1/0``.
        origin, origin_at: the user's function that was traced, and ``file:line`` of the first operation.
        modules: the module that holds all of its linears, if not the root.
        ends, ends_at, hint: why the graph ends, where, and dynamo's advice, if that is a graph break.
        dynamic: ``ids.size(0) = s77 (2 when traced)`` for each dimension that may change.
        calls: how often the graph ran.
        calls_a_step: how often in most training steps, see ``ReportData.step_ms``.
        measured: see ``sste.report_measure``.
        not_measured: why it was asked for and not done.
    """

    rows: tuple[Row, ...]
    execution: str
    id: str = ""
    origin: str = ""
    origin_at: str = ""
    modules: str = ""
    ends: str = ""
    ends_at: str = ""
    hint: str = ""
    dynamic: tuple[str, ...] = ()
    calls: int = 0
    calls_a_step: int = 0
    measured: Measurement | None = None
    not_measured: str = ""
    others: dict[str, int] = field(default_factory=dict)

    @property
    def rewritten(self) -> int:
        return sum(row.decision != DENSE for row in self.rows)

    @property
    def predicted_gain_ms(self) -> float:
        """Milliseconds that a step is predicted to save; of linears that were measured."""
        return sum(row.dense_us - row.rewritten_us for row in self.rows if row.dense_us and row.rewritten_us) / 1e3

    def flops(self) -> Counter[str]:
        """Of one call and its backward, by how they run."""
        return sum((row.flops() for row in self.rows), Counter(self.others))


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """How a linear runs, chosen by measured time.

    Attributes:
        variant: ``full_name`` of the fastest variant of its recipe.
        rewritten, dense: microseconds of a step in that variant, and with dense products.
    """

    variant: str
    rewritten: float
    dense: float


@dataclass(slots=True)
class ReportData:
    """All graphs that a process compiled so far.

    Attributes:
        health: samples of its pruned weights, by their names.
        step_ms: milliseconds of the last training steps, from a step of an optimizer to its next; without those in
            which a graph was compiled or measured.
        gpu_lag_ms: of a few steps, how long the GPU still worked when the host had started all of the step.
        recorded_a_step: how many CUDA graphs Inductor recorded in each of the steps behind the 32nd, on average.
        fallbacks: what dynamo runs eagerly of the modules that were compiled, a sentence each.
        choices: what was chosen by measured time, for each question and number of tokens, see ``sste.plan``.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    health: dict[str, list[Health]] = field(default_factory=dict)
    step_ms: list[float] = field(default_factory=list)
    gpu_lag_ms: list[float] = field(default_factory=list)
    recorded_a_step: float = 0.0
    fallbacks: list[str] = field(default_factory=list)
    torch: str = ""
    device: str = ""
    choices: dict[str, dict[str, Choice]] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The products with a parameter of all graphs."""
        return [row for graph in self.graphs for row in graph.rows]

    def coverage(self) -> dict[str, float]:
        """How all products run.

        Returns:
            The share of FLOPs, from 0 to 1, of each precision, the largest first; each graph counts as often as it was
            called.
        """
        return shares(sum((_times(graph.flops(), self._weight(graph)) for graph in self.graphs), Counter()))

    def gains(self) -> list[Gain]:
        """What could gain more, with the reason and what to do.

        Returns:
            What takes longest first; by FLOPs if a time is missing.
        """
        total = sum(self._weight(graph) * graph.flops().total() for graph in self.graphs)
        alike: dict[tuple[str, str, str], list[tuple[GraphReport, Row]]] = {}
        for graph in self.graphs:
            for row in graph.rows:
                if (row.reason or row.advice) and row.fprop != CONVOLUTION:
                    alike.setdefault((_pattern(row.module), row.reason, row.advice), []).append((graph, row))
        gains: list[tuple[float, float | None, Gain]] = []
        for (pattern, reason, advice), members in alike.items():
            flops = sum(self._weight(graph) * row.flops().total() for graph, row in members)
            times = [self._weight(graph) * row.rewritten_us for graph, row in members if row.rewritten_us is not None]
            time = sum(times) if len(times) == len(members) else None
            calls = sum({id(graph): self._weight(graph) for graph, _ in members}.values())
            gain = Gain(
                modules=_folded_name(pattern, {row.module for _, row in members}),
                reason=reason,
                advice=advice,
                share=flops / total if flops else None,
                microseconds=None if time is None else time / max(1, calls),
            )
            gains.append((flops, time, gain))
        timed = all(time is not None for _, time, _ in gains)
        gains.sort(key=lambda entry: (entry[1] or 0.0) if timed else entry[0], reverse=True)
        return [gain for *_, gain in gains]

    def step(self) -> Spread | None:
        """The time of training steps.

        Returns:
            The median in milliseconds, and what a tenth of them stays below and above; None if no step was timed.
        """
        if not self.step_ms:
            return None
        times = sorted(self.step_ms)
        tenth = len(times) // 10
        return Spread(median=statistics.median(times), low=times[tenth], high=times[-1 - tenth])

    def waits_for_host(self) -> bool:
        """Whether the GPU has nothing to do for a part of each training step, as the host starts kernels too slowly.

        Returns:
            Whether the host is no more than a tenth of a step ahead; False if that was not measured.
        """
        step = self.step()
        return bool(step and self.gpu_lag_ms and statistics.median(self.gpu_lag_ms) < step.median / 10)

    def dense_step_ms(self) -> float | None:
        """What a training step would take if its graphs were dense, as option ``sste.report_measure`` measured them.

        What a step does besides stays as it is.  Where the graphs took longer by themselves than a step takes now, as
        happens on a busy machine, only the ratio of their times is used.

        Returns:
            Milliseconds; None if a graph that runs in the step was not measured.
        """
        step = self.step()
        graphs = [graph for graph in self.graphs if graph.calls_a_step and graph.rewritten]
        if step is None or not graphs:
            return None
        dense = now = 0.0
        for graph in graphs:
            if graph.measured is None:
                return None
            dense += graph.calls_a_step * graph.measured.dense.total
            now += graph.calls_a_step * graph.measured.rewritten.total + graph.measured.weights_ms
        return step.median - now + dense if now < step.median else step.median * dense / now

    def _weight(self, graph: GraphReport) -> int:
        return graph.calls if any(other.calls for other in self.graphs) else 1

    def to_dict(self) -> dict[str, Any]:
        """All of it, in types that JSON knows.

        Returns:
            The attributes, the version of the format, and what ``coverage`` and ``gains`` return.
        """
        gains = [asdict(gain) for gain in self.gains()]
        graphs = [asdict(graph) for graph in self.graphs]
        health = {name: [asdict(sample) for sample in samples] for name, samples in self.health.items()}
        choices = {
            question: {tokens: asdict(choice) for tokens, choice in by_tokens.items()}
            for question, by_tokens in self.choices.items()
        }
        return {
            "version": VERSION, "torch": self.torch, "device": self.device, "coverage": self.coverage(),
            "gains": gains, "graphs": graphs, "choices": choices, "health": health, "step_ms": self.step_ms,
            "gpu_lag_ms": self.gpu_lag_ms, "recorded_a_step": self.recorded_a_step, "fallbacks": self.fallbacks,
        }  # fmt: skip

    def to_json(self) -> str:
        """``to_dict`` as JSON.

        Returns:
            What ``from_json`` and ``python -m sparse_compile report`` read.
        """
        return json.dumps(self.to_dict(), indent=1)


def shares(flops: Counter[str]) -> dict[str, float]:
    """Of the total, the largest first."""
    return {precision: count / flops.total() for precision, count in flops.most_common() if count}


def fold(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that differ only in the numbers of their names, and in where they stand, together: ``blocks.*.fc (12)``."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        alike = asdict(replace(row, module=_pattern(row.module), source="", code=""))
        groups.setdefault(tuple(alike.values()), []).append(row)
    return [
        (_folded_name(pattern, {row.module for row in members}), members) for (pattern, *_), members in groups.items()
    ]


def fold_names(names: Iterable[str]) -> list[str]:
    """Names that differ only in their numbers together, as in ``fold``."""
    groups: dict[str, set[str]] = {}
    for name in sorted(names):
        groups.setdefault(_pattern(name), set()).add(name)
    return [_folded_name(pattern, members) for pattern, members in groups.items()]


def _pattern(module: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def _folded_name(pattern: str, modules: set[str]) -> str:
    return next(iter(modules)) if len(modules) == 1 else f"{pattern} ({len(modules)})"


def _times(flops: Counter[str], count: int) -> Counter[str]:
    return Counter({precision: value * count for precision, value in flops.items()})


def per_cent(share: float) -> str:
    """``44 %``; 0 % of nothing alone."""
    return "< 1 %" if 0 < share < 0.005 else f"{share:.0%}".replace("%", " %")


def precise(share: float) -> str:
    """``0.0312 %``: three digits."""
    return f"{100 * share:.3g} %"


def longest_first(rows: Iterable[Row]) -> list[Row]:
    """By predicted time; by FLOPs if one is missing."""
    rows = list(rows)
    timed = all(row.rewritten_us is not None for row in rows)
    return sorted(rows, key=lambda row: -((row.rewritten_us if timed else row.flops().total()) or 0.0))
