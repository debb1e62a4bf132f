"""S-STE along both dimensions: its definition, the kernel, the scale, and training with 's-ste-transposable'.

The kernel in Triton's interpreter: ``test_transposable.py``.
"""

import pytest
import torch

import sparse_compile
from conftest import FFN
from gpu_weights import in_layout, poisoned, special
from sparse_compile.kernels import reference
from sparse_compile.kernels.formats import E4M3, metadata_shape, values_shape
from sparse_compile.kernels.reference import prune_soft_transposable, soft_mask24_both, soft_threshold24_both
from sparse_compile.kernels.weight import prune_fp8
from sparse_compile.projections.transposable import SOFT_TRANSPOSABLE
from sparse_compile.testing import assert_same_bits
from sparse_compile.weights.beta_fit import fit_beta
from sparse_compile.weights.pattern_24 import is_24
from sparse_compile.weights.projection import project, write_projected

OPTIONS = {"sste.executor": "eager", "sste.when": "always", "sste.recipe": "s-ste-transposable"}


@pytest.mark.parametrize("kind", ["normal", "uniform", "ties"])
def test_it_is_24_both_ways_and_its_own_projection(kind):
    weight = {
        "normal": torch.randn(64, 96).double(),
        "uniform": torch.rand(64, 96).double() - 0.5,
        "ties": torch.randint(-3, 4, (64, 96)).double(),
    }[kind]
    projected = soft_threshold24_both(weight)
    assert is_24(projected, 0)
    assert is_24(projected, 1)
    assert projected.any()
    assert torch.equal(soft_threshold24_both(projected), projected)
    assert (projected.abs() <= weight.abs()).all()
    assert (projected * weight >= 0).all()


def test_a_tile_by_hand():
    weight = torch.tensor([[5.0, -1, 2, 3], [1, 4, -4, 6], [-7, 2, 1, 0], [3, 3, 3, -8]])
    # Along rows the thresholds are 2, 4, 1, 3; along columns 3, 2, 2 and 3.
    expected = torch.tensor([[2.0, 0, 0, 0], [0, 0, 0, 2], [-4, 0, 0, 0], [0, 0, 0, -5]])
    assert torch.equal(soft_threshold24_both(weight), expected)
    assert torch.equal(soft_threshold24_both(weight.t()), expected.t())


def test_nan_spreads_along_both_groups_of_its_own():
    weight = torch.randn(8, 8)
    weight[1, 6] = torch.nan
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[1, 4:] = expected[:4, 6] = True
    assert torch.equal(soft_threshold24_both(weight).isnan(), expected)
    assert not soft_mask24_both(weight)[expected].any()


def test_it_is_continuous():
    """Each threshold moves by no more than the weight, and so does the larger of two; what is left by twice that."""
    weight = torch.randint(-3, 4, (128, 128)).double()  # with ties, where a mask would jump
    moved = weight + 1e-6 * (2 * torch.rand(128, 128, dtype=torch.float64) - 1)
    change = (soft_threshold24_both(moved) - soft_threshold24_both(weight)).abs().max()
    assert 0 < change <= 2.01e-6


def test_density_and_energy_of_normal_weights():
    weight = torch.randn(1024, 1024, dtype=torch.float64)
    projected = soft_threshold24_both(weight)
    assert (projected != 0).double().mean() == pytest.approx(0.372, abs=2e-3)
    beta = (weight * projected).sum() / projected.square().sum()
    limits = SOFT_TRANSPOSABLE.beta_limits
    assert float(beta) == pytest.approx(limits.prior, rel=0.01)
    energy = (beta * projected * weight).sum() / weight.square().sum()
    assert float(energy) == pytest.approx(0.65, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_operands_are_the_projection(dtype):
    weight, beta = torch.randn(48, 80).to(dtype), torch.tensor([1.6])
    values, metadata, values_t, metadata_t, scale_inv = prune_soft_transposable(weight, beta)
    dense = reference.decompress24(values, metadata)[:, :80].float()
    assert torch.equal(dense, reference.decompress24(values_t, metadata_t)[:, :48].float().t())
    exact = beta * soft_threshold24_both(weight.float())
    assert ((dense * scale_inv - exact).abs() <= 2**-4 * exact.abs() + 2**-10 * scale_inv).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_element_makes_every_product_nan(value):
    weight = torch.randn(16, 16)
    weight[3, 5] = value
    assert prune_soft_transposable(weight, torch.ones(1))[-1].isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(16, 16), (48, 80), (3072, 768), (1600, 6400)], ids=str)
