"""Eager definition of every op: what the kernels must compute, on any device.

Written for clarity and bit-exactness, not speed: the kernels repeat these formulas in the same order in fp32, so that
payloads and metadata can be compared bit by bit.  The mathematical pieces (``soft_threshold24``, ``mvue24``) also run
in fp64, as oracles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.kernels.formats import AMAX_FLOOR, E4M3, E4M3_MAX, PAD_NIBBLE, padded

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
_PHILOX_ROUND_A, _PHILOX_ROUND_B = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEY_A, _PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
# Added to the normalised magnitudes of the approximate estimator, so that a group with fewer than two non-zeros still
# has a pair to draw; the estimate stays unbiased because the probabilities used are the true ones.
_APPROX_EPS = 2.0**-23


def saturating_cast(x: Tensor) -> Tensor:
    """``x`` clamped to the e4m3 range and rounded to nearest even; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def soft_threshold24(weight: Tensor) -> Tensor:
    """S(W) of S-STE: per group of four along the last dimension, ``sign(w) * max(|w| - t, 0)``.

    ``t`` is the second smallest magnitude of the group, so at most two elements stay non-zero, and the projection is
    continuous in W (Hu et al., "S-STE", NeurIPS 2024, arXiv 2409.09099).

    Args:
        weight: ``[..., K]``, K a multiple of 4, any floating dtype; computed in that dtype.
    """
    group = weight.reshape(*weight.shape[:-1], -1, 4)
    magnitude = group.abs()
    kept = (magnitude - _threshold(magnitude)).clamp_min(0)
    return torch.where(group < 0, -kept, kept).reshape(weight.shape)


def _threshold(magnitude: Tensor) -> Tensor:
    """Second smallest of the last dimension (size 4), kept as size 1; min/max only, so NaN spreads."""
    b0, b1, b2, b3 = magnitude.unbind(-1)
    low = torch.maximum(torch.minimum(b0, b1), torch.minimum(b2, b3))
    high = torch.minimum(torch.maximum(b0, b1), torch.maximum(b2, b3))
    return torch.minimum(low, high).unsqueeze(-1)


def sste_beta(weight: Tensor) -> float | None:
    """The rescaling factor ``beta = <W, S(W)> / <S(W), S(W)>`` that minimises ``||W - beta * S(W)||`` (S-STE).

    None for a weight that is projected to zero everywhere, where every factor is as good.
    """
    w = weight.detach().double()
    s = soft_threshold24(w)
    norm = s.square().sum()
    return float((w * s).sum() / norm) if norm != 0 else None


