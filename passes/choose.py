"""CHOOSE: how each product of a planned linear runs, by measured time; what would be slower than dense stays dense.

Prices are sums of measured pieces (``kernels.costs``), and of bytes where Inductor fuses an operation into a neighbour:
how much of it remains cannot be measured on its own.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from math import prod

import torch

from sparse_compile.kernels import ops
from sparse_compile.kernels.costs import LinearShape, piece_times
from sparse_compile.passes.decide import Plan, Price
from sparse_compile.passes.find import LinearSite, Reason, Rejection
from sparse_compile.progress import tracked
from sparse_compile.recipe import Gemm, Projection, Recipe
from sparse_compile.torch_internals import example_value, hint

# Times of pieces by name, for one shape on one device.
Clock = Callable[[LinearShape, torch.device, Sequence[str]], dict[str, float]]

_DENSE_PIECES = ("hp fprop", "hp dgrad", "hp wgrad")
# Ops whose times count once, whatever linears share.
_OPS = (
    "prune_weight_", "prune_weight_, hard", "prune_weight_bf16_", "prune_weight_bf16_, hard", "cast_weight_",
    "prune_transposable_", "add_masked_decay_", "cast_transpose", "cast_mvue, exact mvue",
    "cast_mvue, approximate mvue",
)  # fmt: skip
_DENSE = (Gemm.HP, Gemm.BF16)
_WEIGHT_OPS = {
    (Projection.NONE, False): "cast_weight_",
    (Projection.SSTE, False): "prune_weight_",
    (Projection.TOP2, False): "prune_weight_, hard",
    (Projection.TRANSPOSABLE, False): "prune_transposable_",
    (Projection.SSTE, True): "prune_weight_bf16_",
    (Projection.TOP2, True): "prune_weight_bf16_, hard",
}
# A linear is rewritten if it is faster by this share of its dense time: what measurements and prices may be off by.
_MARGIN = 0.05
# Bytes an element, of what Inductor fuses: fitted to the profiles of a Llama and of a GPT-2 step.
_INPUT_BYTES = 1.0  # written by the kernel that makes the input
_GRADIENT_BYTES = 1.0  # the maximum of each token is found on the way, or in another reading
_PRODUCT_BYTES = 2.0  # the scale of each token is applied by the reader, or in another pass


def choose(plans: Sequence[Plan], clock: Clock = piece_times) -> tuple[list[Plan], list[Rejection]]:
    """The fastest variant of each plan, with its price; a rejection where dense products are faster.

    Plans stay as they are where nothing can be measured: without kernels, or where the number of tokens depends on
    data.  A linear that the user named is priced, and rewritten whatever it costs.
    """
    inputs = Counter(plan.site.input for plan in plans)
    # Layers are alike, and each question to the clock may read a file.
    timed = cache(lambda *question: clock(*question))
    chosen: list[Plan] = []
    rejections: list[Rejection] = []
    for plan in tracked(plans, "measuring linears"):
        site, device = plan.site, example_value(plan.site.weight).device
        shape = _shape(site)
        if shape is None or ops.emulation_reason(device) is not None:
            chosen.append(plan)
            continue
        dense = _dense_microseconds(site, timed(shape, device, _DENSE_PIECES))
        prices = {}
        for recipe in plan.recipe.variants():
            times = timed(shape, device, tuple(_pieces(recipe)))
            prices[recipe] = _microseconds(site, shape, recipe, times, inputs[site.input])
        fastest = min(prices, key=prices.__getitem__)
        if plan.named or prices[fastest] <= dense * (1 - _MARGIN):
            price = Price(dense=dense, rewritten=prices[fastest])
            chosen.append(replace(plan, recipe=fastest, price=price))
        else:
            detail = f"a step would take {prices[fastest]:.0f} us in {fastest.short_str()}, {dense:.0f} us dense"
            advice = "more tokens in a call may change that; 'sste.when': 'always' rewrites it all the same"
            rejections.append(replace(site.reject(Reason.SLOWER, detail, advice), dense_us=dense))
    return chosen, rejections


def _shape(site: LinearSite) -> LinearShape | None:
    """None without tokens, or if their number depends on data."""
    tokens = hint(prod(example_value(site.input).shape[:-1]))
    if not tokens:
        return None
    return LinearShape(
        tokens=tokens,
        in_features=site.in_features,
        out_features=site.out_features,
        dtype=example_value(site.node).dtype,
        weight_dtype=example_value(site.weight).dtype,
        transposed=site.transposed,
    )


def _pieces(recipe: Recipe) -> list[str]:
    """What runs for a recipe, besides what Inductor fuses, and a copy to know the speed of memory."""
    pieces = [f"{recipe.fprop.value} fprop", f"{recipe.dgrad.value} dgrad", f"{recipe.wgrad.value} wgrad", "copy"]
    pieces.append(_WEIGHT_OPS[recipe.projection, recipe.is_bf16])
    if recipe.decay:
        pieces.append("add_masked_decay_")
    if recipe.wgrad not in _DENSE:
        pieces.append("transpose_tokens")
    if recipe.wgrad is Gemm.FP8:
        pieces.append("cast_transpose")
    if recipe.estimator is not None:
        pieces.append(f"cast_mvue, {recipe.estimator.value}")
    return pieces


def _dense_microseconds(site: LinearSite, times: dict[str, float]) -> float:
    return times["hp fprop"] * site.forwards + times["hp dgrad"] * _needs_dgrad(site) + times["hp wgrad"]


def _microseconds(site: LinearSite, shape: LinearShape, recipe: Recipe, times: dict[str, float], sharing: int) -> float:
    """Of one forward and backward, and of what happens to the weight after an optimizer step.

    Args:
        sharing: linears that read the same input, whose cast they share.
    """
    inputs, outputs = shape.tokens * shape.in_features, shape.tokens * shape.out_features
    byte = times["copy"] / (2 * outputs * shape.dtype.itemsize)
    forward = times[f"{recipe.fprop.value} fprop"]
    if not recipe.is_bf16:
        forward += inputs * _INPUT_BYTES * byte / sharing
    if recipe.fprop is Gemm.FP8:
        forward += outputs * _PRODUCT_BYTES * byte
    total = forward * site.forwards + sum(time for piece, time in times.items() if piece in _OPS)
    total += times[f"{recipe.wgrad.value} wgrad"] + times.get("transpose_tokens", 0.0) / sharing
    if _needs_dgrad(site):
        total += times[f"{recipe.dgrad.value} dgrad"]
        if recipe.dgrad is Gemm.FP8:
            total += inputs * _PRODUCT_BYTES * byte
    casts_gradient = recipe.dgrad in (Gemm.FP8, Gemm.SPARSE24)
    if casts_gradient or recipe.wgrad not in _DENSE:
        total += outputs * _GRADIENT_BYTES * byte
    if casts_gradient and recipe.wgrad is Gemm.HP:
        total += outputs * _INPUT_BYTES * byte  # the cast, which is no op then
    return total


def _needs_dgrad(site: LinearSite) -> bool:
    return bool(example_value(site.input).requires_grad)
