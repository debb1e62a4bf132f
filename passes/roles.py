"""What part a linear plays, told from the flow of values through the graph alone."""

from collections.abc import Callable, Collection, Mapping
from enum import Enum

from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.flow import Flow, Kind
from sparse_compile.passes.match_linear import target_name
from sparse_compile.torch_internals.graph import example_value
from sparse_compile.torch_internals.sizes import hint


class Role(Enum):
    UP = "ffn up"  # only elementwise operations stand between it and the next linear; gates, too
    DOWN = "ffn down"  # only elementwise operations stand between it and the linears before
    ADAPTER = "adapter"  # of low rank, beside a frozen linear to whose output it adds
    HEAD = "head"  # its output, logits, goes to a cross-entropy
    OUTPUT = "output"  # its output goes to another loss: it is compared with values, or with what a margin asks
    ROUTER = "router"  # its output chooses an expert by its largest elements, or by chances
    LAST = "last"  # its output leaves the graph: a head whose loss lies outside, or where a graph is cut
    OTHER = "other"  # attention projections and the rest


_CROSS_ENTROPIES = frozenset("cross_entropy linear_cross_entropy nll_loss kl_div ctc_loss".split())
_PARTS_OF_ONE = frozenset("log_softmax logsumexp".split())  # and of what balances routers
_OTHER_LOSSES = frozenset(
    """binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss huber_loss
    gaussian_nll_loss poisson_nll_loss soft_margin_loss multi_margin_loss multilabel_margin_loss
    multilabel_soft_margin_loss""".split()
)
_CHOICES = frozenset("topk argmax argmin sort msort argsort kthvalue multinomial gumbel_softmax".split())


def assign_roles(
    flow: Flow,
    inputs: Mapping[Node, Node],
    features: Mapping[Node, tuple[int, int]],
    frozen: Collection[Node] = (),
) -> dict[Node, Role]:
    """The role of each linear.

    A linear is an FFN's down projection when its input is an elementwise function of linears' outputs, not a linear
    one, and of nothing else that has features; an up projection when its output goes into such an input and it is no
    down projection itself.  Moves between dimensions are let through.  Attention lies outside: softmax and
    scaled_dot_product_attention mix elements, and so does a norm, whose mean runs over features.

    A pair of linears is an adapter (LoRA and its kin) when it narrows what it reads, and its result is added to that
    of a frozen linear.

    A linear is the head when its output reaches a cross-entropy without meeting another activation, an output when it
    reaches another loss so.  Of those that are neither and no FFN it is a router when the largest elements of what
    elementwise operations and a softmax make of it, with others or alone, are looked for, and the last when its output
    leaves the graph alone and no other linear depends on it.  What ends an FFN is a router if it is looked at so alone.

    Args:
        inputs: each linear's node and its input.
        features: of each linear, ``(in_features, out_features)``.
        frozen: the linears whose weight is not trained.
    """
    roles = dict.fromkeys(inputs, Role.OTHER)
    adapters = _adapters(flow, inputs, features, frozen)
    roles.update(dict.fromkeys(adapters, Role.ADAPTER))
    for node in inputs:
        producers, bends = _producers(flow, node, inputs)
        ffn = producers - adapters
        if node in adapters or not (ffn and bends):
            continue
        roles[node] = Role.DOWN
        for producer in ffn:
            if roles[producer] is Role.OTHER:
                roles[producer] = Role.UP
    for node in inputs:
        alone = _alone(flow, node, inputs)
        readers = _readers(flow, alone, inputs)
        names = {target_name(reader) for reader in readers}
        if names & _CROSS_ENTROPIES:
            roles[node] = Role.HEAD
        elif names & _OTHER_LOSSES:
            roles[node] = Role.OUTPUT
        elif _is_router(flow, node, roles[node], alone, inputs):
            roles[node] = Role.ROUTER
        elif names & _PARTS_OF_ONE:
            roles[node] = Role.HEAD
        elif roles[node] is Role.OTHER and _leaves(flow, alone) and not _is_read_by_others(flow, node, inputs):
            roles[node] = Role.LAST
    return roles


def _producers(flow: Flow, linear: Node, linears: Mapping[Node, Node]) -> tuple[set[Node], bool]:
    """The linears that a linear's input is an elementwise function of, and whether that is more than a linear one.

    No linears if it depends on another activation with features as well.
    """
    producers: set[Node] = set()
    masks: list[Node] = []
    source = linears[linear]
    pending, seen = [source, flow.held(source, linear)], set()
    while pending:
        node = pending.pop()
        if node not in seen and flow.origin(node).kind is Kind.ACTIVATION:
            seen.add(node)
            if node in linears:
                producers.add(node)
            elif _is_mask(node):
                masks.append(node)
            elif flow.passes(node) and flow.sources(node):
                pending.extend(flow.sources(node))
            else:
                return set(), False
        if not pending:
            # A factor that is made of these linears is no mask: the mean of a norm has no features either.
            made = [mask for mask in masks if flow.depends(mask, producers)]
            masks = [mask for mask in masks if mask not in made]
            for mask in made:
                if not (flow.passes(mask) and flow.sources(mask)):
                    return set(), False
                pending.extend(flow.sources(mask))
    return producers, any(flow.bends(node, producers) for node in seen - producers)


