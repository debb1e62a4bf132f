"""Error budgets: how far an fp8 GEMM of the tensor cores may lie from the exact product."""

import torch
from torch import Tensor

# Columns that a dense fp8 instruction contracts; a 2:4 instruction contracts as many kept ones.
_INSTRUCTION_COLUMNS = 32


def fp8_product(a: Tensor, b: Tensor, columns: int = _INSTRUCTION_COLUMNS) -> tuple[Tensor, Tensor]:
    """``a @ b.T`` in fp64, and the error that fp8 accumulation on Hopper may add to each element.

    An instruction adds its products to the accumulator after shifting all of them to the largest exponent and cutting
    them off below about 13 bits.  So a step loses about 2^-13 of the larger of the running sum and the step's own
    products.  Twice that is allowed for each step, and the losses of all steps add up.

    Args:
        a: ``[M, C]``; b: ``[N, C]``; columns: what one instruction contracts, 64 for a 2:4 operand.
    """
    total = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float64, device=a.device)
    budget = torch.zeros_like(total)
    for start in range(0, a.shape[1], columns):
        a_step, b_step = a[:, start : start + columns].double(), b[:, start : start + columns].double()
        before = total.abs()
        total = total + a_step @ b_step.t()
        products = a_step.abs() @ b_step.abs().t()
        budget += 2 * 2.0**-13 * torch.maximum(torch.maximum(before, total.abs()), products)
    return total, budget


def assert_within(actual: Tensor, expected: Tensor, budget: Tensor) -> None:
    """``|actual - expected| <= budget`` plus the rounding of actual's dtype, everywhere; NaN is outside."""
    rounding = torch.finfo(actual.dtype).eps * (expected.abs() + budget)
    excess = (actual.double() - expected).abs() / (budget + rounding + torch.finfo(torch.float64).tiny)
    excess = excess.nan_to_num(nan=float("inf"))
    assert bool((excess <= 1).all()), (
        f"{int((excess > 1).sum())} of {excess.numel()} outside, worst {excess.max():.2f}x"
    )
