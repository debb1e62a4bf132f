"""The backend: a traced graph goes in; its linears are found, decided on and rewritten; Inductor compiles the rest."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Parameter

from sparse_compile.kernels import ops
from sparse_compile.linear.function import linear
from sparse_compile.linear.seed import new_seed
from sparse_compile.measuring.baseline import Baseline
from sparse_compile.measuring.eager_fallbacks import watch_fallbacks
from sparse_compile.measuring.step_times import time_steps
from sparse_compile.measuring.weight_health import leave_gradients
from sparse_compile.options import Executor, Options, read_options
from sparse_compile.passes.apply_schedule import apply_schedule
from sparse_compile.passes.autotune import autotune
from sparse_compile.passes.checkpoint_policy import follow_checkpoint_policy
from sparse_compile.passes.choose import choose, for_all_processes, leave_without_kernels
from sparse_compile.passes.decide import Plan, decide
from sparse_compile.passes.expand import expand
from sparse_compile.passes.find import Found, find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.keep_one_copy import keep_one_copy
from sparse_compile.passes.keep_rotary_tables import keep_rotary_tables
from sparse_compile.passes.live_modules import LiveModules
from sparse_compile.passes.module_names import ModuleNames, name_of_parameter
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.passes.replay import noting, read_plan
from sparse_compile.passes.rewrite import rewrite, seed_devices
from sparse_compile.passes.roles import TARGETS
from sparse_compile.passes.sites import LinearSite, Rejection
from sparse_compile.passes.verify import verify
from sparse_compile.pipeline import Compilation, Pass, run_passes, show_durations
from sparse_compile.progress import announced
from sparse_compile.reporting.graph_origin import origin
from sparse_compile.reporting.process_report import report_so_far, write_to
from sparse_compile.runtime import Chooser
from sparse_compile.torch_internals.dynamo import (
    compiled_frame,
    graph_before_cut,
    guard_frozen_parameters,
    trace_artifact,
)
from sparse_compile.torch_internals.fake import backend_fake_mode
from sparse_compile.torch_internals.graph import clone_graph_module
from sparse_compile.torch_internals.inductor import compile_graph, reset_cuda_graphs, uses_cuda_graphs
from sparse_compile.variants import Compiled, Decisions, Variants
from sparse_compile.weights.registry import find_record
from sparse_compile.weights.slot import WeightSlot
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
        options: ours, which start with ``sste.`` (``python -m sparse_compile options`` lists them), and Inductor's.

    Returns:
        What dynamo calls in place of the graph, with the graph's inputs.  It returns the graph's outputs, with their
        shapes, strides and dtypes.

    Raises:
        ValueError: an unknown mode or option, or a linear that the user named and that can't be rewritten.
    """
    watch_fallbacks().traced = True
    chosen = read_options(mode, options)
    live = LiveModules()
    traced = run_passes(
        TRACED,
        Compilation(
            options=chosen,
            traced=graph_module,
            graph=clone_graph_module(graph_module),
            names=ModuleNames(live),
            owners=ParameterOwners(live),
        ),
    )
    assert traced.graph is not None
    assert traced.found is not None
    # What is kept for later calls holds neither dynamo's graph, with its parameters, nor the live modules.
    kept = replace(traced, traced=None, names=None, owners=None)
    decisions = Decisions(
        traced.graph, traced.found, chosen, decide=partial(_run_on_sites, traced), choose=partial(_run_on_plans, kept)
    )
    variants = Variants(
        traced.graph,
        origin(graph_module, decisions.names),
        decisions,
        compile=partial(_run_on_graph, kept),
        follows_schedule=chosen.schedule is not None,
        baseline=_dense_baseline(graph_module, chosen) if chosen.report_measure else None,
        health=chosen.health,
    )
    if any(question.target is not None and question.target.projection.prunes for question in decisions.questions):
        watch_fallbacks().prunes(compiled_frame())
    first = variants.traced(example_inputs)
    time_steps()
    if chosen.report is not None:
        write_to(chosen.report)
    if uses_cuda_graphs(chosen.inductor):
        leave_gradients()
    pattern = None
    if chosen.targets not in TARGETS:
        pattern = TargetPattern(chosen.targets, decisions.names, decisions.linears, name_of_parameter)
    return Chooser(
        decisions.questions, chosen.schedule, variants.of_call, first, decisions.trainer, decisions.dense_reads, pattern
    )


