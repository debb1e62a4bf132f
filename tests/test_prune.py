"""The weight: its projections and beta, and the kernels that prune, cast and compress."""

import itertools

import pytest
import torch
from torch import Tensor

from gpu_weights import in_layout
from sparse_compile.kernels import reference
from sparse_compile.kernels.formats import E4M3, E4M3_MAX, PAD_WORD, metadata_shape, values_shape
from sparse_compile.kernels.weight import prune_bf16, prune_fp8
from sparse_compile.testing import assert_same_bits

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = [(16, 16), (48, 80), (3072, 768), (768, 3072), (1600, 6400)]


def test_soft_threshold24_of_every_tie_pattern() -> None:
    patterns = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    threshold = patterns.sort(dim=-1).values[:, 1:2]
    expected = signs * (patterns - threshold).clamp_min(0)
    projected = reference.soft_threshold24(signs * patterns)
    assert torch.equal(projected, expected)
    assert (projected != 0).sum(-1).max() == 2


def test_hard_threshold24_of_every_tie_pattern() -> None:
    """Each element in turn, by how many of the others come before it."""
    patterns = torch.tensor(list(itertools.product(range(4), repeat=4)), dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    expected = torch.zeros_like(patterns)
    for row, pattern in enumerate(patterns.tolist()):
        for i, value in enumerate(pattern):
            before = sum(other > value or (other == value and j < i) for j, other in enumerate(pattern))
            expected[row, i] = value * signs[i] if before < 2 else 0.0
    assert torch.equal(reference.hard_threshold24(signs * patterns), expected)
    assert torch.equal(reference.top2_mask(signs * patterns).sum(-1), torch.full((256,), 2))


def test_hard_threshold24_is_the_nearest_2_4_matrix() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2000, 4, dtype=torch.float64)
    error = (weight - reference.hard_threshold24(weight)).square().sum(-1)
    for pair in itertools.combinations(range(4), 2):
        other = weight.clone()
        other[:, list(pair)] = 0
        assert (error <= (weight - other).square().sum(-1)).all()


def test_soft_threshold24_is_continuous() -> None:
    # Small integers make every kind of tie, where the set of kept elements jumps.
    torch.manual_seed(0)
    weight = torch.randint(-3, 4, (20000, 4), dtype=torch.float64)
    step = 1e-6
    moved = weight + step * (2 * torch.rand_like(weight) - 1)
    change = (reference.soft_threshold24(moved) - reference.soft_threshold24(weight)).abs().max()
    # The magnitude and the threshold move by one step each, and by rounding.
    assert change <= 2 * step + 1e-15


@pytest.mark.parametrize(
    ("draw", "expected"),
    [(torch.randn, 1.4839), (lambda n, **kw: 2 * torch.rand(n, **kw) - 1, 1.749)],
    ids=["gaussian", "uniform"],
)
def test_sste_beta_of_initialisations(draw, expected) -> None:
    torch.manual_seed(0)
    weight = 0.02 * draw(4_000_000, dtype=torch.float64)
    assert reference.sste_beta(weight) == pytest.approx(expected, abs=1e-3)


def test_sste_beta_minimises_the_error() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=torch.float64)
    soft, beta = reference.soft_threshold24(weight), reference.sste_beta(weight)
    residual = weight - beta * soft
    # Stationary, hence the minimum of a convex parabola.
    assert abs((residual * soft).sum()) < 1e-10
    for other in (beta - 1e-3, beta + 1e-3):
        assert (weight - other * soft).norm() > residual.norm()


def test_sste_beta_of_a_zero_projection_is_none() -> None:
    assert reference.sste_beta(torch.ones(8, 8)) is None


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (48, 80)], ids=str)
def test_compressed_and_transposed_payload_agree(size, hard) -> None:
    torch.manual_seed(0)
    weight = torch.randn(size)
    beta = torch.tensor([1.4839])
    values, metadata, weight_t, scale_inv = reference.prune_weight(weight, beta, hard)
    dense = reference.decompress24(values, metadata)[:, : size[1]].float()
    assert torch.equal(dense, weight_t.t().float())
    # The scale is the largest power of two that fits.
    assert E4M3_MAX / 2 <= dense.abs().max() <= E4M3_MAX
    assert (scale_inv / beta).frexp().mantissa == 0.5
    exact = beta * (reference.hard_threshold24(weight) if hard else reference.soft_threshold24(weight))
    # Half a unit in the last place of e4m3: 2^-4 relative, 2^-10 absolute below the normal range.
    assert ((dense * scale_inv - exact).abs() <= 2**-4 * exact.abs() + 2**-10 * scale_inv).all()


