"""How long training steps take: from a step of an optimizer to its next, forward, backward and all between them.

Followed is the first optimizer that steps after a compiled graph has run, as long as it lives.  On a GPU the time
between two marks is read when a later step finds that both have passed.  Behind a few steps alone the device is waited
for, to see how far the host is ahead, and it is seen how many CUDA graphs have been recorded since.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import ref

from torch import Tensor
from torch.optim import Optimizer

from sparse_compile.measuring.device_timer import DeviceTimer, capturing
from sparse_compile.reporting.model import GraphReport
from sparse_compile.reporting.process_report import report_so_far
from sparse_compile.reporting.report import Report
from sparse_compile.torch_internals.inductor import recorded_cuda_graphs
from sparse_compile.weights.optimizer_watch import Stage, watch

_MAX_TIMES = 512
_LOOKED_AT = (32, 128, 512)  # steps


@dataclass(frozen=True, slots=True)
class _Mark:
    """A step: when it was, how often each graph had run, and how many graphs had been compiled, and measured."""

    time: Any
    calls: tuple[int, ...]
    interruptions: tuple[int, int]


class StepTimes:
    """Fills ``Report.step_ms``, ``gpu_lag_ms`` and ``recorded_a_step``, and ``GraphReport.calls_a_step``."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._optimizer: ref[Optimizer] | None = None

    def on_step(self, optimizer: Optimizer, weights: Sequence[Tensor] = ()) -> None:
        del weights
        followed = self._optimizer() if self._optimizer is not None else None
        if followed is None and any(graph.calls for graph in self._report.graphs):
            self._follow(optimizer)
            followed = optimizer
        if followed is optimizer:
            self._step()

    def _follow(self, optimizer: Optimizer) -> None:
        self._optimizer = ref(optimizer)
        self._device = optimizer.param_groups[0]["params"][0].device
        self._clock = DeviceTimer(self._device)
        self._last: _Mark | None = None
        self._pending: deque[tuple[Any, Any]] = deque()
        self._calls: list[Counter[int]] = []
        self._steps = 0
        self._recorded = 0  # CUDA graphs, when that was looked at last
        self._report.step_ms.clear()
        self._report.gpu_lag_ms.clear()
        self._report.recorded_a_step = 0.0

    def _step(self) -> None:
        if capturing():
            self._last = None
            return
        graphs = self._report.graphs
        self._steps += 1
        mark = _Mark(self._clock.mark(), tuple(graph.calls for graph in graphs), _interruptions(graphs))
        if self._steps in _LOOKED_AT:
            self._look()
        last, self._last = self._last, mark
        # A step in which something was compiled or measured is none like others.
        if last is not None and last.interruptions == mark.interruptions and last.calls != mark.calls:
            self._pending.append((last.time, mark.time))
            self._count(graphs, last.calls, mark.calls)
        times = self._report.step_ms
        while self._pending and self._clock.is_past(self._pending[0][1]):
            milliseconds = self._clock.between(*self._pending.popleft())
            # The clock of a machine that was moved or asleep may have gone back.
            if milliseconds > 0:
                times.append(round(milliseconds, 3))
        del times[:-_MAX_TIMES]

    def _look(self) -> None:
        if (lag := self._clock.lag()) is not None:
            self._report.gpu_lag_ms.append(round(lag, 3))
        recorded, before = recorded_cuda_graphs(self._device), self._recorded
        self._recorded = recorded
        index = _LOOKED_AT.index(self._steps)
        if index and recorded > before:
            self._report.recorded_a_step = round((recorded - before - 1) / (self._steps - _LOOKED_AT[index - 1]), 3)

    def _count(self, graphs: Sequence[GraphReport], before: Sequence[int], after: Sequence[int]) -> None:
        self._calls += [Counter() for _ in graphs[len(self._calls) :]]
        for graph, counts, first, last in zip(graphs, self._calls, before, after, strict=True):
            counts[last - first] += 1
            graph.calls_a_step = counts.most_common(1)[0][0]


def _interruptions(graphs: Sequence[GraphReport]) -> tuple[int, int]:
    return len(graphs), sum(graph.measured is not None or graph.not_measured != "" for graph in graphs)


@cache
def time_steps() -> None:
    """Time training steps from now on."""
    watch.subscribe(Stage.STEP_TIMES, after=StepTimes(report_so_far()).on_step)