def _run_on_sites(
    traced: Compilation, sites: Sequence[LinearSite], standing: Standing
) -> tuple[list[Plan], list[Rejection]]:
    decided = run_passes(DECIDED, replace(traced, sites=sites, standing=standing))
    return list(decided.plans), list(decided.rejections)


def _run_on_plans(traced: Compilation, plans: Sequence[Plan], standing: Standing) -> tuple[list[Plan], list[Rejection]]:
    decided = run_passes(PLANNED, replace(traced, plans=plans, standing=standing))
    return list(decided.plans), list(decided.rejections)


def _run_on_graph(traced: Compilation, graph: GraphModule, plans: Sequence[Plan], inputs: Sequence[Any]) -> Compiled:
    rewritten = run_passes(REWRITTEN, replace(traced, graph=graph, plans=plans, inputs=inputs))
    show_durations(rewritten)
    assert rewritten.compiled is not None
    call, fakes = rewritten.compiled
    return Compiled(call, rewritten.slots, fakes, rewritten.seed_devices)


def _expand(graph: GraphModule) -> None:
    expand(graph, _is_pruned)


def _is_pruned(weight: Parameter) -> bool:
    record = find_record(weight)
    return record is not None and record.pruned


def _find(graph: GraphModule, traced: GraphModule, names: ModuleNames) -> Found:
    return find(Flow(graph), graph_before_cut(traced), names.of)


def _decide(
    sites: Sequence[LinearSite], standing: Standing, options: Options, owners: ParameterOwners
) -> tuple[list[Plan], list[Rejection]]:
    return decide(
        sites,
        options.recipe,
        options.targets,
        owners,
        head=options.head,
        is_pruned=lambda _: standing in (Standing.PRUNED, Standing.RESUMED),
        goes_on=standing is Standing.PRUNED,
        is_24=lambda *_: standing is Standing.SPARSE,
    )


def _leave_without_kernels(plans: Sequence[Plan], options: Options) -> tuple[Sequence[Plan], Sequence[Rejection]]:
    return leave_without_kernels(plans) if options.measure else (plans, ())


def _apply_schedule(
    plans: Sequence[Plan], rejections: Sequence[Rejection], standing: Standing, options: Options
) -> tuple[Sequence[Plan], Sequence[Rejection]]:
    if standing is Standing.DENSE:
        why = f"{options.schedule or 'dense now'}, by its schedule"
    elif standing is Standing.TRAINED_DENSE:
        why = "trained dense, in another graph of these options or before it was loaded"
    else:
        return plans, rejections
    plans, dense_now = apply_schedule(plans, why, lambda _: False)
    return plans, (*rejections, *dense_now)


def _keep_one_copy(plans: Sequence[Plan], options: Options) -> Sequence[Plan]:
    return keep_one_copy(plans, of_small_weights=options.recompute)


def _choose(
    plans: Sequence[Plan], rejections: Sequence[Rejection], options: Options
) -> tuple[Sequence[Plan], Sequence[Rejection]]:
    if not options.measure:
        return plans, rejections
    agree = read_plan(options.plan) if options.plan is not None else for_all_processes
    agree = noting(report_so_far().choices, agree)
    plans, slower = choose(plans, agree=agree, training=torch.is_grad_enabled())
    return plans, (*rejections, *slower)


def _autotune(plans: Sequence[Plan], options: Options) -> None:
    if options.tune:
        autotune(plans)


def _keep_rotary_tables(graph: GraphModule, options: Options) -> None:
    if options.keep_rotary_tables:
        keep_rotary_tables(graph)


