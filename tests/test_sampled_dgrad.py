"""dgrad that is 2:4 by MVUE along out_features, an experiment: its definition, no bias, draws of its own, refusals."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shared_graphs
import sparse_compile
from sparse_compile.kernels import ops, reference
from sparse_compile.linear.fp8 import DGRAD_DRAWS
from sparse_compile.linear.function import LinearSpec, linear
from sparse_compile.options import read_options
from sparse_compile.recipe import FP8, RECIPES, SSTE, SSTE_APPROXIMATE, STE, T_SR_STE, Estimator, Gemm
from test_backend import sampled
from variants import with_sampled_dgrad

uncompiled = shared_graphs.uncompiled

SAMPLED = [with_sampled_dgrad(recipe) for recipe in (SSTE, SSTE_APPROXIMATE, STE)]


def pruned(weight, recipe):
    """Its operands, and the projection in full precision of what they hold."""
    operands = recipe.projection.new_operands(*weight.shape, weight.device)
    recipe.projection.fill(weight, operands, None, None, False)
    return operands, operands.weight_t.float().t() * operands.scale_inv


def input_gradient(grad_output, weight, recipe, seed=0, index=0, dtype=torch.float32):
    operands, _ = pruned(weight, recipe)
    x = torch.ones(len(grad_output), weight.shape[1], dtype=dtype, device=weight.device, requires_grad=True)
    parameter = weight.clone().requires_grad_()
    seed = torch.tensor([seed], device=weight.device)
    linear(x, parameter, None, seed, LinearSpec(recipe.full_name, index, False, dtype), operands).backward(grad_output)
    return x.grad


@pytest.mark.parametrize("tokens", [20, 128, 130])
@pytest.mark.parametrize("out_features", [48, 128, 144])
def test_equals_its_definition(tokens, out_features):
    """By masks and dense products in fp64, with samples by a search in cumulative probabilities."""
    recipe, index = SAMPLED[0], 3
    weight, grad = torch.randn(out_features, 64), torch.randn(tokens, out_features)
    grad *= torch.logspace(-12, 4, tokens)[:, None]
    scale = 224 / grad.abs().amax(dim=1, keepdim=True)
    kept = sampled((grad * scale).t(), torch.tensor([7]), index + DGRAD_DRAWS).t()
    assert kept.abs().max() <= 448
    assert bool(((kept.reshape(tokens, -1, 4) != 0).sum(-1) <= 2).all())
    expected = kept.to(torch.float8_e4m3fn).double() @ pruned(weight, recipe)[1].double() / scale
    actual = input_gradient(grad, weight, recipe, 7, index)
    # fp32 numbers that differ in their last bit may round to neighbours in e4m3, in few of the tokens.
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert (error > 1e-5).float().mean() < 0.05, error
    assert error.max() < 0.05


@pytest.mark.parametrize("recipe", SAMPLED, ids=lambda recipe: recipe.full_name)
def test_is_unbiased(recipe):
    """The mean over many seeds, and tokens alike, approaches that of the gradient itself as 1 / sqrt(samples)."""
    seeds, copies = 20, 20
    samples = seeds * copies
    weight, grad_output = torch.randn(64, 16), torch.randn(32, 64)
    repeated = grad_output.repeat(copies, 1)
    stacked = torch.cat([input_gradient(repeated, weight, recipe, seed) for seed in range(seeds)])
    stacked = stacked.reshape(samples, 32, 16)
    _, projected = pruned(weight, recipe)
    bias = stacked.mean(0) - grad_output @ projected
    # Rounding samples to e4m3 moves each product by a relative 2^-4 / sqrt(3) at random.
    rounding = (2.0**-4 / 3**0.5) ** 2 * (grad_output.square() @ projected.square())
    deviation = (stacked.var(0) / samples + rounding).sqrt()
    assert (bias / deviation).square().mean() < 1.0
    assert bool((bias.abs() < 5 * deviation).all())
    # It does sample: on one gradient the error is that of MVUE, far beyond that of e4m3.
    error = (stacked[0] - grad_output @ projected).norm() / (grad_output @ projected).norm()
    assert 0.3 < error < 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_follow_each_token(dtype):
    """Tokens that differ by orders of magnitude keep their relative precision; none saturates, and zeros stay zero.

    Weights so large that fp16 could not hold the product before its scales.
    """
    recipe, weight = SAMPLED[0], (300 * torch.randn(64, 16)).to(dtype)
    # Two equal of four, which MVUE keeps: no noise but that of FP8.
    grad = torch.zeros(36, 16, 4)
    grad[..., 1:3] = torch.randn(36, 16, 1)
    grad = (grad.reshape(36, 64) * torch.logspace(-4, 0, 36)[:, None]).to(dtype)
    grad[5] = 0.0
    actual = input_gradient(grad, weight, recipe, dtype=dtype).double()
    expected = grad.double() @ pruned(weight, recipe)[1].double()
    assert bool((actual[5] == 0).all())
    assert bool(((actual - expected).norm(dim=1) <= 0.05 * expected.norm(dim=1)).all())


@pytest.mark.usefixtures("uncompiled")
def test_draws_are_its_own():
    """Of any linear's wgrad and dgrad no two share their random numbers, and those of wgrad stay what they were."""
    indices = []

    def recorded(name, call, arguments):
        if name.startswith("cast_mvue"):
            indices.append(arguments[4])
        return call(*arguments)

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    options = {"sste.executor": "eager", "sste.when": "always", "sste.targets": "all", "sste.recipe": SAMPLED[0]}
    compiled = torch.compile(model, backend="sste", options=options)
    with ops.observed(recorded):
        compiled(torch.randn(8, 64, requires_grad=True)).sum().backward()
    assert sorted(indices) == [0, 1, 2, *(DGRAD_DRAWS + index for index in range(3))]
    uniforms = torch.stack([reference.group_uniforms(torch.tensor([5]), i, 64, 64).flatten() for i in indices])
    correlation = torch.corrcoef(uniforms) - torch.eye(len(indices))
    assert correlation.abs().max() < 5 / 64  # five standard deviations of 4096 pairs

    gradients = []
    for recipe in (SSTE, SAMPLED[0]):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        x, operands = torch.ones(8, 64, requires_grad=True), pruned(weight.detach(), recipe)[0]
        y = linear(x, weight, None, torch.tensor([3]), LinearSpec(recipe.full_name, 1, False, torch.float32), operands)
        (y * torch.arange(64.0)).sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_nothing_is_sampled_for_an_input_without_gradient(monkeypatch):
    weight, calls = torch.randn(64, 64), []
    cast_mvue = ops.cast_mvue
    monkeypatch.setattr(ops, "cast_mvue", lambda *arguments: calls.append(arguments[4]) or cast_mvue(*arguments))
    parameter, operands = weight.clone().requires_grad_(), pruned(weight, SSTE)[0]
    arguments = (torch.tensor([0]), LinearSpec(SAMPLED[0].full_name, 2, False, torch.float32), operands)
    linear(torch.randn(8, 64), parameter, None, *arguments).sum().backward()
    assert calls == [2]


