"""Activations in e4m3: the casts of the reference, and the kernels that cast and transpose."""

import pytest
import torch
from torch import Tensor

from sparse_compile.kernels import reference
from sparse_compile.kernels.activation import cast_transpose
from sparse_compile.kernels.formats import E4M3, E4M3_MAX, E5M2, FP8_DTYPES, padded, sums_shape
from sparse_compile.testing import assert_block_sums, assert_same_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = [1, 15, 100, 4097]
COLUMNS = [16, 80, 768]


def test_saturating_cast_saturates_and_keeps_nan() -> None:
    x = torch.tensor([500.0, -500.0, float("inf"), float("-inf"), 448.0, 1.0625, 1.1875, -0.0, float("nan")])
    cast = reference.saturating_cast(x).float()
    # 1.0625 and 1.1875 lie between two neighbours: to the even one.
    assert cast[:-1].tolist() == [E4M3_MAX, -E4M3_MAX, E4M3_MAX, -E4M3_MAX, 448.0, 1.0, 1.25, -0.0]
    assert cast[-2].signbit()
    assert cast[-1].isnan()
    x = torch.tensor([60000.0, -1e30, float("inf"), 57344.0, 1.125, 1.375, 1.5 * 2**-16, float("nan")])
    cast = reference.saturating_cast(x, E5M2).float()
    assert cast[:-1].tolist() == [57344.0, -57344.0, 57344.0, 57344.0, 1.0, 1.5, 2 * 2**-16]
    assert cast[-1].isnan()


def test_cast_transpose_scales_each_token() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0], [-5.0, 6.0]])
    row, column = reference.cast_transpose(x, torch.tensor([1.0, 2.0, 4.0]), torch.tensor([8.0, 1.0, 0.5]))
    assert row.float().tolist() == [[1.0, -2.0], [6.0, 8.0], [-20.0, 24.0]]
    assert column.shape == (2, 128)
    assert column[:, :3].float().tolist() == [[8.0, 3.0, -2.5], [-16.0, 4.0, 3.0]]
    assert not column[:, 3:].view(torch.uint8).any()


def poisoned(*shape: int, dtype: torch.dtype = E4M3, device: str = "cuda") -> Tensor:
    """NaN in FP8."""
    return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("fp8", FP8_DTYPES, ids=str)