def _is_mask(node: Node) -> bool:
    """Whether a value says which elements or tokens count, or how much a token does: it has no features of its own."""
    value = example_value(node)
    if not isinstance(value, Tensor):
        return False
    return not value.is_floating_point() or value.ndim == 0 or hint(value.shape[-1]) == 1


def _adapters(
    flow: Flow,
    inputs: Mapping[Node, Node],
    features: Mapping[Node, tuple[int, int]],
    frozen: Collection[Node],
) -> set[Node]:
    found: set[Node] = set()
    if not frozen:
        return found
    added = {node: _reached(flow, node, inputs) for node in frozen}
    for node in inputs:
        if node in frozen:
            continue
        narrow = {p for p in _producers(flow, node, inputs)[0] if p not in frozen}
        rank, out_features = features[node]
        narrow = {p for p in narrow if features[p][1] == rank < min(features[p][0], out_features)}
        reached = _reached(flow, node, inputs)
        if narrow and any(
            reached & others for other, others in added.items() if _size(features, other) == out_features
        ):
            found |= {node, *narrow}
    return found


def _size(features: Mapping[Node, tuple[int, int]], node: Node) -> int | None:
    return features[node][1] if node in features else None


def _reached(flow: Flow, linear: Node, linears: Mapping[Node, Node]) -> set[Node]:
    """What elementwise operations make of the linear's output, together with others or not, before the next linear."""
    return _follow(flow, linear, lambda node: node not in linears and flow.passes(node))


def _alone(flow: Flow, linear: Node, linears: Mapping[Node, Node]) -> set[Node]:
    """The linear's output and what elementwise operations make of it without another activation, but for masks.

    Where elements only move they may come to lie beside others: logits of several heads, or of parts of a batch.
    """
    alone: set[Node] = {linear}

    def is_mask(node: Node) -> bool:
        # A factor that is made of the output itself is none, as its norm.
        return _is_mask(node) and not flow.depends(node, {linear})

    def passes(node: Node) -> bool:
        if node in linears or not flow.passes(node):
            return False
        if flow.moves(node):
            return True
        others = (source for source in flow.sources(node) if source not in alone)
        return all(flow.origin(source).kind is not Kind.ACTIVATION or is_mask(source) for source in others)

    return _follow(flow, linear, passes, alone)


def _follow(flow: Flow, start: Node, passes: Callable[[Node], bool], found: set[Node] | None = None) -> set[Node]:
    found = {start} if found is None else found
    pending = list(flow.users(start))
    while pending:
        node = pending.pop()
        if node not in found and passes(node):
            found.add(node)
            pending.extend(flow.users(node))
    return found


def _readers(flow: Flow, passed: set[Node], linears: Mapping[Node, Node]) -> set[Node]:
    """What reads some of these, with or without a softmax in between."""
    readers = {user for node in passed for user in flow.users(node)}
    for shares in [reader for reader in readers if target_name(reader) in ("softmax", "log_softmax")]:
        readers.update(user for node in _alone(flow, shares, linears) for user in flow.users(node))
    return readers


def _is_router(flow: Flow, linear: Node, role: Role, alone: set[Node], linears: Mapping[Node, Node]) -> bool:
    # Noise with a learned scale is another activation.
    read = {Role.OTHER: _reached(flow, linear, linears) | {linear}, Role.DOWN: alone}.get(role, set())
    return any(map(_looks_for_the_largest, _readers(flow, read, linears)))


def _looks_for_the_largest(node: Node) -> bool:
    """And for their places: the largest element alone, as a scale of a row is made of, chooses nothing."""
    if target_name(node) != "max":
        return target_name(node) in _CHOICES
    return any(target_name(user) == "getitem" and user.args[1] == 1 for user in node.users)


def _is_read_by_others(flow: Flow, linear: Node, linears: Mapping[Node, Node]) -> bool:
    """As keys and values are, which may leave as a cache."""
    return any(flow.depends(other, {linear}) for other in linears if other is not linear)


def _leaves(flow: Flow, alone: set[Node]) -> bool:
    """Whether the graph returns the linear's output alone, beside others or not."""
    return any(flow.held(node) in alone for node in flow.returned if _is_floating(node))


def _is_floating(node: Node) -> bool:
    value = example_value(node)
    return isinstance(value, Tensor) and value.is_floating_point()


# What the user may say instead of a glob of module names, and the roles that are meant; of "all" those that can be.
TARGETS: Mapping[str, Collection[Role]] = {"ffn": (Role.UP, Role.DOWN), "ffn-up": (Role.UP,), "all": ()}
