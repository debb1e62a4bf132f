"""Which operations are contractions, and how many floating-point operations they take, by PyTorch's own counter."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from sparse_compile.torch_internals.dispatch import tree_map_only

# Of shapes; the result's comes last.
_Formula = Callable[..., int]


def is_product(func: Any) -> bool:
    """Whether an operation of ATen, or one of higher order, is a contraction."""
    return _packet(func) in flop_registry or _name(func) in _FORMULAS


def flops_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int | None:
    """2 M N K of a matrix product, and the like; None where nobody has a formula."""
    formula = _FORMULAS.get(_name(func))
    if formula is None:
        counted = flop_registry.get(_packet(func))
        return None if counted is None else int(counted(*args, **kwargs, out_val=result))
    shapes, shapes_by_name, of_result = tree_map_only(Tensor, lambda tensor: tensor.shape, (args, kwargs, result))
    return int(formula(*shapes, **shapes_by_name, result=of_result))


def _packet(func: Any) -> Any:
    return getattr(func, "_overloadpacket", func)


def _name(func: Any) -> str:
    namespace = getattr(func, "namespace", "")
    name = str(getattr(_packet(func), "__name__", ""))
    return name if namespace == "aten" else f"{namespace}::{name}"


def _matrix_vector(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(matrix)


def _added_matrix_vector(_: Any, matrix: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * prod(matrix)


def _added_batch(_: Any, batch: Sequence[int], right: Sequence[int], *__: Any, **___: Any) -> int:
    return 2 * prod(batch) * right[-1]


def _grouped(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Rows ``[T, K]`` by groups ``[E, K, N]``, batches ``[E, T, K]``, or a contraction over the rows of all groups."""
    return 2 * a[-2] * prod(b) if len(a) == 3 and len(b) == 2 else 2 * prod(a) * b[-1]


def _product(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * prod(a) * b[-1]


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products; with fewer heads of keys than of queries, too, which the counter of PyTorch 2.11 refuses."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(
    _: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *__: Any, **___: Any
) -> int:
    """Five products: the scores again, and the gradients of scores, queries, keys and values."""
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


_ATTENTION = "_scaled_dot_product_{}_attention{}"
_KERNELS = ("flash", "efficient", "cudnn")
# Contractions that PyTorch's counter does not know, or not in each supported version.
_FORMULAS: Mapping[str, _Formula] = {
    "mv": _matrix_vector,
    "addmv": _added_matrix_vector,
    "addmv_": _added_matrix_vector,
    "dot": _matrix_vector,
    "vdot": _matrix_vector,
    "addmm_": lambda _, a, b, *__, **___: _product(a, b),
    "baddbmm_": lambda _, a, b, *__, **___: _product(a, b),
    "addbmm": _added_batch,
    "addbmm_": _added_batch,
    "_int_mm": _product,
    "_scaled_mm_v2": _product,
    "_grouped_mm": _grouped,
    "_scaled_grouped_mm": _grouped,
    "_scaled_grouped_mm_v2": _grouped,
    **{_ATTENTION.format(kernel, ""): _attention for kernel in _KERNELS},
    **{_ATTENTION.format(kernel, "_backward"): _attention_backward for kernel in _KERNELS},
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
    "transformers::grouped_mm_fallback": _grouped,
}
