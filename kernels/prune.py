"""A weight to e4m3 with one scale: 2:4-pruned by S-STE and compressed, or dense.

    prune:  W~ = beta * S(W),  S(w) = sign(w) * max(|w| - t, 0),  t the second smallest magnitude of each four along K
            payload = e4m3(S * (448 / amax)),  scale_inv = beta * (amax / 448),  amax = max |S|
    cast:   payload = e4m3(W * (448 / amax)),  scale_inv = amax / 448,           amax = max |W|

``weight [N, K]`` may have any strides.  Pruning writes ``values [N, padded(K) / 2]`` and ``metadata`` (see ``formats``)
for fprop and the payload dense and transposed, ``[K, N]``, for dgrad; casting writes the payload as it is and
transposed.  Arithmetic is fp32.  Each takes two launches: the amax, an integer maximum that no order of the programs
changes, and the payload.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.formats import (
    AMAX_FLOOR,
    E4M3,
    E4M3_MAX,
    check_buffer,
    metadata_shape,
    padded,
    values_shape,
)

_AMAX_FLOOR = tl.constexpr(AMAX_FLOOR)
_E4M3_MAX = tl.constexpr(E4M3_MAX)
_BLOCK_N, _BLOCK_K = 64, 128


@triton.jit
def _load_tile(weight_ptr, offs_n, offs_k, rows, columns, stride_wn, stride_wk):
    """fp32 tile, zero outside the weight.  [BLOCK_N, BLOCK_K]"""
    offsets = offs_n.to(tl.int64)[:, None] * stride_wn + offs_k.to(tl.int64)[None, :] * stride_wk
    inside = (offs_n < rows)[:, None] & (offs_k < columns)[None, :]
    return tl.load(weight_ptr + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _split_groups(x, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr):
    """[BLOCK_N, 4 * GROUPS] -> elements 0, 1, 2 and 3 of the groups, [BLOCK_N, GROUPS] each."""
    even, odd = tl.split(tl.reshape(x, [BLOCK_N, GROUPS, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _magnitude_bits(x):
    """|x| as int32: ordered like |x|, with NaN above infinity."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _shrink(x, threshold):
    kept = tl.abs(x) - threshold
    # Comparisons, because tl.maximum would turn NaN into 0; * -1.0, because Triton's -x is 0 - x, never -0.0.
    kept = tl.where(kept < 0.0, 0.0, kept)
    return tl.where(x < 0.0, kept * -1.0, kept)


@triton.jit
def _soft_threshold24(x0, x1, x2, x3):
    """S of groups of four."""
    b0, b1, b2, b3 = tl.abs(x0), tl.abs(x1), tl.abs(x2), tl.abs(x3)
    low = tl.maximum(tl.minimum(b0, b1), tl.minimum(b2, b3))
    high = tl.minimum(tl.maximum(b0, b1), tl.maximum(b2, b3))
    threshold = tl.minimum(low, high)
    # Minimum and maximum drop NaN; the sum of the magnitudes is NaN exactly where one of them is.
    total = (b0 + b1) + (b2 + b3)
    threshold = tl.where(total == total, threshold, total)
    return _shrink(x0, threshold), _shrink(x1, threshold), _shrink(x2, threshold), _shrink(x3, threshold)


@triton.jit
def _two_largest(x0, x1, x2, x3):
    """Ascending positions of the two largest magnitudes; ties go to the lower position, and NaN counts as largest."""
    NAN_RANK: tl.constexpr = 0x7F800001
    r0 = tl.minimum(_magnitude_bits(x0), NAN_RANK)
    r1 = tl.minimum(_magnitude_bits(x1), NAN_RANK)
    r2 = tl.minimum(_magnitude_bits(x2), NAN_RANK)
    r3 = tl.minimum(_magnitude_bits(x3), NAN_RANK)
    # An element is kept where fewer than two others outrank it.
    keep0 = (r1 > r0).to(tl.int32) + (r2 > r0).to(tl.int32) + (r3 > r0).to(tl.int32) < 2
    keep1 = (r0 >= r1).to(tl.int32) + (r2 > r1).to(tl.int32) + (r3 > r1).to(tl.int32) < 2
    keep2 = (r0 >= r2).to(tl.int32) + (r1 >= r2).to(tl.int32) + (r3 > r2).to(tl.int32) < 2
    keep3 = keep0.to(tl.int32) + keep1.to(tl.int32) + keep2.to(tl.int32) < 2
    return tl.where(keep0, 0, tl.where(keep1, 1, 2)), tl.where(keep3, 3, tl.where(keep2, 2, 1))


