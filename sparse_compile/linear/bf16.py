"""The differentiable linear of recipes without FP8: fprop 2:4 in bf16, backward dense in bf16.

Shapes as in ``linear``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparse_compile.kernels import ops


class LinearBF16(torch.autograd.Function):
    """``x @ W~.T + bias`` of tokens ``[T, K]``, W~ the pruned weight, whose gradient is straight through.

    The result ``[T, N]`` is contiguous and no view.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        out_dtype: torch.dtype,
        values: Tensor,
        metadata: Tensor,
        dense: Tensor,
        scale_inv: Tensor,
    ) -> Tensor:
        tokens = x.to(torch.bfloat16).contiguous()
        output = ops.sparse_mm(values, metadata, tokens, scale_inv, None, out_dtype, True, True)
        if bias is not None:
            output = output + bias.to(out_dtype)
        ctx.save_for_backward(tokens, dense, scale_inv)
        ctx.transposed = transposed
        ctx.input_dtype, ctx.weight_dtype = x.dtype, weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tokens, dense, scale_inv = ctx.saved_tensors
        grad_bf16 = grad_output.to(torch.bfloat16)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            product = (grad_bf16 @ dense).float() * scale_inv
            grad_input = product.to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            product = tokens.t() @ grad_bf16 if ctx.transposed else grad_bf16.t() @ tokens
            grad_weight = product.to(ctx.weight_dtype)
        if ctx.bias_dtype is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(dim=0, dtype=torch.float32).to(ctx.bias_dtype)
        return grad_input, grad_weight, grad_bias, *[None] * (len(ctx.needs_input_grad) - 3)
