"""How values flow through a traced graph: across checkpointed regions, and through tensors written in place."""

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import Parameter

from sparse_compile.passes.record_operations import Effect
from sparse_compile.passes.run_nodes import Effects, Layout, NodeEffect
from sparse_compile.torch_internals.dispatch import tree_flatten
from sparse_compile.torch_internals.fake import is_fake
from sparse_compile.torch_internals.graph import checkpoint_body, example_value, is_buffer, is_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Region:
    """A graph that holds linears: the top graph, or the body of an activation-checkpointed call inside it."""

    graph_module: GraphModule
    calls: tuple[tuple[GraphModule, Node], ...]  # the calls around it, outermost first: the calling graph, its node
    handed: Mapping[Node, Node]  # its placeholders -> what the calling graph hands in


class Kind(Enum):
    """What a value is made of."""

    CONSTANT = "constant"  # buffers, numbers, random masks
    WEIGHT = "weight"  # parameters, and constants
    GATHERED = "gathered"  # those of several matrices in one parameter that data choose
    ACTIVATION = "activation"  # inputs of the graph, and all that is made of them


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """What a value is made of, and the parameters among that: placeholders of the top graph.

    Of an activation only those of its own shape that elementwise operations made it of, as of a weight that is scaled
    by what data say.
    """

    kind: Kind
    weights: frozenset[Node] = frozenset()
    computed: bool = False  # whether more than moves made it of them


_NOTHING = NodeEffect(effect=Effect.MOVES)