def prune_weight(weight: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``W~ = beta * S(W)`` in e4m3, compressed 2:4 for fprop and dense, transposed for dgrad.

    One scale serves both products.  It cancels beta from the payload: ``payload = S * (448 / max|S|)`` and
    ``scale_inv = beta * max|S| / 448``.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32.
        beta: fp32 ``[1]``.

    Returns:
        ``values`` and ``metadata`` of the payload ``[N, K]`` (see ``formats``), the payload transposed, e4m3
        ``[K, N]``, and ``scale_inv``, fp32 ``[1]``, the multiplier that dequantises.
    """
    w = weight.float()
    magnitude = w.reshape(w.shape[0], -1, 4).abs()
    soft = soft_threshold24(w)
    scale, scale_inv = _tensorwise_scale(soft)
    payload = saturating_cast(soft * scale)
    # The two largest magnitudes, the lower position winning ties: a superset of the non-zeros of S.
    order = magnitude.argsort(dim=-1, descending=True, stable=True)
    positions = order[..., :2].sort(dim=-1).values
    values, metadata = compress24(payload, positions)
    return values, metadata, payload.t().contiguous(), beta * scale_inv


def cast_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight in e4m3 with one scale, for dense FP8 linears.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32.

    Returns:
        payload e4m3 ``[N, K]``, the same transposed ``[K, N]``, and ``scale_inv``, fp32 ``[1]``.
    """
    w = weight.float()
    scale, scale_inv = _tensorwise_scale(w)
    payload = saturating_cast(w * scale).contiguous()
    return payload, payload.t().contiguous(), scale_inv


def _tensorwise_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """``(448 / amax, amax / 448)`` as fp32 ``[1]``."""
    amax = x.abs().amax().reshape(1).clamp_min(AMAX_FLOOR)
    # Tensors on both sides: torch turns division of or by a Python scalar into a product with a rounded reciprocal.
    limit = torch.full_like(amax, E4M3_MAX)
    return limit / amax, amax / limit


def compress24(dense: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Values and metadata of ``dense [R, C]``, keeping ``positions`` (int, ``[R, C / 4, 2]``, ascending)."""
    rows, columns = dense.shape
    extra_columns, extra_rows = padded(columns) - columns, padded(rows) - rows
    raw = dense.view(torch.uint8).reshape(rows, columns // 4, 4)
    values = F.pad(raw.gather(-1, positions).reshape(rows, columns // 2), (0, extra_columns // 2)).view(dense.dtype)
    nibbles = positions[..., 0] | positions[..., 1] << 2
    nibbles = F.pad(nibbles, (0, extra_columns // 4, 0, extra_rows), value=PAD_NIBBLE)
    shifts = torch.arange(0, 32, 4, device=dense.device)
    words = (nibbles.reshape(padded(rows), padded(columns) // 32, 8) << shifts).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    blocks = words.reshape(padded(rows) // 16, 2, 8, padded(columns) // 128, 2, 2)  # block, r//8, r%8, block, p//2, p%2
    metadata = blocks.permute(3, 0, 2, 5, 1, 4).reshape(padded(columns) // 128, padded(rows) // 16, 32, 2)
    return values, metadata.contiguous()


def decompress24(values: Tensor, metadata: Tensor) -> Tensor:
    """The dense ``[R, padded(C)]`` matrix, in the dtype of ``values``; inverse of ``compress24``."""
    rows = values.shape[0]
    column_blocks, row_blocks = metadata.shape[:2]
    blocks = metadata.to(torch.int64).reshape(column_blocks, row_blocks, 8, 2, 2, 2)
    words = blocks.permute(1, 4, 2, 0, 5, 3).reshape(row_blocks * 16, column_blocks * 4, 1)[:rows]
    shifts = torch.arange(0, 32, 4, device=values.device)
    nibbles = (words >> shifts & 15).reshape(rows, column_blocks * 32, 1)
    positions = torch.cat([nibbles & 3, nibbles >> 2], dim=-1)
    raw = values.view(torch.uint8).reshape(rows, column_blocks * 32, 2)
    dense = torch.zeros(rows, column_blocks * 32, 4, dtype=torch.uint8, device=values.device)
    return dense.scatter_(-1, positions, raw).reshape(rows, column_blocks * 128).view(values.dtype)


def philox4x32(seed: Tensor, c0: Tensor, c1: Tensor, c2: int) -> list[Tensor]:
    """Four 32-bit random words (as int64) per counter ``(c0, c1, c2, 0)``, keyed by the 64-bit ``seed [1]``."""
    key0, key1 = seed & _MASK32, seed >> 32 & _MASK32
    words = [*torch.broadcast_tensors(c0, c1), torch.full((), c2, device=c0.device), torch.zeros((), device=c0.device)]
    w0, w1, w2, w3 = (word.to(torch.int64) for word in words)
    for _ in range(10):
        product_a, product_b = _PHILOX_ROUND_A * w0, _PHILOX_ROUND_B * w2
        # The 64-bit products wrap; arithmetic shift and mask still give their upper halves.
        w0, w2 = product_b >> 32 & _MASK32 ^ w1 ^ key0, product_a >> 32 & _MASK32 ^ w3 ^ key1
        w1, w3 = product_b & _MASK32, product_a & _MASK32
        key0, key1 = key0 + _PHILOX_KEY_A & _MASK32, key1 + _PHILOX_KEY_B & _MASK32
    return [w0, w1, w2, w3]


def group_uniforms(seed: Tensor, index: int, token_groups: int, columns: int) -> Tensor:
    """One uniform in [0, 1) with 23 bits per group of four tokens and column: fp32 ``[token_groups, columns]``.

    Group ``q`` of column ``n`` takes word ``q // 8 % 4`` of counter ``(n, q // 32 * 8 + q % 8, index, 0)``: a call of
    Philox serves four groups of one column, whatever the tiling of a kernel.
    """
    blocks = (token_groups + 31) // 32
    c0 = torch.arange(columns, device=seed.device)
    c1 = torch.arange(blocks * 8, device=seed.device).reshape(blocks, 8, 1)
    words = torch.stack(philox4x32(seed, c0, c1, index), dim=1)  # [blocks, word, 8, columns]
    return (words >> 9).float().mul(2.0**-23).reshape(blocks * 32, columns)[:token_groups]


def mvue24(groups: Tensor, uniforms: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    """Minimum-variance unbiased 2:4 sampling: two of each four elements, rescaled so that the expectation is exact.

    Exact (Chmiel et al., ICLR 2023, arXiv 2203.10991): with b = |a|, S = sum b, R = S - max b, the inclusion
    probabilities are ``2 b / S``, or, where max b > R, 1 for the largest and ``b / R`` for the others; kept elements
    are ``a / probability``.  Two elements are drawn with those probabilities by systematic sampling: element i is kept
    when u or u + 1 falls into its part of the cumulative probabilities.  The variance of a sum of kept elements'
    squares depends on the inclusion probabilities alone.

    Approximate (the estimator of the S-STE authors' training code): two draws without replacement, each proportional
    to b; P{i, j} = b_i b_j / S * (1 / (S - b_i) + 1 / (S - b_j)), one uniform choosing among the six pairs.

    Args:
        groups: ``[..., 4]`` floating; computed in that dtype.
        uniforms: ``[...]`` in [0, 1).

    Returns:
        kept values ``[..., 2]`` and their ascending positions, int64 ``[..., 2]``.
    """
    positions, outputs = (_mvue24_approximate if approximate else _mvue24_exact)(groups, uniforms.unsqueeze(-1))
    return outputs.gather(-1, positions), positions


def _mvue24_exact(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    b = a.abs()
    b0, b1, b2, b3 = b.split(1, dim=-1)
    total = (b0 + b1) + (b2 + b3)
    largest = torch.maximum(torch.maximum(b0, b1), torch.maximum(b2, b3))
    rest = total - largest
    dominated = largest > rest
    unit = torch.where(dominated, rest, total * 0.5)
    unit_inv = torch.where(unit > 0, 1.0 / unit, 0.0)
    certain = dominated & (b == largest)
    p0, p1, p2, _ = torch.where(certain, 1.0, b * unit_inv).split(1, dim=-1)
    c1 = p0
    c2 = c1 + p1
    c3 = c2 + p2
    v = u + 1.0
    first = (u >= c1).long() + (u >= c2).long() + (u >= c3).long()
    second = (v >= c1).long() + (v >= c2).long() + (v >= c3).long()
    # Equal only in groups of zeros and, with probability 2^-23, by rounding.
    first = torch.where(first == second, first.clamp_max(2), first)
    second = torch.where(first >= second, first + 1, second)
    magnitude = torch.where(b > 0, torch.where(certain, b, unit), 0.0 * b)
    return torch.cat([first, second], dim=-1), torch.where(a < 0, -magnitude, magnitude)


def _mvue24_approximate(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    b = a.abs()
    b0, b1, b2, b3 = b.split(1, dim=-1)
    total = (b0 + b1) + (b2 + b3)
    x = b * torch.where(total > 0, 1.0 / total, 0.0) + _APPROX_EPS
    x0, x1, x2, x3 = x.split(1, dim=-1)
    norm = (x0 + x1) + (x2 + x3)
    odds = x / (norm - x)
    w0, w1, w2, w3 = odds.split(1, dim=-1)
    inclusion = x * ((1.0 + ((w0 + w1) + (w2 + w3))) - odds) / norm
    target = u * norm
    c1 = x1 * w0 + x0 * w1  # {0, 1}
    c2 = c1 + (x2 * w0 + x0 * w2)  # {0, 2}
    c3 = c2 + (x3 * w0 + x0 * w3)  # {0, 3}
    c4 = c3 + (x2 * w1 + x1 * w2)  # {1, 2}
    c5 = c4 + (x3 * w1 + x1 * w3)  # {1, 3}, then {2, 3}
    first = (target >= c3).long() + (target >= c5).long()
    pair = (target >= c1).long() + (target >= c2).long() + (target >= c3).long() + (target >= c4).long()
    pair = pair + (target >= c5).long()
    # Pairs in order: 01 02 03 12 13 23.
    second = torch.where(pair >= 3, pair - 1, pair + 1).clamp_max(3)
    return torch.cat([first, second], dim=-1), a / inclusion


def cast_transpose(x: Tensor, row_scale: Tensor, token_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Two e4m3 copies of ``x [T, C]``: ``x * row_scale`` as it lies, and ``x * token_scale`` token-major.

    Args:
        x: ``[T, C]`` contiguous, bf16, fp16 or fp32.
        row_scale, token_scale: fp32 ``[T]``, multipliers for each token.

    Returns:
        e4m3 ``[T, C]`` and e4m3 ``[C, padded(T)]``, zero beyond T.
    """
    row = saturating_cast(x.float() * row_scale[:, None])
    column = saturating_cast(x.float() * token_scale[:, None])
    return row, transpose_tokens(column)


def transpose_tokens(x: Tensor) -> Tensor:
    """``x [T, C]`` (e4m3) token-major: ``[C, padded(T)]``, zero beyond T."""
    tokens = x.shape[0]
    # Without padding F.pad returns its input as it lies.
    return F.pad(x.view(torch.uint8).t(), (0, padded(tokens) - tokens)).contiguous().view(x.dtype)


def cast_mvue(
    grad: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, index: int, approximate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Both uses of grad_output in one reading: its e4m3 cast for dgrad, its MVUE-pruned transpose for wgrad.

    Args:
        grad: ``[T, N]`` contiguous, bf16, fp16 or fp32.
        row_scale: fp32 ``[T]``, multiplier of each token in the cast for dgrad.
        token_scale: fp32 ``[T]``, multiplier of each token before MVUE; the caller keeps ``|grad * token_scale|``
            within ``448 / MVUE_GAIN``, so that no sampled value saturates.
        seed: int64 ``[1]``; index: distinguishes the linears that share a seed.

    Returns:
        e4m3 ``[T, N]``, and the ``values`` and ``metadata`` of the 2:4 matrix ``[N, T]`` pruned along tokens.
    """
    tokens, columns = grad.shape
    row = saturating_cast(grad.float() * row_scale[:, None])
    scaled = F.pad(grad.float() * token_scale[:, None], (0, 0, 0, padded(tokens) - tokens))
    groups = scaled.reshape(padded(tokens) // 4, 4, columns)
    uniforms = group_uniforms(seed, index, padded(tokens) // 4, columns)
    kept, positions = mvue24(groups.permute(2, 0, 1), uniforms.t(), approximate)
    payload = torch.zeros(columns, padded(tokens) // 4, 4, device=grad.device).scatter_(-1, positions, kept)
    values, metadata = compress24(saturating_cast(payload.reshape(columns, -1)), positions)
    return row, values, metadata


def sparse_mm(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    out_dtype: torch.dtype,
    transpose: bool,
) -> Tensor:
    """2:4-sparse times dense: ``(A * scale_inv) @ (B * dense_scale_inv[:, None]).T``.

    Args:
        values, metadata: the 2:4 operand A ``[R, C]``.
        dense: B, e4m3 ``[D, c]`` contiguous with C / 2 * 2 >= c; columns beyond c count as zero.
        scale_inv: fp32 ``[1]``; dense_scale_inv: fp32 ``[D]`` or None.
        transpose: store the product as ``[D, R]`` instead of ``[R, D]``.
    """
    a = decompress24(values, metadata)[:, : dense.shape[1]].float()
    product = dense.float() @ a.t() if transpose else a @ dense.float().t()
    if dense_scale_inv is not None:
        product = product * (dense_scale_inv[:, None] if transpose else dense_scale_inv)
    return (product * scale_inv).to(out_dtype)


def scaled_mm(a: Tensor, b: Tensor, scale_inv: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Dense ``(a @ b.T) * scale_inv`` of e4m3 ``a [M, C]`` and ``b [D, C]``; scale_inv fp32 ``[1]``."""
    return ((a.float() @ b.float().t()) * scale_inv).to(out_dtype)
