"""MEASURE: a rewritten graph and its dense baseline, run in turns on copies of what the user's first call was given.

Training goes on as if nothing had been measured: parameters are read through aliases that collect no gradients, all
other tensors are copied, because a graph may write to them, and the random number generators are put back.
"""

import logging
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Parameter

from sparse_compile.kernels import ops
from sparse_compile.measuring.device_timer import DeviceTimer
from sparse_compile.progress import announced, tracked
from sparse_compile.reporting.model import GraphTiming, Measurement, Spread
from sparse_compile.torch_internals.distributed import several_processes
from sparse_compile.torch_internals.dynamo import forget_examples
from sparse_compile.torch_internals.graph import clone_graph_module, mutated
from sparse_compile.weights.operands import fill_operands
from sparse_compile.weights.slot import WeightSlot

logger = logging.getLogger(__name__)

_ROUNDS = 7
_WARM_UPS = 2  # compile the backward passes, and what is chosen at the first run
_CASTS = ("cast_transpose", "cast_transpose_with_sums", "transpose_tokens")
_MVUE = ("cast_mvue", "cast_mvue_with_sums")

# Compiles a graph for inputs.
Compiler = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """What dynamo traced, before it is edited.

    Attributes:
        mutated: positions of inputs that dynamo saw change.
        cuda_graphs: whether the compiler runs it as CUDA graphs.
    """

    graph: GraphModule
    compile: Compiler
    mutated: frozenset[int]
    cuda_graphs: bool

    @classmethod
    def of(cls, graph_module: GraphModule, compile: Compiler, *, cuda_graphs: bool) -> "Baseline":
        placeholders = graph_module.graph.find_nodes(op="placeholder")
        changed = frozenset(index for index, node in enumerate(placeholders) if mutated(node))
        graph = forget_examples(clone_graph_module(graph_module))
        return cls(graph=graph, compile=compile, mutated=changed, cuda_graphs=cuda_graphs)


def measure(
    baseline: Baseline,
    rewritten: Callable[..., Any],
    slots: Sequence[WeightSlot],
    arguments: Sequence[Any],
    inputs: Sequence[Tensor],
) -> Measurement | str:
    """The times of both graphs; or why they were not measured.

    Args:
        rewritten: the compiled graph, called with ``arguments`` and ``inputs``: seeds and operands.
    """
    refusal = _refusal(baseline, slots, arguments)
    if refusal is not None:
        return refusal
    device = slots[0].device
    clock = DeviceTimer(device)
    logger.info("measuring a graph and its dense baseline")
    start = perf_counter()
    try:
        # What is measured must not count as training.
        with _generators_kept(arguments), ops.observed(None):
            with announced("compiling the dense baseline of a graph, to measure it"):
                dense = baseline.compile(baseline.graph, arguments)
            runs = {
                "dense": _Run(dense, _copies(baseline, arguments), clock),
                "rewritten": _Run(partial(_with_inputs, rewritten, inputs), _copies(baseline, arguments), clock),
            }
            measurement = _measure(runs, clock, slots, arguments)
    except torch.OutOfMemoryError as error:
        return f"a second forward and backward do not fit the memory: {error}".splitlines()[0]
    logger.info("measured %.2fx in %.1f s", measurement.speedup, perf_counter() - start)
    return measurement


def _refusal(baseline: Baseline, slots: Sequence[WeightSlot], arguments: Sequence[Any]) -> str | None:
    if not slots:
        return "nothing is rewritten"
    if several_processes():
        return "several processes train the model, and measuring would hold up the others"
    if baseline.cuda_graphs:
        return "the compiler runs CUDA graphs, which further calls would disturb; measure with another mode"
    tensors = {index: value for index, value in enumerate(arguments) if isinstance(value, Tensor)}
    for index, tensor in tensors.items():
        if type(tensor) not in (Tensor, Parameter):
            return f"an input is a {type(tensor).__name__}, which cannot be copied as a plain tensor can"
        if index in baseline.mutated and tensor.requires_grad and not isinstance(tensor, Parameter):
            return "the graph changes an input in place that requires a gradient"
    addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    if baseline.mutated and len(set(addresses)) < len(addresses):
        return "the graph changes inputs in place, and some of its inputs share their memory"
    return None


def _with_inputs(rewritten: Callable[..., Any], inputs: Sequence[Tensor], *arguments: Any) -> Any:
    return rewritten(*arguments, *inputs)


def _copies(baseline: Baseline, arguments: Sequence[Any]) -> list[Any]:
    """Leaves of their own: parameters that the graph only reads share their memory, other tensors are copied."""
    copies = list(arguments)
    for index, value in enumerate(arguments):
        if isinstance(value, Tensor):
            shared = isinstance(value, Parameter) and index not in baseline.mutated
            copy = value.detach() if shared else _copy(value.detach())
            copies[index] = copy.requires_grad_(value.requires_grad)
    return copies


