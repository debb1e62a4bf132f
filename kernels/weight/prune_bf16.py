"""A weight to bf16, 2:4-pruned and compressed, and the same dense.

    W~ = beta * S(W), payload = bf16(S), scale_inv = beta; S as in ``prune``

``weight [N, K]`` may have any strides.  Pruning writes ``values [N, padded(K) / 2]`` and ``metadata`` (see ``formats``)
for fprop and the payload dense, ``dense [N, K]``, for dgrad.  Arithmetic is fp32.  bf16 needs no scale, so one launch
does it all.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparse_compile.kernels.formats import check_buffer, check_weight, metadata_shape, padded, values_shape
from sparse_compile.kernels.launch_plan import LaunchPlan, UncachedPlan, plan_kernel, planned
from sparse_compile.kernels.tiles import (
    column_layout,
    join_columns,
    join_indices,
    kept_positions,
    load_tile,
    row_layout,
    store_metadata,
    store_tile,
)
from sparse_compile.kernels.weight.groups_of_four import bits, groups, magnitude, maximum, pair, project

# Rows, columns and warps of a tile.
_ROW_MAJOR_TILE = (64, 128, 4)
_COLUMN_MAJOR_TILE = (128, 64, 4)


@gluon.constexpr_function
def _load_layout(shape, warps, column_major):
    """16 bytes of bf16 along the contiguous dimension of the weight; whole groups."""
    return column_layout(shape, 8, 8, warps) if column_major else row_layout(shape, 2, 8, warps)


@gluon.jit
def _signed(m, w):
    """``copysign(max(m, 0), w)`` in bf16."""
    magnitude = bits(maximum(m, 0.0))
    return (magnitude | bits(w) & -0x80000000).to(gl.float32, bitcast=True).to(gl.bfloat16)


@gluon.jit
def _prune_bf16_kernel(
    weight_ptr, beta_ptr, values_ptr, metadata_ptr, dense_ptr, scale_inv_ptr,
    rows, columns, stride_wn, stride_wk, tiles_k,
    HARD: gl.constexpr, COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """One tile."""
    row, column = gl.program_id(0) // tiles_k * BLOCK_N, gl.program_id(0) % tiles_k * BLOCK_K
    layout: gl.constexpr = _load_layout([BLOCK_N, BLOCK_K], gl.num_warps(), COLUMN_MAJOR)
    w = load_tile(weight_ptr, row, column, rows, columns, stride_wn, stride_wk, BLOCK_N, BLOCK_K, EVEN, layout)
    w0, w1, w2, w3, _ = groups(w)  # [BLOCK_N, BLOCK_K / 4]
    m0, m1, m2, m3, _, index = project(magnitude(w0), magnitude(w1), magnitude(w2), magnitude(w3), HARD)
    s0, s1, s2, s3 = _signed(m0, w0), _signed(m1, w1), _signed(m2, w2), _signed(m3, w3)
    dense_layout: gl.constexpr = row_layout([BLOCK_N, BLOCK_K], 2, 8, gl.num_warps())
    store_tile(dense_ptr, join_columns(s0, s1, s2, s3), row, column, rows, columns, EVEN, dense_layout)

    both = kept_positions(index)
    first, second = both & 3, both >> 4 & 3
    values = pair(
        gl.where(first == 0, s0, gl.where(first == 1, s1, s2)), gl.where(second == 3, s3, gl.where(second == 2, s2, s1))
    )
    values_ptr = values_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    values_layout: gl.constexpr = row_layout(values.shape, 2, 2, gl.num_warps())
    store_tile(values_ptr, values, row, column // 4, rows, gl.cdiv(columns, 128) * 32, EVEN, values_layout)

    # Rows and columns beyond the weight were loaded as zeros, whose groups name positions 0 and 1: the padding word.
    # r // 16, r // 8 % 2, r % 8, block, part, half of the part
    blocks = gl.reshape(join_indices(index, 4), [BLOCK_N // 16, 2, 8, BLOCK_K // 64, 4, 2])
    blocks = gl.reshape(gl.permute(blocks, [3, 0, 2, 4, 1, 5]), [BLOCK_K // 64, BLOCK_N * 8])
    metadata_columns = gl.cdiv(rows, 128) * 256
    store_metadata(
        blocks, metadata_ptr, column // 64, row * 2, gl.cdiv(columns, 128) * 2, metadata_columns, metadata_columns, 1,
        EVEN,
    )  # fmt: skip
    if gl.program_id(0) == 0:
        gl.store(scale_inv_ptr, gl.load(beta_ptr))


@planned
def launch_prune_weight_bf16(
    weight: Tensor, beta: Tensor, values: Tensor, metadata: Tensor, dense: Tensor, scale_inv: Tensor,
    hard: bool = False,
) -> LaunchPlan:  # fmt: skip
    """Prune ``weight`` into the buffers, all of which are written in full.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32; N and K multiples of 16.
        beta: fp32 ``[1]``.
        values: bf16 ``[N, padded(K) / 2]``.
        metadata: int32 ``[padded(K) / 64, padded(N) / 16, 32, 1]``.
        dense: bf16 ``[N, K]``.
        scale_inv: fp32 ``[1]``.
        hard: whether the two largest magnitudes are kept as they are, instead of S-STE's soft threshold.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    check_weight(weight)
    n, k = weight.shape
    check_buffer("beta", beta, (1,), torch.float32, weight.device)
    check_buffer("values", values, values_shape(n, k), torch.bfloat16, weight.device)
    check_buffer("metadata", metadata, metadata_shape(n, k, torch.bfloat16), torch.int32, weight.device)
    check_buffer("dense", dense, (n, k), torch.bfloat16, weight.device)
    check_buffer("scale_inv", scale_inv, (1,), torch.float32, weight.device)
    if weight.numel() == 0:
        return UncachedPlan(lambda: scale_inv.copy_(beta))
    column_major = weight.stride(0) == 1 and weight.stride(1) != 1
    block_n, block_k, warps = _COLUMN_MAJOR_TILE if column_major else _ROW_MAJOR_TILE
    # Metadata is written for the padding too.
    tiles_n, tiles_k = triton.cdiv(padded(n), block_n), triton.cdiv(padded(k), block_k)
    return plan_kernel(
        _prune_bf16_kernel, (tiles_n * tiles_k,), (weight, beta, values, metadata, dense, scale_inv),
        (n, k, *weight.stride(), tiles_k),
        HARD=hard, COLUMN_MAJOR=column_major, EVEN=(tiles_n * block_n, tiles_k * block_k) == (n, k),
        BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
