"""Eager definitions of transposable pruning: 2:4 along rows and along columns, by masks or by soft thresholds.

Masks: of the 90 of a 4 x 4 tile with two ones in each row and column, the one that keeps the largest sum of magnitudes
(Hubara et al., arXiv 2102.08124; Hu et al., "T-SR-STE", ICML 2024, arXiv 2404.01847).

The two upper rows of such a mask say how often the two lower ones need each column.  So the best mask is the best of 19
ways to share the columns, and for each the best upper half and the best lower half, on their own: 72 sums of half a
tile instead of 90 of a whole one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.kernels.reference.compression import compress24, kept_positions, saturating_cast
from sparse_compile.kernels.reference.pruning import soft_mask24_both, soft_threshold24_both, tensorwise_scale

# Pairs of columns; the complement of pair p is pair 5 - p.
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_Halves = list[tuple[int, int]]  # the pairs of the first and of the second row of a half


def ways() -> list[tuple[_Halves, _Halves]]:
    """The upper and lower halves that go together, the first best."""
    same = [([(p, p)], [(5 - p, 5 - p)]) for p in range(6)]
    one_shared = [
        ([(p, q), (q, p)], [(5 - p, 5 - q), (5 - q, 5 - p)]) for p in range(6) for q in range(p + 1, 6) if q != 5 - p
    ]
    none_shared: _Halves = [(p, 5 - p) for p in range(6)]
    return [*same, *one_shared, (none_shared, none_shared)]


def transposable_masks(weight: Tensor) -> Tensor:
    """The best mask of each 4 x 4 tile: int16 ``[N / 4, K / 4]``, bit ``4 * i + j`` for the element in row i, column j.

    Sums are those of two columns, then of two rows, then of both halves, in fp32 (fp64 for an fp64 weight); of equal
    ones the first, and NaN is never larger.

    Args:
        weight: ``[N, K]``, N and K multiples of 4, floating.
    """
    n, k = weight.shape
    magnitude = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs()
    tiles = magnitude.reshape(n // 4, 4, k // 4, 4).transpose(1, 2)
    pairs = [[tiles[..., row, a] + tiles[..., row, b] for a, b in PAIRS] for row in range(4)]
    best, masks = None, torch.zeros(n // 4, k // 4, dtype=torch.int32, device=weight.device)
    for upper, lower in ways():
        upper_sum, upper_mask = _best_half(pairs[0], pairs[1], upper)
        lower_sum, lower_mask = _best_half(pairs[2], pairs[3], lower)
        total, mask = upper_sum + lower_sum, upper_mask | lower_mask << 8
        better = torch.ones_like(total, dtype=torch.bool) if best is None else total > best
        best = total if best is None else torch.where(better, total, best)
        masks = torch.where(better, mask, masks)
    return masks.to(torch.int16).contiguous()


def _best_half(first: Sequence[Tensor], second: Sequence[Tensor], halves: _Halves) -> tuple[Tensor, Tensor]:
    """The largest sum, and the mask of its two rows."""
    best = mask = None
    for p, q in halves:
        total, bits = first[p] + second[q], _nibble(p) | _nibble(q) << 4
        better = torch.ones_like(total, dtype=torch.bool) if best is None else total > best
        best = total if best is None else torch.where(better, total, best)
        mask = torch.full_like(total, bits, dtype=torch.int32) if mask is None else torch.where(better, bits, mask)
    assert best is not None
    assert mask is not None
    return best, mask


def _nibble(pair: int) -> int:
    a, b = PAIRS[pair]
    return 1 << a | 1 << b


def dense_mask(masks: Tensor) -> Tensor:
    """bool ``[N, K]`` of int16 ``[N / 4, K / 4]``."""
    bits = torch.arange(16, device=masks.device)
    rows, columns = masks.shape
    tiles = (masks.to(torch.int32)[..., None] >> bits & 1).bool()
    return tiles.reshape(rows, columns, 4, 4).transpose(1, 2).reshape(4 * rows, 4 * columns)


def prune_transposable(weight: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``mask * W`` in e4m3, compressed 2:4 along K for fprop and, transposed, along N for dgrad.

    One scale serves both: the largest power of two that keeps max |W|, the dropped elements included, within e4m3.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32; masks: int16 ``[N / 4, K / 4]``.

    Returns:
        ``values`` and ``metadata`` of the payload ``[N, K]``, the same of it transposed ``[K, N]``, and ``scale_inv``,
        fp32 ``[1]``.
    """
    w = weight.float()
    scale, scale_inv = tensorwise_scale(w)
    return (*_compress_both_ways(w * scale, dense_mask(masks)), scale_inv)


def prune_soft_transposable(weight: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``W~ = beta * S(W)``, S being ``soft_threshold24_both``, in e4m3 and compressed along K and along N.

    One scale serves both, and cancels beta from them, as in ``prune_weight``.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32.
        beta: fp32 ``[1]``.

    Returns:
        as ``prune_transposable``.
    """
    w = weight.float()
    projected = soft_threshold24_both(w)
    scale, scale_inv = tensorwise_scale(projected)
    return (*_compress_both_ways(projected * scale, soft_mask24_both(w)), beta * scale_inv)


def _compress_both_ways(scaled: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``values`` and ``metadata`` of ``scaled [N, K]`` in e4m3, and of it transposed; ``kept`` as of both."""
    payload = saturating_cast(scaled).contiguous()
    compressed = compress24(payload, kept_positions(kept))
    transposed = compress24(payload.t().contiguous(), kept_positions(kept.t()))
    return (*compressed, *transposed)