class Flow:
    """The nodes of a graph and of its checkpointed bodies, in the order in which they run.

    Attributes:
        regions: the region of each node.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        self.regions: dict[Node, Region] = {}
        self._effects = Effects(self._value)
        self._known: dict[Node, NodeEffect] = {}
        self._returned: set[Node] | None = None  # of what the graph returns something is made
        self._sources: dict[Node, tuple[Node, ...]] = {}
        self._results: dict[Node, Any] = {}  # of checkpointed calls: what their bodies return
        self._memory: dict[Node, Node] = {}  # the first node whose memory a node shares
        self._writers: dict[Node, list[Node]] = {}  # by that node
        self._read: dict[Node, tuple[Node, ...]] = {}  # the inputs that a node reads
        self._origins: dict[Node, Origin] = {}
        top = Region(graph_module=graph_module, calls=(), handed={})
        self.returned = frozenset(_nodes(_flat(self._follow(top))))  # by the top graph
        self._order = {node: index for index, node in enumerate(self._sources)}
        self._users: dict[Node, list[Node]] = {}
        for node, sources in self._sources.items():
            for source in sources:
                self._users.setdefault(source, []).append(node)

    @property
    def nodes(self) -> Iterable[Node]:
        return self._sources

    def effect(self, node: Node) -> NodeEffect:
        """Of a node itself; what a checkpointed call does, the nodes of its body do."""
        if node not in self._known:
            passed = is_checkpoint(node) or _read_of(node) in self._results
            self._known[node] = _NOTHING if passed else self._effects.of(node)
        return self._known[node]

    def sources(self, node: Node) -> tuple[Node, ...]:
        """The nodes whose values the node's own depends on, those included that wrote to its inputs before."""
        return self._sources[node]

    def users(self, node: Node) -> list[Node]:
        """The nodes whose values depend on the node's."""
        return self._users.get(node, [])

    def depends(self, node: Node, on: Collection[Node]) -> bool:
        """Whether a value is made of one of others."""
        first = min((self._order[other] for other in on), default=len(self._order))
        pending, seen = [node], set()
        while pending:
            node = pending.pop()
            if node in on:
                return True
            if node not in seen and self._order[node] > first:
                seen.add(node)
                pending.extend(self._sources[node])
        return False

    def origin(self, node: Node) -> Origin:
        return self._origins[node]

    def operand(self, node: Node, positions: frozenset[int]) -> Origin:
        """Of a product's operand, which was made of inputs of the node at these positions."""
        inputs = [node.all_input_nodes[position] for position in sorted(positions)]
        # What began as a constant may have been made to be written to.
        made = [self.held(n, node) if self._origins[n].kind is Kind.CONSTANT else n for n in inputs]
        origins = [self._origins[given] for given in made]
        return origins[0] if len(origins) == 1 else _joined(origins)

    def held(self, node: Node, reader: Node | None = None) -> Node:
        """What made the values that a node has where another reads it, or in the end: itself, or what wrote last."""
        writers = self._writers.get(self._memory.get(node, node), ())
        return next((w for w in reversed(writers) if reader is None or w in self._sources[reader]), node)

    def passes(self, node: Node) -> bool:
        """Whether a node hands on an elementwise function of its sources, or moves of it."""
        return self._kind(node) is not Effect.MIXES

    def moves(self, node: Node) -> bool:
        """Whether each element that a node hands on is one of its sources'."""
        return self._kind(node) is Effect.MOVES

    def bends(self, node: Node, values: Collection[Node]) -> bool:
        """Whether a node that passes is no linear function of values: an activation function, or a product of two."""
        effect, inputs = self.effect(node), node.all_input_nodes
        if effect.bends:
            return True
        for factors in effect.factors:
            made = [any(self.depends(inputs[position], values) for position in factor) for factor in factors]
            if sum(made) > 1:
                return True
        return False

    def _kind(self, node: Node) -> Effect:
        if node.op == "output":
            return Effect.MIXES
        return self.effect(node).effect if node.op.startswith("call") else Effect.MOVES

    def has_backward(self, node: Node) -> bool:
        """Whether a gradient can come to a node.

        Not to what nothing that the graph returns, or writes to its inputs, is made of, nor past what cuts it off.
        """
        if self._returned is None:
            self._returned = set()
            inputs = [given for given in self._sources if given.op == "placeholder" and not self._sources[given]]
            pending = [*self._with_writers(self.returned), *self._with_writers(inputs)]
            while pending:
                source = pending.pop()
                if source not in self._returned and _may_have_gradient(self._value(source)):
                    self._returned.add(source)
                    pending.extend(self._sources[source])
        return node in self._returned

    def _with_writers(self, nodes: Collection[Node]) -> tuple[Node, ...]:
        """They, and what has written to their memory so far."""
        writers = (writer for node in nodes for writer in self._writers.get(self._memory.get(node, node), ()))
        return tuple(dict.fromkeys([*nodes, *writers]))

    def forwards(self, node: Node) -> int:
        """How often it runs in a step: once more in backward where a checkpointed region needs its value again."""
        calls = self.regions[node].calls
        value = self._value(node)
        if not calls or not any(leaf.requires_grad for leaf in _flat(value) if isinstance(leaf, Tensor)):
            return 1
        pending, seen = list(self.users(node)), set()
        while pending:
            user = pending.pop()
            if user in seen or self.regions[user].calls[:1] != calls[:1]:
                continue
            if self.effect(user).saves:
                return 2
            seen.add(user)
            pending.extend(self.users(user))
        return 1

    def outer(self, node: Node) -> Node:
        """What a placeholder of a checkpointed body stands for; any other node itself."""
        while node in self.regions and node in self.regions[node].handed:
            node = self.regions[node].handed[node]
        return node

    def matrix(self, node: Any) -> tuple[Node | None, bool]:
        """The parameter that a matrix is, through transpositions, copies and casts; whether it is its transpose.

        None where it is not a parameter: computed, a part of one, cast to what cannot hold it, or cut off gradients.
        What is written to a parameter in place does not make it another one: see ``writers``.
        """
        transposed = False
        while isinstance(node, Node):
            node = self.outer(node)
            if node.op == "placeholder":
                return (node, transposed) if isinstance(self._value(node), Parameter) else (None, False)
            effect, step = self.effect(node), self._step(node)
            if step is None or (effect.layout is Layout.OTHER and not effect.written):
                return None, False
            transposed ^= effect.layout is Layout.TRANSPOSED
            node = step
        return None, False

    def writers(self, node: Node, matrix: Any) -> tuple[Node, ...]:
        """What wrote to a parameter, or to the copy of it that a matrix is, before a node reads the matrix."""
        found: dict[Node, None] = {}
        reader, read = node, matrix
        while isinstance(read, Node):
            writers = self._writers.get(self._memory.get(read, read), ())
            found.update((writer, None) for writer in writers if writer in self._sources[reader])
            reader = self.outer(read)
            if reader.op != "placeholder" and self.effect(reader).written:
                found[reader] = None
            read = self._step(reader)
        return tuple(found)

    def _step(self, node: Node) -> Node | None:
        """The one input that a node hands on, as it is or, of a parameter, written to; None of several."""
        if self.effect(node).written:
            memory = self._memory.get(node)
            same = [given for given in node.all_input_nodes if self._memory.get(given, given) is memory]
            parameter = memory is not None and isinstance(self._value(memory), Parameter)
            return same[0] if parameter and _shape(self._value(same[0])) == _shape(self._value(node)) else None
        sources = self._read.get(node, self._sources.get(node, ()))
        return sources[0] if len(sources) == 1 else None

    def _value(self, node: Node) -> Any:
        node = self.outer(node)
        if node.op == "get_attr":
            return _attribute(self.regions[node].graph_module if node in self.regions else None, node)
        return example_value(node)

    def _follow(self, region: Region) -> Any:
        """Take the nodes of a region into the flow; returns what its graph returns."""
        result = None
        for node in region.graph_module.graph.nodes:
            self.regions[node] = region
            if node.op == "output":
                result = node.args[0]
            self._sources[node] = self._sources_of(node, region)
            self._origins[node] = self._origin_of(node)
        return result

    def _sources_of(self, node: Node, region: Region) -> tuple[Node, ...]:
        if node in region.handed:
            self._memory[node] = self._memory.get(region.handed[node], region.handed[node])
            return (region.handed[node],)
        if is_checkpoint(node):
            body = checkpoint_body(region.graph_module, node)
            inside = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
            handed = {
                inner: given for inner, given in zip(inside, node.args[1:], strict=True) if isinstance(given, Node)
            }
            calls = (*region.calls, (region.graph_module, node))
            self._results[node] = self._follow(Region(graph_module=body, calls=calls, handed=handed))
            return self._with_writers(tuple(_nodes(_flat(self._results[node]))))
        if (call := _read_of(node)) in self._results:
            whole, item = self._results[call], cast(int, node.args[1])
            return self._with_writers(tuple(_nodes(_flat(whole[item] if isinstance(whole, (tuple, list)) else whole))))
        inputs, effect = node.all_input_nodes, self.effect(node)
        shared = [self._memory.get(inputs[position], inputs[position]) for position in sorted(effect.aliased)]
        if shared:
            self._memory[node] = shared[0]
        self._read[node] = tuple(dict.fromkeys(inputs[position] for position in sorted(effect.sources)))
        read = self._with_writers(self._read[node])
        for position in effect.written:
            self._writers.setdefault(self._memory.get(inputs[position], inputs[position]), []).append(node)
        return read

    def _origin_of(self, node: Node) -> Origin:
        if node.op == "get_attr":
            return Origin(kind=Kind.CONSTANT)
        sources = self._sources[node]
        if node.op == "placeholder" and not sources:
            if isinstance(self._value(node), Parameter):
                return Origin(kind=Kind.WEIGHT, weights=frozenset((node,)))
            # A body's placeholder may lack metadata; then it is an activation for all we know.
            return Origin(kind=Kind.CONSTANT if is_buffer(node) else Kind.ACTIVATION)
        effect = self._kind(node)
        origins = [self._origins[source] for source in sources]
        chosen = self._chosen_by_data(effect, sources, origins)
        if chosen is not None:
            return chosen
        joined = _joined(origins)
        if joined.kind is Kind.ACTIVATION and effect in (Effect.COMPUTES, Effect.MOVES):
            shape = _shape(self._value(node))
            alike = [
                o for o, s in zip(origins, sources, strict=True) if len(sources) == 1 or _shape(self._value(s)) == shape
            ]
            weights = frozenset().union(*(origin.weights for origin in alike)) if alike else frozenset()
            return Origin(kind=joined.kind, weights=weights, computed=bool(weights))
        computed = effect in (Effect.COMPUTES, Effect.MIXES) and bool(joined.weights)
        return Origin(kind=joined.kind, weights=joined.weights, computed=joined.computed or computed)

    def _chosen_by_data(self, effect: Effect, sources: tuple[Node, ...], origins: list[Origin]) -> Origin | None:
        """Matrices that are indexed by data in a parameter that holds several."""
        if effect is not Effect.MOVES or not origins or origins[0].kind is not Kind.WEIGHT:
            return None
        several = isinstance(value := self._value(sources[0]), Tensor) and value.ndim >= 3
        data = [source for source, origin in zip(sources, origins, strict=True) if origin.kind is Kind.ACTIVATION]
        whole = all(isinstance(v := self._value(source), Tensor) and not v.is_floating_point() for source in data)
        if not (several and data and whole):
            return None
        return Origin(kind=Kind.GATHERED, weights=origins[0].weights)


