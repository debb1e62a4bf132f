"""MATERIALIZE: tables of sines and cosines are computed once, not again in each kernel that reads them.

Inductor inlines a pointwise operation into whatever reads its result.  The tables of rotary embeddings are small and
read for every head of every layer, forward and backward; computed in each of those kernels, they take several times as
long as moving the activations does.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from sparse_compile.kernels import ops
from sparse_compile.passes.match_linear import target_name
from sparse_compile.torch_internals.graph import example_value, is_checkpoint, with_checkpoint_bodies
from sparse_compile.torch_internals.sizes import hint

_TRIGONOMETRIC = ("sin", "cos")


def keep_rotary_tables(graph_module: GraphModule) -> None:
    """Give each table that is broadcast memory of its own, checkpointed regions included; values stay the same."""
    for module in with_checkpoint_bodies(graph_module):
        ends = (_end_of_chain(node) for node in module.graph.nodes if _is_trigonometric(node))
        tables = [table for table in dict.fromkeys(ends) if _can_be_kept(table) and _is_broadcast(table)]
        for table in tables:
            _keep(table)
        if tables:
            module.recompile()


def _is_trigonometric(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and target_name(node) in _TRIGONOMETRIC


def _end_of_chain(node: Node) -> Node:
    """What scalings, casts and views make of a table before it meets anything else."""
    (user,) = node.users if len(node.users) == 1 else (None,)
    if user is not None and user.all_input_nodes == [node] and _size(user) == _size(node):
        return _end_of_chain(user)
    return node


def _can_be_kept(table: Node) -> bool:
    value = example_value(table)
    return isinstance(value, Tensor) and not value.requires_grad


def _is_broadcast(table: Node) -> bool:
    """Whether something larger than the table reads it, through views or not; a checkpointed region is taken to."""
    size = _size(table)
    return size is not None and any(is_checkpoint(user) or (_size(user) or 0) > size for user in _readers(table))


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        yield user
        if user.all_input_nodes == [node]:
            yield from _readers(user)


def _size(node: Node) -> int | None:
    """Elements of a node's tensor, without a guard on it."""
    value: Any = example_value(node)
    return hint(value.numel()) if isinstance(value, Tensor) else None


def _keep(table: Node) -> None:
    with table.graph.inserting_after(table):
        kept = table.graph.call_function(ops.materialize, (table,))
    kept.meta = dict(table.meta)
    table.replace_all_uses_with(kept, delete_user_cb=lambda user: user is not kept)
