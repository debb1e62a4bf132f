"""The products of a linear in FP8, dense and 2:4.

The per-token scales and casts of activations are plain aten, which Inductor fuses into the producing norm or activation
function, and only the FP8 copy of the input is saved for backward.

Shapes as in ``function``.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import (
    AMAX_FLOOR,
    E4M3,
    E4M3_MAX,
    MVUE_GAIN,
    allows_fast_accum,
    padded,
    unscaled_dtype,
)
from sparse_compile.linear.products import Products
from sparse_compile.projections.base import DenseOperand, SparseOperand
from sparse_compile.recipe import Estimator, Gemm, Recipe, Rounding

# Added to the stream of a linear where it samples grad_output for dgrad: other random numbers than any wgrad's.
DGRAD_DRAWS = 2**30


def forward(
    recipe: Recipe,
    products: Products,
    x: Tensor,
    weight: Tensor,
    operands: Any,
    transposed: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """fprop of ``x [T, K]``, and what ``backward`` reads; ``weight`` as it is stored."""
    scale, scale_inv = token_scale(token_amax(x))
    x_fp8 = cast(x, scale)
    if recipe.fprop is Gemm.DENSE:
        matrix = weight if transposed else weight.mT
        output = products.dense(x.to(out_dtype), matrix.to(out_dtype))
    else:
        output = _multiply(products, x_fp8, scale_inv, recipe.projection.fprop_operand(operands), out_dtype, False)
    saved_input = (x, None) if recipe.wgrad is Gemm.DENSE else (x_fp8, scale_inv)
    saved_weight = (weight,) if recipe.dgrad is Gemm.DENSE else recipe.projection.kept_for_dgrad(operands)
    return output, (*saved_input, *saved_weight)


def backward(
    ctx: Any, products: Products, grad_output: Tensor, seed: Tensor | None, saved: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """grad_input ``[T, K]`` and grad_weight, where they are needed, and partial sums for the gradient of a bias.

    They are taken of grad_output where it is cast, fp32 ``[padded(T) / 32, N]``; None where it is not, and without a
    bias.  A sum in the graph would read it once more, or Inductor would take it in one pass with amax: then what
    produces grad_output, such as the backward of an activation, is not in that pass, and more is read than is saved.
    """
    x, x_scale_inv, *weight = saved
    recipe = ctx.recipe
    grad = grad_output.contiguous()
    grad_input = grad_weight = sums = None
    amax = token_amax(grad)
    dtype = recipe.grad_format.dtype
    row_scale, row_scale_inv = token_scale(amax, torch.finfo(dtype).max)
    if recipe.wgrad is Gemm.DENSE:
        grad_fp8 = cast(grad, row_scale, dtype)
    else:
        with_sums = ctx.needs_input_grad[1] and ctx.needs_input_grad[2]
        grad_fp8, operand, wgrad_scale_inv = _cast_grad(
            ctx, products, grad, amax, row_scale, x_scale_inv, seed, with_sums
        )
        if with_sums:
            *operand, sums = operand
    if ctx.needs_input_grad[0]:
        if recipe.dgrad is Gemm.DENSE:
            product = products.dense(grad, (weight[0].mT if ctx.transposed else weight[0]).to(grad.dtype))
        elif recipe.dgrad is Gemm.MVUE24:
            assert seed is not None
            projected = recipe.projection.dgrad_operand(*weight)
            assert isinstance(projected, DenseOperand)
            product = _sampled_dgrad(ctx, grad, amax, projected, seed)
        else:
            projected = recipe.projection.dgrad_operand(*weight)
            accurate = recipe.dgrad is Gemm.FP8_ACCURATE
            product = _multiply(products, grad_fp8, row_scale_inv, projected, ctx.input_dtype, accurate)
        grad_input = product.to(ctx.input_dtype)
    if ctx.needs_input_grad[1]:
        if recipe.wgrad is Gemm.DENSE:
            x = x.to(grad.dtype)
            product = products.dense_wgrad(x, grad) if ctx.transposed else products.dense_wgrad(grad, x)
            grad_weight = product.to(ctx.weight_dtype)
        else:
            grad_weight = _wgrad(ctx, products, operand, x, wgrad_scale_inv)
    return grad_input, grad_weight, sums


def token_amax(x: Tensor) -> Tensor:
    """max |x| of each token, fp32 ``[T]``, of ``x [T, C]``; NaN where there is one.

    As integers magnitudes compare as they do as floats, and NaN is above all: one instruction an element, where a
    maximum of floats that passes NaN on takes three.
    """
    return x.float().abs().view(torch.int32).amax(dim=1).view(torch.float32)


def token_scale(amax: Tensor, limit: float = E4M3_MAX) -> tuple[Tensor, Tensor]:
    """``(scale, scale_inv)``, fp32 ``[T]``, that map fp32 ``amax [T]`` to ``limit``, the largest FP8 value or less."""
    amax = amax.clamp_min(AMAX_FLOOR)
    return limit / amax, amax / limit


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """``x [T, C] * scale [T]`` in FP8, contiguous; NaN stays NaN, and infinity, whose scale is 0, becomes it.

    No clamp: these casts wait for instructions, not for memory.  A scale of the token's own amax leaves at most the
    largest FP8 value and, where amax was taken before x was rounded to bf16, 1/256 more of it: this rounds down to it.
    """
    return (x.float() * scale[:, None]).to(dtype).contiguous()


def _multiply(
    products: Products, x: Tensor, scale_inv: Tensor, weight: SparseOperand | DenseOperand, out_dtype: torch.dtype,
    accurate: bool,
) -> Tensor:  # fmt: skip
    """``(x * scale_inv[:, None]) @ weight.T`` of FP8 ``x [T, C]``: fprop, and dgrad, whose operand is transposed.

    Where the weight is dense, rows are scaled after the GEMM, where Inductor fuses the multiplication into whatever
    reads the result: the GEMM with one scale is faster than the one with a scale per row.
    """
    if isinstance(weight, SparseOperand):
        return products.sparse(x, scale_inv, weight, out_dtype)
    fast = allows_fast_accum(weight.payload.shape[-1]) and not accurate
    product = products.scaled(x, weight, unscaled_dtype(out_dtype), fast)
    return (product.float() * scale_inv[:, None]).to(out_dtype)


def _cast_grad(
    ctx: Any,
    products: Products,
    grad: Tensor,
    amax: Tensor,
    row_scale: Tensor,
    x_scale_inv: Tensor,
    seed: Tensor | None,
    with_sums: bool,
) -> tuple[Tensor, Sequence[Tensor], Tensor]:
    """grad_output for its two uses: FP8 ``[T, N]`` for dgrad; the operand of wgrad, with sums, and its ``scale_inv``.

    The scale of each token of the saved input is folded into wgrad's operand, so that the same fp8 input serves fprop
    and wgrad exactly: grad_weight = (grad_output * x_scale_inv).T @ x_fp8.
    """
    dtype = ctx.recipe.grad_format.dtype
    largest = torch.finfo(dtype).max
    # max |grad * x_scale_inv| over the tokens of a matrix, without reading grad again.  Of zeros it is a floor by which
    # scales become no larger in e5m2: those of large inputs are finite still.
    bound, of_token = products.largest(amax * x_scale_inv, AMAX_FLOOR * largest / E4M3_MAX)
    limit = largest / MVUE_GAIN if ctx.recipe.wgrad is Gemm.SPARSE24 else largest
    token_scales = x_scale_inv * (limit / of_token)
    scale_inv = bound / limit
    if ctx.recipe.wgrad is Gemm.SPARSE24:
        assert seed is not None  # rewrite hands one to every recipe with an estimator
        grad_fp8, *operand = products.cast_mvue(
            grad, row_scale, token_scales, seed, ctx.stream, _sampling(ctx.recipe), with_sums
        )
    else:
        grad_fp8, *operand = products.cast_transpose(grad, row_scale, token_scales, dtype, with_sums)
    return grad_fp8, operand, scale_inv


def _sampling(recipe: Recipe) -> tuple[bool, bool, torch.dtype]:
    """``approximate, stochastic, dtype`` of ``cast_mvue``."""
    approximate, stochastic = recipe.estimator is Estimator.APPROXIMATE_MVUE, recipe.rounding is Rounding.STOCHASTIC
    return approximate, stochastic, recipe.grad_format.dtype


def _sampled_dgrad(ctx: Any, grad: Tensor, amax: Tensor, weight: DenseOperand, seed: Tensor) -> Tensor:
    """grad_input = MVUE(grad_output) @ weight, 2:4 along out_features.

    With the scale of each token applied, grad_output is transposed, so that the op that prunes along tokens prunes
    along out_features, and its operand is that of the product as it lies.  The scales leave after the product.
    """
    scale, scale_inv = token_scale(amax, torch.finfo(ctx.recipe.grad_format.dtype).max / MVUE_GAIN)
    tokens, out_features = grad.shape
    # Whole tiles, and kernels for few numbers of tokens: they are compiled for each number of columns.
    scaled_t = F.pad((grad.float() * scale[:, None]).t(), (0, padded(tokens) - tokens)).contiguous()
    ones = torch.ones(out_features, dtype=torch.float32, device=grad.device)
    _, values, metadata = ops.cast_mvue(scaled_t, ones, ones, seed, ctx.stream + DGRAD_DRAWS, *_sampling(ctx.recipe))
    out_dtype = unscaled_dtype(ctx.input_dtype)
    product = ops.sparse_mm(values, metadata, weight.payload, weight.scale_inv, None, out_dtype, False, True)
    return product[:tokens].float() * scale_inv[:, None]


def _wgrad(ctx: Any, products: Products, operand: Sequence[Tensor], x_fp8: Tensor, scale_inv: Tensor) -> Tensor:
    """grad_weight = grad_output.T @ input, in the layout and dtype of the weight."""
    x_t = products.transpose_tokens(x_fp8)
    if ctx.recipe.wgrad is Gemm.SPARSE24:
        values, metadata = operand
        return products.sparse_wgrad(values, metadata, x_t, scale_inv, ctx.weight_dtype, ctx.transposed)
    (grad_t,) = operand
    a, b = (x_t, grad_t) if ctx.transposed else (grad_t, x_t)
    return products.scaled_wgrad(a, b, scale_inv, unscaled_dtype(ctx.weight_dtype)).to(ctx.weight_dtype)