@triton.jit
def _scales(amax_ptr):
    """``448 / amax`` and ``amax / 448`` of the amax found by ``_amax_kernel``."""
    amax = tl.load(amax_ptr, volatile=True).to(tl.float32, bitcast=True)
    amax = tl.where(amax < _AMAX_FLOOR, _AMAX_FLOOR, amax)
    return tl.div_rn(_E4M3_MAX, amax), tl.div_rn(amax, _E4M3_MAX)


@triton.jit
def _amax_kernel(
    weight_ptr, amax_ptr, rows, columns, stride_wn, stride_wk,
    PRUNE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Raise the int32 at ``amax_ptr`` to the bits of max |S(W)| (PRUNE) or max |W| over one tile."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    w = _load_tile(weight_ptr, offs_n, offs_k, rows, columns, stride_wn, stride_wk)
    if PRUNE:
        w0, w1, w2, w3 = _split_groups(w, BLOCK_N, BLOCK_K // 4)
        s0, s1, s2, s3 = _soft_threshold24(w0, w1, w2, w3)
        bits01 = tl.maximum(_magnitude_bits(s0), _magnitude_bits(s1))
        bits23 = tl.maximum(_magnitude_bits(s2), _magnitude_bits(s3))
        bits = tl.maximum(bits01, bits23)
    else:
        bits = _magnitude_bits(w)
    tl.atomic_max(amax_ptr, tl.max(bits), sem="relaxed")


@triton.jit
def _prune_kernel(
    weight_ptr, beta_ptr, amax_ptr, values_ptr, metadata_ptr, weight_t_ptr, scale_inv_ptr,
    rows, columns, stride_wn, stride_wk, values_stride, metadata_row_blocks,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the padded weight, BLOCK_N rows by BLOCK_K = 128 columns."""
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    GROUPS: tl.constexpr = BLOCK_K // 4
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_v = pid_k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    offs_n64 = offs_n.to(tl.int64)
    w = _load_tile(weight_ptr, offs_n, offs_k, rows, columns, stride_wn, stride_wk)
    w0, w1, w2, w3 = _split_groups(w, BLOCK_N, GROUPS)  # [BLOCK_N, GROUPS] each
    first, second = _two_largest(w0, w1, w2, w3)

    scale, amax_over_max = _scales(amax_ptr)
    if (pid_n == 0) & (pid_k == 0):
        tl.store(scale_inv_ptr, tl.load(beta_ptr) * amax_over_max)
    # No clamp: the conversion to e4m3 saturates in hardware and keeps NaN.
    s0, s1, s2, s3 = _soft_threshold24(w0, w1, w2, w3)
    payload_dtype = values_ptr.dtype.element_ty
    p0, p1, p2, p3 = s0 * scale, s1 * scale, s2 * scale, s3 * scale

    # Columns beyond K stay zero also where the scale is NaN; K is a multiple of 4.
    inside = (pid_k * BLOCK_K + tl.arange(0, GROUPS) * 4 < columns)[None, :]
    v0 = tl.where(inside, tl.where(first == 0, p0, tl.where(first == 1, p1, p2)), 0.0)
    v1 = tl.where(inside, tl.where(second == 3, p3, tl.where(second == 2, p2, p1)), 0.0)
    values = tl.reshape(tl.join(v0, v1).to(payload_dtype), [BLOCK_N, BLOCK_K // 2])
    tl.store(values_ptr + offs_n64[:, None] * values_stride + offs_v[None, :], values, mask=(offs_n < rows)[:, None])

    # Rows and columns beyond the weight were loaded as zeros, whose groups name positions 0 and 1: the padding word.
    nibbles = tl.reshape(first | second << 2, [BLOCK_N, GROUPS // 8, 8])
    words = tl.sum(nibbles << (tl.arange(0, 8) * 4)[None, None, :], axis=2)  # [BLOCK_N, 4]
    part = tl.arange(0, GROUPS // 8)[None, :]
    block = pid_k.to(tl.int64) * metadata_row_blocks + (offs_n // 16)[:, None]
    lane = 4 * (offs_n % 8)[:, None] + 2 * (part % 2) + (offs_n % 16 // 8)[:, None]
    tl.store(metadata_ptr + (block * 32 + lane) * 2 + part // 2, words)

    dense = tl.join(tl.join(p0, p2), tl.join(p1, p3)).to(payload_dtype)
    dense = tl.reshape(dense, [BLOCK_N, BLOCK_K])
    inside = (offs_n < rows)[:, None] & (offs_k < columns)[None, :]
    tl.store(weight_t_ptr + offs_k.to(tl.int64)[None, :] * rows + offs_n64[:, None], dense, mask=inside)


@triton.jit
def _cast_kernel(
    weight_ptr, amax_ptr, payload_ptr, payload_t_ptr, scale_inv_ptr, rows, columns, stride_wn, stride_wk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of the weight, BLOCK_N rows by BLOCK_K columns."""
    pid_n, pid_k = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_n64, offs_k64 = offs_n.to(tl.int64)[:, None], offs_k.to(tl.int64)[None, :]
    scale, scale_inv = _scales(amax_ptr)
    if (pid_n == 0) & (pid_k == 0):
        tl.store(scale_inv_ptr, scale_inv)
    w = _load_tile(weight_ptr, offs_n, offs_k, rows, columns, stride_wn, stride_wk)
    # No clamp: the conversion to e4m3 saturates in hardware and keeps NaN.
    payload_dtype = payload_ptr.dtype.element_ty
    inside = (offs_n < rows)[:, None] & (offs_k < columns)[None, :]
    tl.store(payload_ptr + offs_n64 * columns + offs_k64, (w * scale).to(payload_dtype), mask=inside)
    # Converted again, with a scale that the compiler can't know to be the same: where one conversion feeds both
    # stores, ptxas 12.8 loses every fourth byte of the transposed one.
    scale_again, _ = _scales(amax_ptr)
    tl.store(payload_t_ptr + offs_k64 * rows + offs_n64, (w * scale_again).to(payload_dtype), mask=inside)


def launch_prune_weight(
    weight: Tensor, beta: Tensor, values: Tensor, metadata: Tensor, weight_t: Tensor, scale_inv: Tensor
) -> None:
    """Prune and cast ``weight`` into the buffers, all of which are written in full.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32; K a multiple of 4.
        beta: fp32 ``[1]``.
        values: e4m3 ``[N, padded(K) / 2]``.
        metadata: int32 ``[padded(K) / 128, padded(N) / 16, 32, 2]``.
        weight_t: e4m3 ``[K, N]``.
        scale_inv: fp32 ``[1]``; 0 for an empty weight.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    _check_weight(weight)
    n, k = weight.shape
    if k % 4 != 0:
        raise ValueError(f"weight has {k} columns; 2:4 pruning needs a multiple of 4")
    check_buffer("beta", beta, (1,), torch.float32, weight.device)
    check_buffer("values", values, values_shape(n, k), E4M3, weight.device)
    check_buffer("metadata", metadata, metadata_shape(n, k), torch.int32, weight.device)
    check_buffer("weight_t", weight_t, (k, n), E4M3, weight.device)
    check_buffer("scale_inv", scale_inv, (1,), torch.float32, weight.device)
    if weight.numel() == 0:
        scale_inv.zero_()
        return
    amax = _amax(weight, prune=True)
    grid = (padded(n) // _BLOCK_N, padded(k) // _BLOCK_K)
    _prune_kernel[grid](
        weight, beta, amax, values, metadata, weight_t, scale_inv,
        n, k, *weight.stride(), values.stride(0), metadata.shape[1],
        BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, num_warps=8,
    )  # fmt: skip


def launch_cast_weight(weight: Tensor, payload: Tensor, payload_t: Tensor, scale_inv: Tensor) -> None:
    """Cast ``weight`` into the buffers, all of which are written in full.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32.
        payload: e4m3 ``[N, K]``.
        payload_t: e4m3 ``[K, N]``.
        scale_inv: fp32 ``[1]``; 0 for an empty weight.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    _check_weight(weight)
    n, k = weight.shape
    check_buffer("payload", payload, (n, k), E4M3, weight.device)
    check_buffer("payload_t", payload_t, (k, n), E4M3, weight.device)
    check_buffer("scale_inv", scale_inv, (1,), torch.float32, weight.device)
    if weight.numel() == 0:
        scale_inv.zero_()
        return
    amax = _amax(weight, prune=False)
    grid = (triton.cdiv(n, _BLOCK_N), triton.cdiv(k, _BLOCK_K))
    _cast_kernel[grid](
        weight, amax, payload, payload_t, scale_inv, n, k, *weight.stride(),
        BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, num_warps=4,
    )  # fmt: skip


def _amax(weight: Tensor, *, prune: bool) -> Tensor:
    """int32 ``[1]``: the bits of the fp32 amax."""
    n, k = weight.shape
    amax = torch.zeros(1, dtype=torch.int32, device=weight.device)
    grid = (triton.cdiv(n, _BLOCK_N), triton.cdiv(k, _BLOCK_K))
    _amax_kernel[grid](
        weight, amax, n, k, *weight.stride(), PRUNE=prune, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, num_warps=4
    )
    return amax


def _check_weight(weight: Tensor) -> None:
    if weight.dim() != 2 or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; allowed is bf16, fp16 or fp32 [N, K]")
