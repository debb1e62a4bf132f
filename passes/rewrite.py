"""REWRITE: the planned edits.

Before: ``%y = linear(%x, %weight, %bias)``
After:  ``%y = linear(%x, %weight, %bias, %seed, LinearSpec("s-ste", 3, False, bf16), PrunedWeight(%values, ...))``

``%seed`` and the operands are new inputs of the graph.  The seed is drawn for each call: as an input it is saved for
backward, whatever the compiler moves there, and a checkpointed region sees the same when it is recomputed.  The
operands hold what is derived from the weight.
"""

import logging
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from sparse_compile.linear.function import LinearSpec, linear
from sparse_compile.linear.seed import new_seed
from sparse_compile.passes.decide import Plan
from sparse_compile.passes.flow import Region
from sparse_compile.torch_internals.graph import add_input, add_static_input, checkpoint_body, example_value
from sparse_compile.weights.slot import WeightSlot

logger = logging.getLogger(__name__)


def rewrite(graph_module: GraphModule, plans: Sequence[Plan]) -> list[WeightSlot]:
    """Edit the graph by the plans; returns the slots whose operands its new inputs expect, in order.

    Before them come the seeds, one for each of ``seed_devices``.
    """
    graph = graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    operands_of: dict[WeightSlot, list[Node]] = {}  # a weight that several linears read has them once
    seeds = _add_seeds(graph, plans)
    replaced: dict[Node, Node] = {}
    for index, plan in enumerate(plans):
        site = plan.site
        slot = _slot(plan, placeholders.index(site.weight))
        if slot not in operands_of:
            with example_value(site.weight).fake_mode:
                fakes = slot.new_operands()
            operands_of[slot] = [add_static_input(graph, f"sste_{index}_{i}", fake) for i, fake in enumerate(fakes)]
        operands = operands_of[slot]
        (seed,) = _hand_in([seeds[slot.device]], site.region) if _samples(plan) else [None]
        arguments = (
            replaced.get(site.input, site.input),  # one linear may read another
            *_hand_in([site.weight], site.region),
            site.bias,
            seed,
            LinearSpec(plan.recipe.full_name, index, site.transposed, example_value(site.node).dtype),
            slot.projection.Operands(*_hand_in(operands, site.region)),
            *([] if site.offsets is None else [site.offsets]),
        )
        replaced[site.node] = _replace(site.node, arguments)
        logger.debug("rewrote %s to %s", site.name, plan.recipe.full_name)
    for edited in {graph_module, *(module for plan in plans for module in _modules(plan.site.region))}:
        edited.recompile()
    return list(operands_of)


def _slot(plan: Plan, position: int) -> WeightSlot:
    return WeightSlot(
        name=plan.site.name,
        position=position,
        transposed=plan.site.transposed,
        projection=plan.recipe.projection,
        out_features=plan.site.out_features,
        in_features=plan.site.in_features,
        experts=plan.site.experts,
        device=example_value(plan.site.weight).device,
        decay=plan.recipe.decay,
        refresh=plan.recipe.refresh,
        beta_factor=plan.recipe.beta_factor,
        shadow_projection=plan.shadow_projection,
    )


def seed_devices(plans: Sequence[Plan]) -> list[torch.device]:
    """Where a call of the rewritten graph needs a seed: on each device with linears that sample gradients."""
    return list(dict.fromkeys(example_value(plan.site.weight).device for plan in plans if _samples(plan)))


def _samples(plan: Plan) -> bool:
    return plan.recipe.estimator is not None and bool(example_value(plan.site.node).requires_grad)


def _add_seeds(graph: Graph, plans: Sequence[Plan]) -> dict[torch.device, Node]:
    """The inputs that hold the seeds."""
    seeds = {}
    for index, device in enumerate(seed_devices(plans)):
        with example_value(plans[0].site.weight).fake_mode:
            seeds[device] = add_input(graph, f"seed_{index}", new_seed(device))
    return seeds


def _hand_in(nodes: Sequence[Node], region: Region) -> list[Node]:
    """The same values inside a checkpointed region: each call on the way takes them as further operands."""
    handed = list(nodes)
    for caller, call in region.calls:
        body = checkpoint_body(caller, call)
        inside = []
        for node in handed:
            existing = [n for n in body.graph.nodes if n.op == "placeholder"]
            operands = call.args[1:]
            if node in operands:
                inside.append(existing[operands.index(node)])
                continue
            call.args = (*call.args, node)
            inside.append(add_static_input(body.graph, f"{node.name}_inside", example_value(node)))
        handed = inside
    return handed


def _modules(region: Region) -> list[GraphModule]:
    """The graphs on the way to a region, and its own."""
    return [*(caller for caller, _ in region.calls), region.graph_module]


def _replace(node: Node, arguments: tuple[object, ...]) -> Node:
    graph = node.graph
    with graph.inserting_before(node):
        new = graph.call_function(linear, arguments)  # type: ignore[arg-type]
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new
