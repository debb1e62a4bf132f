"""MVUE: the two estimators against their mathematics, the random numbers, and the kernel."""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from sparse_compile.kernels import reference
from sparse_compile.kernels.activation import cast_mvue
from sparse_compile.kernels.formats import E4M3, E5M2, FP8_DTYPES, MVUE_GAIN, metadata_shape, sums_shape, values_shape
from sparse_compile.testing import assert_block_sums, assert_same_bits, hard_groups

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ESTIMATORS = pytest.mark.parametrize("approximate", [False, True], ids=["exact", "approximate"])
FORMATS = pytest.mark.parametrize("fp8", FP8_DTYPES, ids=str)
PAIRS = list(combinations(range(4), 2))
# A grid of uniforms measures an interval with an error below one step; no event here is made of more than two.
GRID = 2**20
GRID_ERROR = 2 / GRID

# Magnitudes, inclusion probabilities and total variance, exact and approximate.
VECTORS = [
    ((0.5, 0.6, 0.7, 0.9), (0.37037, 0.44444, 0.51852, 0.66667), 1.735, (0.39550, 0.46162, 0.52189, 0.62100), 1.745236),
    ((0.1, 0.5, 0.6, 1.0), (0.09091, 0.45455, 0.54545, 0.90909), 0.8, (0.11375, 0.51272, 0.59320, 0.78033), 0.843891),
    ((0.05, 0.3, 1.2, 2.0), (0.03226, 0.19355, 0.77419, 1.0), 0.87, (0.04075, 0.23791, 0.81023, 0.91112), 1.074649),
    ((0.1, 0.2, 0.3, 5.0), (0.16667, 0.33333, 0.5, 1.0), 0.22, (0.16834, 0.33600, 0.50296, 0.99270), 0.401265),
    ((1.0, 2.0, 3.0, 4.0), (0.2, 0.4, 0.6, 0.8), 20.0, (0.23452, 0.44127, 0.60833, 0.71587), 20.473561),
    ((1.0, 1.0, 1.0, 1.0), (0.5, 0.5, 0.5, 0.5), 4.0, (0.5, 0.5, 0.5, 0.5), 4.0),
]
BLOCKS = [*(vector[0] for vector in VECTORS), (4.0, 1.0, 3.0, 2.0), (0.0, 1.0, 2.0, 0.0), (3.0, 0.0, 1.0, 1.0)]


def sample_on_grid(block: tuple[float, ...], approximate: bool) -> tuple[Tensor, Tensor]:
    """The dense fp64 outputs ``[GRID, 4]`` and kept positions ``[GRID, 2]`` for evenly spaced uniforms."""
    groups = torch.tensor(block, dtype=torch.float64).expand(GRID, 4)
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    kept, positions = reference.mvue24(groups, uniforms, approximate)
    return torch.zeros_like(groups).scatter(-1, positions, kept), positions


def exact_inclusion(b: Tensor) -> Tensor:
    """Chmiel et al.: 2 b / S, or 1 for a largest element above the sum R of the others, and b / R for these."""
    rest = b.sum() - b.max()
    return torch.where(b == b.max(), 1.0, b / rest) if b.max() > rest else 2 * b / b.sum()


def successive_inclusion(b: Tensor) -> Tensor:
    """Two draws without replacement, each proportional to b."""
    odds = b / (b.sum() - b)
    return b / b.sum() * (1 + odds.sum() - odds)


def inclusion_probabilities(block: tuple[float, ...], approximate: bool) -> Tensor:
    return (successive_inclusion if approximate else exact_inclusion)(torch.tensor(block, dtype=torch.float64))


def pair_probabilities(block: tuple[float, ...], approximate: bool) -> dict[tuple[int, int], float]:
    """Overlap of the interval of element i, and that of j one to the left, in [0, 1)."""
    ends = [0.0, *inclusion_probabilities(block, approximate).cumsum(0).tolist()]
    return {(i, j): max(0.0, min(ends[i + 1], ends[j + 1] - 1, 1.0) - max(ends[i], ends[j] - 1, 0.0)) for i, j in PAIRS}


