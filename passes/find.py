"""FIND: the linear layers of a traced graph, in every spelling."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from sparse_compile.passes.roles import Role, assign_roles
from sparse_compile.passes.spelling import Spelling, is_unsupported_contraction, read_linear, target_name
from sparse_compile.report import DENSE, Row
from sparse_compile.torch_internals import (
    checkpoint_body,
    example_value,
    hint,
    is_checkpoint,
    module_name,
    parameter_name,
    user_frames,
)


class Reason(Enum):
    """Why a linear stays dense."""

    UNSUPPORTED_FORM = "form not rewritten"
    NOT_A_PARAMETER = "weight is not a parameter"
    NOT_PLAIN = "not a plain tensor"
    NOT_2D = "weight is not a matrix"
    DTYPE = "dtype"
    SHAPE = "shape"
    TOO_SMALL = "too small"
    TIED = "weight is shared"
    FROZEN = "weight is frozen"
    HEAD = "vocabulary head"
    SLOWER = "not faster"
    NO_KERNELS = "not emulated"
    NOT_A_TARGET = "not a target"
    DENSE_PHASE = "in a dense phase"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """A linear that stays dense, and why."""

    name: str
    role: Role
    shape: str
    reason: Reason
    detail: str
    advice: str  # what the user can do about it
    node: Node
    site: "LinearSite | None" = None
    # Predicted microseconds of its products in a step, where they were measured.
    dense_us: float | None = None

    def row(self) -> Row:
        reason = f"{self.reason.value}: {self.detail}"
        if self.site is not None:
            precisions = dict.fromkeys(self.site.products, self.site.dtype_name)
            row = self.site.row(decision=DENSE, precisions=precisions, reason=reason, advice=self.advice)
            return replace(row, dense_us=self.dense_us, rewritten_us=self.dense_us)
        source, code = _written_at(self.node)
        return Row(
            module=self.name,
            role=self.role.value,
            shape=self.shape,
            decision=DENSE,
            reason=reason,
            advice=self.advice,
            source=source,
            code=code,
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Region:
    """A graph that holds linears: the top graph, or the body of an activation-checkpointed call inside it."""

    graph_module: GraphModule
    calls: tuple[tuple[GraphModule, Node], ...]  # the calls around it, outermost first: the calling graph, its node
    sources: Mapping[Node, Node]  # its placeholders -> the top graph's


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LinearSite:
    """``output = input @ weight.T + bias`` with a parameter ``[N, K]``, stored ``[K, N]`` if ``transposed``."""

    node: Node
    region: Region
    input: Node
    weight: Node  # placeholder of the top graph
    bias: Node | None
    transposed: bool
    name: str
    role: Role
    weight_uses: int  # nodes that read the weight, this one included

    @property
    def out_features(self) -> int:
        return int(example_value(self.weight).shape[1 if self.transposed else 0])

    @property
    def in_features(self) -> int:
        return int(example_value(self.weight).shape[0 if self.transposed else 1])

    @property
    def shape(self) -> str:
        """``tokens x in_features -> out_features``; ``?`` for a number of tokens that changes."""
        weight = example_value(self.weight)
        if weight.ndim != 2:
            return f"weight {tuple(weight.shape)}"
        tokens = prod(example_value(self.input).shape[:-1])
        return f"{tokens if isinstance(tokens, int) else '?'} x {self.in_features} -> {self.out_features}"

    @property
    def products(self) -> tuple[str, ...]:
        """The products that a step has: no wgrad of a frozen weight, no dgrad where the input needs none."""
        wanted = {"fprop": True, "dgrad": False, "wgrad": False}
        if example_value(self.node).requires_grad:
            wanted["dgrad"] = example_value(self.input).requires_grad
            wanted["wgrad"] = example_value(self.weight).requires_grad
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)

    @property
    def forwards(self) -> int:
        """How often fprop runs in a step: once more in backward where activations are checkpointed."""
        return 2 if self.region.calls else 1

    @property
    def dtype_name(self) -> str:
        """``bf16``: what its products run in where they are dense."""
        name = str(example_value(self.node).dtype).removeprefix("torch.")
        return name.replace("bfloat", "bf").replace("float", "fp")

    def row(self, decision: str, precisions: Mapping[str, str], *, reason: str = "", advice: str = "") -> Row:
        """The report's row.

        Args:
            precisions: how each of ``products`` runs.
        """
        source, code = _written_at(self.node)
        is_matrix = example_value(self.weight).ndim == 2
        return Row(
            module=self.name,
            role=self.role.value,
            shape=self.shape,
            tokens=hint(prod(example_value(self.input).shape[:-1])) if is_matrix else None,
            in_features=self.in_features if is_matrix else None,
            out_features=self.out_features if is_matrix else None,
            forwards=self.forwards,
            decision=decision,
            reason=reason,
            advice=advice,
            source=source,
            code=code,
            fprop=precisions.get("fprop", ""),
            dgrad=precisions.get("dgrad", ""),
            wgrad=precisions.get("wgrad", ""),
        )

    def reject(self, reason: Reason, detail: str, advice: str) -> Rejection:
        return Rejection(
            name=self.name,
            role=self.role,
            shape=self.shape,
            reason=reason,
            detail=detail,
            advice=advice,
            node=self.node,
            site=self,
        )


def find(graph_module: GraphModule, whole: Graph | None = None) -> tuple[list[LinearSite], list[Rejection]]:
    """All linears of the graph and of its checkpointed bodies, and those that can't be told to be one.

    Handles F.linear, addmm, mm, matmul and ``@`` as function or method, with the weight as the right operand, reached
    through any number of transpositions and casts.  A product of two activations is no linear and is left out.

    Args:
        whole: the graph that this one was cut out of, where one was: what part a linear plays is told from that.
    """
    linears: dict[Node, tuple[Region, Spelling]] = {}
    rejections: list[Rejection] = []
    uses: Counter[Node] = Counter()
    for region in _regions(graph_module):
        for node in region.graph_module.graph.nodes:
            if not is_checkpoint(node):
                uses.update(region.sources[source] for source in node.all_input_nodes if source in region.sources)
            spelling = read_linear(node)
            if spelling is not None and spelling.weight in region.sources and _is_weight(region, spelling.weight):
                linears[node] = (region, spelling)
            else:
                rejections += _near_miss(node, spelling, region)
    roles = assign_roles({node: spelling.input for node, (_, spelling) in linears.items()})
    if whole is not None:
        roles |= _roles_before_the_cut([node for node in linears if node.graph is graph_module.graph], whole)
    # A transposed weight may be made once and read by several linears.
    linears_of = Counter(region.sources[spelling.weight] for region, spelling in linears.values())
    sites = []
    for node, (region, spelling) in linears.items():
        weight = region.sources[spelling.weight]
        site = LinearSite(
            node=node,
            region=region,
            input=spelling.input,
            weight=weight,
            bias=spelling.bias,
            transposed=spelling.transposed,
            name=parameter_name(weight),
            role=roles[node],
            weight_uses=max(uses[weight], linears_of[weight]),
        )
        if spelling.refusal is None:
            sites.append(site)
        else:
            advice = "write it as F.linear, and what it does besides as operations of their own"
            rejections.append(site.reject(Reason.UNSUPPORTED_FORM, spelling.refusal, advice))
    return sites, rejections


def _roles_before_the_cut(linears: Iterable[Node], whole: Graph) -> dict[Node, Role]:
    """Roles in the graph from which these linears come: nodes keep what dynamo recorded of them, though not names."""
    inputs = {}
    for node in whole.nodes:
        spelling = read_linear(node)
        if spelling is not None and isinstance(example_value(spelling.weight), Parameter):
            inputs[node] = spelling.input
    roles = {id(example_value(node)): role for node, role in assign_roles(inputs).items()}
    return {node: roles[id(example_value(node))] for node in linears if id(example_value(node)) in roles}


def _regions(graph_module: GraphModule) -> Iterator[Region]:
    sources = {node: node for node in graph_module.graph.nodes if node.op == "placeholder"}
    pending = [Region(graph_module=graph_module, calls=(), sources=sources)]
    while pending:
        region = pending.pop(0)
        yield region
        for node in region.graph_module.graph.nodes:
            if is_checkpoint(node):
                body = checkpoint_body(region.graph_module, node)
                inside = [n for n in body.graph.nodes if n.op == "placeholder"]
                handed = dict(zip(inside, node.args[1:], strict=True))
                pending.append(
                    Region(
                        graph_module=body,
                        calls=(*region.calls, (region.graph_module, node)),
                        sources={n: region.sources[given] for n, given in handed.items() if given in region.sources},
                    )
                )


def _is_weight(region: Region, node: Node) -> bool:
    value = example_value(region.sources[node])
    return isinstance(value, Parameter)


def _near_miss(node: Node, spelling: Spelling | None, region: Region) -> list[Rejection]:
    """The report's row for a linear-like node whose weight can't be rewritten; none for products of activations."""
    if spelling is None:
        weights = [region.sources[n] for n in node.all_input_nodes if n in region.sources and _is_weight(region, n)]
        weights = [weight for weight in weights if example_value(weight).ndim >= 2]
        if not (is_unsupported_contraction(node) and weights):
            return []
        name, reason = parameter_name(weights[0]), Reason.UNSUPPORTED_FORM
        detail, advice = f"{target_name(node)} is not rewritten yet", "write it as F.linear"
    elif spelling.input in region.sources and _is_weight(region, spelling.input):
        name, reason = parameter_name(region.sources[spelling.input]), Reason.UNSUPPORTED_FORM
        detail, advice = f"the weight is the left operand of {target_name(node)}", "write it as F.linear"
    elif target_name(node) == "linear":
        name, reason = module_name(node), Reason.NOT_A_PARAMETER
        detail = "it is computed in the graph, for instance by a parametrization, or is a buffer or an input"
        advice = (
            "give the linear a parameter itself (FSDP: fully_shard does): what changes in a step can't be pruned once"
        )
    else:
        return []
    return [Rejection(name=name, role=Role.OTHER, shape="", reason=reason, detail=detail, advice=advice, node=node)]


def _written_at(node: Node) -> tuple[str, str]:
    """``file:line`` of the user's code that calls it, and that line."""
    frames = user_frames(node)
    if not frames:
        return "", ""
    file, line, _, code = frames[-1]
    return f"{file}:{line}", code
