"""The ops of experts: schemas, fakes and dispatch, as in ``ops``.  ``torch.ops.sparse_compile.grouped_*``

There are no kernels yet: GPUs run the eager definitions, too, which read ``offsets`` on the host.
"""

import torch
from torch import Tensor

from sparse_compile.kernels import ops, reference
from sparse_compile.kernels.formats import grouped_columns, metadata_shape, values_shape
from sparse_compile.kernels.ops import define, empty


def missing_kernels(device: torch.device) -> str:
    """Why there are no kernels for experts on ``device``."""
    return ops.missing_kernels(device) or "no kernels for experts yet"


def _grouped_mm_fake(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return empty(a, (a.shape[0], b.shape[2]), a.dtype)


grouped_mm = define(
    "grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor", reference.grouped_mm, None, _grouped_mm_fake,
    any_strides=2,
)  # fmt: skip


def _grouped_wgrad_mm_fake(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return empty(a, (offsets.shape[0], a.shape[1], b.shape[1]), a.dtype)


grouped_wgrad_mm = define(
    "grouped_wgrad_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    reference.grouped_wgrad_mm,
    None,
    _grouped_wgrad_mm_fake,
)


def _grouped_sparse_mm_fake(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    offsets: Tensor,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    return empty(dense, (dense.shape[0], values.shape[1]), out_dtype)


grouped_sparse_mm = define(
    "grouped_sparse_mm(Tensor values, Tensor metadata, Tensor dense, Tensor scale_inv, Tensor? dense_scale_inv, "
    "Tensor offsets, ScalarType out_dtype, bool use_fast_accum) -> Tensor",
    reference.grouped_sparse_mm,
    None,
    _grouped_sparse_mm_fake,
)


def _grouped_scaled_mm_fake(
    a: Tensor, b: Tensor, scale_inv: Tensor, offsets: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    return empty(a, (a.shape[0], b.shape[1]), out_dtype)


grouped_scaled_mm = define(
    "grouped_scaled_mm(Tensor a, Tensor b, Tensor scale_inv, Tensor offsets, ScalarType out_dtype, "
    "bool use_fast_accum) -> Tensor",
    reference.grouped_scaled_mm,
    None,
    _grouped_scaled_mm_fake,
)


def _grouped_transpose_tokens_fake(x: Tensor, offsets: Tensor) -> Tensor:
    return empty(x, (x.shape[1], grouped_columns(x.shape[0], offsets.shape[0])), x.dtype)


grouped_transpose_tokens = define(
    "grouped_transpose_tokens(Tensor x, Tensor offsets) -> Tensor",
    reference.grouped_transpose_tokens,
    None,
    _grouped_transpose_tokens_fake,
)


def _grouped_cast_transpose_fake(
    x: Tensor, row_scale: Tensor, token_scale: Tensor, offsets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    tokens, columns = x.shape
    return empty(x, (tokens, columns), dtype), empty(x, (columns, grouped_columns(tokens, offsets.shape[0])), dtype)


grouped_cast_transpose = define(
    "grouped_cast_transpose(Tensor x, Tensor row_scale, Tensor token_scale, Tensor offsets, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    reference.grouped_cast_transpose,
    None,
    _grouped_cast_transpose_fake,
)


def _grouped_cast_mvue_fake(
    grad: Tensor,
    row_scale: Tensor,
    token_scale: Tensor,
    seed: Tensor,
    index: int,
    offsets: Tensor,
    approximate: bool,
    stochastic: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, columns = grad.shape
    total = grouped_columns(tokens, offsets.shape[0])
    return (
        empty(grad, (tokens, columns), dtype),
        empty(grad, values_shape(columns, total), dtype),
        empty(grad, metadata_shape(columns, total), torch.int32),
    )


grouped_cast_mvue = define(
    "grouped_cast_mvue(Tensor grad, Tensor row_scale, Tensor token_scale, Tensor seed, int index, Tensor offsets, "
    "bool approximate, bool stochastic, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    reference.grouped_cast_mvue,
    None,
    _grouped_cast_mvue_fake,
)


def _grouped_wgrad_sparse_mm_fake(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    transpose: bool,
) -> Tensor:
    rows, columns = values.shape[0], dense.shape[0]
    return empty(dense, (offsets.shape[0], *((columns, rows) if transpose else (rows, columns))), out_dtype)


grouped_wgrad_sparse_mm = define(
    "grouped_wgrad_sparse_mm(Tensor values, Tensor metadata, Tensor dense, Tensor scale_inv, Tensor offsets, "
    "ScalarType out_dtype, bool transpose) -> Tensor",
    reference.grouped_wgrad_sparse_mm,
    None,
    _grouped_wgrad_sparse_mm_fake,
)


def _grouped_wgrad_scaled_mm_fake(
    a: Tensor, b: Tensor, scale_inv: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return empty(a, (offsets.shape[0], a.shape[0], b.shape[0]), out_dtype)


grouped_wgrad_scaled_mm = define(
    "grouped_wgrad_scaled_mm(Tensor a, Tensor b, Tensor scale_inv, Tensor offsets, ScalarType out_dtype) -> Tensor",
    reference.grouped_wgrad_scaled_mm,
    None,
    _grouped_wgrad_scaled_mm_fake,
)