@pytest.mark.by_day(3)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@ESTIMATORS
def test_frequencies_bias_and_variance(block, approximate) -> None:
    """Frequencies of pairs; and of elements, with the total variance, as the table has them."""
    signed = tuple(value * sign for value, sign in zip(block, (1, -1, -1, 1), strict=True))
    outputs, positions = sample_on_grid(signed, approximate)
    frequencies = torch.bincount(positions[:, 0] * 4 + positions[:, 1], minlength=16).double() / GRID
    for (i, j), probability in pair_probabilities(block, approximate).items():
        assert float(frequencies[i * 4 + j]) == pytest.approx(probability, abs=GRID_ERROR), (i, j)
    assert float(frequencies.sum()) == pytest.approx(sum(float(frequencies[i * 4 + j]) for i, j in PAIRS))

    a = torch.tensor(signed, dtype=torch.float64)
    largest = float(outputs.abs().max())
    torch.testing.assert_close(outputs.mean(0), a, rtol=1e-6, atol=GRID_ERROR * largest)
    inclusion = inclusion_probabilities(block, approximate)
    variance = torch.where(a != 0, a.square() / inclusion - a.square(), 0.0).sum()
    measured_variance = (outputs - a).square().sum(-1).mean()
    torch.testing.assert_close(measured_variance, variance, rtol=1e-6, atol=4 * GRID_ERROR * largest**2)

    for vector in (vector for vector in VECTORS if vector[0] == block):
        table, variance = vector[3:] if approximate else vector[1:3]
        measured = torch.stack([(positions == i).any(-1).double().mean() for i in range(4)])
        # The table has five decimals of the probabilities and six of the variances.
        torch.testing.assert_close(measured, torch.tensor(table).double(), rtol=0, atol=5e-6 + GRID_ERROR)
        assert float(measured_variance) == pytest.approx(variance, abs=5e-7 + 4 * GRID_ERROR * largest**2)


def test_exact_estimator_has_the_smaller_variance() -> None:
    for block in BLOCKS:
        b = torch.tensor(block, dtype=torch.float64)
        exact, approximate = (
            torch.where(b > 0, b.square() / inclusion_probabilities(block, choice), 0.0).sum()
            for choice in (False, True)
        )
        assert exact <= approximate + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@ESTIMATORS
