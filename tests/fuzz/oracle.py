"""What a rewritten linear computes, in fp64 and from the papers' formulas: written without the package's own reference.

What is sampled has no one answer: the oracle's gradient of a weight is what the samples are on average.
"""

from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, Literal

import torch
from torch import Tensor

LARGEST = 448.0  # of e4m3
TINY = 2.0**-100  # a maximum below it is taken for it

# How a product is made; "dense" is exact.
Product = Literal["fp8", "bf16", "dense"]


def e4m3(x: Tensor) -> Tensor:
    """To the nearest of 3 bits of mantissa and an exponent from -6, ties to even; it saturates."""
    exponent = torch.frexp(x.abs().clamp_min(2.0**-6))[1] - 1
    quantum = torch.ldexp(torch.ones_like(x), exponent - 3)
    return (x / quantum).round().mul(quantum).clamp(-LARGEST, LARGEST)


def bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).double()


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
    """Of what either threshold leaves the smaller."""
    along_k, along_n = soft24(weight), soft24(weight.mT).mT
    return weight.sign() * torch.minimum(along_k.abs(), along_n.abs())


PROJECTIONS = {"none": lambda weight: weight, "soft": soft24, "soft, both": soft_both, "hard": hard24}

_ROWS = [torch.zeros(4).scatter_(0, torch.tensor(pair), 1.0) for pair in combinations(range(4), 2)]
# All masks of a 4 x 4 tile with two elements in each row and column.
TILES = torch.stack([torch.stack(rows) for rows in product(_ROWS, repeat=4) if (sum(rows) == 2).all()])


def transposable_mask(weight: Tensor) -> Tensor:
    """Of each tile the mask that keeps most, of magnitudes."""
    rows, columns = weight.shape
    tiles = weight.abs().view(rows // 4, 4, columns // 4, 4).transpose(1, 2)
    best = torch.einsum("abij,mij->abm", tiles, TILES.to(tiles)).argmax(-1)
    return TILES.to(tiles)[best].transpose(1, 2).reshape(rows, columns)


@dataclass(frozen=True)
class Recipe:
    """The arithmetic of a linear's three products.

    Attributes:
        projection: by name; "masks" are transposable ones, which are kept.
        sampled: whether the gradient of the weight may be an estimate.
    """

    projection: str
    fprop: Product = "fp8"
    dgrad: Product = "fp8"
    wgrad: Product = "fp8"
    sampled: bool = False

    @property
    def prunes(self) -> bool:
        return self.projection != "none"

    @property
    def has_beta(self) -> bool:
        return self.projection.startswith("soft")


RECIPES = {
    "fp8": Recipe("none"),
    "fp8-mvue": Recipe("none", sampled=True),
    "fp8-backward": Recipe("none", fprop="dense"),
    "s-ste": Recipe("soft", sampled=True),
    "s-ste-approximate": Recipe("soft", sampled=True),
    "s-ste-transposable": Recipe("soft, both", sampled=True),
    "ste": Recipe("hard", sampled=True),
    "sr-ste": Recipe("hard", sampled=True),
    "t-sr-ste": Recipe("masks", sampled=True),
    "s-ste-bf16": Recipe("soft", "bf16", "bf16", "bf16"),
    "ste-bf16": Recipe("hard", "bf16", "bf16", "bf16"),
}


@dataclass(frozen=True)
class Kept:
    """What is multiplied with in place of a weight ``[N, K]``: the payload times ``scale_inv``."""

    payload: Tensor
    scale_inv: float


def beta_of(weight: Tensor, recipe: Recipe) -> float:
    """Of least squares; 1 where there is none."""
    if not recipe.has_beta:
        return 1.0
    projected = PROJECTIONS[recipe.projection](weight)
    return float((weight * projected).sum() / projected.square().sum())


def kept(weight: Tensor, recipe: Recipe, beta: float, mask: Tensor | None) -> Kept:
    """In FP8 with a scale that is the largest power of two for which nothing saturates, masked or not."""
    projected = weight * mask if mask is not None else PROJECTIONS[recipe.projection](weight)
    if recipe.fprop == "bf16":
        return Kept(bf16(projected), beta)
    amax = max(float((weight if mask is not None else projected).abs().max()), TINY)
    scale = 2.0 ** int(torch.tensor(LARGEST / amax, dtype=torch.float64).log2().floor())
    return Kept(e4m3(projected * scale), beta / scale)


def scales(x: Tensor) -> Tensor:
    """``[T, 1]``, that map the largest magnitude of each row to that of e4m3."""
    return LARGEST / x.abs().amax(dim=1, keepdim=True).clamp_min(TINY)


class Linear(torch.autograd.Function):
    """``x [T, K]`` by a weight ``[N, K]``, whose gradient goes straight through what was made of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operand: Kept, recipe: Recipe) -> Tensor:
        ctx.recipe, ctx.operand = recipe, operand
        scale = scales(x)
        ctx.save_for_backward(x, scale, weight)
        if recipe.fprop == "dense":
            return x @ weight.t()
        left = bf16(x) if recipe.fprop == "bf16" else e4m3(x * scale) / scale
        return (left @ operand.payload.t()) * operand.scale_inv

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, x_scale, weight), recipe, operand = ctx.saved_tensors, ctx.recipe, ctx.operand
        scale = scales(grad)
        if recipe.dgrad == "dense":
            grad_input = grad @ weight
        else:
            left = bf16(grad) if recipe.dgrad == "bf16" else e4m3(grad * scale) / scale
            grad_input = (left @ operand.payload) * operand.scale_inv
        if recipe.wgrad == "dense":
            grad_weight = grad.t() @ x
        elif recipe.wgrad == "bf16":
            grad_weight = bf16(grad).t() @ bf16(x)
        else:
            # The scale of each token of the input is folded into the gradient; one scale is left for all.
            folded = grad / x_scale
            one = LARGEST / max(float(folded.abs().max()) if folded.numel() else 0.0, TINY)
            grad_weight = (e4m3(folded * one).t() @ e4m3(x * x_scale)) / one
        return grad_input, grad_weight, None, None
