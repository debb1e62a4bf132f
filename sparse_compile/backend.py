"""The backend: a traced graph goes in; its linears are found, decided on and rewritten; Inductor compiles the rest."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn import Parameter

from sparse_compile.kernels import ops
from sparse_compile.linear.fp8 import linear
from sparse_compile.linear.seed import new_seed
from sparse_compile.measuring.baseline import Twin
from sparse_compile.measuring.step_times import time_steps
from sparse_compile.measuring.weight_health import leave_gradients
from sparse_compile.options import Executor, Options, read_options
from sparse_compile.passes.apply_schedule import phase
from sparse_compile.passes.autotune import tune
from sparse_compile.passes.checkpoint_policy import recompute
from sparse_compile.passes.choose import choose, leave_without_kernels
from sparse_compile.passes.decide import Plan, decide
from sparse_compile.passes.expand import expand
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.keep_rotary_tables import materialize
from sparse_compile.passes.live_modules import LiveModules
from sparse_compile.passes.module_names import ModuleNames
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.passes.rewrite import rewrite, seed_devices
from sparse_compile.passes.roles import TARGETS
from sparse_compile.passes.sites import LinearSite, Rejection
from sparse_compile.passes.verify import verify
from sparse_compile.progress import announced
from sparse_compile.reporting.graph_origin import origin
from sparse_compile.reporting.process_report import write_to
from sparse_compile.runtime import Chooser
from sparse_compile.torch_internals.dynamo import graph_before_cut, trace_artifact
from sparse_compile.torch_internals.fake import backend_fake_mode
from sparse_compile.torch_internals.graph import clone_graph_module
from sparse_compile.torch_internals.inductor import compile_graph, reset_cuda_graphs, uses_cuda_graphs
from sparse_compile.variants import Compiled, Decisions, Variants
from sparse_compile.weights.registry import find_record
from sparse_compile.weights.standing import Standing
from sparse_compile.weights.target_pattern import TargetPattern


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
    expand(graph, _is_pruned)
    live = LiveModules()
    found = find(Flow(graph), graph_before_cut(graph_module), ModuleNames(live).of)
    decisions = Decisions(
        graph,
        found,
        chosen,
        decide=partial(_decide, options=chosen, owners=ParameterOwners(live)),
        choose=partial(_choose, options=chosen),
    )
    variants = Variants(
        graph,
        origin(graph_module, decisions.names),
        decisions,
        compile=partial(_compile, options=chosen),
        follows_schedule=chosen.schedule is not None,
        twin=_dense_twin(graph_module, chosen) if chosen.report_measure else None,
        health=chosen.health,
    )
    first = variants.traced(example_inputs)
    time_steps()
    if chosen.report is not None:
        write_to(chosen.report)
    if uses_cuda_graphs(chosen.inductor):
        leave_gradients()
    pattern = None
    if chosen.targets not in TARGETS:
        pattern = TargetPattern(chosen.targets, decisions.names, decisions.paths), decisions.positions
    return Chooser(decisions.questions, chosen.schedule, variants.of_call, first, pattern)


def _is_pruned(weight: Parameter) -> bool:
    record = find_record(weight)
    return record is not None and record.pruned


def _decide(
    sites: Sequence[LinearSite], standing: Standing, *, options: Options, owners: ParameterOwners
) -> tuple[list[Plan], list[Rejection]]:
    return decide(
        sites,
        options.recipe,
        options.targets,
        owners,
        head=options.head,
        is_pruned=lambda _: standing is Standing.PRUNED,
        is_24=lambda *_: standing is Standing.SPARSE,
    )


def _choose(plans: Sequence[Plan], standing: Standing, *, options: Options) -> tuple[list[Plan], list[Rejection]]:
    """What a dense phase and devices without kernels make of the plans, and what is faster."""
    rejections: list[Rejection] = []
    if options.measure:
        plans, not_emulated = leave_without_kernels(plans)
        rejections += not_emulated
    if standing is Standing.DENSE:
        plans, dense_now = phase(plans, options.schedule or "dense now", lambda _: False)
        rejections += dense_now
    if options.measure:
        plans, slower = choose(plans, training=torch.is_grad_enabled())
        rejections += slower
    return list(plans), rejections


def _compile(graph: GraphModule, plans: Sequence[Plan], inputs: Sequence[Any], *, options: Options) -> Compiled:
    """Rewrite the linears, and let Inductor compile the graph."""
    if options.tune:
        tune(plans)
    recompute(plans)
    materialize(graph)
    seeded, slots = seed_devices(plans), rewrite(graph, plans)
    verify(graph, plans)
    trace_artifact("sparse_compile_graph", lambda: graph.print_readable(print_output=False))

    for device in {slot.device for slot in slots}:
        ops.prepare(device)
    with backend_fake_mode(inputs):
        fakes = [new_seed(device) for device in seeded]
        fakes += [operand for slot in slots for operand in slot.new_operands()]
    with announced(f"compiling a graph in which {len(plans)} linears are rewritten"):
        compiled = compile_graph(
            graph,
            [*inputs, *fakes],
            options.inductor,
            generate_code=options.executor is Executor.INDUCTOR,
            recompute=options.recompute,
            cacheable_function=f"{linear.__module__}.{linear.__name__}",
        )
    return Compiled(compiled, slots, fakes, seeded)


def _dense_twin(graph_module: GraphModule, options: Options) -> Twin:
    """The graph as it was traced, to be compiled and measured at the first call."""

    def compile(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        generate_code = options.executor is Executor.INDUCTOR
        return compile_graph(graph, inputs, options.inductor, generate_code=generate_code, recompute=options.recompute)

    return Twin.of(graph_module, compile, cuda_graphs=uses_cuda_graphs(options.inductor))


# torch._dynamo.reset() calls this attribute of a backend.
sste.reset = reset_cuda_graphs  # type: ignore[attr-defined]