def test_random_blocks_keep_two_elements_within_the_gain(approximate, dtype) -> None:
    torch.manual_seed(0)
    # From almost equal magnitudes to one dominating.
    magnitude = torch.exp(torch.randn(400_000, 4, dtype=dtype) * torch.rand(400_000, 1, dtype=dtype) * 4)
    groups = magnitude * (torch.randint(0, 2, magnitude.shape) * 2 - 1)
    kept, positions = reference.mvue24(groups, torch.rand(400_000, dtype=dtype), approximate)
    assert (positions[:, 0] < positions[:, 1]).all()
    assert positions.min() == 0
    assert positions.max() == 3
    assert torch.equal(kept.sign(), groups.gather(-1, positions).sign())
    gain = kept.abs().amax(-1) / magnitude.amax(-1)
    # Beyond the bound only by rounding and, in the approximate estimator, by what it adds to the magnitudes.
    assert 0.99 * MVUE_GAIN < gain.max() <= MVUE_GAIN * (1 + 2**-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@ESTIMATORS
def test_blocks_with_at_most_two_nonzeros_are_kept(approximate, dtype) -> None:
    # The approximate estimator drops a non-zero with a probability of a few 2^-23, at either end of the uniforms.
    ends = [2.0**-20, 1 - 2.0**-20] if approximate else [0.0, 1 - 2.0**-23]
    uniforms = torch.tensor([*ends, *(i / 1000 for i in range(1, 1000))], dtype=dtype)
    for block in [(0, 0, 0, 0), *(tuple(-3.0 * (i == j) for i in range(4)) for j in range(4)), (0, 2, 0, -2)]:
        groups = torch.tensor(block, dtype=dtype).expand(len(uniforms), 4)
        kept, positions = reference.mvue24(groups, uniforms, approximate)
        outputs = torch.zeros_like(groups).scatter(-1, positions, kept)
        # The true inclusion probability is a few 2^-23 below one in the approximate estimator.
        torch.testing.assert_close(outputs, groups, rtol=2**-20 if approximate else 0, atol=0)


@pytest.mark.parametrize("gap", [1.0, 2.0**10, 2.0**30], ids=str)
def test_exact_estimator_of_every_kind_of_group(gap) -> None:
    # Ties, sums that cancel, zeros and dominating elements, of which the smallest would vanish from the sum in fp32.
    levels = torch.tensor([0.0, 2.0, 3.0, 5.0, 7.0 * gap, 12.0 * gap, 24.0 * gap])
    groups = torch.cartesian_prod(*[levels] * 4) * torch.tensor([1.0, -1.0, -1.0, 1.0])
    steps = 512
    uniforms = ((torch.arange(steps) + 0.5) / steps)[:, None].expand(steps, len(groups))
    kept, positions = reference.mvue24(groups.expand(steps, -1, -1), uniforms, False)
    assert (positions[..., 0] < positions[..., 1]).all()
    outputs = torch.zeros(steps, *groups.shape).scatter(-1, positions, kept).double()

    a = groups.double()
    b, total = a.abs(), a.abs().sum(-1, keepdim=True)
    unit = torch.minimum(total - b.amax(-1, keepdim=True), total / 2)
    magnitude = torch.maximum(b, unit)
    drawn = torch.zeros(steps, *groups.shape, dtype=torch.bool).scatter(-1, positions, True)
    # What is kept has the magnitude of least variance, and is kept as often as makes it unbiased.
    wanted = torch.where(drawn & (b > 0), magnitude * a.sign(), 0.0)
    torch.testing.assert_close(outputs, wanted, rtol=2**-22, atol=0)
    assert ((outputs.mean(0) - a).abs() <= 2 / steps * magnitude).all()
    certain = (b >= total - b) & (b > 0)
    assert drawn.all(0)[certain & (b > total - b)].all()
    few = (b > 0).sum(-1) <= 2
    assert (outputs == a)[:, few].all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@ESTIMATORS
def test_nonfinite_elements_stay_visible(approximate, bad) -> None:
    # Gradient scalers look for them.
    levels = torch.tensor([0.0, -1.0, 3e38, bad])
    groups = torch.cartesian_prod(*[levels] * 4)
    groups = groups[~groups.isfinite().all(-1)]
    uniforms = ((torch.arange(64) + 0.5) / 64)[:, None].expand(64, len(groups))
    kept, positions = reference.mvue24(groups.expand(64, -1, -1), uniforms, approximate)
    assert (positions[..., 0] < positions[..., 1]).all()
    assert (~kept.isfinite()).any(-1).all()
    if bad != bad:
        assert kept.isnan().all()


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-30, 1e30])
@ESTIMATORS
def test_any_size_of_magnitudes(approximate, size) -> None:
    groups = (torch.randn(10_000, 4) * size).float()
    kept, positions = reference.mvue24(groups, torch.rand(10_000), approximate)
    assert (positions[:, 0] < positions[:, 1]).all()
    assert (kept.abs() <= MVUE_GAIN * (1 + 2**-20) * groups.abs().amax(-1, keepdim=True) + 2**-148).all()


