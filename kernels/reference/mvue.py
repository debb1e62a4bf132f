"""Eager definition of how grad_output is cast, transposed and sampled (MVUE), and of its random numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.kernels.formats import E4M3, SUMMED, padded
from sparse_compile.kernels.reference.compression import compress24, saturating_cast

# Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
_PHILOX_ROUND_A, _PHILOX_ROUND_B = 0xD2511F53, 0xCD9E8D57
_PHILOX_KEY_A, _PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF
# Added to the normalised magnitudes of the approximate estimator, so that a group with fewer than two non-zeros still
# has a pair to draw; the estimate stays unbiased because the probabilities used are the true ones.
_APPROX_EPS = 2.0**-23
# Added to the sum of their magnitudes, so that its inverse is finite.
_TOTAL_FLOOR = 2.0**-100


def stochastic_round(x: Tensor, uniforms: Tensor, dtype: torch.dtype) -> Tensor:
    """One of the two neighbours of ``x`` in an FP8 format, the upper magnitude as often as ``|x|`` is near to it.

    ``floor(|x| / ulp + u) * ulp``, with ulp the distance of the format's numbers where ``|x|`` lies.  So the mean over
    uniforms is x, where a cast to nearest would always err to the same side.  What is beyond the range stays there.

    Args:
        x: fp32.
        uniforms: fp32 in (0, 1), of x's shape.

    Returns:
        fp32, which a cast to ``dtype`` does not round again, but for what saturates; NaN stays NaN.
    """
    info = torch.finfo(dtype)
    magnitude = x.abs()
    # The power of two below, at least that of the smallest normal number: subnormal ones are as far from each other.
    binade = magnitude.clamp(info.smallest_normal, info.max).view(torch.int32).bitwise_and(0x7F800000)
    ulp = binade.view(torch.float32) * info.eps
    return ((magnitude / ulp + uniforms).floor() * ulp).copysign(x)


def philox4x32(seed: Tensor, c0: Tensor, c1: Tensor, c2: int, c3: int = 0) -> list[Tensor]:
    """Four 32-bit random words (as int64) per counter ``(c0, c1, c2, c3)``, keyed by the 64-bit ``seed [1]``."""
    key0, key1 = seed & _MASK32, seed >> 32 & _MASK32
    words = [*torch.broadcast_tensors(c0, c1), *(torch.full((), c, device=c0.device) for c in (c2, c3))]
    w0, w1, w2, w3 = (word.to(torch.int64) for word in words)
    for _ in range(10):
        product_a, product_b = _PHILOX_ROUND_A * w0, _PHILOX_ROUND_B * w2
        # The 64-bit products wrap; arithmetic shift and mask still give their upper halves.
        w0, w2 = product_b >> 32 & _MASK32 ^ w1 ^ key0, product_a >> 32 & _MASK32 ^ w3 ^ key1
        w1, w3 = product_b & _MASK32, product_a & _MASK32
        key0, key1 = key0 + _PHILOX_KEY_A & _MASK32, key1 + _PHILOX_KEY_B & _MASK32
    return [w0, w1, w2, w3]


def group_uniforms(seed: Tensor, index: int, token_groups: int, columns: int) -> Tensor:
    """One uniform in (0, 1) per group of four tokens and column: fp32 ``[token_groups, columns]``.

    Eight groups of a column, a word of metadata, share a call of Philox, whatever the tiling of a kernel: group ``g``
    takes 16 bits ``k``, half ``g % 2`` of word ``g % 8 // 2`` of counter ``(n, g // 8, index, 0)``.  Its uniform is
    ``(k + 1/2) / 2^16``: probabilities are off by at most 2^-16, where e4m3 then rounds to four binary digits.
    """
    return _group_halves(seed, index, token_groups, columns, 0).float().add(0.5).mul(2.0**-16)


def rounding_uniforms(seed: Tensor, index: int, token_groups: int, columns: int) -> Tensor:
    """One uniform in (0, 1) for each kept element of a group of four tokens: fp32 ``[token_groups, columns, 2]``.

    Of a further call of Philox, whose counter ends in 1: of the 16 bits that lie where those of ``group_uniforms`` do,
    the first kept element takes the lower 8 bits ``k``, the second the upper.  Its uniform is ``(k + 1/2) / 2^8``: a
    mean is off by at most 2^-9 of a distance of two numbers, where rounding to nearest is off by up to one half.
    """
    halves = _group_halves(seed, index, token_groups, columns, 1)
    return torch.stack([halves & 0xFF, halves >> 8], dim=-1).float().add(0.5).mul(2.0**-8)


def _group_halves(seed: Tensor, index: int, token_groups: int, columns: int, call: int) -> Tensor:
    """16 random bits per group of four tokens and column, of one call of Philox: int64 ``[token_groups, columns]``."""
    blocks = (token_groups + 7) // 8
    c0 = torch.arange(columns, device=seed.device)
    c1 = torch.arange(blocks, device=seed.device)[:, None]
    words = torch.stack(philox4x32(seed, c0, c1, index, call), dim=1)  # [blocks, word, columns]
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2)  # [blocks, word, half, columns]
    return halves.reshape(blocks * 8, columns)[:token_groups]


def mvue24(groups: Tensor, uniforms: Tensor, approximate: bool) -> tuple[Tensor, Tensor]:
    """Minimum-variance unbiased 2:4 sampling: two of each four elements, rescaled so that the expectation is exact.

    Both estimators give each element a weight and keep it with probability ``weight / unit``, where two units are the
    sum of the weights: laid end to end, those into which the points ``u * unit`` and ``(u + 1) * unit`` fall
    (systematic sampling).  Kept elements are ``a / probability``.  The total variance depends on the probabilities
    alone.

    Exact (Chmiel et al., ICLR 2023, arXiv 2203.10991): the weights are b = |a|, cut at the unit, which is half their
    sum or, where one element is larger than the three others together, the sum of these: it is kept as it is.

    Approximate: the probabilities of the S-STE authors' training code, which draws two without replacement, each with
    probability proportional to b; P(i) = b_i / S * (1 + sum over j != i of b_j / (S - b_j)), S = sum b.

    A NaN makes both kept elements NaN, and an infinity at least one of them infinite or NaN.

    Args:
        groups: ``[..., 4]`` floating; computed in that dtype.
        uniforms: ``[...]`` in [0, 1).

    Returns:
        kept values ``[..., 2]`` and their ascending positions, int64 ``[..., 2]``.
    """
    return (_mvue24_approximate if approximate else _mvue24_exact)(groups, uniforms.unsqueeze(-1))


def _mvue24_exact(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    b0, b1, b2, b3 = a.abs().split(1, dim=-1)
    b01, b23 = b0 + b1, b2 + b3
    # Not sum - maximum, whose rounding error can exceed the three other elements.
    rest = torch.minimum(b01 + torch.minimum(b2, b3), b23 + torch.minimum(b0, b1))
    unit = torch.minimum(rest, (b01 + b23) * 0.5)
    positions = _systematic(b0, b3, b01, b23, unit, u)
    kept = a.gather(-1, positions)
    return torch.maximum(kept.abs(), unit).copysign(kept), positions


def _mvue24_approximate(a: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    b0, b1, b2, b3 = a.abs().split(1, dim=-1)
    total_inv = 1.0 / (((b0 + b1) + (b2 + b3)) + _TOTAL_FLOOR)
    x0, x1, x2, x3 = (b * total_inv + _APPROX_EPS for b in (b0, b1, b2, b3))
    x01, x23 = x0 + x1, x2 + x3
    # Sums without an element are sums of the others, because differences would cancel.
    d0, d1, d2, d3 = x1 + x23, x0 + x23, x01 + x3, x01 + x2
    d01, d23 = d0 * d1, d2 * d3
    d_inv = 1.0 / (d01 * d23)
    d01_inv, d23_inv = d_inv * d23, d_inv * d01
    odds0, odds1 = x0 * (d1 * d01_inv), x1 * (d0 * d01_inv)
    odds2, odds3 = x2 * (d3 * d23_inv), x3 * (d2 * d23_inv)
    odds01, odds23 = odds0 + odds1, odds2 + odds3
    y0, y1 = x0 * (1.0 + (odds1 + odds23)), x1 * (1.0 + (odds0 + odds23))
    y2, y3 = x2 * (1.0 + (odds01 + odds3)), x3 * (1.0 + (odds01 + odds2))
    y01, y23 = y0 + y1, y2 + y3
    unit = (y01 + y23) * 0.5
    positions = _systematic(y0, y3, y01, y23, unit, u)
    y_first, y_second = torch.cat([y0, y1, y2, y3], dim=-1).gather(-1, positions).split(1, dim=-1)
    gain = unit * (1.0 / (y_first * y_second))
    return a.gather(-1, positions) * torch.cat([y_second * gain, y_first * gain], dim=-1), positions


def _systematic(w0: Tensor, w3: Tensor, w01: Tensor, w23: Tensor, unit: Tensor, u: Tensor) -> Tensor:
    """Positions of the elements at ``u * unit`` and ``(u + 1) * unit``, from the first two weights and the last two.

    The second point is ``(1 - u) * unit`` from the right end.  So no weight need be cut at the unit: it matters in
    neither comparison whether one that reaches beyond a point does so by more.
    """
    t = u * unit
    t_right = unit - t
    beyond0, beyond1 = w0 <= t, w01 <= t
    first = beyond0.long() + beyond1.long()
    # The second is beyond the first by the disjunctions, whatever rounding does.
    second = 1 + ((w23 >= t_right) | beyond0).long() + ((w3 >= t_right) | beyond1).long()
    return torch.cat([first, second], dim=-1)


def cast_transpose(
    x: Tensor, row_scale: Tensor, token_scale: Tensor, dtype: torch.dtype = E4M3
) -> tuple[Tensor, Tensor]:
    """Two FP8 copies of ``x [T, C]``: ``x * row_scale`` as it lies, and ``x * token_scale`` token-major.

    Args:
        x: ``[T, C]`` contiguous, bf16, fp16 or fp32.
        row_scale, token_scale: fp32 ``[T]``, multipliers for each token.
        dtype: e4m3 or e5m2.

    Returns:
        FP8 ``[T, C]`` and FP8 ``[C, padded(T)]``, zero beyond T.
    """
    row = saturating_cast(x.float() * row_scale[:, None], dtype)
    column = saturating_cast(x.float() * token_scale[:, None], dtype)
    return row, transpose_tokens(column)


def block_sums(x: Tensor) -> Tensor:
    """Sums of ``x [T, C]`` over each 32 tokens, fp32 ``[padded(T) / 32, C]``: the gradient of a bias is their sum."""
    tokens, columns = x.shape
    blocks = F.pad(x.float(), (0, 0, 0, padded(tokens) - tokens))
    return blocks.reshape(padded(tokens) // SUMMED, SUMMED, columns).sum(dim=1)


def transpose_tokens(x: Tensor) -> Tensor:
    """``x [T, C]`` (FP8) token-major: ``[C, padded(T)]``, zero beyond T."""
    tokens = x.shape[0]
    # Without padding F.pad returns its input as it lies.
    return F.pad(x.view(torch.uint8).t(), (0, padded(tokens) - tokens)).contiguous().view(x.dtype)


def cast_mvue(
    grad: Tensor,
    row_scale: Tensor,
    token_scale: Tensor,
    seed: Tensor,
    index: int,
    approximate: bool,
    stochastic: bool = False,
    dtype: torch.dtype = E4M3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both uses of grad_output in one reading: its FP8 cast for dgrad, its MVUE-pruned transpose for wgrad.

    Args:
        grad: ``[T, N]`` contiguous, bf16, fp16 or fp32.
        row_scale: fp32 ``[T]``, multiplier of each token in the cast for dgrad.
        token_scale: fp32 ``[T]``, multiplier of each token before MVUE; the caller keeps ``|grad * token_scale|``
            within the format's largest number over ``MVUE_GAIN``, so that no sampled value saturates.
        seed: int64 ``[1]``; index: distinguishes the linears that share a seed.
        approximate: which of the two estimators.
        stochastic: whether what MVUE keeps is rounded up or down at random, see ``stochastic_round``, or to nearest.
        dtype: e4m3 or e5m2.

    Returns:
        FP8 ``[T, N]``, and the ``values`` and ``metadata`` of the 2:4 matrix ``[N, T]`` pruned along tokens.
    """
    tokens, columns = grad.shape
    row = saturating_cast(grad.float() * row_scale[:, None], dtype)
    scaled = F.pad(grad.float() * token_scale[:, None], (0, 0, 0, padded(tokens) - tokens))
    groups = scaled.reshape(padded(tokens) // 4, 4, columns)
    uniforms = group_uniforms(seed, index, padded(tokens) // 4, columns)
    kept, positions = mvue24(groups.permute(2, 0, 1), uniforms.t(), approximate)
    if stochastic:
        kept = stochastic_round(
            kept, rounding_uniforms(seed, index, padded(tokens) // 4, columns).transpose(0, 1), dtype
        )
    payload = kept.new_zeros(columns, padded(tokens) // 4, 4).scatter_(-1, positions, kept)
    values, metadata = compress24(saturating_cast(payload.reshape(columns, padded(tokens)), dtype), positions)
    return row, values, metadata