def _rewrite(graph: GraphModule, plans: Sequence[Plan]) -> tuple[list[torch.device], list[WeightSlot]]:
    return seed_devices(plans), rewrite(graph, plans)


def _compile(
    graph: GraphModule,
    plans: Sequence[Plan],
    seeded: Sequence[torch.device],
    slots: Sequence[WeightSlot],
    inputs: Sequence[Any],
    options: Options,
) -> tuple[Callable[..., Any], Sequence[Tensor]]:
    """Let Inductor compile the graph; the compiled one, and fakes of its inputs that are ours."""
    trace_artifact("sparse_compile_graph", lambda: graph.print_readable(print_output=False))
    for device in {slot.device for slot in slots}:
        ops.prepare(device)
    with backend_fake_mode(inputs):
        fakes = [new_seed(device) for device in seeded]
        fakes += [operand for slot in slots for operand in slot.new_operands()]
    with announced(f"compiling a graph with {len(plans)} rewritten linears"):
        compiled = compile_graph(
            graph,
            [*inputs, *fakes],
            options.inductor,
            generate_code=options.executor is Executor.INDUCTOR,
            recompute=options.recompute,
            cacheable_function=f"{linear.__module__}.{linear.__name__}",
        )
    return compiled, fakes


def _dense_baseline(graph_module: GraphModule, options: Options) -> Baseline:
    """The graph as it was traced, to be compiled and measured at the first call."""

    def compile(graph: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        generate_code = options.executor is Executor.INDUCTOR
        return compile_graph(graph, inputs, options.inductor, generate_code=generate_code, recompute=options.recompute)

    return Baseline.of(graph_module, compile, cuda_graphs=uses_cuda_graphs(options.inductor))


# The passes, in their order.  When dynamo has traced a graph:
TRACED = (
    Pass(name="expand", reads=("graph",), edits=True, run=_expand),
    Pass(name="find", reads=("graph", "traced", "names"), returns=("found",), run=_find),
)
# For each linear, and each way in which its weight may be found:
DECIDED = (
    Pass(name="decide", reads=("sites", "standing", "options", "owners"), returns=("plans", "rejections"), run=_decide),
)
# For all linears with a plan whose weights are found in one way:
PLANNED = (
    Pass(
        name="leave_without_kernels", reads=("plans", "options"), returns=("plans", "rejections"),
        run=_leave_without_kernels,
    ),
    Pass(
        name="apply_schedule", reads=("plans", "rejections", "standing", "options"), returns=("plans", "rejections"),
        run=_apply_schedule,
    ),
    Pass(name="keep_one_copy", reads=("plans", "options"), returns=("plans",), run=_keep_one_copy),
    Pass(
        name="choose", reads=("plans", "rejections", "options"), returns=("plans", "rejections"), run=_choose
    ),
)  # fmt: skip
# When a call needs the graph for weights that are found in such ways:
REWRITTEN = (
    Pass(name="autotune", reads=("plans", "options"), run=_autotune),
    Pass(name="follow_checkpoint_policy", reads=("plans",), run=follow_checkpoint_policy),
    Pass(name="keep_rotary_tables", reads=("graph", "options"), edits=True, run=_keep_rotary_tables),
    Pass(name="rewrite", reads=("graph", "plans"), returns=("seed_devices", "slots"), edits=True, run=_rewrite),
    Pass(name="verify", reads=("graph", "plans"), run=verify),
    Pass(
        name="compile", reads=("graph", "plans", "seed_devices", "slots", "inputs", "options"), returns=("compiled",),
        run=_compile,
    ),
)  # fmt: skip
PASSES = (*TRACED, *DECIDED, *PLANNED, *REWRITTEN)

# From now on, as it may be that nothing is ever compiled that should be.
watch_fallbacks().backend = sste
guard_frozen_parameters()

# torch._dynamo.reset() calls this attribute of a backend.
sste.reset = reset_cuda_graphs  # type: ignore[attr-defined]
