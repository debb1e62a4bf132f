"""What each node of a traced graph does to tensors, told by running it on fake ones.

The fake tensors have the sizes that dynamo recorded.  A ``Recorder`` sees the operations that the node is made of: any
spelling, method, composite or autograd.Function comes down to the same few of ATen.
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

from sparse_compile.passes.flops import flops_of, is_product
from sparse_compile.passes.record_operations import Effect, Product, Recorder, asks_only, tensors_in
from sparse_compile.torch_internals.autocast import no_autocast
from sparse_compile.torch_internals.dispatch import HigherOrderOperator, TorchDispatchMode, tree_flatten, tree_map_only
from sparse_compile.torch_internals.fake import FakeTensorMode
from sparse_compile.torch_internals.graph import example_value
from sparse_compile.torch_internals.sizes import concrete_size, has_unbacked_size
from sparse_compile.torch_internals.tensors import storage_key


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
        if not tensors_in(values):
            return NodeEffect(effect=Effect.FRESH)
        key = _key(node, values, _needs_backward(self._value_of(node)))
        if key not in self._known:
            self._known[key] = self._found(node, values)
        return self._known[key]

    def _found(self, node: Node, values: list[Any]) -> NodeEffect:
        backward = _needs_backward(self._value_of(node))
        mixed = len({tensor.dtype for tensor in tensors_in(values)} & set(_MIXED)) > 1
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


def _needs_backward(value: Any) -> bool:
    return any(tensor.requires_grad for tensor in tensors_in(value))


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
        leaves = [tensors_in(fake) for fake in fakes]
        args = map_arg(node.args, handed.__getitem__)
        kwargs = map_arg(dict(node.kwargs), handed.__getitem__)
        recorder, saved = Recorder(leaves), list[Tensor]()
        with torch.set_grad_enabled(grad), _saved_to(saved), recorder:
            output = _call(node, args, kwargs)
        outputs = tensors_in(output)
        changed = [leaf for position in recorder.written for leaf in leaves[position]]
        effect, sources = recorder.result([*outputs, *changed])
        unknown = any(map(has_unbacked_size, tensors_in(values)))
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
    if isinstance(node.target, HigherOrderOperator) and node.target.__name__ == "invoke_subgraph":
        # Its body: where gradients are recorded, the operation itself would trace a backward, too.
        return args[0](*args[2:])
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
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(False), no_autocast():
        sized = tree_map_only((torch.SymInt,), concrete_size, list(values))
        yield tree_map_only(Tensor, fake, sized)


# What autocast casts between.
_MIXED = (torch.float16, torch.bfloat16, torch.float32)


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
        composite = not isinstance(func, HigherOrderOperator) and not asks_only(func)
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
    leaves = [tensor for tensor in tensors_in((args, kwargs)) if tensor.requires_grad]
    # As in _saved_to; a saved output that is not detached would hold itself for ever.
    hooks = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)
    one_thread = torch.autograd.set_multithreading_enabled(False)
    # The user may look for NaN, which fake gradients do not tell.
    with torch.enable_grad(), hooks, one_thread, torch.autograd.set_detect_anomaly(False):
        # Copies, because a leaf must not be written to.
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        outputs = tensors_in(_call(node, args, kwargs))
        outputs = [output for output in outputs if output.requires_grad]
        counter = _Counter()
        if outputs and leaves:
            gradients = [torch.empty_like(output) for output in outputs]
            with counter:
                torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
    return counter.flops


def _layout(inputs: Sequence[Sequence[Tensor]], outputs: Sequence[Tensor], recorder: Recorder) -> Layout:
    """How a matrix lies that is an input's, told by the strides of its view; or by the operation, if that copies."""
    effect, sources = recorder.result(outputs)
    if effect is not Effect.MOVES or len(outputs) != 1 or len(sources) != 1:
        return Layout.OTHER
    (after,), of_input = outputs, inputs[next(iter(sources))]
    if len(of_input) != 1:
        return Layout.OTHER
    before = of_input[0]
    # Of the matrices in one tensor, all lie alike.
    if before.ndim not in (2, 3) or after.ndim != before.ndim or after.dtype not in (*_MIXED, torch.float64):
        return Layout.OTHER
    if storage_key(before) != storage_key(after):
        copies = recorder.operations <= {"clone", "_to_copy"} and before.shape == after.shape
        return Layout.SAME if copies else Layout.OTHER
    if before.storage_offset() != after.storage_offset():
        return Layout.OTHER
    lies, (*stack, rows, columns) = _extents(after), _extents(before)
    if lies == [*stack, rows, columns]:
        return Layout.SAME
    return Layout.TRANSPOSED if lies == [*stack, columns, rows] else Layout.OTHER


def _extents(matrix: Tensor) -> list[tuple[int, int]]:
    """Size and stride of each dimension; the stride along one of a single element says nothing."""
    return [(size, stride if size > 1 else 0) for size, stride in zip(matrix.shape, matrix.stride(), strict=True)]