def _copy(x: Tensor) -> Tensor:
    """A copy with the same strides, however the elements lie or overlap."""
    if not x.numel():
        return torch.empty_like(x)
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((span,), (1,)).clone().as_strided(x.shape, x.stride())


@contextmanager
def _generators_kept(arguments: Sequence[Any]) -> Iterator[None]:
    """Random numbers go on as if none had been drawn: PyTorch's, on all devices of the inputs, and Python's."""
    devices = {value.device for value in arguments if isinstance(value, Tensor) and value.is_cuda}
    python = random.getstate()
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        random.setstate(python)


class _Run:
    """A compiled graph with inputs of its own."""

    def __init__(self, call: Callable[..., Any], inputs: list[Any], clock: DeviceTimer) -> None:
        self._call, self._inputs, self._clock = call, inputs, clock
        self._leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]

    def times(self) -> tuple[float, float | None]:
        """Milliseconds of a forward and of its backward; None where there is none."""
        self._clock.wait()
        start = self._clock.mark()
        outputs = self._call(*self._inputs)
        middle = self._clock.mark()
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        roots = [value for value in outputs if isinstance(value, Tensor) and value.requires_grad]
        if not roots:
            return self._clock.between(start, middle), None
        # As far as random numbers can be a gradient: how fast a GPU may run depends on its data.
        gradients = [torch.randn_like(root) if root.ndim else torch.ones_like(root) for root in roots]
        before = self._clock.mark()
        torch.autograd.grad(roots, self._leaves, gradients, allow_unused=True)
        return self._clock.between(start, middle), self._clock.between(before, self._clock.mark())

    def peak_bytes(self) -> int | None:
        """Allocated by a forward and its backward at most; None on a CPU, which does not count it."""
        if not self._clock.is_cuda:
            return None
        self._clock.wait()
        torch.cuda.reset_peak_memory_stats(self._clock.device)
        before = torch.cuda.memory_allocated(self._clock.device)
        self.times()
        return torch.cuda.max_memory_allocated(self._clock.device) - before


def _measure(
    runs: dict[str, _Run], clock: DeviceTimer, slots: Sequence[WeightSlot], arguments: Sequence[Any]
) -> Measurement:
    times: dict[str, list[tuple[float, float | None]]] = {name: [] for name in runs}
    for turn in tracked(range(-_WARM_UPS, _ROUNDS), "measuring a graph and its dense baseline"):
        for name, run in runs.items():
            measured = run.times()
            if turn >= 0:
                times[name].append(measured)
    own = _op_times(runs["rewritten"], clock)
    return Measurement(
        dense=_passes(times["dense"], runs["dense"].peak_bytes()),
        rewritten=_passes(times["rewritten"], runs["rewritten"].peak_bytes()),
        rounds=_ROUNDS,
        weights_ms=_weights_milliseconds(slots, arguments, clock),
        casts_ms=sum(own.get(op, 0.0) for op in _CASTS) if own else None,
        mvue_ms=sum(own.get(op, 0.0) for op in _MVUE) if own else None,
    )


def _passes(times: list[tuple[float, float | None]], peak_bytes: int | None) -> GraphTiming:
    backwards = [backward for _, backward in times if backward is not None]
    forward = _spread([forward for forward, _ in times])
    return GraphTiming(forward=forward, backward=_spread(backwards) if backwards else None, peak_bytes=peak_bytes)


def _spread(times: list[float]) -> Spread:
    return Spread(median=statistics.median(times), low=min(times), high=max(times))


def _op_times(run: _Run, clock: DeviceTimer) -> dict[str, float]:
    """Milliseconds in each of our ops in one forward and backward, medians; nothing where they cannot be seen."""
    rounds = [_op_times_once(run, clock) for _ in range(_ROUNDS)]
    return {op: statistics.median(times[op] for times in rounds) for op in rounds[0]}


def _op_times_once(run: _Run, clock: DeviceTimer) -> dict[str, float]:
    marks: list[tuple[str, Any, Any]] = []

    def timed(op: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        start = clock.mark()
        result = call(*arguments)
        marks.append((op, start, clock.mark()))
        return result

    with ops.observed(timed):
        run.times()
    times: dict[str, float] = defaultdict(float)
    for op, start, end in marks:
        times[op] += clock.between(start, end)
    return times


def _weights_milliseconds(slots: Sequence[WeightSlot], arguments: Sequence[Any], clock: DeviceTimer) -> float:
    """Of pruning and casting all weights, in buffers that are given back."""
    total = 0.0
    for slot in slots:
        operands = slot.new_operands()
        # The first time begins with no scale of this weight.
        for _ in range(2):
            clock.wait()
            start = clock.mark()
            fill_operands(arguments[slot.position], slot, operands)
            end = clock.mark()
        total += clock.between(start, end)
    return total
