"""The differentiable linear that a rewritten node calls.

AOTAutograd traces through it, so forward and backward become ordinary nodes, which Inductor fuses; the GEMMs, and the
copies that change layout, are opaque ops.  What the products compute is in ``fp8`` and ``bf16``; what they multiply, in
``products``.

Shapes: ``T`` tokens, ``K`` in_features, ``N`` out_features, ``E`` experts.  ``scale`` multiplies when casting,
``scale_inv`` when dequantising.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_compile.linear import bf16, fp8
from sparse_compile.linear.products import Experts, Products
from sparse_compile.recipe import recipe_named
from sparse_compile.torch_internals.tensors import unsafe_view


class LinearSpec(NamedTuple):
    """What a graph says of one rewritten linear.

    Attributes:
        recipe: ``full_name`` of the recipe.
        stream: distinct for each linear of a graph: with the seed, the randomness of the estimator.
        transposed: whether the weight is stored ``[K, N]``.
        out_dtype: of the result.
    """

    recipe: str
    stream: int
    transposed: bool
    out_dtype: torch.dtype


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    spec: LinearSpec,
    operands: tuple[Tensor, ...],
    offsets: Tensor | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` in the arithmetic of a recipe.

    With the matrices of experts in one weight, the tokens of each are multiplied with its own, as if in a loop over
    experts: scales, draws and groups of four have nothing of two of them.

    Args:
        x: ``[..., K]``; of experts ``[T, K]``, or ``[E, T / E, K]``.
        weight: the parameter, ``[N, K]`` or as ``spec`` says: the edge its gradient flows along.  The product itself
            reads ``operands``.  Of experts, ``[E, N, K]``.
        bias: ``[N]``, or whatever else F.linear broadcasts, or None; None of experts.
        seed: int64 ``[1]``.  None for recipes without an estimator, and where there will be no backward.
        operands: what is kept of the weight for this recipe: ``Operands`` of its projection.
        offsets: of experts, int32 or int64 ``[E]``, where the tokens of each end in ``x``, which is sorted by them;
            None where all have as many.  Rows beyond the last belong to nobody: what comes of them means
            nothing, as with torch._grouped_mm.
    """
    if weight.ndim == 3 and offsets is None:
        experts, each = x.shape[:2]
        offsets = torch.arange(1, experts + 1, device=x.device) * each
    # Views are made out here, where autograd knows them: what a Function returns may be written in place if it is none.
    tokens = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    bias, added = (bias, None) if bias is None or _is_vector(bias, weight, spec) else (None, bias)
    result: Tensor = _Linear.apply(tokens, weight, bias, seed, offsets, spec, *operands)  # type: ignore[no-untyped-call]
    if x.ndim != 2:
        # As F.linear does: with a bias its result is a view, without one it is none, which hooks and writes can tell.
        unflatten = unsafe_view if bias is None else Tensor.view
        result = unflatten(result, (*x.shape[:-1], result.shape[1]))
    return result if added is None else result + added.to(spec.out_dtype)


def _is_vector(bias: Tensor, weight: Tensor, spec: LinearSpec) -> bool:
    """Whether a bias has one element for each out_feature."""
    return bias.ndim == 1 and bias.shape[0] == weight.shape[1 if spec.transposed else 0]


class _Linear(torch.autograd.Function):
    """``linear`` of tokens ``[T, K]``; the result ``[T, N]`` is contiguous and no view."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
        offsets: Tensor | None,
        spec: LinearSpec,
        *operands: Tensor,
    ) -> Tensor:
        recipe = recipe_named(spec.recipe)
        forward = bf16.forward if recipe.is_bf16 else fp8.forward
        operands = recipe.projection.Operands(*operands)
        output, saved = forward(recipe, _products(offsets), x, weight, operands, spec.transposed, spec.out_dtype)
        if bias is not None:
            output = output + bias.to(spec.out_dtype)
        # What the backward products read, and nothing more.
        ctx.save_for_backward(seed, offsets, *saved)
        ctx.recipe, ctx.stream, ctx.transposed = recipe, spec.stream, spec.transposed
        ctx.input_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        backward = bf16.backward if ctx.recipe.is_bf16 else fp8.backward
        seed, offsets, *saved = ctx.saved_tensors
        grad_input, grad_weight, sums = backward(ctx, _products(offsets), grad_output, seed, saved)
        grad_bias = None
        if ctx.needs_input_grad[2]:
            addends = grad_output if sums is None else sums
            grad_bias = addends.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, *[None] * (len(ctx.needs_input_grad) - 3)


def _products(offsets: Tensor | None) -> Products:
    return Products() if offsets is None else Experts(offsets)