@pytest.mark.parametrize(
    ("amax", "scale_inv"),
    [
        (448.0, 1.0),
        (448.0 * (1 + 2.0**-23), 2.0),
        (447.0, 1.0),
        (224.0, 0.5),
        (0.0, 2.0**-108),
        (2.0**-100, 2.0**-108),
        (2.0**127 * 1.75, 2.0**119),
        (torch.finfo(torch.float32).max, 2.0**120),
        (float("inf"), float("nan")),
        (float("nan"), float("nan")),
    ],
)
def test_scale_is_the_largest_power_of_two_that_fits(amax, scale_inv) -> None:
    weight = torch.zeros(16, 16)
    weight[3, 5] = -amax
    for actual in (reference.cast_weight(weight)[-1], reference.prune_weight(weight, torch.ones(1))[-1]):
        assert_same_bits(actual, torch.tensor([scale_inv]))


def test_kept_is_what_exceeds_the_threshold_then_the_lowest() -> None:
    weight = torch.zeros(1, 16)
    weight[0] = torch.tensor([[0.0, 0, 0, 5], [1, 2, 2, 3], [7, 0, -6, 0], [2, 2, 2, 2]]).flatten()
    values, metadata, *_ = reference.prune_weight(weight, torch.ones(1))
    nibbles = [int(metadata[0, 0, 0, 0]) >> 4 * i & 15 for i in range(4)]
    assert [(nibble & 3, nibble >> 2) for nibble in nibbles] == [(0, 3), (0, 3), (0, 2), (0, 1)]
    assert values[0, :8].float().mul(2.0**-6).tolist() == [0, 5, 0, 1, 7, -6, 0, 0]


def test_kept_are_the_two_largest_then_the_lowest() -> None:
    weight = torch.zeros(1, 16)
    weight[0] = torch.tensor([[0.0, 0, 0, -5], [1, 2, 2, 3], [2, 1, -6, 2], [2, -2, 2, 2]]).flatten()
    values, metadata, *_ = reference.prune_weight(weight, torch.ones(1), True)
    nibbles = [int(metadata[0, 0, 0, 0]) >> 4 * i & 15 for i in range(4)]
    assert [(nibble & 3, nibble >> 2) for nibble in nibbles] == [(0, 3), (1, 3), (0, 2), (0, 1)]
    assert values[0, :8].float().mul(2.0**-6).tolist() == [0, -5, 2, 3, 2, -6, 2, -2]


@pytest.mark.parametrize("hard", [False, True])
def test_bf16_operands_are_the_projected_weight(hard) -> None:
    torch.manual_seed(0)
    weight, beta = torch.randn(48, 80), torch.tensor([1.4839])
    values, metadata, dense, scale_inv = reference.prune_weight_bf16(weight, beta, hard)
    exact = reference.hard_threshold24(weight) if hard else reference.soft_threshold24(weight)
    assert torch.equal(dense, exact.bfloat16())
    assert torch.equal(reference.decompress24(values, metadata)[:, :80], dense)
    assert torch.equal(scale_inv, beta)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """NaN in e4m3 and fp32, illegal words in int32."""
    if dtype == torch.int32:
        return torch.full(shape, -559038737, dtype=dtype, device=device)
    return (
        torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(dtype)
        if dtype == E4M3
        else torch.full(shape, float("nan"), dtype=dtype, device=device)
    )


def prune_buffers(n: int, k: int, device: str = "cpu") -> list[Tensor]:
    return [
        poisoned(values_shape(n, k), E4M3, device),
        poisoned(metadata_shape(n, k), torch.int32, device),
        poisoned((k, n), E4M3, device),
        poisoned((1,), torch.float32, device),
    ]


def bf16_buffers(n: int, k: int, device: str = "cpu") -> list[Tensor]:
    return [
        poisoned(values_shape(n, k), torch.bfloat16, device),
        poisoned(metadata_shape(n, k, torch.bfloat16), torch.int32, device),
        poisoned((n, k), torch.bfloat16, device),
        poisoned((1,), torch.float32, device),
    ]


def cast_buffers(n: int, k: int, device: str = "cpu") -> list[Tensor]:
    return [poisoned((n, k), E4M3, device), poisoned((k, n), E4M3, device), poisoned((1,), torch.float32, device)]