def test_cast_transpose_matches_the_reference(fp8, tokens, columns, dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(tokens, columns, device="cuda").to(dtype)
    x[0, :4] = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0])
    # Some tokens saturate, some fall below the normal range.
    row_scale, token_scale = torch.randn(2, tokens, device="cuda").mul(5).exp().unbind()
    (row, column), (again_row, again_column) = (
        (poisoned(tokens, columns, dtype=fp8), poisoned(columns, padded(tokens), dtype=fp8)) for _ in range(2)
    )
    cast_transpose.launch_cast_transpose(x, row_scale, token_scale, row, column)
    expected_row, expected_column = reference.cast_transpose(x, row_scale, token_scale, fp8)
    assert_same_bits(row, expected_row)
    assert_same_bits(column, expected_column)

    sums = torch.full(sums_shape(tokens, columns), float("nan"), device="cuda")
    cast_transpose.launch_cast_transpose(x, row_scale, token_scale, again_row, again_column, sums)
    assert_block_sums(sums, x)
    assert torch.equal(row.view(torch.uint8), again_row.view(torch.uint8))
    assert torch.equal(column.view(torch.uint8), again_column.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_transpose_tokens_matches_the_reference(tokens, columns) -> None:
    torch.manual_seed(0)
    # Every byte, both NaN among them, passes unchanged.
    x = torch.randint(256, (tokens, columns), device="cuda", dtype=torch.uint8).view(E4M3)
    out = poisoned(columns, padded(tokens))
    cast_transpose.launch_transpose_tokens(x, out)
    assert torch.equal(out.view(torch.uint8), reference.transpose_tokens(x).view(torch.uint8))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    # More than 2^31 elements, of which only the tokens from `start` on are not zero.
    tokens, start, columns = 65539, 65408, 32768
    torch.manual_seed(0)
    x = torch.zeros(tokens, columns, device="cuda", dtype=torch.bfloat16)
    x[start:] = torch.randn(tokens - start, columns, device="cuda")
    scale = torch.rand(tokens, device="cuda") * 100
    row, column = poisoned(tokens, columns), poisoned(columns, padded(tokens))
    cast_transpose.launch_cast_transpose(x, scale, 2 * scale, row, column)
    expected_row, expected_column = reference.cast_transpose(x[start:], scale[start:], 2 * scale[start:])
    assert_same_bits(row[start:], expected_row)
    assert_same_bits(column[:, start:], expected_column)
    assert not row[:start].view(torch.uint8).any()
    assert not column[:, :start].view(torch.uint8).any()

    out = poisoned(columns, padded(tokens))
    cast_transpose.launch_transpose_tokens(row, out)
    assert_same_bits(out[:, start:], reference.transpose_tokens(expected_row))
    assert not out[:, :start].view(torch.uint8).any()


@pytest.mark.parametrize("size", [(0, 16), (5, 0)], ids=str)
def test_nothing_is_launched_for_an_empty_input(size) -> None:
    tokens, columns = size
    row, column = torch.empty(size, dtype=E4M3), torch.empty(columns, padded(tokens), dtype=E4M3)
    assert column.numel() == 0
    cast_transpose.launch_cast_transpose(torch.empty(size), torch.empty(tokens), torch.empty(tokens), row, column)
    cast_transpose.launch_transpose_tokens(row, column)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.empty(5, 16, dtype=torch.float64), "x is torch.float64"),
        (0, torch.empty(16, 5).t(), r"x is torch.float32 \(5, 16\) with strides \(1, 5\)"),
        (0, torch.empty(5), r"x is torch.float32 \(5,\)"),
        (0, torch.empty(5, 20), r"x is torch.float32 \(5, 20\) .* C a multiple of 16"),
        (1, torch.empty(1), r"row_scale is .* needed is torch.float32 \(5,\)"),
        (2, torch.empty(5, dtype=torch.float64), "token_scale is torch.float64"),
        (3, torch.empty(5, 16), "row is torch.float32"),
        (3, torch.empty(5, 16, dtype=E5M2), r"column is .* needed is torch.float8_e5m2 \(16, 128\)"),
        (4, torch.empty(16, 5, dtype=E4M3), r"column is .* needed is torch.float8_e4m3fn \(16, 128\)"),
        (5, torch.empty(1, 16), r"sums is .* needed is torch.float32 \(4, 16\)"),
    ],
)
def test_cast_transpose_refuses_wrong_tensors(position, wrong, message) -> None:
    row, column = torch.empty(5, 16, dtype=E4M3), torch.empty(16, 128, dtype=E4M3)
    arguments = [torch.empty(5, 16), torch.empty(5), torch.empty(5), row, column, torch.empty(4, 16)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        cast_transpose.launch_cast_transpose(*arguments)


@pytest.mark.parametrize(
    ("x", "out", "message"),
    [
        (torch.empty(5, 16), torch.empty(16, 128, dtype=E4M3), "x is torch.float32"),
        (torch.empty(5, 16, dtype=E4M3), torch.empty(128, 16, dtype=E4M3).t(), "out is .* contiguous"),
        (torch.empty(81, dtype=E4M3)[1:].view(5, 16), torch.empty(16, 128, dtype=E4M3), "16-byte boundary"),
    ],
)
def test_transpose_tokens_refuses_wrong_tensors(x, out, message) -> None:
    with pytest.raises(ValueError, match=message):
        cast_transpose.launch_transpose_tokens(x, out)
