"""What a linear of experts costs: the ``components`` on tokens that lie sorted by expert.

Two routings stand for all: each expert with as many tokens, and a skewed one, in which the share of the expert of rank
``r`` is proportional to ``1 / r`` (Zipf's law).
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_compile.kernels import grouped_ops, ops
from sparse_compile.kernels.formats import (
    allows_fast_accum,
    grouped_columns,
    metadata_shape,
    unscaled_dtype,
    values_shape,
)

if TYPE_CHECKING:
    from sparse_compile.kernels.timing.components import LinearShape, RandomOperands

_METADATA_WORD = 0x4C9E8D44  # eight legal pairs of positions
_SCALE_INV = 2.0**-12


def ends(tokens: int, experts: int, *, skewed: bool) -> list[int]:
    """Where the tokens of each expert end."""
    shares = [1 / (1 + rank) if skewed else 1.0 for rank in range(experts)]
    return [round(tokens * share / sum(shares)) for share in accumulate(shares)]


def dense_fprop(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    return _dense(s, make.normal(s.tokens, s.in_features, dtype=s.dtype), make.weight_in(s, s.dtype).mT, make)


def dense_dgrad(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    return _dense(s, make.normal(s.tokens, s.out_features, dtype=s.dtype), make.weight_in(s, s.dtype), make)


def dense_wgrad(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    x, g = (make.normal(s.tokens, size, dtype=s.dtype) for size in (s.in_features, s.out_features))
    a, b = (x, g) if s.transposed else (g, x)
    if s.dtype is torch.bfloat16:
        return partial(torch._grouped_mm, a.t(), b, offs=_offsets(s, make))
    last = ends(s.tokens, _experts(s), skewed=s.skewed)
    return lambda: [a[first:end].t() @ b[first:end] for first, end in zip([0, *last], last, strict=False)]


def _dense(s: "LinearShape", x: Tensor, matrices: Tensor, make: "RandomOperands") -> Callable[[], object]:
    if s.dtype is torch.bfloat16:
        return partial(torch._grouped_mm, x, matrices, offs=_offsets(s, make))
    # There is no grouped product in other dtypes: libraries loop.
    last = ends(s.tokens, _experts(s), skewed=s.skewed)
    return lambda: torch.cat([x[a:b] @ matrix for a, b, matrix in zip([0, *last], last, matrices, strict=False)])


def fp8_fprop(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    operands = make.fp8(s.tokens, s.in_features), make.fp8(_experts(s), s.out_features, s.in_features)
    return _scaled_mm(s, *operands, make, accurate=False)


def fp8_dgrad(s: "LinearShape", make: "RandomOperands", accurate: bool) -> Callable[[], object]:
    g = make.fp8(s.tokens, s.out_features, dtype=s.grad_dtype)
    return _scaled_mm(s, g, make.fp8(_experts(s), s.in_features, s.out_features), make, accurate)


def _scaled_mm(s: "LinearShape", a: Tensor, b: Tensor, make: "RandomOperands", accurate: bool) -> Callable[[], object]:
    scale_inv, fast = make.ones(_experts(s), _SCALE_INV), allows_fast_accum(b.shape[2]) and not accurate
    return partial(grouped_ops.grouped_scaled_mm, a, b, scale_inv, _offsets(s, make), unscaled_dtype(s.dtype), fast)


def fp8_wgrad(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    total = grouped_columns(s.tokens, _experts(s))
    grad_t, x_t = make.fp8(s.out_features, total, dtype=s.grad_dtype), make.fp8(s.in_features, total)
    a, b = (x_t, grad_t) if s.transposed else (grad_t, x_t)
    scale_inv, out_dtype = make.ones(_experts(s), _SCALE_INV), unscaled_dtype(s.weight_dtype)
    return partial(grouped_ops.grouped_wgrad_scaled_mm, a, b, scale_inv, _offsets(s, make), out_dtype)


def sparse_fprop(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    return _sparse_mm(s, s.out_features, make.fp8(s.tokens, s.in_features), make)


def sparse_dgrad(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    return _sparse_mm(s, s.in_features, make.fp8(s.tokens, s.out_features, dtype=s.grad_dtype), make)


def _sparse_mm(s: "LinearShape", rows: int, dense: Tensor, make: "RandomOperands") -> Callable[[], object]:
    experts, columns = _experts(s), dense.shape[1]
    shape = (experts, *metadata_shape(rows, columns))
    metadata = torch.full(shape, _METADATA_WORD, device=make.device, dtype=torch.int32)
    operands = (make.fp8(experts, *values_shape(rows, columns)), metadata, dense, make.ones(experts, _SCALE_INV))
    return partial(grouped_ops.grouped_sparse_mm, *operands, make.ones(s.tokens), _offsets(s, make), s.dtype, True)


def sparse_wgrad(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    total = grouped_columns(s.tokens, _experts(s))
    operands = (*make.sparse(s.out_features, total, s.grad_dtype), make.fp8(s.in_features, total))
    scale_inv, offsets = make.ones(_experts(s), _SCALE_INV), _offsets(s, make)
    return partial(
        grouped_ops.grouped_wgrad_sparse_mm, *operands, scale_inv, offsets, s.weight_dtype, s.transposed
    )  # fmt: skip


def transpose_tokens(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    return partial(grouped_ops.grouped_transpose_tokens, make.fp8(s.tokens, s.in_features), _offsets(s, make))


def cast_transpose(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    return partial(grouped_ops.grouped_cast_transpose, *make.gradient(s), _offsets(s, make), s.grad_dtype)


def cast_mvue(s: "LinearShape", make: "RandomOperands", approximate: bool, stochastic: bool) -> Callable[[], object]:
    gradient, seed, offsets = make.gradient(s), make.seed(), _offsets(s, make)
    return partial(
        grouped_ops.grouped_cast_mvue, *gradient, seed, 0, offsets, approximate, stochastic, s.grad_dtype
    )  # fmt: skip


def add_masked_decay(s: "LinearShape", make: "RandomOperands") -> Callable[[], object]:
    grads, weights = (make.weight_in(s, s.weight_dtype) for _ in range(2))
    factor = make.ones(1, 2e-4)

    def run() -> None:
        for grad, weight in zip(grads, weights, strict=True):
            ops.add_masked_decay_(grad, weight, factor)

    return run


def _experts(s: "LinearShape") -> int:
    assert s.experts is not None
    return s.experts


def _offsets(s: "LinearShape", make: "RandomOperands") -> Tensor:
    return torch.tensor(ends(s.tokens, _experts(s), skewed=s.skewed), device=make.device, dtype=torch.int32)
