"""Eager definition of the ops of experts: those of one matrix, in a loop over experts and the tokens of each.

Tokens lie sorted by expert: those of expert ``e`` are the rows ``offsets[e - 1] : offsets[e]``, from 0 for the first.
Experts may have none.  Rows beyond the last offset belong to nobody: here they are zero, and kernels may leave them.

Where tokens are the contraction, the operand of each expert is padded on its own, so that no group of four and no tile
of metadata has tokens of two experts: expert ``e`` has the ``padded`` number of columns that its tokens need, right
after those of the expert before.  How many columns all of them need is known on the device alone, so there are
``grouped_columns`` of them; those that nobody needs are padding as well.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_compile.kernels.formats import E4M3, PAD, PAD_WORD, expert_stream, grouped_columns, metadata_shape, padded
from sparse_compile.kernels.reference.gemm import scaled_mm, sparse_mm
from sparse_compile.kernels.reference.mvue import cast_mvue, cast_transpose, transpose_tokens


def tokens_of_experts(offsets: Tensor) -> Iterator[tuple[slice, slice]]:
    """For each expert the rows of its tokens, and its columns in operands that contract over tokens.

    Args:
        offsets: int32 or int64 ``[E]``, where the tokens of each expert end.

    Raises:
        RuntimeError: a CUDA graph is being captured, in which no offsets can be read.
    """
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "experts are emulated, which reads on the host where the tokens of each end, and a CUDA graph is captured: "
            "leave 'sste.when' at 'faster', or do without CUDA graphs"
        )
    begin = first = 0
    for end in offsets.tolist():
        columns = padded(end - begin)
        yield slice(begin, end), slice(first, first + columns)
        begin, first = end, first + columns


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """``a[t] @ b[e]`` for each token ``t`` of expert ``e``: ``a [T, C]``, ``b [E, C, D]``, of one dtype; ``[T, D]``."""
    product = a.new_zeros(a.shape[0], b.shape[2])
    for matrix, (tokens, _) in zip(b, tokens_of_experts(offsets), strict=True):
        product[tokens] = a[tokens] @ matrix
    return product


def grouped_wgrad_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """``a.T @ b`` over the tokens of each expert: ``a [T, M]``, ``b [T, D]``, of one dtype; ``[E, M, D]``."""
    return torch.stack([a[tokens].t() @ b[tokens] for tokens, _ in tokens_of_experts(offsets)])


def grouped_sparse_mm(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    offsets: Tensor,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> Tensor:
    """``sparse_mm``, transposed, of each expert's matrix and tokens.

    Args:
        values, metadata: of the 2:4 operands ``[R, C]`` of E experts, stacked.
        dense: ``[T, c]``; dense_scale_inv: fp32 ``[T]`` or None.
        scale_inv: fp32 ``[E]``.

    Returns:
        ``[T, R]``
    """
    product = torch.zeros(dense.shape[0], values.shape[1], dtype=out_dtype, device=dense.device)
    for e, (tokens, _) in enumerate(tokens_of_experts(offsets)):
        of_tokens = None if dense_scale_inv is None else dense_scale_inv[tokens]
        product[tokens] = sparse_mm(
            values[e], metadata[e], dense[tokens], scale_inv[e], of_tokens, out_dtype, True, use_fast_accum
        )
    return product


def grouped_scaled_mm(
    a: Tensor, b: Tensor, scale_inv: Tensor, offsets: Tensor, out_dtype: torch.dtype, use_fast_accum: bool
) -> Tensor:
    """``scaled_mm`` of each expert's tokens ``a [T, C]`` and matrix ``b [E, D, C]``; scale_inv ``[E]``; ``[T, D]``."""
    product = torch.zeros(a.shape[0], b.shape[1], dtype=out_dtype, device=a.device)
    for e, (tokens, _) in enumerate(tokens_of_experts(offsets)):
        product[tokens] = scaled_mm(a[tokens], b[e], scale_inv[e], out_dtype, use_fast_accum)
    return product


def grouped_transpose_tokens(x: Tensor, offsets: Tensor) -> Tensor:
    """``x [T, C]`` (FP8) token-major, each expert's tokens padded: ``[C, grouped_columns]``."""
    transposed = _padding(x, offsets)
    for tokens, columns in tokens_of_experts(offsets):
        transposed[:, columns] = transpose_tokens(x[tokens]).view(torch.uint8)
    return transposed.view(x.dtype)


