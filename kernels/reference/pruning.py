"""Eager definition of pruning and casting a weight."""

import torch
from torch import Tensor

from sparse_compile.kernels.formats import AMAX_FLOOR
from sparse_compile.kernels.reference.compression import compress24, kept_positions, saturating_cast


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
    return kept.copysign(group).reshape(weight.shape)


def soft_threshold24_both(weight: Tensor) -> Tensor:
    """``sign(w) * max(|w| - t, 0)``: t is the larger of two thresholds, of the element's group along K and along N.

    Each is that of ``soft_threshold24``.  So at most two of each four elements stay non-zero along either dimension.
    The projection is continuous in W and idempotent, and of the transposed weight it is the transposed one.

    Args:
        weight: ``[N, K]``, N and K multiples of 4, any floating dtype; computed in that dtype.
    """
    magnitude = weight.abs()
    return (magnitude - _threshold_both(magnitude)).clamp_min(0).copysign(weight)


def soft_mask24_both(weight: Tensor) -> Tensor:
    """Which elements exceed the threshold of ``soft_threshold24_both``, bool ``[N, K]``; none of a group with NaN."""
    magnitude = weight.abs()
    return magnitude > _threshold_both(magnitude)


def soft_mask24(weight: Tensor) -> Tensor:
    """Which elements exceed the threshold of ``soft_threshold24``, bool ``[..., K]``; none of a group with NaN."""
    magnitude = weight.reshape(*weight.shape[:-1], -1, 4).abs()
    return (magnitude > _threshold(magnitude)).reshape(weight.shape)


def top2_mask(weight: Tensor) -> Tensor:
    """Which elements are the two largest magnitudes of their group of four along the last dimension, bool ``[..., K]``.

    Of equal ones the first; NaN is the largest.
    """
    magnitude = weight.reshape(*weight.shape[:-1], -1, 4).abs()
    largest = magnitude.argsort(dim=-1, descending=True, stable=True)[..., :2]
    mask = torch.zeros_like(magnitude, dtype=torch.bool).scatter_(-1, largest, True)
    return mask.reshape(weight.shape)


def hard_threshold24(weight: Tensor) -> Tensor:
    """Top-2 projection: the two largest magnitudes of each group of four stay as they are, the others become zero."""
    return weight.abs().where(top2_mask(weight), 0).copysign(weight)


def _threshold(magnitude: Tensor) -> Tensor:
    """Second smallest of the last dimension (size 4), kept as size 1; min/max only, so NaN spreads."""
    b0, b1, b2, b3 = magnitude.unbind(-1)
    low = torch.maximum(torch.minimum(b0, b1), torch.minimum(b2, b3))
    high = torch.minimum(torch.maximum(b0, b1), torch.maximum(b2, b3))
    return torch.minimum(low, high).unsqueeze(-1)


def _threshold_both(magnitude: Tensor) -> Tensor:
    """Of each element of ``[N, K]`` the larger threshold of its two groups; NaN where one of them holds NaN."""
    along_k, along_n = (
        _threshold(of_four.reshape(*of_four.shape[:-1], -1, 4)).expand(-1, -1, 4).reshape(of_four.shape)
        for of_four in (magnitude, magnitude.t())
    )
    return torch.maximum(along_k, along_n.t())


def sste_beta(weight: Tensor) -> float | None:
    """The rescaling factor ``beta = <W, S(W)> / <S(W), S(W)>`` that minimises ``||W - beta * S(W)||`` (S-STE).

    None for a weight that is projected to zero everywhere, where every factor is as good.
    """
    w = weight.detach().double()
    s = soft_threshold24(w)
    norm = s.square().sum()
    return float((w * s).sum() / norm) if norm != 0 else None


def prune_weight(weight: Tensor, beta: Tensor, hard: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``W~ = beta * S(W)`` in e4m3, compressed 2:4 for fprop and dense, transposed for dgrad.

    One scale serves both products.  It cancels beta from the payload: ``payload = S * scale`` and
    ``scale_inv = beta / scale``, with ``scale`` the largest power of two that keeps max |S| within e4m3.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32.
        beta: fp32 ``[1]``.
        hard: whether S is ``hard_threshold24``, for which beta is 1, or ``soft_threshold24``.

    Returns:
        ``values`` and ``metadata`` of the payload ``[N, K]`` (see ``formats``), the payload transposed, e4m3
        ``[K, N]``, and ``scale_inv``, fp32 ``[1]``, the multiplier that dequantises.
    """
    w = weight.float()
    projected = hard_threshold24(w) if hard else soft_threshold24(w)
    scale, scale_inv = tensorwise_scale(projected)
    payload = saturating_cast(projected * scale)
    values, metadata = compress24(payload, _kept_positions(w, hard))
    return values, metadata, payload.t().contiguous(), beta * scale_inv


def prune_weight_bf16(weight: Tensor, beta: Tensor, hard: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``W~ = beta * S(W)`` with S(W) in bf16: ``values`` and ``metadata`` of it, itself ``[N, K]``, and ``beta``.

    Arguments as of ``prune_weight``.
    """
    w = weight.float()
    payload = (hard_threshold24(w) if hard else soft_threshold24(w)).to(torch.bfloat16).contiguous()
    values, metadata = compress24(payload, _kept_positions(w, hard))
    return values, metadata, payload, beta.clone()


def _kept_positions(weight: Tensor, hard: bool) -> Tensor:
    return kept_positions(top2_mask(weight) if hard else soft_mask24(weight))


def add_masked_decay(grad: Tensor, weight: Tensor, factor: Tensor, mask: Tensor) -> Tensor:
    """``grad + factor * (1 - mask) * weight`` (SR-STE, Zhou et al., ICLR 2021, arXiv 2102.04010).

    Args:
        grad, weight: ``[N, K]``, any strides, bf16, fp16 or fp32 each.
        factor: fp32 ``[1]``.
        mask: bool ``[N, K]``.
    """
    decayed = grad.float() + factor * weight.float()
    return grad.where(mask, decayed.to(grad.dtype))


def cast_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight in e4m3 with one scale, for dense FP8 linears.

    Args:
        weight: ``[N, K]``, any strides, bf16, fp16 or fp32.

    Returns:
        payload e4m3 ``[N, K]``, the same transposed ``[K, N]``, and ``scale_inv``, fp32 ``[1]``.
    """
    w = weight.float()
    scale, scale_inv = tensorwise_scale(w)
    payload = saturating_cast(w * scale).contiguous()
    return payload, payload.t().contiguous(), scale_inv


def tensorwise_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest power of two that keeps x within e4m3, and its inverse, NaN unless all x are finite; fp32 ``[1]``."""
    amax = x.abs().amax().reshape(1)
    bounded = amax.nan_to_num(nan=torch.finfo(torch.float32).max).clamp_min(AMAX_FLOOR)
    # The biased exponent, one more for a mantissa above 1.75, that of 448 = 1.75 * 2^8.
    exponent = bounded.view(torch.int32) + 0x1FFFFF >> 23
    scale = (262 - exponent << 23).view(torch.float32)
    scale_inv = (exponent - 8 << 23).view(torch.float32)
    return scale, scale_inv.where(amax.isfinite(), float("nan"))