def assert_kernels_match_the_reference(weight: Tensor) -> None:
    n, k = weight.shape
    beta = torch.tensor([1.4839], device="cuda")
    for hard in (False, True):
        buffers = prune_buffers(n, k, "cuda")
        prune_fp8.launch_prune_weight(weight, beta, *buffers, hard)
        for actual, expected in zip(buffers, reference.prune_weight(weight, beta, hard), strict=True):
            assert_same_bits(actual, expected, f"hard {hard}")
        buffers = bf16_buffers(n, k, "cuda")
        prune_bf16.launch_prune_weight_bf16(weight, beta, *buffers, hard)
        for actual, expected in zip(buffers, reference.prune_weight_bf16(weight, beta, hard), strict=True):
            assert_same_bits(actual, expected, f"bf16, hard {hard}")
    buffers = cast_buffers(n, k, "cuda")
    prune_fp8.launch_cast_weight(weight, *buffers)
    for actual, expected in zip(buffers, reference.cast_weight(weight), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernels_match_the_reference(size, dtype, layout) -> None:
    torch.manual_seed(0)
    n, k = size
    assert_kernels_match_the_reference(in_layout(layout, n, k, dtype))


def special_weight(kind: str, n: int = 80, k: int = 144) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(n, k)
    if kind == "ties":
        weight = torch.randint(-3, 4, (n, k)).float()
    elif kind == "zero":
        weight = torch.zeros(n, k)
    elif kind == "negative zero":
        weight = torch.full((n, k), -0.0)
    elif kind == "tiny":
        weight = weight * 1e-38
    elif kind == "huge":
        weight = weight.sign() * 3e38
        weight[:, ::2] = 1.0
    elif kind == "NaN":
        weight[3, 4:7] = torch.tensor([float("-inf"), float("nan"), float("nan")])
    elif kind == "NaN beside three larger":
        weight[3, 4:8] = torch.tensor([1.0, 2.0, 3.0, float("nan")])
    elif kind == "infinity":
        weight[7, 12] = float("-inf")
    elif kind == "infinities":
        weight[20, 4:8] = float("inf")
    return weight


@pytest.mark.gpu
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize(
    "kind",
    ["ties", "zero", "negative zero", "tiny", "huge", "NaN", "NaN beside three larger", "infinity", "infinities"],
)
def test_kernels_match_the_reference_on_special_values(kind, transposed) -> None:
    weight = special_weight(kind).cuda()
    assert_kernels_match_the_reference(weight.t().contiguous().t() if transposed else weight)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(80, 144), (1024, 1024)], ids=str)
def test_old_scale_inv_does_not_change_the_result(size) -> None:
    torch.manual_seed(0)
    weight, beta = torch.randn(size, device="cuda", dtype=torch.bfloat16), torch.tensor([1.4839], device="cuda")
    for launch, arguments, new_buffers, expected in (
        (prune_fp8.launch_prune_weight, (weight, beta), prune_buffers, reference.prune_weight(weight, beta)),
        (prune_fp8.launch_cast_weight, (weight,), cast_buffers, reference.cast_weight(weight)),
    ):
        right = float(expected[-1])
        for hint in (right, 2 * right, 0.9 * right, -right, 0.0, float("nan"), float("inf"), 1e-42):
            buffers = new_buffers(*size, "cuda")
            buffers[-1].fill_(hint)
            launch(*arguments, *buffers)
            for actual, reference_result in zip(buffers, expected, strict=True):
                assert_same_bits(actual, reference_result, f"scale_inv was {hint}")