def grouped_cast_transpose(
    x: Tensor, row_scale: Tensor, token_scale: Tensor, offsets: Tensor, dtype: torch.dtype = E4M3
) -> tuple[Tensor, Tensor]:
    """``cast_transpose`` of each expert's tokens: FP8 ``[T, C]`` and FP8 ``[C, grouped_columns]``."""
    row = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    transposed = _padding(x, offsets)
    for tokens, columns in tokens_of_experts(offsets):
        cast, cast_t = cast_transpose(x[tokens], row_scale[tokens], token_scale[tokens], dtype)
        row[tokens], transposed[:, columns] = cast.view(torch.uint8), cast_t.view(torch.uint8)
    return row.view(dtype), transposed.view(dtype)


def grouped_cast_mvue(
    grad: Tensor,
    row_scale: Tensor,
    token_scale: Tensor,
    seed: Tensor,
    index: int,
    offsets: Tensor,
    approximate: bool,
    stochastic: bool = False,
    dtype: torch.dtype = E4M3,
) -> tuple[Tensor, Tensor, Tensor]:
    """``cast_mvue`` of each expert's tokens: no group of four has tokens of two experts.

    Draws of an expert are those of the index ``expert_stream(index, e)``: they depend on where a token stands among
    those of its expert, and on nothing else of the routing.

    Returns:
        FP8 ``[T, N]``, and the ``values`` and ``metadata`` of the 2:4 matrix ``[N, grouped_columns]`` pruned along
        tokens, each expert's padded.
    """
    total, n = grouped_columns(grad.shape[0], len(offsets)), grad.shape[1]
    row = torch.zeros(grad.shape, dtype=torch.uint8, device=grad.device)
    values = torch.zeros(n, total // 2, dtype=torch.uint8, device=grad.device)
    metadata = torch.full(metadata_shape(n, total), PAD_WORD, dtype=torch.int32, device=grad.device)
    for e, (tokens, columns) in enumerate(tokens_of_experts(offsets)):
        scales, stream = (row_scale[tokens], token_scale[tokens]), expert_stream(index, e)
        cast, kept, where = cast_mvue(grad[tokens], *scales, seed, stream, approximate, stochastic, dtype)
        row[tokens] = cast.view(torch.uint8)
        values[:, columns.start // 2 : columns.stop // 2] = kept.view(torch.uint8)
        metadata[_blocks(columns)] = where
    return row.view(dtype), values.view(dtype), metadata


def grouped_wgrad_sparse_mm(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    offsets: Tensor,
    out_dtype: torch.dtype,
    transpose: bool,
) -> Tensor:
    """``sparse_mm`` over the tokens of each expert, in accurate sums.

    Args:
        values, metadata: of the 2:4 operand ``[R, grouped_columns]``.
        dense: ``[D, grouped_columns]``.
        scale_inv: fp32 ``[E]``.
        transpose: store the products as ``[D, R]`` instead of ``[R, D]``.

    Returns:
        ``[E, R, D]``, or ``[E, D, R]``
    """
    products = []
    for e, (_, columns) in enumerate(tokens_of_experts(offsets)):
        kept, where = values[:, columns.start // 2 : columns.stop // 2], metadata[_blocks(columns)]
        products.append(sparse_mm(kept, where, dense[:, columns], scale_inv[e], None, out_dtype, transpose, False))
    return torch.stack(products)


def grouped_wgrad_scaled_mm(a: Tensor, b: Tensor, scale_inv: Tensor, offsets: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``scaled_mm`` over the tokens of each expert, in accurate sums.

    Args:
        a, b: FP8 ``[M, grouped_columns]`` and ``[D, grouped_columns]``.
        scale_inv: fp32 ``[E]``.

    Returns:
        ``[E, M, D]``
    """
    products = []
    for e, (_, columns) in enumerate(tokens_of_experts(offsets)):
        products.append(scaled_mm(a[:, columns], b[:, columns], scale_inv[e], out_dtype, False))
    return torch.stack(products)


def _padding(x: Tensor, offsets: Tensor) -> Tensor:
    """The bytes of an FP8 operand ``[C, grouped_columns]`` of ``x [T, C]``, to be written in parts."""
    tokens, columns = x.shape
    return torch.zeros(columns, grouped_columns(tokens, len(offsets)), dtype=torch.uint8, device=x.device)


def _blocks(columns: slice) -> slice:
    """The blocks of columns in the metadata of FP8 operands."""
    return slice(columns.start // PAD, columns.stop // PAD)
