"""What each node of a traced graph does to tensors, told by running it on fake ones.

PyTorch knows of each of its operations whether it is elementwise (``torch.Tag.pointwise``), a view, or a composition
of others.  So a node is run once on fake tensors of the sizes that dynamo recorded, in a dispatch mode that sees the
operations it is made of: any spelling, method, composite or autograd.Function comes down to the same few of ATen.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from sparse_compile.passes.flops import flops_of, is_product
from sparse_compile.passes.triton_kernels import is_elementwise
from sparse_compile.torch_internals.fake import FakeTensorMode
from sparse_compile.torch_internals.graph import example_value
from sparse_compile.torch_internals.operations import decompositions, triton_kernel
from sparse_compile.torch_internals.sizes import concrete_size, has_unbacked_size
from sparse_compile.torch_internals.tensors import storage_key


class Effect(Enum):
    """What a node makes of the values of its inputs."""

    MOVES = "moves"  # each element of the output is one of an input: views, copies, casts, indexing, concatenation
    COMPUTES = "computes"  # elementwise, besides such moves
    FRESH = "fresh"  # depends on no input's values: random numbers, constants
    MIXES = "mixes"  # elements of the output depend on many: reductions, norms, contractions; all that is not known


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """One contraction that a node performs: a matrix product, a convolution, attention, or one that nobody knows.

    Attributes:
        op: ATen's name, ``mm``.
        operands: for each operand, the positions among the node's inputs that it was made of.
        flops: of the product itself; None where PyTorch's counter does not know the operation.
        computed: for each operand, whether more than moves made it.
    """

    op: str
    operands: tuple[frozenset[int], ...]
    flops: int | None
    computed: tuple[bool, ...]


class Layout(Enum):
    """How the output of a node with one tensor input lies beside it."""

    SAME = "same"  # the same matrix, perhaps copied or cast to a floating-point dtype
    TRANSPOSED = "transposed"
    OTHER = "other"


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeEffect:
    """What running a node showed.  Positions are those in ``node.all_input_nodes``.

    Attributes:
        sources: inputs whose values the outputs depend on.
        written: inputs that it writes to.
        aliased: inputs whose memory an output shares.
        layout: of its output, for a node with one input.
        backward_flops: of the products in its backward, as far as inputs require gradients.
        saves: whether it keeps a tensor for its backward.
        bends: whether it is no linear function of its inputs, whatever they are.
        factors: what it multiplies elementwise: for each product the inputs behind each of its factors.
        unknown: why it could not be run; empty where it could.
    """

    effect: Effect
    sources: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    aliased: frozenset[int] = frozenset()
    layout: Layout = Layout.OTHER
    products: tuple[Product, ...] = ()
    backward_flops: int = 0
    saves: bool = False
    bends: bool = False
    factors: tuple[tuple[frozenset[int], ...], ...] = ()
    unknown: str = ""


class Effects:
    """Runs nodes; those that are alike, as in the layers of a transformer, once.

    Args:
        value_of: the example value of a node, where another than dynamo recorded for it is to be taken.
    """

    def __init__(self, value_of: Callable[[Node], Any] = example_value) -> None:
        self._value_of = value_of
        self._known: dict[Hashable, NodeEffect] = {}

    def of(self, node: Node) -> NodeEffect:
        if node.op not in ("call_function", "call_method"):
            return NodeEffect(effect=Effect.FRESH)
        inputs = node.all_input_nodes
        values = [self._value_of(source) for source in inputs]
        if not _tensors(values):
            return NodeEffect(effect=Effect.FRESH)
        key = _key(node, values, _needs_backward(self._value_of(node)))
        if key not in self._known:
            self._known[key] = self._found(node, values)
        return self._known[key]

    def _found(self, node: Node, values: list[Any]) -> NodeEffect:
        backward = _needs_backward(self._value_of(node))
        mixed = len({tensor.dtype for tensor in _tensors(values)} & set(_MIXED)) > 1
        error = None
        # With gradients as it was traced, because attention chooses its kernel by that; without where it writes to an
        # input that would be a leaf.
        for dtype, grad in product(
            (None, torch.float32) if mixed else (None,), (True, False) if backward else (False,)
        ):
            try:
                return _run(node, values, backward, dtype, grad)
            # What a node's own Python raises on fake tensors is anybody's guess; it is reported where it matters.
            except Exception as raised:  # noqa: BLE001
                error = raised
        reason = str(error).strip().split("\n", 1)[0][:120]
        unknown = f"{type(error).__name__}: {reason}"
        return NodeEffect(effect=Effect.MIXES, sources=frozenset(range(len(values))), unknown=unknown)


# Core ATen operations whose every output element is an input element.  Core ATen is closed: what is not in it is a
# view, tagged, or comes down to it by PyTorch's decompositions.
_MOVES = frozenset(
    """_to_copy cat clone constant_pad_nd copy copy_ embedding flip gather index index_put index_put_ index_select
    masked_scatter masked_select permute reflection_pad1d reflection_pad2d reflection_pad3d repeat replication_pad1d
    replication_pad2d replication_pad3d roll scatter scatter_ select_scatter slice_scatter _unsafe_view
    _unsafe_index _unsafe_index_put lift_fresh lift_fresh_copy _reshape_copy fill fill_ zero zero_ tril triu""".split()
)
# Those that no tag and no decomposition tells: random numbers that only look at the input's shape, or scale it.
_FRESH = frozenset(("bernoulli", "bernoulli_", "normal_", "uniform_", "random_", "exponential_"))
_ELEMENTWISE = frozenset(("rrelu_with_noise", "rrelu_with_noise_", "native_dropout", "_fused_dropout"))


# Elementwise operations that are linear, and those that are so in each of their factors.  What is in neither bends.
_LINEAR = frozenset(("add", "sub", "rsub", "neg", "clone", "positive", "conj", "view_as_real"))
_MULTIPLIES = frozenset(("mul", "div", "native_dropout", "where", "masked_fill", "addcmul", "lerp"))


class _Recorder(TorchDispatchMode):
    """Follows, through the operations of a node, which inputs each tensor comes from, and what was done on the way."""

    supports_higher_order_operators = True

    def __init__(self, inputs: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[Product] = []
        self.written: set[int] = set()
        self.operations: set[str] = set()
        self.bends = False
        self.factors: list[tuple[frozenset[int], ...]] = []
        self._alive: list[Tensor] = []  # so that no id is used twice
        self._origins: dict[int, frozenset[int]] = {}
        self._effects: dict[int, Effect] = {}
        self._memory: dict[Hashable, set[int]] = {}
        for position, tensors in enumerate(inputs):
            for tensor in tensors:
                self._keep(tensor, frozenset((position,)), Effect.MOVES)
                self._memory.setdefault(storage_key(tensor), set()).add(position)

    def result(self, outputs: Sequence[Tensor]) -> tuple[Effect, frozenset[int]]:
        """The effect on the outputs and on what was written to, and the inputs that they depend on."""
        sources = frozenset().union(*(self._origins.get(id(tensor), frozenset()) for tensor in outputs))
        effects = [self._effects.get(id(tensor), Effect.FRESH) for tensor in outputs]
        return _worst(effects) if effects else Effect.FRESH, sources

    def memory(self, tensor: Tensor) -> frozenset[int]:
        """The inputs whose memory a tensor shares."""
        return frozenset(self._memory.get(storage_key(tensor), ()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        name = func._overloadpacket.__name__
        if _asks_only(func):
            return func(*args, **kwargs)
        if not is_product(func):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        self.operations.add(name)
        effect = self._effect(func, name)
        if effect is Effect.MIXES and not is_product(func) and func in decompositions():
            # It may be elementwise in parts, as glu is.
            return self._decomposed(func, args, kwargs)
        tensors = _tensors((args, kwargs))
        known = [tensor for tensor in tensors if id(tensor) in self._origins]
        result = func(*args, **kwargs)
        if effect is Effect.MIXES and (is_product(func) or _may_be_product(tensors, result)):
            self._add_product(func, args, kwargs, result)
        before = _worst([self._effects[id(tensor)] for tensor in known]) if known else Effect.FRESH
        after = Effect.FRESH if effect is Effect.FRESH or not known else _worst([before, effect])
        origins = frozenset().union(*(self._origins[id(tensor)] for tensor in known)) if known else frozenset()
        if effect is Effect.COMPUTES and known:
            self._note_shape(name.removesuffix("_"), [self._origins[id(tensor)] for tensor in known])
        if effect is Effect.FRESH:
            origins = frozenset()
        for tensor in _written(func, args, kwargs):
            key = storage_key(tensor)
            self.written |= self._memory.get(key, set())
            for other in [other for other in self._alive if storage_key(other) == key] or [tensor]:
                self._keep(other, origins, after)
        for tensor in _tensors(result):
            self._keep(tensor, origins, after)
        return result

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        before = len(self.products)
        with self:
            result = decompositions()[func](*args, **kwargs)
        tensors = _tensors((args, kwargs))
        outputs = _tensors(result)
        mixes = any(self._effects.get(id(output)) is Effect.MIXES for output in outputs)
        if mixes and len(self.products) == before and _may_be_product(tensors, result):
            self._add_product(func, args, kwargs, result)
        return result

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A body that is called once counts as its operations; of others only the name and the operands are known."""
        if func.__name__ == "invoke_subgraph":
            with self:
                return args[0](*args[2:])
        tensors = _tensors((args, kwargs))
        result = func(*args, **kwargs)
        origins = frozenset().union(*(self._origins.get(id(tensor), frozenset()) for tensor in tensors))
        written = _tensors(result)
        effect = Effect.MIXES
        if func.__name__.startswith("triton_kernel_wrapper"):
            # What it writes are the tensors that hold nothing yet, or any.
            fresh = [tensor for tensor in tensors if not self._origins.get(id(tensor))]
            written += fresh or tensors
            effect = Effect.COMPUTES if is_elementwise(triton_kernel(kwargs["kernel_idx"])) else Effect.MIXES
            self.bends = True
        if effect is Effect.MIXES:
            self._add_product(func, args, kwargs, result)
        for tensor in written:
            self.written |= self._memory.get(storage_key(tensor), set())
            self._keep(tensor, origins, effect)
        return result

    def _effect(self, func: Any, name: str) -> Effect:
        if is_product(func):
            return Effect.MIXES
        if func.namespace == "prims":  # parts of decompositions; ATen's operations of the same names are tagged
            func = _of_aten(func, name)
        functional = name.removesuffix("_") if func._schema.is_mutable else name
        if name in _FRESH or functional.endswith("_like") or functional.startswith("new_") or "empty" in functional:
            return Effect.FRESH
        if func.is_view or name in _MOVES or functional in _MOVES or name == "convert_element_type":
            return Effect.MOVES
        tagged = torch.Tag.pointwise in func.tags or torch.Tag.pointwise in _functional_tags(functional)
        return Effect.COMPUTES if tagged or name in _ELEMENTWISE else Effect.MIXES

    def _note_shape(self, name: str, origins: list[frozenset[int]]) -> None:
        """Whether an elementwise operation is linear; of a multiplication that depends on what its factors are."""
        if name in _MULTIPLIES:
            self.factors.append(tuple(origins))
        elif name not in _LINEAR:
            self.bends = True

    def _add_product(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        tensors = _tensors((args, kwargs))
        name = getattr(func, "_overloadpacket", func).__name__
        operands = _contracted(name, tensors, is_product(func))
        self.products.append(
            Product(
                op=name,
                operands=tuple(self._origins.get(id(tensor), frozenset()) for tensor in operands),
                flops=flops_of(func, args, kwargs, result),
                computed=tuple(self._effects.get(id(tensor)) is not Effect.MOVES for tensor in operands),
            )
        )

    def _keep(self, tensor: Tensor, origins: frozenset[int], effect: Effect) -> None:
        if id(tensor) in self._origins:  # written to: what it was stays part of what it is
            origins |= self._origins[id(tensor)]
            effect = _worst([effect, self._effects[id(tensor)]])
        else:
            self._alive.append(tensor)
        self._origins[id(tensor)], self._effects[id(tensor)] = origins, effect


def _asks_only(func: Any) -> bool:
    """Whether an operation returns no tensors but what is known of one: its device, sizes, strides."""
    return func.namespace == "prim" or not any("Tensor" in str(value.type) for value in func._schema.returns)


def _tensors(value: Any) -> list[Tensor]:
    """Those within nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _worst(effects: Sequence[Effect]) -> Effect:
    order = (Effect.FRESH, Effect.MOVES, Effect.COMPUTES, Effect.MIXES)
    return max(effects, key=order.index)


def _contracted(name: str, tensors: list[Tensor], known: bool) -> list[Tensor]:
    """Of a product's operands those that are multiplied: no bias, scale or mask."""
    if not known:
        return [tensor for tensor in tensors if tensor.ndim >= 2 and tensor.is_floating_point()]
    if "attention" in name:
        return tensors[:3]
    return tensors[1:3] if name.startswith(("add", "baddbmm")) else tensors[:2]


def _may_be_product(tensors: Sequence[Tensor], result: Any) -> bool:
    """Whether an operation that nobody knows could be a contraction: of two floating-point matrices, to no number."""
    matrices = sum(tensor.ndim >= 2 and tensor.is_floating_point() for tensor in tensors)
    return matrices >= 2 and any(tensor.ndim for tensor in _tensors(result))


def _of_aten(func: Any, name: str) -> Any:
    packet = getattr(torch.ops.aten, name, None)
    return func if packet is None else getattr(packet, packet.overloads()[0])


def _functional_tags(name: str) -> set[Any]:
    packet = getattr(torch.ops.aten, name, None)
    return (
        set() if packet is None else {tag for overload in packet.overloads() for tag in getattr(packet, overload).tags}
    )


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _needs_backward(value: Any) -> bool:
    return any(tensor.requires_grad for tensor in _tensors(value))


def _key(node: Node, values: Sequence[Any], backward: bool) -> Hashable:
    """What the effect of a node depends on."""
    positions = {source: position for position, source in enumerate(node.all_input_nodes)}
    arguments = map_arg((node.args, dict(node.kwargs)), lambda source: ("input", positions[source]))
    described = [_described(leaf) for value in values for leaf in tree_flatten(value)[0]]
    return node.op, node.target, repr(arguments), tuple(described), backward


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        strides = leaf.stride() if leaf.layout is torch.strided else ()
        return str(tuple(leaf.shape)), str(tuple(strides)), leaf.dtype, leaf.device, leaf.requires_grad
    return str(leaf) if isinstance(leaf, torch.SymInt) else id(leaf)


def _run(node: Node, values: Sequence[Any], backward: bool, dtype: torch.dtype | None, grad: bool) -> NodeEffect:
    inputs = node.all_input_nodes
    with _fakes(values, dtype) as fakes:
        handed = dict(zip(inputs, fakes, strict=True))
        leaves = [_tensors(fake) for fake in fakes]
        args = map_arg(node.args, handed.__getitem__)
        kwargs = map_arg(dict(node.kwargs), handed.__getitem__)
        recorder, saved = _Recorder(leaves), list[Tensor]()
        with torch.set_grad_enabled(grad), _saved_to(saved), recorder:
            output = _call(node, args, kwargs)
        outputs = _tensors(output)
        changed = [leaf for position in recorder.written for leaf in leaves[position]]
        effect, sources = recorder.result([*outputs, *changed])
        unknown = any(map(has_unbacked_size, _tensors(values)))
        products = recorder.products
        if unknown:
            products = [replace(found, flops=None) for found in products]
        backward_flops = 0
        if products and backward and not unknown:
            backward_flops = _backward_flops(node, args, kwargs)
        return NodeEffect(
            effect=effect,
            sources=sources,
            written=frozenset(recorder.written),
            aliased=frozenset().union(*(recorder.memory(tensor) for tensor in outputs)) if outputs else frozenset(),
            layout=_layout(leaves, outputs, recorder),
            products=tuple(products),
            backward_flops=backward_flops,
            saves=bool(saved),
            bends=recorder.bends,
            factors=tuple(recorder.factors),
        )


def _call(node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


@contextmanager
def _fakes(values: Sequence[Any], dtype: torch.dtype | None = None) -> Iterator[list[Any]]:
    """The values with fake tensors of their own, of sizes that are known: nothing here guards on what dynamo traced.

    Args:
        dtype: of all tensors in one of ``_MIXED``, where autocast lets a node read several.
    """

    def fake(tensor: Tensor) -> Tensor:
        sizes = [concrete_size(size) for size in tensor.shape]
        strides = [concrete_size(stride) for stride in tensor.stride()]
        own = dtype if dtype is not None and tensor.dtype in _MIXED else tensor.dtype
        made = torch.empty_strided(sizes, strides, dtype=own, device=tensor.device)
        return made.requires_grad_(tensor.requires_grad)

    # Autocast, where it surrounds the compilation, is not what the node saw if it is switched within the graph.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(False), _no_autocast():
        sized = tree_map_only((torch.SymInt,), concrete_size, list(values))
        yield tree_map_only(Tensor, fake, sized)


# What autocast casts between.
_MIXED = (torch.float16, torch.bfloat16, torch.float32)


@contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _saved_to(saved: list[Tensor]) -> Any:
    """The user may compile within hooks that count what is saved, as those of activation checkpointing do."""
    nothing = torch.empty(0)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return nothing

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed)


class _Counter(TorchDispatchMode):
    """Adds up the floating-point operations of what runs."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        composite = not isinstance(func, torch._ops.HigherOrderOperator) and not _asks_only(func)
        if composite and not is_product(func):
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        if is_product(func):
            self.flops += flops_of(func, args, kwargs, result) or 0
        return result


def _backward_flops(node: Node, args: Any, kwargs: Any) -> int:
    """Of a backward through the node to all of its inputs that require gradients."""
    leaves = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
    # As in _saved_to; a saved output that is not detached would hold itself for ever.
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)
    with torch.enable_grad(), hooks, torch.autograd.set_multithreading_enabled(False):
        # Copies, because a leaf must not be written to.
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        outputs = _tensors(_call(node, args, kwargs))
        outputs = [output for output in outputs if output.requires_grad]
        counter = _Counter()
        if outputs and leaves:
            gradients = [torch.empty_like(output) for output in outputs]
            with counter:
                torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    return counter.flops


def _layout(inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Tensor], recorder: _Recorder) -> Layout:
    """How a matrix lies that is an input's, told by the strides of its view; or by the operation, if that copies."""
    effect, sources = recorder.result(outputs)
    if effect is not Effect.MOVES or len(outputs) != 1 or len(sources) != 1:
        return Layout.OTHER
    (after,), of_input = outputs, inputs[next(iter(sources))]
    if len(of_input) != 1:
        return Layout.OTHER
    before = of_input[0]
    if before.ndim != 2 or after.ndim != 2 or after.dtype not in (*_MIXED, torch.float64):
        return Layout.OTHER
    if storage_key(before) != storage_key(after):
        copies = recorder.operations <= {"clone", "_to_copy"} and before.shape == after.shape
        return Layout.SAME if copies else Layout.OTHER
    if before.storage_offset() != after.storage_offset():
        return Layout.OTHER
    lies, flipped = _extents(after), _extents(before)[::-1]
    if lies == _extents(before):
        return Layout.SAME
    return Layout.TRANSPOSED if lies == flipped else Layout.OTHER


def _extents(matrix: Tensor) -> list[tuple[int, int]]:
    """Size and stride of each dimension; the stride along one of a single element says nothing."""
    return [(size, stride if size > 1 else 0) for size, stride in zip(matrix.shape, matrix.stride(), strict=True)]
