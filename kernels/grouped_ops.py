"""The ops of experts: schemas, fakes and dispatch, as in ``ops``.  ``torch.ops.sparse_compile.grouped_*``"""

import torch
from torch import Tensor

from sparse_compile.kernels import ops, reference
from sparse_compile.kernels.formats import PAD, grouped_columns, metadata_shape, values_shape
from sparse_compile.kernels.ops import define, empty
from sparse_compile.torch_internals.autocast import no_autocast

# Rows of A that a warpgroup of the GEMM multiplies: those of two experts are never in one of its blocks.
FEATURES_MULTIPLE = 64


def _grouped_mm_fake(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return empty(a, (a.shape[0], b.shape[2]), a.dtype)


grouped_mm = define(
    "grouped_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    reference.grouped_mm,
    lambda: _grouped_mm_kernel,
    _grouped_mm_fake,
    any_strides=2,
)


def _grouped_mm_kernel(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """PyTorch's kernel takes bf16 alone; the definition reads offsets on the host."""
    if a.dtype != torch.bfloat16:
        with no_autocast():
            return reference.grouped_mm(a, b, offsets)
    return torch._grouped_mm(a, b, offs=offsets.int())


def _grouped_wgrad_mm_kernel(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    if a.dtype != torch.bfloat16:
        with no_autocast():
            return reference.grouped_wgrad_mm(a, b, offsets)
    return torch._grouped_mm(a.t(), b, offs=offsets.int())


def _grouped_wgrad_mm_fake(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return empty(a, (offsets.shape[0], a.shape[1], b.shape[1]), a.dtype)


grouped_wgrad_mm = define(
    "grouped_wgrad_mm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    reference.grouped_wgrad_mm,
    lambda: _grouped_wgrad_mm_kernel,
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
    ops.launcher(
        "sparse_gemm.grouped.launch_grouped_sparse_gemm",
        _grouped_sparse_mm_fake,
        lambda values, metadata, dense, scale_inv, dense_scale_inv, offsets, out_dtype, use_fast_accum, out: (
            (values, metadata, dense, scale_inv, dense_scale_inv, offsets, out)
        ),
    ),
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
    lambda: _grouped_scaled_mm_kernel,
    _grouped_scaled_mm_fake,
)


def _grouped_scaled_mm_kernel(
    a: Tensor, b: Tensor, scale_inv: Tensor, offsets: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    """PyTorch's, which has a scale for each row of either side, and returns bf16."""
    ones = torch.ones(a.shape[0], dtype=torch.float32, device=a.device)
    of_rows = scale_inv[:, None].expand(b.shape[:2]).contiguous()
    product = torch._scaled_grouped_mm(
        a, b.mT, ones, of_rows, offs=offsets.int(), out_dtype=torch.bfloat16, use_fast_accum=use_fast_accum
    )
    return product.to(out_dtype)


def _grouped_transpose_tokens_fake(x: Tensor, offsets: Tensor) -> Tensor:
    return empty(x, (x.shape[1], grouped_columns(x.shape[0], offsets.shape[0])), x.dtype)


grouped_transpose_tokens = define(
    "grouped_transpose_tokens(Tensor x, Tensor offsets) -> Tensor",
    reference.grouped_transpose_tokens,
    ops.launcher("activation.cast_transpose.launch_grouped_transpose_tokens", _grouped_transpose_tokens_fake),
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
    ops.launcher(
        "activation.cast_transpose.launch_grouped_cast_transpose",
        _grouped_cast_transpose_fake,
        lambda x, row_scale, token_scale, offsets, dtype, *results: ((x, row_scale, token_scale, offsets, *results)),
    ),
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
    ops.launcher(
        "activation.cast_mvue.launch_grouped_cast_mvue",
        _grouped_cast_mvue_fake,
        lambda grad, row_scale, token_scale, seed, index, offsets, approximate, stochastic, dtype, *results: (
            (grad, row_scale, token_scale, seed, index, offsets, approximate, stochastic, *results)
        ),
    ),
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
    ops.launcher(
        "sparse_gemm.grouped.launch_grouped_wgrad",
        _grouped_wgrad_sparse_mm_fake,
        lambda values, metadata, dense, scale_inv, offsets, out_dtype, transpose, out: (
            (values, metadata, dense, scale_inv, offsets, out, transpose)
        ),
    ),
    _grouped_wgrad_sparse_mm_fake,
)


def _grouped_wgrad_scaled_mm_fake(
    a: Tensor, b: Tensor, scale_inv: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return empty(a, (offsets.shape[0], a.shape[0], b.shape[0]), out_dtype)


def _grouped_wgrad_scaled_mm_kernel(
    a: Tensor, b: Tensor, scale_inv: Tensor, offsets: Tensor, out_dtype: torch.dtype
) -> Tensor:
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
    ends = ((counts + PAD - 1) // PAD * PAD).cumsum(0, dtype=torch.int32)  # of each expert's columns
    of_a = scale_inv.repeat_interleave(a.shape[0], output_size=scale_inv.shape[0] * a.shape[0])
    of_b = torch.ones(scale_inv.shape[0] * b.shape[0], dtype=torch.float32, device=b.device)
    product = torch._scaled_grouped_mm(a, b.t(), of_a, of_b, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=False)
    return product.to(out_dtype)


grouped_wgrad_scaled_mm = define(
    "grouped_wgrad_scaled_mm(Tensor a, Tensor b, Tensor scale_inv, Tensor offsets, ScalarType out_dtype) -> Tensor",
    reference.grouped_wgrad_scaled_mm,
    lambda: _grouped_wgrad_scaled_mm_kernel,
    _grouped_wgrad_scaled_mm_fake,
)
