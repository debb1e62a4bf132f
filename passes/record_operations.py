"""What operations do to the elements of tensors, told by a dispatch mode that sees them run.

PyTorch knows of each of its operations whether it is elementwise (``torch.Tag.pointwise``), a view, or a composition
of others.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from sparse_compile.passes.flops import flops_of, is_product
from sparse_compile.passes.triton_kernels import is_elementwise
from sparse_compile.torch_internals.dispatch import HigherOrderOperator, TorchDispatchMode, tree_flatten
from sparse_compile.torch_internals.operations import decompositions, triton_kernel
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


class Recorder(TorchDispatchMode):
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
        if isinstance(func, HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        name = func._overloadpacket.__name__
        if asks_only(func):
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
        tensors = tensors_in((args, kwargs))
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
            self._write(tensor, origins, after)
        for tensor in tensors_in(result):
            self._keep(tensor, origins, after)
        return result

    def _decomposed(self, func: Any, args: Any, kwargs: Any) -> Any:
        before = len(self.products)
        with self:
            result = decompositions()[func](*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        outputs = tensors_in(result)
        mixes = any(self._effects.get(id(output)) is Effect.MIXES for output in outputs)
        if mixes and len(self.products) == before and _may_be_product(tensors, result):
            self._add_product(func, args, kwargs, result)
        return result

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A body that is called once counts as its operations; of others only the name and the operands are known."""
        if func.__name__ == "invoke_subgraph":
            with self:
                return args[0](*args[2:])
        tensors = tensors_in((args, kwargs))
        result = func(*args, **kwargs)
        origins = frozenset().union(*(self._origins.get(id(tensor), frozenset()) for tensor in tensors))
        written = tensors_in(result)
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
            self._write(tensor, origins, effect)
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
        tensors = tensors_in((args, kwargs))
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

    def _write(self, tensor: Tensor, origins: frozenset[int], effect: Effect) -> None:
        """What is written to a tensor is read through every other that shares its memory."""
        key = storage_key(tensor)
        self.written |= self._memory.get(key, set())
        self._keep(tensor, origins, effect)
        for other in self._alive:
            if other is not tensor and storage_key(other) == key:
                self._keep(other, origins, effect)

    def _keep(self, tensor: Tensor, origins: frozenset[int], effect: Effect) -> None:
        if id(tensor) in self._origins:  # written to: what it was stays part of what it is
            origins |= self._origins[id(tensor)]
            effect = _worst([effect, self._effects[id(tensor)]])
        else:
            self._alive.append(tensor)
        self._origins[id(tensor)], self._effects[id(tensor)] = origins, effect


def asks_only(func: Any) -> bool:
    """Whether an operation returns no tensors but what is known of one: its device, sizes, strides."""
    return func.namespace == "prim" or not any("Tensor" in str(value.type) for value in func._schema.returns)


def tensors_in(value: Any) -> list[Tensor]:
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
    return matrices >= 2 and any(tensor.ndim for tensor in tensors_in(result))


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
            yield from tensors_in(value)