@FORMATS
def test_stochastic_rounding_takes_one_of_two_neighbours(fp8) -> None:
    numbers = torch.arange(0x7C if fp8 is E5M2 else 0x7F, dtype=torch.uint8).view(fp8).float()  # all that are finite
    assert float(numbers[-1]) == torch.finfo(fp8).max
    uniforms = (torch.arange(256) + 0.5) / 256
    steps = torch.arange(1, 32) / 32
    # Between each two: subnormal, normal, and around powers of two.
    x = numbers[:-1, None, None] + (numbers[1:] - numbers[:-1])[:, None, None] * steps[:, None]
    x, u = (tensor.contiguous() for tensor in torch.broadcast_tensors(x, uniforms))
    for sign in (1.0, -1.0):
        rounded = sign * reference.stochastic_round(sign * x, u, fp8)
        assert torch.equal(rounded.to(fp8).float(), rounded), "a cast changes nothing"
        assert ((rounded == numbers[:-1, None, None]) | (rounded == numbers[1:, None, None])).all()
        # Each as often as x is near to it, out of 256.
        up = (rounded == numbers[1:, None, None]).double().mean(-1)
        assert torch.equal(up, steps.double().expand_as(up))
    for exact in (numbers, -numbers):
        for u in (2.0**-9, 1 - 2.0**-9):
            result = reference.stochastic_round(exact, torch.full_like(exact, u), fp8)
            assert torch.equal(result.view(torch.int32), exact.view(torch.int32)), "numbers of the format, and zeros"


@FORMATS
def test_stochastic_rounding_of_what_is_beyond(fp8) -> None:
    limit = torch.finfo(fp8).max
    x = torch.tensor([limit, limit * 1.01, 1e38, float("inf"), float("nan"), 1e-45])
    for u in (2.0**-9, 1 - 2.0**-9):
        for sign in (1.0, -1.0):
            rounded = reference.stochastic_round(sign * x, torch.full_like(x, u), fp8)
            payload = sign * reference.saturating_cast(rounded, fp8).float()
            assert payload[:4].tolist() == [limit] * 4
            assert payload[4].isnan()
            assert payload[5] == 0


def test_philox_known_answer() -> None:
    # philox4x32-10 of counter 0 and key 0, published with Random123; the other answers need a fourth counter word.
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    seed, zero = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    assert [int(word) for word in reference.philox4x32(seed, zero, zero, 0)] == list(words)
    uniforms = reference.group_uniforms(seed, 0, 8, 1)[:, 0]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    assert uniforms.tolist() == [(half + 0.5) / 2**16 for half in halves]


def test_a_byte_of_another_philox_call_rounds() -> None:
    seed, zero = torch.tensor([12345]), torch.zeros(1, dtype=torch.int64)
    words = [int(word) for word in reference.philox4x32(seed, zero + 5, zero + 1, 7, 1)]
    assert words != [int(word) for word in reference.philox4x32(seed, zero + 5, zero + 1, 7)]
    uniforms = reference.rounding_uniforms(seed, 7, 16, 6)
    assert uniforms.shape == (16, 6, 2)
    # Groups 8 to 15 of column 5: two bytes each, in the order of their addresses.
    drawn = b"".join(word.to_bytes(4, "little") for word in words)
    assert uniforms[8:, 5].flatten().tolist() == [(byte + 0.5) / 2**8 for byte in drawn]


def sampled(block: tuple[float, ...], seed: int, index: int, *how: object) -> Tensor:
    """What ``cast_mvue`` makes of 64 columns and 1024 groups of the same four values: ``[64, 1024, 4]``."""
    grad = torch.tensor(block).repeat(1024)[:, None].expand(4096, 64).contiguous()
    ones = torch.ones(4096)
    _, values, metadata = reference.cast_mvue(grad, ones, ones, torch.tensor([seed]), index, *how)
    return reference.decompress24(values, metadata).float().reshape(64, 1024, 4)


@pytest.mark.parametrize(
    ("block", "approximate"),
    # Blocks of which every output is an e4m3 number, so that rounding adds no bias.
    [((1.0, -2.0, 3.0, 4.0), False), ((0.5, 1.0, -1.5, 8.0), False), ((1.0, -1.0, 1.0, -1.0), True)],
    ids=str,
)
def test_cast_mvue_is_unbiased(block, approximate) -> None:
    outputs = sampled(block, 1, 0, approximate).reshape(-1, 4).double()
    a = torch.tensor(block, dtype=torch.float64)
    inclusion = inclusion_probabilities(tuple(abs(value) for value in block), approximate)
    sigma = (a.square() * (1 / inclusion - 1) / len(outputs)).clamp_min(0).sqrt()
    assert ((outputs.mean(0) - a).abs() <= 4 * sigma + 1e-12).all()


