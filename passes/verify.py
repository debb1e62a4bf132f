"""VERIFY: the edited graph is well-formed and every rewritten linear returns what the original did."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, map_arg

from sparse_compile.errors import SparseCompileError
from sparse_compile.linear.function import linear
from sparse_compile.passes.decide import Plan
from sparse_compile.torch_internals.graph import example_value, with_checkpoint_bodies


def verify(graph_module: GraphModule, plans: Sequence[Plan]) -> None:
    """Check the rewrite of ``plans``.

    Every graph passes FX's lint; there is one rewritten node per plan and no planned original left; each rewritten
    node, run on fake tensors, gives the shape, strides, dtype and device that dynamo recorded for the original.

    Raises:
        SparseCompileError: naming the node.
    """
    nodes = list(_linear_nodes(graph_module))
    if len(nodes) != len(plans):
        raise SparseCompileError("verify", "graph", f"{len(nodes)} rewritten nodes for {len(plans)} plans")
    for plan in plans:
        if plan.site.node in plan.site.node.graph.nodes:
            raise SparseCompileError("verify", plan.site.name, "the original node is still in the graph")
    for node in nodes:
        _check_output(node)


def _linear_nodes(graph_module: GraphModule) -> list[Node]:
    nodes: list[Node] = []
    for module in with_checkpoint_bodies(graph_module):
        module.graph.lint()
        nodes += module.graph.find_nodes(op="call_function", target=linear)
    return nodes


def _check_output(node: Node) -> None:
    expected = example_value(node)
    with torch.no_grad(), expected.fake_mode:
        actual = linear(*map_arg(node.args, example_value))  # type: ignore[arg-type]
    for attribute, before in _described(expected).items():
        after = _described(actual)[attribute]
        if before != after:
            raise SparseCompileError("verify", node.name, f"output {attribute} was {before}, is {after}")


def _described(output: Tensor) -> dict[str, object]:
    return {"shape": output.shape, "stride": output.stride(), "dtype": output.dtype, "device": output.device}