def _joined(origins: list[Origin]) -> Origin:
    order = list(Kind)
    kind = max((origin.kind for origin in origins), key=order.index, default=Kind.CONSTANT)
    if kind is Kind.ACTIVATION:
        return Origin(kind=kind)
    weights = frozenset().union(*(origin.weights for origin in origins))
    return Origin(kind=kind, weights=weights, computed=any(origin.computed for origin in origins))


def _may_have_gradient(value: Any) -> bool:
    """Not if it was cut off from what it was made of: detached, compared, computed without gradients."""
    tensors = [leaf for leaf in _flat(value) if isinstance(leaf, Tensor)]
    # Of tensors within transforms of torch.func that is not known.
    return not (tensors and all(is_fake(tensor) and not tensor.requires_grad for tensor in tensors))


def _shape(value: Any) -> str:
    """Without asking whether symbolic sizes are equal, which would be a guard."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else ""


def _read_of(node: Node) -> Any:
    """Of what a node reads an item."""
    return node.args[0] if node.op == "call_function" and node.target is operator.getitem else None


def _flat(value: Any) -> list[Any]:
    return tree_flatten(value)[0]


def _nodes(values: list[Any]) -> Iterator[Node]:
    return (item for item in values if isinstance(item, Node))


def _attribute(graph_module: GraphModule | None, node: Node) -> Any:
    value: Any = graph_module
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value