@FORMATS
@ESTIMATORS
@pytest.mark.parametrize("size", [1.0, 2.0**-7, 2.0**-16], ids=["normal", "mostly subnormal e4m3", "subnormal e5m2"])
def test_stochastic_rounding_leaves_no_bias(size, approximate, fp8) -> None:
    """Nearest rounding does: what MVUE keeps of a group is nearly always the same, and rounded to the same side."""
    block = tuple(size * value for value in (0.83, -1.1, 0.37, 1.87))
    a = torch.tensor(block, dtype=torch.float64)
    limits, standard_errors = torch.finfo(fp8), {}
    for stochastic in (False, True):
        outputs = sampled(block, 1, 0, approximate, stochastic, fp8).reshape(-1, 4).double()
        # A byte decides: probabilities are off by 2^-9 at most, of the distance of two numbers.
        allowed = 2.0**-9 * limits.eps * outputs.abs().amax().clamp_min(limits.smallest_normal)
        bias = (outputs.mean(0) - a).abs() - allowed
        standard_errors[stochastic] = (bias / (outputs.std(0) / len(outputs) ** 0.5).clamp_min(1e-30)).max()
    assert standard_errors[True] < 4.5
    assert standard_errors[False] > 9


def test_the_format_and_the_rounding_change_no_choice() -> None:
    torch.manual_seed(0)
    grad, ones = torch.randn(261, 48), torch.ones(261)
    draws = {
        (stochastic, fp8): reference.cast_mvue(grad, ones, ones, torch.tensor([3]), 2, False, stochastic, fp8)
        for stochastic in (False, True)
        for fp8 in FP8_DTYPES
    }
    for (_, fp8), (row, values, metadata) in draws.items():
        assert torch.equal(metadata, draws[False, E4M3][2])
        assert_same_bits(row, draws[False, fp8][0])
        assert row.dtype == values.dtype == fp8
    for fp8 in FP8_DTYPES:
        nearest, other = (draws[stochastic, fp8][1] for stochastic in (False, True))
        # Half of a column's last word is padding, and of two neighbours the nearer is the likelier.
        differ = (nearest.view(torch.uint8) != other.view(torch.uint8)).float()
        assert 0.1 < differ[:, :128].mean() < 0.5


@pytest.mark.parametrize(
    "shift",
    [
        lambda kept, other: (kept[:, :-1], kept[:, 1:]),
        lambda kept, other: (kept[:, :-2], kept[:, 2:]),
        lambda kept, other: (kept[:, :-8], kept[:, 8:]),
        lambda kept, other: (kept[:-1], kept[1:]),
        lambda kept, other: (kept[:-32], kept[32:]),
        lambda kept, other: (kept, other(1, 1)),
        lambda kept, other: (kept, other(2, 0)),
        lambda kept, other: (kept, other(1 + 2**32, 0)),
    ],
    ids=["half of a word", "word", "counter", "column", "column block", "index", "seed", "upper half of the seed"],
)
@ESTIMATORS
def test_samples_are_independent(approximate, shift: Callable[..., tuple[Tensor, Tensor]]) -> None:
    def kept_first(seed: int, index: int) -> Tensor:
        return (sampled((1.0, 1.0, 1.0, 1.0), seed, index, approximate)[:, :, 0] != 0).double()

    a, b = shift(kept_first(1, 0), kept_first)
    correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
    assert abs(correlation) < 4 / a.numel() ** 0.5