class TestRecipe:
    def test_choosing_may_make_it_precise_again(self):
        variants = SAMPLED[1].variants()
        assert [(v.dgrad, v.wgrad, v.estimator) for v in variants] == [
            (Gemm.MVUE24, Gemm.SPARSE24, Estimator.APPROXIMATE_MVUE),
            (Gemm.FP8, Gemm.SPARSE24, Estimator.APPROXIMATE_MVUE),
            (Gemm.FP8, Gemm.FP8, None),
            (Gemm.FP8, Gemm.DENSE, None),
        ]
        assert len({v.full_name for v in variants}) == 4

    def test_no_recipe_has_it_by_itself(self):
        assert all(recipe.dgrad is not Gemm.MVUE24 for recipe in RECIPES.values())

    def test_options_of_the_estimator_go_with_it(self):
        recipe = read_options(None, {"sste.recipe": SAMPLED[0], "sste.mvue": "approximate"}).recipe
        assert (recipe.dgrad, recipe.estimator) == (Gemm.MVUE24, Estimator.APPROXIMATE_MVUE)

    def test_it_needs_an_estimator_and_a_dgrad_that_is_not_24_by_the_weight(self):
        with pytest.raises(ValueError, match="a sampled dgrad needs a pruned weight and a sampled wgrad"):
            replace(FP8, dgrad=Gemm.MVUE24)
        with pytest.raises(ValueError, match="dgrad is 2:4 if and only if the weight is 2:4 both ways"):
            replace(T_SR_STE, dgrad=Gemm.MVUE24)


class Model(nn.Module):
    """A linear, and an FFN whose forward may be recomputed."""

    def __init__(self, ffn, checkpointed):
        super().__init__()
        self.proj, self.norm, self.ffn, self.checkpointed = nn.Linear(64, 64), nn.LayerNorm(64), ffn(), checkpointed

    def forward(self, x):
        x = self.norm(x + self.proj(x))
        return checkpoint(self.ffn, x, use_reentrant=False) if self.checkpointed else self.ffn(x)


@pytest.mark.parametrize(
    ("dynamic", "checkpointed"),
    [
        pytest.param(False, True, id="checkpointed", marks=pytest.mark.nightly),
        pytest.param(True, True, id="dynamic, checkpointed", marks=pytest.mark.nightly),
        pytest.param(True, False, id="dynamic", marks=pytest.mark.nightly),
    ],
)
def test_runs_through_the_backend(ffn, checkpointed, dynamic):
    """As the report says; recomputed forwards and symbolic sizes draw the same samples."""
    gradients, x = [], torch.randn(24, 64)
    for recomputed, symbolic in ((checkpointed, dynamic), (False, False)):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = Model(ffn, recomputed)
        compiled = torch.compile(
            model,
            backend="sste",
            dynamic=symbolic,
            options={"sste.executor": "eager", "sste.when": "always", "sste.recipe": SAMPLED[0]},
        )
        torch.manual_seed(1)
        compiled(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-6)
    for graph in sparse_compile.report().graphs:
        rows = {row.module: row for row in graph.rows}
        up = rows["ffn.up"]
        assert up.decision == "s-ste (2:4 fp8, 2:4 fp8 mvue, 2:4 fp8)"
        assert (up.fprop, up.dgrad, up.wgrad) == ("2:4 fp8", "2:4 fp8 mvue", "2:4 fp8")
        assert rows["proj"].decision == "fp8 (fp8, fp8, fp8)"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("recipe", SAMPLED, ids=lambda recipe: recipe.full_name)
@pytest.mark.parametrize("size", [(1, 64, 64), (100, 144, 80), (1000, 512, 768)], ids=str)
def test_kernels_equal_their_definition(size, recipe, dtype):
    """The same samples; sums by tensor cores keep about 14 bits."""
    tokens, out_features, in_features = size
    weight = torch.randn(out_features, in_features, device="cuda").to(dtype)
    grad = torch.randn(tokens, out_features, device="cuda").to(dtype)
    actual = input_gradient(grad, weight, recipe, 5, 3, dtype).double()
    with ops.force_reference():
        expected = input_gradient(grad, weight, recipe, 5, 3, dtype).double()
    band = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-11}[dtype]
    assert (actual - expected).norm() < band * expected.norm()
