"""Eager definition of the products."""

import torch
from torch import Tensor

from sparse_compile.kernels.reference.compression import decompress24


def sparse_mm(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    out_dtype: torch.dtype,
    transpose: bool,
    use_fast_accum: bool,
) -> Tensor:
    """2:4-sparse times dense: ``(A * scale_inv) @ (B * dense_scale_inv[:, None]).T``.

    Args:
        values, metadata: the 2:4 operand A ``[R, C]``.
        dense: B, of the same dtype or both in FP8, ``[D, c]`` contiguous, c <= C; columns beyond c count as zero.
        scale_inv: fp32 ``[1]``; dense_scale_inv: fp32 ``[D]`` or None.
        transpose: store the product as ``[D, R]`` instead of ``[R, D]``.
        use_fast_accum: allow FP8 kernels to add up with fewer bits than fp32; here it changes nothing.
    """
    del use_fast_accum
    a = decompress24(values, metadata)[:, : dense.shape[1]].float()
    product = dense.float() @ a.t() if transpose else a @ dense.float().t()
    if dense_scale_inv is not None:
        product = product * (dense_scale_inv[:, None] if transpose else dense_scale_inv)
    return (product * scale_inv).to(out_dtype)


def scaled_mm(a: Tensor, b: Tensor, scale_inv: Tensor, out_dtype: torch.dtype, use_fast_accum: bool) -> Tensor:
    """Dense ``(a @ b.T) * scale_inv`` of FP8 ``a [M, C]`` and ``b [D, C]``, not both e5m2; scale_inv fp32 ``[1]``.

    ``use_fast_accum`` is that of ``sparse_mm``.
    """
    del use_fast_accum
    return ((a.float() @ b.float().t()) * scale_inv).to(out_dtype)