def test_kernel_matches_the_reference(size, dtype, layout):
    n, k = size
    weight = in_layout(layout, n, k, dtype)
    beta, buffers = torch.rand(1, device="cuda") + 1, poisoned(n, k)
    expected = prune_soft_transposable(weight, beta)
    for _ in range(2):  # with a wrong scale, then with the right one
        prune_fp8.launch_prune_soft_transposable(weight, beta, *buffers)
        for actual, wanted in zip(buffers, expected, strict=True):
            assert_same_bits(actual, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ties", "zero", "NaN", "tiny", "huge"])
def test_kernel_matches_the_reference_on_special_values(kind):
    weight = special(kind)
    beta, buffers = torch.ones(1, device="cuda"), poisoned(80, 144)
    prune_fp8.launch_prune_soft_transposable(weight, beta, *buffers)
    for actual, expected in zip(buffers, prune_soft_transposable(weight, beta), strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.empty(16, 36), r"\(16, 36\); needed are multiples of 16"),
        (1, torch.ones(2), r"beta is .* needed is torch.float32 \(1,\)"),
        (4, torch.empty(16, 64, dtype=E4M3), r"values_t is .* needed is torch.float8_e4m3fn \(32, 64\)"),
    ],
)
def test_wrong_tensors_are_refused(position, wrong, message):
    arguments = [
        torch.empty(16, 32), torch.ones(1),
        torch.empty(values_shape(16, 32), dtype=E4M3), torch.empty(metadata_shape(16, 32), dtype=torch.int32),
        torch.empty(values_shape(32, 16), dtype=E4M3), torch.empty(metadata_shape(32, 16), dtype=torch.int32),
        torch.empty(1),
    ]  # fmt: skip
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        prune_fp8.launch_prune_soft_transposable(*arguments)


def test_a_shard_is_written_where_it_holds_whole_tiles():
    weight = torch.randn(32, 64)
    whole = project(weight, SOFT_TRANSPOSABLE, 1.5, None)
    shards = weight.clone().split(8)
    for shard in shards:
        write_projected(shard, SOFT_TRANSPOSABLE, 1.5, None)
    assert torch.equal(torch.cat(shards), whole)
    with pytest.raises(ValueError, match=r"a shard of 6 out_features and 64 in_features ends within a tile of 4 x 4"):
        write_projected(weight[:6], SOFT_TRANSPOSABLE, 1.5, None)


def projected(model):
    """The model that trains, dense: with the weights that its products read."""
    beta, dense = sparse_compile.beta(model), FFN()
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in ("up", "down"):
            weight = dense.get_submodule(name).weight
            weight.copy_(beta[f"{name}.weight"] * soft_threshold24_both(weight))
    return dense


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_all_three_products_read_the_projection_along_both_dimensions():
    model, x = FFN(), torch.randn(64, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out = torch.compile(model, backend="sste", options=OPTIONS)(x)
    dense = projected(model)
    out.square().mean().backward()
    expected = dense(y)
    expected.square().mean().backward()
    assert relative(out, expected) < 0.1
    assert relative(x.grad, y.grad) < 0.2
    assert relative(model.down.weight.grad, dense.down.weight.grad) < 0.8, "sampled"
    rows = {row.module: row for row in sparse_compile.report().rows}
    assert rows["up"].decision == "s-ste-transposable (2:4 fp8, 2:4 fp8, 2:4 fp8)"


def test_training_a_checkpoint_and_finalize():
    def begin():
        torch.manual_seed(1)
        model = FFN()
        return model, torch.compile(model, backend="sste", options=OPTIONS), torch.optim.AdamW(model.parameters(), 1e-2)

    def train(run, optimizer, steps):
        losses = []
        for step in steps:
            torch.manual_seed(step)
            x = torch.randn(64, 64)
            loss = (run(x) - x.roll(1, 1)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, run, optimizer = begin()
    losses = train(run, optimizer, range(6))
    assert losses[-1] < losses[0]
    betas = sparse_compile.beta(model)
    assert all(2.1 < value < 2.5 for value in betas.values()), betas
    saved = {key: part.state_dict() for key, part in (("model", model), ("optimizer", optimizer))}
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)
    later = train(run, optimizer, range(6, 9))

    model, run, optimizer = begin()
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(run, optimizer, range(6, 9)) == later
    assert sparse_compile.beta(model) == betas

    expected, x = projected(model), torch.randn(64, 64)
    before = run(x).detach()
    assert sparse_compile.finalize(model) == ["up.weight", "down.weight"]
    assert torch.equal(model.up.weight, expected.up.weight)
    assert is_24(model.up.weight, 1)
    assert is_24(model.up.weight, 0)
    assert relative(run(x), before) < 0.06, "but for where FP8 rounds"


@pytest.mark.parametrize("weight", [torch.zeros(64, 64), torch.ones(64, 64), torch.randn(64, 64).sign()])
def test_what_says_nothing_has_the_prior(weight):
    fit = fit_beta(weight, SOFT_TRANSPOSABLE)
    assert (fit.value, fit.representative) == (SOFT_TRANSPOSABLE.beta_limits.prior, False)


@pytest.mark.parametrize(
    ("kind", "value"), [("normal", 1.74), ("uniform", 2.34), ("exponential", 1.43)], ids=lambda value: str(value)
)
def test_real_distributions_are_fitted(kind, value):
    uniform = torch.rand(512, 512)
    weight = {
        "normal": torch.randn(512, 512),
        "uniform": uniform - 0.5,
        "exponential": torch.randn(512, 512).sign() * -uniform.log(),
    }[kind]
    fit = fit_beta(weight, SOFT_TRANSPOSABLE)
    assert fit.value == pytest.approx(value, rel=0.02)
    assert fit.representative


def test_a_weight_that_is_24_both_ways_keeps_its_size():
    fit = fit_beta(soft_threshold24_both(torch.randn(64, 64)), SOFT_TRANSPOSABLE)
    assert (fit.value, fit.is_24) == (1.0, True)
