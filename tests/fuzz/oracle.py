"""What a rewritten linear computes, in fp64 and from the papers' formulas: written without the package's own reference.

Only recipes without sampling have one answer: wgrad is dense FP8 here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 448.0  # of e4m3
TINY = 2.0**-100  # a maximum below it is taken for it


def e4m3(x: Tensor) -> Tensor:
    """To the nearest of 3 bits of mantissa and an exponent from -6, ties to even; it saturates."""
    exponent = torch.frexp(x.abs().clamp_min(2.0**-6))[1] - 1
    quantum = torch.ldexp(torch.ones_like(x), exponent - 3)
    return (x / quantum).round().mul(quantum).clamp(-LARGEST, LARGEST)


def soft24(weight: Tensor) -> Tensor:
    """Of each four neighbours of a row: what exceeds the second smallest magnitude, signed."""
    groups = weight.unflatten(-1, (-1, 4))
    threshold = groups.abs().sort(dim=-1).values[..., 1:2]
    return (groups.sign() * (groups.abs() - threshold).clamp_min(0)).flatten(-2)


def hard24(weight: Tensor) -> Tensor:
    """The two largest magnitudes of each four neighbours, of equal ones the first."""
    groups = weight.unflatten(-1, (-1, 4))
    order = groups.abs().sort(dim=-1, descending=True, stable=True).indices[..., :2]
    return (groups * torch.zeros_like(groups).scatter_(-1, order, 1.0)).flatten(-2)


def soft_both(weight: Tensor) -> Tensor:
    return soft24(soft24(weight).t()).t()


PROJECTIONS = {
    "fp8": lambda weight: weight, "s-ste": soft24, "s-ste-transposable": soft_both, "ste": hard24
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What is multiplied with in place of a weight ``[N, K]``: e4m3 times ``scale_inv``."""

    payload: Tensor
    scale_inv: float


def beta_of(weight: Tensor, recipe: str) -> float:
    """Of least squares; 1 where nothing is pruned."""
    projected = PROJECTIONS[recipe](weight)
    norm = float(projected.square().sum())
    return 1.0 if recipe == "fp8" or not norm else float((weight * projected).sum()) / norm


def kept(weight: Tensor, recipe: str, beta: float) -> Kept:
    """With a scale that is the largest power of two for which nothing saturates."""
    projected = PROJECTIONS[recipe](weight)
    amax = max(float(projected.abs().max()), TINY)
    scale = 2.0 ** int(torch.tensor(LARGEST / amax, dtype=torch.float64).log2().floor())
    return Kept(e4m3(projected * scale), beta / scale)


def scales(x: Tensor) -> Tensor:
    """``[T, 1]``, that map the largest magnitude of each row to that of e4m3."""
    return LARGEST / x.abs().amax(dim=1, keepdim=True).clamp_min(TINY)


class Linear(torch.autograd.Function):
    """``x [T, K]`` by a weight ``[N, K]``, whose gradient goes straight through what was made of it."""

    @staticmethod
    def forward(ctx, x, weight, operand):
        scale = scales(x)
        x_fp8 = e4m3(x * scale)
        ctx.save_for_backward(x_fp8, scale, operand.payload)
        ctx.scale_inv = operand.scale_inv
        return (x_fp8 @ operand.payload.t()) * operand.scale_inv / scale

    @staticmethod
    def backward(ctx, grad):
        x_fp8, x_scale, payload = ctx.saved_tensors
        scale = scales(grad)
        grad_input = (e4m3(grad * scale) @ payload) * ctx.scale_inv / scale
        # The scale of each token of the input is folded into the gradient; one scale is left for all.
        folded = grad / x_scale
        one = LARGEST / max(float(folded.abs().max()), TINY)
        grad_weight = (e4m3(folded * one).t() @ x_fp8) / one
        return grad_input, grad_weight, None
