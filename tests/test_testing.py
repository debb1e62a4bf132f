"""The yardsticks themselves: they let through what is equal, and nothing else."""

import pytest
import torch

from sparse_compile.kernels.formats import E4M3
from sparse_compile.testing import (
    DENSE_INSTRUCTION,
    assert_same_bits,
    assert_within_budget,
    hard_groups,
    tensor_core_product,
)


def test_same_bits_frees_the_sign_of_nan_only():
    nan = torch.tensor([0x7F, 0xFF], dtype=torch.uint8).view(E4M3)
    assert_same_bits(nan, nan[[1, 0]])
    zero = torch.tensor([0x00, 0x80], dtype=torch.uint8).view(E4M3)
    with pytest.raises(AssertionError, match="zeros: 2 of 2 differ"):
        assert_same_bits(zero, zero[[1, 0]], "zeros")
    with pytest.raises(AssertionError, match="1 of 2 differ"):
        assert_same_bits(torch.tensor([1, 2]), torch.tensor([1, 3]))
    with pytest.raises(AssertionError):
        assert_same_bits(torch.zeros(2), torch.zeros(2).double())
    with pytest.raises(AssertionError):
        assert_same_bits(torch.zeros(2), torch.zeros(1))


@pytest.mark.parametrize("spoil", ["one element", "nan", "scale"])
def test_budget_refuses_what_is_wrong(spoil):
    a, b, scale = torch.randn(32, 256).to(E4M3), torch.randn(48, 256).to(E4M3), torch.tensor([0.5])
    out = 0.5 * tensor_core_product(a.float(), b.float(), DENSE_INSTRUCTION)
    assert_within_budget(out, a, b, scale, DENSE_INSTRUCTION)
    if spoil == "scale":
        out *= 1.01
    else:
        out[3, 5] = float("nan") if spoil == "nan" else out[3, 5] + 1
    with pytest.raises(AssertionError, match="of the error is"):
        assert_within_budget(out, a, b, scale, DENSE_INSTRUCTION)


def test_hard_groups_hold_the_special_cases():
    groups = hard_groups(400, 64, 0.5, "cpu")
    assert groups.shape == (400, 64)
    assert bool(groups.isnan().any())
    assert bool(groups.isinf().any())
    blocks = groups.reshape(100, 4, 64)
    assert bool((blocks == 0).all(1).any())
    assert bool((blocks == 1).all(1).any())