@pytest.mark.gpu
def test_kernels_repeat_their_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1600, 6400, device="cuda", dtype=torch.bfloat16)
    beta = torch.ones(1, device="cuda")
    first, second = prune_buffers(1600, 6400, "cuda"), prune_buffers(1600, 6400, "cuda")
    prune_fp8.launch_prune_weight(weight, beta, *first)
    prune_fp8.launch_prune_weight(weight, beta, *second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    # More than 2^31 elements, of which only the last 128 rows are not zero: they set the scale.
    n, k = 65536 + 128, 32768
    torch.manual_seed(0)
    weight = torch.zeros(n, k, device="cuda", dtype=torch.bfloat16)
    weight[-128:] = torch.randn(128, k, device="cuda")
    beta = torch.ones(1, device="cuda")
    values, metadata, weight_t, scale_inv = buffers = prune_buffers(n, k, "cuda")
    prune_fp8.launch_prune_weight(weight, beta, *buffers)
    expected = reference.prune_weight(weight[-128:], beta)
    assert_same_bits(values[-128:], expected[0])
    assert_same_bits(metadata[:, -8:], expected[1])
    assert_same_bits(weight_t[:, -128:], expected[2])
    assert_same_bits(scale_inv, expected[3])
    assert not values[:-128].view(torch.uint8).any()
    assert (metadata[:, :-8] == PAD_WORD).all()
    assert not weight_t[:, :-128].view(torch.uint8).any()
    del values, metadata, weight_t, buffers

    payload, payload_t, scale_inv = buffers = cast_buffers(n, k, "cuda")
    prune_fp8.launch_cast_weight(weight, *buffers)
    expected_payload, expected_payload_t, expected_scale_inv = reference.cast_weight(weight[-128:])
    assert_same_bits(payload[-128:], expected_payload)
    assert_same_bits(payload_t[:, -128:], expected_payload_t)
    assert_same_bits(scale_inv, expected_scale_inv)
    assert not payload[:-128].view(torch.uint8).any()
    assert not payload_t[:, :-128].view(torch.uint8).any()


@pytest.mark.gpu
def test_launches_wait_for_each_other() -> None:
    # In a CUDA graph and out of it; the weight is written just before, and what was made of it read just after.
    torch.manual_seed(0)
    n, k = 2048, 4096
    weights, beta = torch.randn(16, n, k, device="cuda", dtype=torch.bfloat16), torch.tensor([1.4839], device="cuda")
    weights *= torch.logspace(-20, 20, 16, 2, device="cuda")[:, None, None]  # a scale of its own each
    expected = [reference.prune_weight(weight, beta) for weight in weights]
    weight, buffers = torch.empty_like(weights[0]), prune_buffers(n, k, "cuda")
    results = [[torch.empty_like(buffer) for buffer in buffers] for _ in weights]

    def prune_all() -> None:
        for new, copies in zip(weights, results, strict=True):
            weight.copy_(new)
            prune_fp8.launch_prune_weight(weight, beta, *buffers)
            for copy, buffer in zip(copies, buffers, strict=True):
                copy.copy_(buffer)

    prune_all()
    graph = torch.cuda.CUDAGraph()
    for replay in (False, True):
        if replay:
            with torch.cuda.graph(graph):
                prune_all()
            graph.replay()
        for copies, wanted in zip(results, expected, strict=True):
            for actual, reference_result in zip(copies, wanted, strict=True):
                assert_same_bits(actual, reference_result)
                actual.view(torch.uint8).fill_(0x7F)


def test_both_launches_share_partials_of_their_own(monkeypatch) -> None:
    launches: list[tuple[bool, tuple[int | None, ...]]] = []

    def plan_kernel(*_, launch_pdl=False, **__):
        return lambda *varying: launches.append((launch_pdl, varying))

    monkeypatch.setattr(prune_fp8, "plan_kernel", plan_kernel)
    weight, beta = torch.empty(16, 48), torch.ones(1)
    for _ in range(2):
        buffers = prune_buffers(16, 48)
        prune_fp8.launch_prune_weight(weight, beta, *buffers)
        (first, addresses), (second, again) = launches[-2:]
        assert (first, second) == (False, True)
        assert addresses == again
        *written, scale_inv = (tensor.data_ptr() for tensor in (weight, beta, *buffers))
        assert addresses[:-1] == (*written, None, None, scale_inv)
    payload, payload_t, scale_inv = buffers = cast_buffers(16, 48)
    prune_fp8.launch_cast_weight(weight, *buffers)
    assert launches[-1][1][:-1] == (
        (weight.data_ptr(), None, payload.data_ptr(), None, payload_t.data_ptr(), None, None, scale_inv.data_ptr())
    )
    assert len(launches) == 6


@pytest.mark.parametrize("size", [(0, 16), (16, 0)], ids=str)
def test_empty_weight_has_a_defined_scale(size) -> None:
    beta, weight = torch.ones(1), torch.empty(size)
    buffers = prune_buffers(*size)
    prune_fp8.launch_prune_weight(weight, beta, *buffers)
    assert buffers[-1] == 0
    buffers = cast_buffers(*size)
    prune_fp8.launch_cast_weight(weight, *buffers)
    assert buffers[-1] == 0


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.empty(16, 32, dtype=torch.float64), "weight is torch.float64"),
        (0, torch.empty(512), r"weight is torch.float32 \(512,\)"),
        (0, torch.empty(16, 36), r"\(16, 36\); needed are multiples of 16"),
        (0, torch.empty(20, 32), r"\(20, 32\); needed are multiples of 16"),
        (1, torch.ones(2), "beta is"),
        (2, torch.empty(16, 16, dtype=E4M3), r"values is .* needed is torch.float8_e4m3fn \(16, 64\)"),
        (3, torch.empty(1, 8, 32, 2), "metadata is torch.float32"),
        (4, torch.empty(16, 32, dtype=E4M3).t(), r"weight_t is .* contiguous"),
        (5, torch.empty(1, dtype=torch.float64), "scale_inv is"),
    ],
)  # fmt: skip
def test_prune_refuses_wrong_tensors(position, wrong, message) -> None:
    arguments = [torch.empty(16, 32), torch.ones(1), *prune_buffers(16, 32)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        prune_fp8.launch_prune_weight(*arguments)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.empty(16, 32, dtype=torch.int32), "weight is torch.int32"),
        (1, torch.empty(16, 32), "payload is torch.float32"),
        (2, torch.empty(16, 32, dtype=E4M3), "payload_t is"),
        (3, torch.empty(()), "scale_inv is"),
    ],
)
def test_cast_refuses_wrong_tensors(position, wrong, message) -> None:
    arguments = [torch.empty(16, 32), *cast_buffers(16, 32)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        prune_fp8.launch_cast_weight(*arguments)
