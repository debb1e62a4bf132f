"""Masked decay: what pruning drops from a weight is pulled towards zero through its gradient.

    grad[n, k] += factor * weight[n, k]  where the mask drops weight[n, k]

The mask keeps the two largest magnitudes of each four along K, of equal ones the first, or is a transposable one.
``grad`` and ``weight [N, K]`` may have any strides.  Arithmetic is fp32, each operation rounded; elements that are kept
are not written anew.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparse_compile.kernels.formats import check_buffer
from sparse_compile.kernels.launch_plan import NOTHING, LaunchPlan, plan_kernel, planned
from sparse_compile.kernels.tiles import (
    column_layout,
    join_columns,
    load_tile,
    row_layout,
    split_columns,
    store_strided,
    with_layout_of,
)
from sparse_compile.kernels.weight.groups_of_four import groups, keep_top2

# Rows, columns and warps of a tile.
_ROW_MAJOR_TILE = (32, 128, 4)
_COLUMN_MAJOR_TILE = (128, 32, 4)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@gluon.constexpr_function
def _load_layout(shape, warps, column_major):
    """16 bytes of bf16 along the contiguous dimension of the weight; whole groups."""
    return column_layout(shape, 8, 4, warps) if column_major else row_layout(shape, 4, 8, warps)


@gluon.jit
def _decay(g, w, kept, factor):
    return gl.where(kept, g, g + factor * w)


@gluon.jit
def _decay_kernel(
    grad_ptr, weight_ptr, factor_ptr, masks_ptr, rows, columns, stride_gn, stride_gk, stride_wn, stride_wk,
    TRANSPOSABLE: gl.constexpr, COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """One tile."""
    tiles_k = gl.cdiv(columns, BLOCK_K)
    row, column = gl.program_id(0) // tiles_k * BLOCK_N, gl.program_id(0) % tiles_k * BLOCK_K
    layout: gl.constexpr = _load_layout([BLOCK_N, BLOCK_K], gl.num_warps(), COLUMN_MAJOR)
    w = load_tile(weight_ptr, row, column, rows, columns, stride_wn, stride_wk, BLOCK_N, BLOCK_K, EVEN, layout)
    g = load_tile(grad_ptr, row, column, rows, columns, stride_gn, stride_gk, BLOCK_N, BLOCK_K, EVEN, layout)
    factor = gl.load(factor_ptr)
    w0, w1, w2, w3, _ = groups(w)
    if TRANSPOSABLE:
        groups_layout: gl.constexpr = row_layout([BLOCK_N, BLOCK_K // 4], 4, 1, gl.num_warps())
        offs_n = row + gl.arange(0, BLOCK_N, gl.SliceLayout(1, groups_layout))
        offs_g = column // 4 + gl.arange(0, BLOCK_K // 4, gl.SliceLayout(0, groups_layout))
        inside = (offs_n < rows)[:, None] & (offs_g < columns // 4)[None, :]
        pointers = masks_ptr + (offs_n // 4).to(gl.int64)[:, None] * (columns // 4) + offs_g[None, :]
        masks = gl.load(pointers, mask=inside, other=0).to(gl.int32) >> 4 * (offs_n % 4)[:, None]
        masks = with_layout_of(masks, w0)
        keep0, keep1 = masks & 1 != 0, masks & 2 != 0
        keep2, keep3 = masks & 4 != 0, masks & 8 != 0
    else:
        keep0, keep1, keep2, keep3 = keep_top2(gl.abs(w0), gl.abs(w1), gl.abs(w2), gl.abs(w3))
    g0, g1, g2, g3 = split_columns(g.to(gl.float32))
    decayed = join_columns(
        _decay(g0, w0, keep0, factor), _decay(g1, w1, keep1, factor),
        _decay(g2, w2, keep2, factor), _decay(g3, w3, keep3, factor),
    )  # fmt: skip
    store_strided(grad_ptr, decayed.to(g.dtype), row, column, rows, columns, stride_gn, stride_gk, EVEN, layout)


@planned
def launch_add_masked_decay(grad: Tensor, weight: Tensor, factor: Tensor, masks: Tensor | None = None) -> LaunchPlan:
    """Add to ``grad`` in place.

    Args:
        grad, weight: ``[N, K]``, any strides, bf16, fp16 or fp32 each; K a multiple of 4.
        factor: fp32 ``[1]``.
        masks: int16 ``[N / 4, K / 4]``, transposable masks as ``launch_prune_transposable`` writes them; without them
            the largest are kept.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    for name, tensor in (("grad", grad), ("weight", weight)):
        if tensor.dim() != 2 or tensor.dtype not in _DTYPES or tensor.shape[1] % 4 != 0:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; allowed is bf16, fp16 or fp32 [N, K], K a multiple "
                "of 4"
            )
    if (grad.shape, grad.device) != (weight.shape, weight.device):
        raise ValueError(
            f"grad is {tuple(grad.shape)} on {grad.device}; needed is {tuple(weight.shape)} on {weight.device}"
        )
    check_buffer("factor", factor, (1,), torch.float32, weight.device)
    if masks is not None:
        check_buffer("masks", masks, (weight.shape[0] // 4, weight.shape[1] // 4), torch.int16, weight.device)
    if weight.numel() == 0:
        return NOTHING
    column_major = weight.stride(0) == 1 and weight.stride(1) != 1
    block_n, block_k, warps = _COLUMN_MAJOR_TILE if column_major else _ROW_MAJOR_TILE
    tiles_n, tiles_k = triton.cdiv(weight.shape[0], block_n), triton.cdiv(weight.shape[1], block_k)
    # Without fusion of multiplications and additions, which would round once where the definition rounds twice.
    decay = plan_kernel(
        _decay_kernel, (tiles_n * tiles_k,), (grad, weight, factor, masks),
        (*weight.shape, *grad.stride(), *weight.stride()),
        TRANSPOSABLE=masks is not None, COLUMN_MAJOR=column_major,
        EVEN=(tiles_n * block_n, tiles_k * block_k) == tuple(weight.shape),
        BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return lambda grad, weight, factor, masks=None: decay(grad, weight, factor, masks)
