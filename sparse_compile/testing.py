"""What kernels are held to: their reference's bits, or, for an fp8 GEMM, an error budget."""

import torch
from torch import Tensor

from sparse_compile.kernels import reference
from sparse_compile.kernels.formats import E4M3, E5M2, SUMMED, padded

# Columns that one instruction contracts.
DENSE_INSTRUCTION = 32
SPARSE_INSTRUCTION = 64
# The least magnitude that is NaN.
_NAN = {E4M3: 0x7F, E5M2: 0x7D}


def tensor_core_product(a: Tensor, b: Tensor, instruction: int) -> Tensor:
    """``a @ b.T`` as fp8 tensor cores add it up, fp32.

    fp8 ``wgmma`` does not accumulate in fp32: each instruction aligns its products and the accumulator to the largest
    of them and cuts what lies more than 13 bits below that one's leading bit.

    Args:
        a: ``[R, C]``; b: ``[D, C]``; fp32 with FP8 values.
        instruction: columns that one instruction contracts.
    """
    rows = []
    for part in a.split(64):
        acc = torch.zeros(part.shape[0], b.shape[0], dtype=torch.float32, device=a.device)
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
        a: ``[R, C]``; b: ``[D, C]``; FP8.
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


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Equal shape, dtype and bits; only NaN's bits are free."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    least = _NAN.get(actual.dtype)
    if least is not None:
        actual, expected = actual.view(torch.uint8), expected.view(torch.uint8)
        nan = (actual & 0x7F >= least) & (expected & 0x7F >= least)
    else:
        nan = actual.isnan() & expected.isnan()
    differing = int(((actual != expected) & ~nan).sum())
    assert differing == 0, f"{what}: {differing} of {actual.numel()} differ"


def hard_groups(tokens: int, columns: int, share: float, device: str) -> Tensor:
    """fp32 ``[tokens, columns]``: groups of four tokens, random but for a ``share`` that is hard for MVUE.

    Hard are zeros, ties, one or two non-zeros, a dominant element, extreme magnitudes, NaN and infinity.
    """
    nan, inf = float("nan"), float("inf")
    special = torch.tensor(
        [
            [0.0, 0.0, 0.0, 0.0], [-0.0, 0.0, -0.0, 0.0], [0.0, -3.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0],
            [1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 0.0, 0.0], [1.0, 1.0, 2.0, 0.0], [1.0, 2.0, 3.0, -4.0],
            [0.1, 0.2, -0.3, 5.0], [-5.0, 0.1, 0.2, 0.3], [1e-30, 0.0, -1.0, 1e30], [1e-42, 2e-42, 3e-42, 1e-45],
            [nan, 1.0, 0.0, -1.0], [inf, 1.0, 0.0, -1.0], [1.0, -inf, inf, 0.0], [3e38, 3e38, 3e38, 3e38],
        ],
        device=device,
    )  # fmt: skip
    groups = torch.randn(padded(tokens) // 4, 4, columns, device=device)
    chosen = torch.rand(groups.shape[0], 1, columns, device=device) < share
    kind = torch.randint(len(special), (groups.shape[0], columns), device=device)
    return torch.where(chosen, special[kind].permute(0, 2, 1), groups).reshape(-1, columns)[:tokens].contiguous()


def assert_block_sums(sums: Tensor, x: Tensor, what: str = "sums") -> None:
    """``sums`` are ``reference.block_sums`` of ``x``, but for what fp32 may round away in another order.

    Raises:
        AssertionError: they are not.
    """
    expected = reference.block_sums(x)
    assert sums.shape == expected.shape, f"{what}: {tuple(sums.shape)}, not {tuple(expected.shape)}"
    bound = reference.block_sums(x.abs()) * (SUMMED * 2.0**-24)
    right = (sums - expected).abs() <= bound
    # Infinities and NaN have no distance.
    right |= (sums == expected) | (sums.isnan() & expected.isnan())
    assert bool(right.all()), f"{what}: {int((~right).sum())} of {right.numel()} are wrong, such as {sums[~right][:3]}"
