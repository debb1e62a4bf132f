"""Passes as data: each says what it reads and returns; each is timed and logged, and its edits of the graph shown.

``TORCH_LOGS="+sparse_compile"`` logs durations and graphs; tlparse gets them as artifacts ``sparse_compile_passes`` and
``sparse_compile_<pass>_before`` and ``_after``.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from sparse_compile.options import Options
from sparse_compile.passes.decide import Plan
from sparse_compile.passes.find import Found
from sparse_compile.passes.module_names import ModuleNames
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.passes.sites import LinearSite, Rejection
from sparse_compile.torch_internals.dynamo import trace_artifact, traces_artifacts
from sparse_compile.weights.slot import WeightSlot
from sparse_compile.weights.standing import Standing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Compilation:
    """A graph on its way through the passes.

    Attributes:
        graph: edited in place.
        traced: dynamo's own graph.
        names, owners: what the live modules call parameters, and which hold them.
        found: its linears, and what is left dense however weights are found.
        sites: the linears that are decided on, whose weights all stand alike, as ``standing`` says.
        plans, rejections: what becomes of them.
        inputs: of the graph.
        seed_devices, slots: what the rewritten graph is called with besides.
        compiled: what runs, and fake tensors like its further inputs.
        durations: of the passes so far, in milliseconds.
    """

    options: Options
    graph: GraphModule | None = None
    traced: GraphModule | None = None
    names: ModuleNames | None = None
    owners: ParameterOwners | None = None
    found: Found | None = None
    sites: Sequence[LinearSite] = ()
    standing: Standing = Standing.FRESH
    plans: Sequence[Plan] = ()
    rejections: Sequence[Rejection] = ()
    inputs: Sequence[Any] = ()
    seed_devices: Sequence[torch.device] = ()
    slots: Sequence[WeightSlot] = ()
    compiled: tuple[Callable[..., Any], Sequence[Tensor]] | None = None
    durations: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One step from a traced graph to a compiled one.

    Attributes:
        reads: fields of ``Compilation`` that are its arguments, in order.
        returns: the field that its result is for, or the fields that the parts of its result are for.
        edits: whether it edits the graph, which is among what it reads.
        run: does it.
    """

    name: str
    reads: tuple[str, ...]
    returns: tuple[str, ...] = ()
    edits: bool = False
    run: Callable[..., Any]


def run_passes(passes: Sequence[Pass], compilation: Compilation) -> Compilation:
    """The compilation after the passes, in their order."""
    for step in passes:
        shown = step.edits and (logger.isEnabledFor(logging.DEBUG) or traces_artifacts())
        before = _readable(compilation) if shown else ""
        start = perf_counter()
        result = step.run(*(getattr(compilation, name) for name in step.reads))
        milliseconds = (perf_counter() - start) * 1e3
        compilation.durations[step.name] = compilation.durations.get(step.name, 0.0) + milliseconds
        if len(step.returns) == 1:
            compilation = replace(compilation, **{step.returns[0]: result})
        elif step.returns:
            compilation = replace(compilation, **dict(zip(step.returns, result, strict=True)))
        if shown:
            _show(step.name, before, _readable(compilation))
    return compilation


def show_durations(compilation: Compilation) -> None:
    """In the log and the trace: milliseconds of each pass, summed over what it has run on so far."""
    durations = {name: round(milliseconds, 3) for name, milliseconds in compilation.durations.items()}
    logger.debug("passes: %s", ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in durations.items()))
    trace_artifact("sparse_compile_passes", lambda: json.dumps(durations))


def _readable(compilation: Compilation) -> str:
    assert compilation.graph is not None
    return compilation.graph.print_readable(print_output=False)


def _show(name: str, before: str, after: str) -> None:
    if before == after:
        logger.debug("pass %s left the graph as it was", name)
        return
    logger.debug("graph before %s:\n%s\ngraph after %s:\n%s", name, before, name, after)
    trace_artifact(f"sparse_compile_{name}_before", lambda: before)
    trace_artifact(f"sparse_compile_{name}_after", lambda: after)
