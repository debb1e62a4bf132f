"""The error budget of an fp8 GEMM: what the tensor cores of Hopper may do to a product, and no more."""

import torch
from torch import Tensor

# Columns that one instruction contracts.
DENSE_INSTRUCTION = 32
SPARSE_INSTRUCTION = 64


def tensor_core_product(a: Tensor, b: Tensor, instruction: int) -> Tensor:
    """``a @ b.T`` as fp8 tensor cores add it up, fp32.

    fp8 ``wgmma`` does not accumulate in fp32: each instruction aligns its products and the accumulator to the largest
    of them and cuts what lies more than 13 bits below that one's leading bit.

    Args:
        a: ``[R, C]``; b: ``[D, C]``; fp32 with e4m3 values.
        instruction: columns that one instruction contracts.
    """
    rows = []
    for part in a.split(64):
        acc = torch.zeros(part.shape[0], b.shape[0], device=a.device)
        for part_k, b_k in zip(part.split(instruction, dim=1), b.split(instruction, dim=1), strict=True):
            products = part_k[:, None, :] * b_k[None, :, :]
            largest = torch.maximum(products.abs().amax(-1), acc.abs())
            # 13 bits below the leading one; sums of the integers that remain are exact in fp32.
            quantum = torch.ldexp(torch.ones_like(largest), largest.frexp().exponent - 14)
            acc = ((products / quantum[..., None]).trunc().sum(-1) + (acc / quantum).trunc()) * quantum
        rows.append(acc)
    return torch.cat(rows)


def assert_within_budget(out: Tensor, a: Tensor, b: Tensor, scale: Tensor, instruction: int) -> None:
    """``out [R, D]`` is ``(a @ b.T) * scale``: its error against fp64 is within the budget, in RMS and at its worst.

    The budget is twice the error of ``tensor_core_product`` plus the rounding of out's dtype, in units of the payloads,
    so that no scale hides an error.

    Args:
        a: ``[R, C]``; b: ``[D, C]``; e4m3.
        scale: fp32, broadcastable to ``[R, D]``.
    """
    a, b, scale = a.float(), b.float(), scale.double()
    exact = a.double() @ b.double().t()
    modelled = tensor_core_product(a, b, instruction).double() - exact
    limits = torch.finfo(out.dtype)
    band = exact.abs() * (limits.eps / 2) + limits.tiny * limits.eps / scale
    error = out.double() / scale - exact
    for norm in (_rms, _worst):
        limit = 2 * (norm(modelled) + norm(band))
        # Not "error > limit": NaN must fail.
        assert norm(error) <= limit, f"{norm.__name__} of the error is {norm(error)}, allowed is {limit}"


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _worst(x: Tensor) -> float:
    return float(x.abs().max())