@ESTIMATORS
def test_the_seed_decides_the_samples(approximate) -> None:
    torch.manual_seed(0)
    grad, ones = torch.randn(261, 48), torch.ones(261)

    def draw(seed: int, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return reference.cast_mvue(grad, ones, ones, torch.tensor([seed]), index, approximate)

    row, values, metadata = draw(3, 0)
    for a, b in zip((row, values, metadata), draw(3, 0), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    # Every word of the 48 rows and of the two full blocks of tokens; the other rows are padding.
    for seed, index in ((4, 0), (3, 1)):
        differs = metadata != draw(seed, index)[2]
        assert differs[:2, :3].double().mean() > 0.99
        assert not differs[:, 3:].any()
    assert not reference.decompress24(values, metadata)[:, 261:].view(torch.uint8).any()


def buffers(tokens: int, columns: int, device: str, fp8: torch.dtype = E4M3) -> list[Tensor]:
    """``row, values, metadata``, poisoned: NaN and illegal words."""
    row, values = (
        torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(fp8)
        for shape in ((tokens, columns), values_shape(columns, tokens))
    )
    return [row, values, torch.full(metadata_shape(columns, tokens), -559038737, dtype=torch.int32, device=device)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "columns", "dtype", "fp8", "stochastic"),
    [
        case + how
        for cases, hows in (
            (
                [
                    *((tokens, 208, dtype) for tokens in (1, 15, 4097) for dtype in DTYPES),
                    *((8192, 768, dtype) for dtype in DTYPES),
                    # Each number of columns is compiled.
                    *((tokens, columns, torch.bfloat16) for tokens, columns in ((100, 16), (4097, 80), (4097, 3072))),
                ],
                [(E4M3, False), (E5M2, True)],
            ),
            ([(4097, 208, torch.bfloat16), (8192, 768, torch.bfloat16)], [(E4M3, True), (E5M2, False)]),
        )
        for case in cases
        for how in hows
    ],
    ids=str,
)
@ESTIMATORS
def test_kernel_matches_the_reference(tokens, columns, dtype, fp8, stochastic, approximate) -> None:
    torch.manual_seed(0)
    grad = hard_groups(tokens, columns, 0.25, "cuda").to(dtype)
    row_scale, token_scale = torch.randn(2, tokens, device="cuda").exp().unbind()
    token_scale[tokens // 2 :] *= 2.0**-12  # to what is subnormal in FP8
    for seed, index in ((0, 0), (-(2**63) + 12345, 1), (2**40 + 7, 2**31 - 1)):
        arguments = (grad, row_scale, token_scale, torch.tensor([seed], device="cuda"), index, approximate, stochastic)
        results, again = buffers(tokens, columns, "cuda", fp8), buffers(tokens, columns, "cuda", fp8)
        sums = torch.full(sums_shape(tokens, columns), float("nan"), device="cuda")
        cast_mvue.launch_cast_mvue(*arguments, *results)
        cast_mvue.launch_cast_mvue(*arguments, *again, sums)
        assert_block_sums(sums, grad)
        for actual, expected, repeated in zip(results, reference.cast_mvue(*arguments, fp8), again, strict=True):
            assert_same_bits(actual, expected)
            assert torch.equal(actual.view(torch.uint8), repeated.view(torch.uint8))


@pytest.mark.gpu
@ESTIMATORS
def test_kernel_draws_anew_for_another_seed_or_index(approximate) -> None:
    torch.manual_seed(0)
    grad, ones = torch.randn(512, 128, device="cuda"), torch.ones(512, device="cuda")

    def metadata(seed: int, index: int) -> Tensor:
        results = buffers(512, 128, "cuda")
        cast_mvue.launch_cast_mvue(
            grad, ones, ones, torch.tensor([seed], device="cuda"), index, approximate, False, *results
        )
        return results[2]

    assert (metadata(3, 0) != metadata(4, 0)).double().mean() > 0.99
    assert (metadata(3, 0) != metadata(3, 1)).double().mean() > 0.99


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    # More than 2^31 elements in every payload; only the tokens from `start` on, two tiles, are not zero.
    start, tokens, columns = 131072, 131072 + 253, 32768
    torch.manual_seed(0)
    grad = torch.zeros(tokens, columns, device="cuda", dtype=torch.bfloat16)
    grad[start:] = torch.randn(tokens - start, columns, device="cuda")
    scale, seed, index = torch.rand(tokens, device="cuda") * 100, torch.tensor([5], device="cuda"), 3
    row, values, metadata = results = buffers(tokens, columns, "cuda")
    cast_mvue.launch_cast_mvue(grad, scale, scale, seed, index, False, False, *results)

    # As in the reference, with the counters of the last two tiles.
    scaled = torch.zeros(256, columns, device="cuda")
    scaled[: tokens - start] = grad[start:].float() * scale[start:, None]
    c1 = start // 32 + torch.arange(8, device="cuda")[:, None]
    words = torch.stack(reference.philox4x32(seed, torch.arange(columns, device="cuda"), c1, index), dim=1)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=2)
    uniforms = halves.reshape(64, columns).float().add(0.5).mul(2.0**-16)
    kept, positions = reference.mvue24(scaled.reshape(64, 4, columns).permute(2, 0, 1), uniforms.t(), False)
    payload = torch.zeros(columns, 64, 4, device="cuda").scatter(-1, positions, kept).reshape(columns, 256)
    expected_values, expected_metadata = reference.compress24(reference.saturating_cast(payload), positions)

    assert_same_bits(row[start:], reference.saturating_cast(scaled[: tokens - start]))
    assert_same_bits(values[:, -128:], expected_values)
    assert_same_bits(metadata[-2:], expected_metadata)
    assert not row[:start].view(torch.uint8).any()
    assert not values[:, :-128].view(torch.uint8).any()


def test_index_is_checked_in_every_call(monkeypatch) -> None:
    indices: list[int] = []
    monkeypatch.setattr(cast_mvue, "plan_kernel", lambda *_, **__: lambda *varying: indices.append(varying[4]))
    scale, seed = torch.ones(7), torch.zeros(1, dtype=torch.int64)

    def call(index: int) -> None:
        cast_mvue.launch_cast_mvue(torch.empty(7, 16), scale, scale, seed, index, False, False, *buffers(7, 16, "cpu"))

    for index in (3, 2**31 - 1, 0):
        call(index)
    for index in (-1, 2**31):
        with pytest.raises(ValueError, match=f"index is {index}"):
            call(index)
    assert indices == [3, 2**31 - 1, 0]


@pytest.mark.parametrize("size", [(0, 16), (5, 0)], ids=str)
def test_nothing_is_launched_for_an_empty_input(size) -> None:
    results = buffers(*size, "cpu")
    assert all(buffer.numel() == 0 for buffer in results)
    scale, seed = torch.ones(size[0]), torch.zeros(1, dtype=torch.int64)
    cast_mvue.launch_cast_mvue(torch.empty(size), scale, scale, seed, 0, False, False, *results)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.empty(5, 16, dtype=torch.float64), "grad is torch.float64"),
        (0, torch.empty(16, 5).t(), r"grad is torch.float32 \(5, 16\) with strides \(1, 5\)"),
        (1, torch.empty(1), "row_scale is"),
        (2, torch.empty(5, 1), "token_scale is"),
        (3, torch.zeros(1, dtype=torch.int32), "seed is torch.int32"),
        (4, 2**31, "index is 2147483648"),
        (4, -1, "index is -1"),
        (7, torch.empty(5, 16), "row is torch.float32; allowed are torch.float8_e4m3fn and torch.float8_e5m2"),
        (7, torch.empty(5, 16, dtype=E5M2), r"values is .* needed is torch.float8_e5m2 \(16, 64\)"),
        (8, torch.empty(16, 8, dtype=E4M3), r"values is .* needed is torch.float8_e4m3fn \(16, 64\)"),
        (9, torch.empty(1, 1, 32, 2, dtype=torch.int32), r"metadata is .* needed is torch.int32 \(1, 8, 32, 2\)"),
        (10, torch.empty(16), r"sums is .* needed is torch.float32 \(4, 16\)"),
    ],
)
def test_launcher_refuses_wrong_arguments(position, wrong, message) -> None:
    scale, seed = torch.ones(5), torch.zeros(1, dtype=torch.int64)
    arguments = [torch.empty(5, 16), scale, scale, seed, 0, False, False, *buffers(5, 16, "cpu"), torch.empty(4, 16)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        cast_mvue.launch_cast_mvue(*arguments)
