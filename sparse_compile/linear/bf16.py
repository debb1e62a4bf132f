"""The products of a linear without FP8: fprop 2:4 in bf16, backward dense in bf16.

Shapes as in ``function``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.linear.products import Products
from sparse_compile.projections.base import SparseOperand
from sparse_compile.recipe import Recipe


def forward(
    recipe: Recipe,
    products: Products,
    x: Tensor,
    weight: Tensor,
    operands: Any,
    transposed: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """fprop of ``x [T, K]``, and what ``backward`` reads."""
    del weight, transposed  # its gradient is straight through
    tokens = x.to(torch.bfloat16).contiguous()
    pruned = recipe.projection.fprop_operand(operands)
    assert isinstance(pruned, SparseOperand)  # dense products stay without us
    output = products.sparse(tokens, None, pruned, out_dtype)
    return output, (tokens, *recipe.projection.kept_for_dgrad(operands))


def backward(
    ctx: Any, products: Products, grad_output: Tensor, seed: Tensor | None, saved: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None, None]:
    """grad_input ``[T, K]`` and grad_weight, where they are needed, and no sums."""
    del seed  # nothing is sampled
    tokens, *kept = saved
    dense, scale_inv = ctx.recipe.projection.dgrad_operand(*kept)
    grad_bf16 = grad_output.to(torch.bfloat16)
    grad_input = grad_weight = None
    if ctx.needs_input_grad[0]:
        product = products.times(products.dense(grad_bf16, dense).float(), scale_inv)
        grad_input = product.to(ctx.input_dtype)
    if ctx.needs_input_grad[1]:
        operands = (tokens, grad_bf16) if ctx.transposed else (grad_bf16, tokens)
        product = products.dense_wgrad(*operands)
        grad_weight = product.to(ctx.weight_dtype)
    return grad_input, grad_weight, None
