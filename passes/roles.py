"""What part a linear plays, told from the graph's structure alone."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch.fx import Node
from torch.nn import Parameter

from sparse_compile.torch_internals import example_value


class Role(Enum):
    FFN = "ffn"  # only pointwise operations stand between it and the next linear, or the one before
    HEAD = "head"  # its output is the logits
    OTHER = "other"  # attention projections and the rest


_POINTWISE = frozenset(
    """add sub mul div truediv neg pow square sqrt rsqrt exp log log1p expm1 abs sign tanh sigmoid erf relu relu6 relu_
    gelu silu silu_ mish elu selu celu leaky_relu softplus softsign hardswish hardsigmoid hardtanh logsigmoid prelu
    rrelu threshold dropout glu clamp clamp_min clamp_max clip maximum minimum where masked_fill reciprocal sin cos
    iadd isub imul itruediv add_ mul_ sub_ div_ radd rmul rsub rtruediv rpow""".split()
)
_VIEWS = frozenset(
    """view reshape view_as flatten unflatten squeeze unsqueeze contiguous clone chunk split tensor_split unbind
    getitem to float bfloat16 half type_as""".split()
)
_LOSSES = frozenset(
    """cross_entropy nll_loss log_softmax logsumexp binary_cross_entropy_with_logits ctc_loss mse_loss l1_loss
    smooth_l1_loss huber_loss kl_div linear_cross_entropy""".split()
)


def assign_roles(inputs: Mapping[Node, Node]) -> dict[Node, Role]:
    """The role of each linear.

    A linear is FFN when its input is a pointwise function of linears' outputs and of nothing else (the down
    projection), or when its output goes only into such a function (the up and gate projections).  Attention lies
    outside: softmax and scaled_dot_product_attention are not pointwise, nor is a norm, whose mean runs over features.

    A linear is the head when its output reaches a loss without meeting another activation; or leaves the graph so, if
    it is the only one that does and is no FFN (a loss computed outside the graph).

    Args:
        inputs: each linear's node and its input.
    """
    roles = dict.fromkeys(inputs, Role.OTHER)
    for node, source in inputs.items():
        producers = _pointwise_producers(source, inputs)
        for member in (node, *producers) if producers else ():
            roles[member] = Role.FFN
    leaving = []
    for node in inputs:
        destinations = _destinations(node, inputs)
        if "loss" in destinations:
            roles[node] = Role.HEAD
        elif "output" in destinations and roles[node] is not Role.FFN:
            leaving.append(node)
    if len(leaving) == 1 and Role.HEAD not in roles.values():
        roles[leaving[0]] = Role.HEAD
    return roles


def _pointwise_producers(source: Any, linears: Mapping[Node, Node]) -> set[Node]:
    """The linears that ``source`` is a pointwise function of; empty if it depends on anything else as well."""
    producers: set[Node] = set()
    computes = False
    pending, seen = [source], set()
    while pending:
        node = pending.pop()
        if node in seen or not _is_activation(node):
            continue
        seen.add(node)
        if node in linears:
            producers.add(node)
        elif _name(node) in _POINTWISE or _name(node) in _VIEWS:
            computes = computes or _name(node) in _POINTWISE
            pending.extend(node.all_input_nodes)
        else:
            return set()
    return producers if computes else set()


def _destinations(linear: Node, linears: Mapping[Node, Node]) -> set[str]:
    """Where a linear's output goes before it meets another activation: "loss", "output", "elsewhere"."""
    destinations: set[str] = set()
    pending, seen = list(linear.users), {linear}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        alone = all(source in seen or not _is_activation(source) for source in node.all_input_nodes)
        if node.op == "output":
            destinations.add("output")
        elif _name(node) in _LOSSES:
            destinations.add("loss")
        elif node not in linears and alone and (_name(node) in _POINTWISE or _name(node) in _VIEWS):
            pending.extend(node.users)
        else:
            destinations.add("elsewhere")
    return destinations


def _is_activation(node: Any) -> bool:
    """Whether a node carries a tensor that is neither a parameter nor a constant of the module."""
    value = example_value(node)
    if not isinstance(node, Node) or node.op == "get_attr":
        return False
    if node.op == "placeholder":
        # A body's placeholder may lack metadata; then it is an activation for all we know.
        return not isinstance(value, Parameter)
    return value is None or hasattr(value, "shape") or isinstance(value, (tuple, list))


def _name(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
