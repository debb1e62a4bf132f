"""What a linear costs: the times of its products, and of the ops around them, measured and kept on disk.

A component is one product or op.  Each is timed on its own the first time that it is asked for, on random operands that
are not in the L2 cache: between two uses of a weight in a step, more than a cache holds is read and written.
"""

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

from sparse_compile.kernels.timing.components import COMPONENTS, LinearShape, RandomOperands
from sparse_compile.kernels.timing.gpu_times import (
    keep,
    kept,
    median_microseconds,
    path_of,
    round_up,
    set_count,
)
from sparse_compile.progress import tracked
from sparse_compile.torch_internals.autocast import plain_arithmetic

logger = logging.getLogger(__name__)

# Beyond this, times grow with the number of tokens, and operands need not be as large.
_MAX_TOKENS = 16384
_MAX_TOKENS_OF_EXPERTS = 65536  # of all of them: how long a token takes depends on how many each has
_TARGET_MICROSECONDS = 3000.0  # of a graph: its launch is nothing against that
_MAX_LAUNCHES = 50
# Long enough that the median is at the clock that the power limit allows, as in a step, and not at the highest one.
_ROUNDS = 20
# Kernels that compile side by side; their operands lie in memory for so long.
_MAX_WORKERS = 8

# A shape and the GPU that it runs on, which has kernels.
ShapeKey = tuple[LinearShape, torch.device]


def component_times(questions: Mapping[ShapeKey, Iterable[str]]) -> dict[ShapeKey, dict[str, float]]:
    """Microseconds of each component of each linear, measured where that was not done before.

    Args:
        questions: names among ``COMPONENTS``, for each shape.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    measured = {question: _measured(*question) for question in questions}
    paths = {question: path_of("linear-cold", *measured[question]) for question in questions}
    times = {path: kept(path, dict[str, float]) or {} for path in paths.values()}
    missing: dict[Path, list[_Timed]] = {}
    for question, components in questions.items():
        path = paths[question]
        asked = missing.setdefault(path, [])
        asked += [
            component
            for name in dict.fromkeys(components)
            if name not in times[path] and (component := _Timed(name, *measured[question])) not in asked
        ]
    _measure_all(missing, times)
    return {
        question: {
            name: times[paths[question]][name] * _growth(name, question[0], measured[question][0])
            for name in components
        }
        for question, components in questions.items()
    }


def _measured(shape: LinearShape, device: torch.device) -> ShapeKey:
    """What is measured in place of a shape."""
    most = _MAX_TOKENS if shape.experts is None else _MAX_TOKENS_OF_EXPERTS
    return replace(shape, tokens=min(round_up(shape.tokens), most)), device


def _growth(name: str, shape: LinearShape, measured: LinearShape) -> float:
    return 1.0 if COMPONENTS[name].of_weight else shape.tokens / measured.tokens


class _Timed(NamedTuple):
    """A component of a linear that is to be measured."""

    name: str
    shape: LinearShape
    device: torch.device

    def call(self, operands: RandomOperands) -> Callable[[], Any]:
        """On operands of its own."""
        component = COMPONENTS[self.name]
        make = component.make if self.shape.experts is None else component.of_experts
        assert make is not None, self
        return make(self.shape, operands)

    def compile(self) -> None:
        with plain_arithmetic(), torch.cuda.device(self.device):
            self.call(RandomOperands(self.device))()

    def measure(self) -> float:
        with plain_arithmetic(), torch.cuda.device(self.device):
            return _measure(self.call, RandomOperands(self.device))


def _measure_all(missing: Mapping[Path, Sequence[_Timed]], times: Mapping[Path, dict[str, float]]) -> None:
    """Add the times of missing components, one by one, to what each file holds; kernels compile side by side."""
    components = [component for asked in missing.values() for component in asked]
    if not components:
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"a linear {components[0].shape} is compiled while a CUDA graph is captured, and its products must be "
            "timed before that: run one step with the same shapes before the capture, or compile with "
            '"sste.when": "always"'
        )
    start = perf_counter()
    ours = [component for component in components if not COMPONENTS[component.name].of_library]
    with ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1)) as pool:
        for compilation in tracked([pool.submit(component.compile) for component in ours], "compiling kernels"):
            compilation.result()
    compiled = perf_counter()
    progress = iter(tracked(components, "measuring linears"))
    for path, asked in missing.items():
        times[path].update({component.name: next(progress).measure() for component in asked})
        keep(path, times[path])
    logger.info(
        "compiled %d kernels in %.1f s, measured %d components of %d linears in %.1f s",
        len(ours), compiled - start, len(components), len(missing), perf_counter() - compiled,
    )  # fmt: skip


def _measure(make: Callable[[RandomOperands], Callable[[], Any]], operands: RandomOperands) -> float:
    """Median microseconds of a call, on the current device, which finds its operands in memory, as in a step."""
    call = make(operands)
    call()  # loads what a library needs
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    launches = round(_TARGET_MICROSECONDS / max(1.0, start.elapsed_time(end) * 1000))
    launches = max(1, min(_MAX_LAUNCHES, launches))
    others = min(launches, set_count(operands.nbytes, operands.device)) - 1
    return median_microseconds({"": [call, *(make(operands) for _ in range(others))]}, launches, _ROUNDS)[""]
