"""What part a linear plays, told from the graph's structure alone."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.nn import Parameter

from sparse_compile.passes.spelling import target_name
from sparse_compile.torch_internals import example_value


class Role(Enum):
    UP = "ffn up"  # only pointwise operations stand between it and the next linear; gates, too
    DOWN = "ffn down"  # only pointwise operations stand between it and the linears before
    HEAD = "head"  # its output goes to the loss
    LAST = "last"  # its output is all that leaves the graph: a head whose loss lies outside, or where a graph is cut
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

    A linear is an FFN's down projection when its input is a pointwise function of linears' outputs and of nothing else;
    an up projection when its output goes into such an input and it is no down projection itself.  Attention lies
    outside: softmax and scaled_dot_product_attention are not pointwise, nor is a norm, whose mean runs over features.

    A linear is the head when its output reaches a loss without meeting another activation, and the last when it is no
    FFN and nothing but its output leaves the graph in the same way.

    Args:
        inputs: each linear's node and its input.
    """
    roles = dict.fromkeys(inputs, Role.OTHER)
    for node, source in inputs.items():
        producers = _pointwise_producers(source, inputs)
        if producers:
            roles[node] = Role.DOWN
        for producer in producers:
            if roles[producer] is Role.OTHER:
                roles[producer] = Role.UP
    for node in inputs:
        if _reaches_loss(node, inputs):
            roles[node] = Role.HEAD
        elif roles[node] is Role.OTHER and _is_all_that_leaves(node, inputs):
            roles[node] = Role.LAST
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
        elif target_name(node) in _POINTWISE or target_name(node) in _VIEWS:
            computes = computes or target_name(node) in _POINTWISE
            pending.extend(node.all_input_nodes)
        else:
            return set()
    return producers if computes else set()


def _reaches_loss(linear: Node, linears: Mapping[Node, Node]) -> bool:
    """Whether a loss reads the linear's output before it has met another activation."""
    return any(target_name(user) in _LOSSES for node in _alone(linear, linears) for user in node.users)


def _is_all_that_leaves(linear: Node, linears: Mapping[Node, Node]) -> bool:
    """Whether everything floating-point that the graph returns is the linear's output, alone."""
    alone = _alone(linear, linears)
    (output,) = linear.graph.find_nodes(op="output")
    returned = {node for node in output.all_input_nodes if _is_floating(node)}
    return bool(returned) and returned <= alone


def _alone(linear: Node, linears: Mapping[Node, Node]) -> set[Node]:
    """The linear's output and what views and pointwise operations make of it without another activation."""
    alone, pending = {linear}, list(linear.users)
    while pending:
        node = pending.pop()
        passes_on = target_name(node) in _POINTWISE or target_name(node) in _VIEWS
        if node in alone or node in linears or not passes_on:
            continue
        if all(source in alone or not _is_activation(source) for source in node.all_input_nodes):
            alone.add(node)
            pending.extend(node.users)
    return alone


def _is_floating(node: Node) -> bool:
    value = example_value(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_activation(node: Any) -> bool:
    """Whether a node carries a tensor that is neither a parameter nor a constant of the module."""
    value = example_value(node)
    if not isinstance(node, Node) or node.op == "get_attr":
        return False
    if node.op == "placeholder":
        # A body's placeholder may lack metadata; then it is an activation for all we know.
        return not isinstance(value, Parameter)
    return value is None or hasattr(value, "shape") or isinstance(value, (tuple, list))
