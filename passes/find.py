"""FIND: every contraction of a traced graph, and the linear layers among them, in every spelling."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from sparse_compile.passes.account import account
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.match_linear import LinearPattern, is_of_experts, read_linear, target_name
from sparse_compile.passes.roles import Role, assign_roles
from sparse_compile.passes.sites import LinearSite, Reason, Rejection
from sparse_compile.torch_internals.graph import example_value, parameter_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """All contractions of a graph.

    Attributes:
        sites: the linears that can be told to be one.
        rejections: the other products with a parameter.
        others: floating-point operations of a step in products that have no parameter, by what they are.
    """

    sites: list[LinearSite] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def find(flow: Flow, whole: GraphModule | None = None, name_of: Callable[[Node], str] = parameter_name) -> Found:
    """Every contraction of the graph and of its checkpointed bodies.

    A linear is F.linear, addmm, mm, matmul and ``@`` as function, method or operation of ATen, with a parameter as the
    right operand, reached through any number of transpositions and casts.  One of experts is grouped_mm or bmm with a
    parameter ``[E, ., .]``.  What else is made of a parameter and
    multiplied, in whatever spelling, is a rejection.

    Args:
        whole: the graph that this one was cut out of, where one was: what part a linear plays is told from that.
        name_of: the model's own name of a parameter, by its placeholder.
    """
    found = Found()
    linears = _linears(flow)
    for node in flow.nodes:
        if node not in linears:
            rejections, others = account(flow, node, name_of)
            found.rejections.extend(rejections)
            found.others.update(others)
    roles = _roles(flow, linears)
    if whole is not None:
        roles |= _roles_before_the_cut(linears, whole)
    other_uses = _other_uses(flow, linears)
    for node, linear in linears.items():
        site = LinearSite(
            node=node,
            region=flow.regions[node],
            input=linear.pattern.input,
            weight=linear.weight,
            bias=linear.pattern.bias,
            offsets=linear.pattern.offsets,
            transposed=linear.transposed,
            name=name_of(linear.weight),
            path=parameter_name(linear.weight),
            role=roles[node],
            other_uses=other_uses(linear),
            writers=tuple(target_name(writer) for writer in flow.writers(node, linear.pattern.matrix)),
            has_backward=flow.has_backward(node),
            forwards=flow.forwards(node),
        )
        if linear.pattern.refusal is None:
            found.sites.append(site)
        else:
            spelling = "F.linear" if site.experts is None else "grouped_mm"
            advice = f"write it as {spelling}, and move the extra work into separate operations"
            found.rejections.append(site.reject(Reason.UNSUPPORTED_FORM, linear.pattern.refusal, advice))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Linear:
    pattern: LinearPattern
    weight: Node  # placeholder of the top graph
    transposed: bool


def _linears(flow: Flow) -> dict[Node, _Linear]:
    linears = {}
    for node in flow.nodes:
        effect = flow.effect(node)
        pattern = read_linear(node) if effect.products or effect.unknown else None
        weight, flipped = (None, False) if pattern is None else flow.matrix(pattern.matrix)
        if pattern is not None and weight is not None and _is_linear(flow, pattern, weight):
            linears[node] = _Linear(pattern=pattern, weight=weight, transposed=pattern.transposed != flipped)
    return linears


def _roles(flow: Flow, linears: Mapping[Node, _Linear]) -> dict[Node, Role]:
    return assign_roles(
        flow,
        {node: linear.pattern.input for node, linear in linears.items()},
        {node: _features(linear) for node, linear in linears.items()},
        {node for node, linear in linears.items() if not example_value(linear.weight).requires_grad},
    )


def _features(linear: _Linear) -> tuple[int, int]:
    """``(in_features, out_features)``"""
    rows, columns = example_value(linear.weight).shape[-2:]
    return (int(rows), int(columns)) if linear.transposed else (int(columns), int(rows))


def _is_linear(flow: Flow, pattern: LinearPattern, weight: Node) -> bool:
    """Whether a product of an input and a parameter is one: not of two parameters, nor of a detached one."""
    value = example_value(weight)
    trained = value.requires_grad and torch.is_grad_enabled()
    detached = trained and not getattr(example_value(pattern.matrix), "requires_grad", True)
    # Of several matrices in a parameter, [E, N, K], only the product of each with its own tokens is a linear's.
    linear = pattern.offsets is None if value.ndim == 2 else is_of_experts(pattern, value)
    return linear and not detached and flow.matrix(pattern.input)[0] is None


def _other_uses(flow: Flow, linears: Mapping[Node, _Linear]) -> Callable[[_Linear], tuple[str, ...]]:
    """What reads the weight of a linear besides linears that read it in the same way."""
    readers: dict[Node, list[Node]] = {}
    for weight in {linear.weight for linear in linears.values()}:
        pending, seen = list(flow.users(weight)), set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            handed_on = node not in linears and node.op != "output" and flow.matrix(node)[0] is weight
            if handed_on and not flow.effect(node).written:
                pending.extend(flow.users(node))
            else:
                readers.setdefault(weight, []).append(node)

    def others_of(linear: _Linear) -> tuple[str, ...]:
        alike = (linear.weight, linear.transposed)
        return tuple(
            target_name(node) if node.op != "output" else "the graph's output"
            for node in readers.get(linear.weight, ())
            if node not in linears or (linears[node].weight, linears[node].transposed) != alike
        )

    return others_of


def _roles_before_the_cut(linears: Mapping[Node, _Linear], whole: GraphModule) -> dict[Node, Role]:
    """Roles in the graph from which these linears come: nodes keep what dynamo recorded of them, though not names."""
    flow = Flow(whole)
    roles = {id(example_value(node)): role for node, role in _roles(flow, _linears(flow)).items()}
    return {node: roles[id(example_value(node))] for node in linears if id(example_value(node)) in roles}
