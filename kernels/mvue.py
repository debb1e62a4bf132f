"""grad_output in one reading: its e4m3 cast for dgrad, and its MVUE-pruned transpose for wgrad.

    row[t, n] = e4m3(grad[t, n] * row_scale[t])
    operand[n, t] = e4m3(MVUE24(grad[t, n] * token_scale[t])), pruned 2:4 along the tokens

``grad [T, N]``, ``row [T, N]``; the operand ``[N, T]`` is stored as ``values [N, padded(T) / 2]`` and ``metadata`` (see
``formats``).  Both estimators of ``MVUE24`` are in fp32, every operation in the order of their eager definition.

A program takes 128 tokens, four sub-blocks of eight groups of four.  One Philox call per column and ``q`` in 0..7 gives
four words, of which word ``i`` draws group ``q`` of sub-block ``i``; the eight groups of a sub-block share a word of
metadata.  The four tokens of the groups are four tensors ``[8, BLOCK_N]``, each contiguous along n.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.formats import E4M3, PAD_WORD, check_buffer, metadata_shape, padded, values_shape

_PAD_WORD = tl.constexpr(PAD_WORD)
_APPROX_EPS = tl.constexpr(2.0**-23)
_BLOCK_N = 64


@triton.jit
def _load_tokens(grad_ptr, row_scale_ptr, token_scale_ptr, row_ptr, offs_t, offs_n, tokens, columns):
    """``grad * token_scale`` of tokens offs_t, zero outside, storing their cast for dgrad on the way.  [8, BLOCK_N]"""
    mask_t = offs_t < tokens
    inside = mask_t[:, None] & (offs_n < columns)[None, :]
    offsets = offs_t.to(tl.int64)[:, None] * columns + offs_n[None, :]
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    row_scale = tl.load(row_scale_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
    # No clamp: the conversion to e4m3 saturates in hardware and keeps NaN.
    tl.store(row_ptr + offsets, (grad * row_scale).to(row_ptr.dtype.element_ty), mask=inside)
    return grad * tl.load(token_scale_ptr + offs_t, mask=mask_t, other=0.0)[:, None]


@triton.jit
def _at_least(x, bound):
    return (x >= bound).to(tl.int32)


@triton.jit
def _pick(first, second, x0, x1, x2, x3):
    """Elements ``first`` (0..2) and ``second`` (1..3) of each group."""
    x_first = tl.where(first == 0, x0, tl.where(first == 1, x1, x2))
    return x_first, tl.where(second == 3, x3, tl.where(second == 2, x2, x1))


@triton.jit
def _exact_kept(a, largest, dominated, unit):
    b = tl.abs(a)
    magnitude = tl.where(b > 0.0, tl.where(dominated & (b == largest), b, unit), 0.0 * b)
    # Not -magnitude: Triton computes 0 - magnitude, never -0.0.
    return tl.where(a < 0.0, magnitude * -1.0, magnitude)


@triton.jit
def _mvue24_exact(a0, a1, a2, a3, u):
    """Ascending positions of the two kept elements, and their values."""
    b0, b1, b2, b3 = tl.abs(a0), tl.abs(a1), tl.abs(a2), tl.abs(a3)
    total = (b0 + b1) + (b2 + b3)
    # Maximum drops NaN, but a NaN reaches rest and unit through the total.
    largest = tl.maximum(tl.maximum(b0, b1), tl.maximum(b2, b3))
    rest = total - largest
    dominated = largest > rest
    unit = tl.where(dominated, rest, total * 0.5)
    unit_inv = tl.where(unit > 0.0, tl.div_rn(1.0, unit), 0.0)
    c1 = tl.where(dominated & (b0 == largest), 1.0, b0 * unit_inv)
    c2 = c1 + tl.where(dominated & (b1 == largest), 1.0, b1 * unit_inv)
    c3 = c2 + tl.where(dominated & (b2 == largest), 1.0, b2 * unit_inv)
    v = u + 1.0
    first = _at_least(u, c1) + _at_least(u, c2) + _at_least(u, c3)
    second = _at_least(v, c1) + _at_least(v, c2) + _at_least(v, c3)
    first = tl.where(first == second, tl.minimum(first, 2), first)
    second = tl.where(first >= second, first + 1, second)
    a_first, a_second = _pick(first, second, a0, a1, a2, a3)
    kept_first = _exact_kept(a_first, largest, dominated, unit)
    kept_second = _exact_kept(a_second, largest, dominated, unit)
    return first, second, kept_first, kept_second


@triton.jit
def _approximate_kept(a, x, odds, odds_sum, norm):
    return tl.div_rn(a, tl.div_rn(x * ((1.0 + odds_sum) - odds), norm))


@triton.jit
def _mvue24_approximate(a0, a1, a2, a3, u):
    """Ascending positions of the two kept elements, and their values."""
    b0, b1, b2, b3 = tl.abs(a0), tl.abs(a1), tl.abs(a2), tl.abs(a3)
    total = (b0 + b1) + (b2 + b3)
    total_inv = tl.where(total > 0.0, tl.div_rn(1.0, total), 0.0)
    x0, x1 = b0 * total_inv + _APPROX_EPS, b1 * total_inv + _APPROX_EPS
    x2, x3 = b2 * total_inv + _APPROX_EPS, b3 * total_inv + _APPROX_EPS
    norm = (x0 + x1) + (x2 + x3)
    w0, w1 = tl.div_rn(x0, norm - x0), tl.div_rn(x1, norm - x1)
    w2, w3 = tl.div_rn(x2, norm - x2), tl.div_rn(x3, norm - x3)
    odds_sum = (w0 + w1) + (w2 + w3)
    target = u * norm
    c1 = x1 * w0 + x0 * w1
    c2 = c1 + (x2 * w0 + x0 * w2)
    c3 = c2 + (x3 * w0 + x0 * w3)
    c4 = c3 + (x2 * w1 + x1 * w2)
    c5 = c4 + (x3 * w1 + x1 * w3)
    # Pairs in order: 01 02 03 12 13 23.
    beyond3, beyond5 = _at_least(target, c3), _at_least(target, c5)
    first = beyond3 + beyond5
    pair = _at_least(target, c1) + _at_least(target, c2) + beyond3 + _at_least(target, c4) + beyond5
    second = tl.minimum(tl.where(pair >= 3, pair - 1, pair + 1), 3)
    # Picked before the divisions, to divide for two elements instead of four.
    a_first, a_second = _pick(first, second, a0, a1, a2, a3)
    x_first, x_second = _pick(first, second, x0, x1, x2, x3)
    w_first, w_second = _pick(first, second, w0, w1, w2, w3)
    kept_first = _approximate_kept(a_first, x_first, w_first, odds_sum, norm)
    kept_second = _approximate_kept(a_second, x_second, w_second, odds_sum, norm)
    return first, second, kept_first, kept_second


@triton.jit
def _prune_sub_block(
    word, grad_ptr, row_scale_ptr, token_scale_ptr, row_ptr, offs_t, offs_n, tokens, columns, APPROXIMATE: tl.constexpr
):
    """Kept elements [8, BLOCK_N, 2] and metadata nibbles [8, BLOCK_N] of the groups that begin at tokens offs_t."""
    a0 = _load_tokens(grad_ptr, row_scale_ptr, token_scale_ptr, row_ptr, offs_t, offs_n, tokens, columns)
    a1 = _load_tokens(grad_ptr, row_scale_ptr, token_scale_ptr, row_ptr, offs_t + 1, offs_n, tokens, columns)
    a2 = _load_tokens(grad_ptr, row_scale_ptr, token_scale_ptr, row_ptr, offs_t + 2, offs_n, tokens, columns)
    a3 = _load_tokens(grad_ptr, row_scale_ptr, token_scale_ptr, row_ptr, offs_t + 3, offs_n, tokens, columns)
    u = (word >> 9).to(tl.float32) * 2.0**-23
    if APPROXIMATE:
        first, second, kept_first, kept_second = _mvue24_approximate(a0, a1, a2, a3, u)
    else:
        first, second, kept_first, kept_second = _mvue24_exact(a0, a1, a2, a3, u)
    return tl.join(kept_first, kept_second).to(row_ptr.dtype.element_ty), first | second << 2


@triton.jit(do_not_specialize=["index"])
def _cast_mvue_kernel(
    grad_ptr, row_scale_ptr, token_scale_ptr, seed_ptr, row_ptr, values_ptr, metadata_ptr,
    index, tokens, columns, values_stride, metadata_row_blocks, APPROXIMATE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of 128 tokens by BLOCK_N columns of the padded operand."""
    column_tiles = metadata_row_blocks * 16 // BLOCK_N
    pid_t, pid_n = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    offs_q = tl.arange(0, 8)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t = pid_t * 128 + offs_q * 4
    seed = tl.load(seed_ptr)
    word0, word1, word2, word3 = tl.philox(seed, offs_n[None, :], (pid_t * 8 + offs_q)[:, None], index, 0)
    kept0, nibbles0 = _prune_sub_block(
        word0, grad_ptr, row_scale_ptr, token_scale_ptr, row_ptr, offs_t, offs_n, tokens, columns, APPROXIMATE
    )
    kept1, nibbles1 = _prune_sub_block(
        word1, grad_ptr, row_scale_ptr, token_scale_ptr, row_ptr, offs_t + 32, offs_n, tokens, columns, APPROXIMATE
    )
    kept2, nibbles2 = _prune_sub_block(
        word2, grad_ptr, row_scale_ptr, token_scale_ptr, row_ptr, offs_t + 64, offs_n, tokens, columns, APPROXIMATE
    )
    kept3, nibbles3 = _prune_sub_block(
        word3, grad_ptr, row_scale_ptr, token_scale_ptr, row_ptr, offs_t + 96, offs_n, tokens, columns, APPROXIMATE
    )

    # Sub-block i is [i // 2, i % 2] of the joined dimensions.
    kept = tl.join(tl.join(kept0, kept2), tl.join(kept1, kept3))  # [8, BLOCK_N, 2, 2, 2]
    kept = tl.reshape(tl.permute(kept, [1, 3, 4, 0, 2]), [BLOCK_N, 64])
    offs_v = pid_t * 64 + tl.arange(0, 64)
    mask_n = offs_n < columns
    tl.store(values_ptr + offs_n.to(tl.int64)[:, None] * values_stride + offs_v[None, :], kept, mask=mask_n[:, None])

    nibbles = tl.join(tl.join(nibbles0, nibbles2), tl.join(nibbles1, nibbles3))  # [8, BLOCK_N, 2, 2]
    words = tl.sum(nibbles << (offs_q * 4)[:, None, None, None], axis=0)  # [BLOCK_N, 2, 2]
    words = tl.where(mask_n[:, None, None], words, _PAD_WORD)
    half = tl.arange(0, 2)
    block = pid_t.to(tl.int64) * metadata_row_blocks + offs_n // 16
    lane = (4 * (offs_n % 8) + offs_n % 16 // 8)[:, None, None] + 2 * half[None, None, :]
    tl.store(metadata_ptr + (block[:, None, None] * 32 + lane) * 2 + half[None, :, None], words)


def launch_cast_mvue(
    grad: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, index: int, approximate: bool,
    row: Tensor, values: Tensor, metadata: Tensor,
) -> None:  # fmt: skip
    """Cast and prune ``grad`` into the buffers, all of which are written in full.

    Args:
        grad: ``[T, N]`` contiguous, bf16, fp16 or fp32.
        row_scale, token_scale: fp32 ``[T]``.
        seed: int64 ``[1]``.
        index: 0 <= index < 2**31, distinguishes the linears that share a seed.
        approximate: which of the two estimators.
        row: e4m3 ``[T, N]``.
        values: e4m3 ``[N, padded(T) / 2]``.
        metadata: int32 ``[padded(T) / 128, padded(N) / 16, 32, 2]``.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device, or index is out of range.
    """
    if grad.dim() != 2 or grad.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not grad.is_contiguous():
        raise ValueError(
            f"grad is {grad.dtype} {tuple(grad.shape)} with strides {grad.stride()}; "
            "allowed is bf16, fp16 or fp32 [T, N], contiguous"
        )
    if not 0 <= index < 2**31:
        raise ValueError(f"index is {index}; allowed is 0 <= index < 2**31")
    tokens, columns = grad.shape
    check_buffer("row_scale", row_scale, (tokens,), torch.float32, grad.device)
    check_buffer("token_scale", token_scale, (tokens,), torch.float32, grad.device)
    check_buffer("seed", seed, (1,), torch.int64, grad.device)
    check_buffer("row", row, (tokens, columns), E4M3, grad.device)
    check_buffer("values", values, values_shape(columns, tokens), E4M3, grad.device)
    check_buffer("metadata", metadata, metadata_shape(columns, tokens), torch.int32, grad.device)
    if grad.numel() == 0:
        return
    grid = (padded(tokens) // 128 * (padded(columns) // _BLOCK_N),)
    # Without fusion of multiplications and additions, which would round once where the definition rounds twice.
    _cast_mvue_kernel[grid](
        grad, row_scale, token_scale, seed, row, values, metadata,
        index, tokens, columns, values.stride(0), metadata.shape[1],
        APPROXIMATE=approximate, BLOCK_N=_BLOCK_N, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
