"""The backend: a traced graph goes in; its linears are found, decided on and rewritten; Inductor compiles the rest."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule

from sparse_compile.betas import KEY, PRUNED
from sparse_compile.courses import Schedule
from sparse_compile.kernels import ops
from sparse_compile.linear import linear
from sparse_compile.measure import Twin
from sparse_compile.module_names import ModuleNames
from sparse_compile.options import Executor, Options, read_options
from sparse_compile.origin import origin
from sparse_compile.owners import ParameterOwners
from sparse_compile.passes.choose import choose, leave_without_kernels
from sparse_compile.passes.decide import Plan, decide
from sparse_compile.passes.expand import expand
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.materialize import materialize
from sparse_compile.passes.phase import phase
from sparse_compile.passes.recompute import recompute
from sparse_compile.passes.rewrite import new_seed, rewrite, seed_devices
from sparse_compile.passes.tune import tune
from sparse_compile.passes.verify import verify
from sparse_compile.pattern import is_24
from sparse_compile.phases import follow
from sparse_compile.progress import announced
from sparse_compile.record import record, write_to
from sparse_compile.report import GraphReport
from sparse_compile.runtime import Runtime
from sparse_compile.state import is_pruned, saved_with
from sparse_compile.step_times import time_steps
from sparse_compile.torch_internals import (
    backend_fake_mode,
    clone_graph_module,
    compile_graph,
    graph_before_cut,
    guard_phase,
    real_parameter,
    reset_cuda_graphs,
    trace_artifact,
    uses_cuda_graphs,
)
from sparse_compile.weight_health import leave_gradients, sample_every

logger = logging.getLogger(__name__)


def sste(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The function behind ``torch.compile(model, backend="sste")``.

    Args:
        graph_module: the forward graph that dynamo traced.
        example_inputs: its inputs, the parameters among them.
        mode: any mode of torch.compile.
        options: ours, which start with ``sste.`` (see ``Options``), and Inductor's.

    Raises:
        ValueError: an unknown mode or option, or a linear that the user named and that can't be rewritten.
    """
    chosen = read_options(mode, options)
    graph = clone_graph_module(graph_module)
    expand(graph, is_pruned)

    owners = ParameterOwners()
    found = find(Flow(graph), graph_before_cut(graph_module), ModuleNames().of)
    plans, rejections = decide(
        found.sites,
        chosen.recipe,
        chosen.targets,
        owners,
        head=chosen.head,
        is_pruned=is_pruned,
        is_24=lambda weight, dim: chosen.frozen and is_24(weight, dim) and bool(weight.any()),
    )
    if chosen.measure:
        # Before a schedule is followed: at its end it would write into weights that were never pruned.
        plans, not_emulated = leave_without_kernels(plans, _was_pruned)
        rejections += not_emulated
    if chosen.schedule is not None:
        plans, dense_now = phase(plans, chosen.schedule, partial(_is_pruned_now, schedule=chosen.schedule))
        rejections += dense_now
    if chosen.tune:
        tune(plans)
    if chosen.measure:
        plans, slower = choose(plans, training=torch.is_grad_enabled())
        rejections += slower
    recompute(plans)
    materialize(graph)
    seeded, slots = seed_devices(plans), rewrite(graph, plans)
    verify(graph, plans)
    trace_artifact("sparse_compile_graph", lambda: graph.print_readable(print_output=False))

    devices = {slot.device for slot in slots}
    for device in devices:
        ops.prepare(device)
    with backend_fake_mode(example_inputs):
        fakes = [new_seed(device) for device in seeded]
        fakes += [operand for slot in slots for operand in slot.new_operands()]
    with announced(f"compiling a graph in which {len(plans)} linears are rewritten"):
        compiled = compile_graph(
            graph,
            [*example_inputs, *fakes],
            chosen.inductor,
            generate_code=chosen.executor is Executor.INDUCTOR,
            recompute=chosen.recompute,
            cacheable_function=f"{linear.__module__}.{linear.__name__}",
        )

    refused = [*rejections, *found.rejections]
    for rejection in refused:
        logger.debug("left %s dense: %s: %s", rejection.name, rejection.reason.value, rejection.detail)
    rows = (*(plan.row() for plan in plans), *(rejection.row() for rejection in refused))
    description = origin(graph_module, [row.module for row in rows])
    graph_report = GraphReport(rows=rows, others=dict(found.others), execution=_execution(devices), **description)
    record(graph_report)
    time_steps()
    trace_artifact("sparse_compile_report", lambda: json.dumps(asdict(graph_report), indent=1))
    if chosen.report is not None:
        write_to(chosen.report)
    if uses_cuda_graphs(chosen.inductor):
        leave_gradients()
    if chosen.health:
        sample_every(chosen.health)
    logger.info("rewrote %d of %d linears", len(plans), len(rows))
    twin = _dense_twin(graph_module, chosen) if chosen.report_measure else None
    return Runtime(compiled, slots, fakes, graph_report, twin, seeded)


def _was_pruned(plan: Plan) -> bool:
    """Whether the weight of a plan that prunes was trained pruned, here or as the checkpoint of its optimizer says."""
    if plan.pruned:
        return True
    weight = real_parameter(plan.site.weight)
    saved = {} if weight is None else saved_with(weight, torch.is_grad_enabled())[0]
    return KEY in saved or bool(saved.get(PRUNED))


def _is_pruned_now(plan: Plan, schedule: Schedule) -> bool:
    """Whether the schedule has the weight of a plan that prunes pruned; dynamo will compile anew when that changes."""
    weight = real_parameter(plan.site.weight)
    if weight is None or not guard_phase(plan.site.weight):
        raise ValueError(
            f"the weight of {plan.site.name!r} is no parameter that dynamo can find again, so that it can follow no "
            "schedule; leave it out by 'sste.targets', or leave 'sste.warmup' and 'sste.tail' away"
        )
    return follow(weight, schedule, plan.recipe.projection, plan.site.transposed)


def _dense_twin(graph_module: GraphModule, options: Options) -> Twin:
    """The graph as it was traced, to be compiled and measured at the first call."""

    def compile(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        generate_code = options.executor is Executor.INDUCTOR
        return compile_graph(graph, inputs, options.inductor, generate_code=generate_code, recompute=options.recompute)

    return Twin.of(graph_module, compile, cuda_graphs=uses_cuda_graphs(options.inductor))


def _execution(devices: Iterable[torch.device]) -> str:
    """What runs the rewritten linears, as the report says it."""
    reasons = {device: ops.emulation_reason(device) for device in devices}
    emulated = sorted({reason for reason in reasons.values() if reason})
    if emulated:
        return "emulated: " + "; ".join(emulated)
    return "kernels" if reasons else "dense"


# torch._dynamo.reset() calls this attribute of a backend.
sste.reset = reset_cuda_graphs  # type: ignore[attr-defined]
