"""Gradients in e5m2 and stochastic rounding, from the options to the kernels; what they compute has its own tests."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

import shared_graphs
import sparse_compile
import warm
from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3
from sparse_compile.linear.function import LinearSpec, linear
from sparse_compile.options import read_options
from sparse_compile.recipe import FP8, RECIPES, SSTE, SSTE_BF16, T_SR_STE, GradFormat, Rounding, recipe_named
from test_linear import operands_of
from variants import VARIANTS, with_sampled_dgrad

uncompiled = shared_graphs.uncompiled

RECIPE = replace(SSTE, grad_format=GradFormat.E5M2, rounding=Rounding.STOCHASTIC)
# In which the operands of backward differ.
FORMS = (SSTE, with_sampled_dgrad(SSTE), T_SR_STE, FP8)
SCHEDULE = {"sste.total_steps": 6, "sste.tail": 1}  # one recipe asks for it


class TestNames:
    def test_are_those_of_the_recipes_where_nothing_else_was_chosen(self):
        assert all(recipe.full_name == name for name, recipe in RECIPES.items())

    def test_tell_all_that_a_graph_computes(self):
        names = {variant: name for name, variant in VARIANTS.items()}
        assert len(names) == len(VARIANTS)
        for name, variant in VARIANTS.items():
            assert recipe_named(name) == variant
        # Not these: they are the state's.
        decayed = replace(T_SR_STE, decay=1e-5, refresh=3)
        assert decayed.full_name == "t-sr-ste"

    def test_are_known_in_a_fresh_process(self):
        """A graph that another process has compiled and kept."""
        recipe = replace(with_sampled_dgrad(SSTE), grad_format=GradFormat.E5M2, rounding=Rounding.STOCHASTIC)
        variants = (recipe, *recipe.variants())
        code = "import sys; from sparse_compile.recipe import recipe_named; print(*map(recipe_named, sys.argv[1:]))"
        printed = warm.python("-c", code, *(variant.full_name for variant in variants), check=True).stdout
        assert printed == f"{' '.join(map(str, variants))}\n"


class TestRecipe:
    def test_it_keeps_both_in_what_it_may_become(self):
        """The format wherever it casts gradients, and the rounding where it samples."""
        recipe = read_options(None, {"sste.recipe": with_sampled_dgrad(RECIPE), "sste.mvue": "approximate"}).recipe
        assert (recipe.grad_format, recipe.rounding) == (GradFormat.E5M2, Rounding.STOCHASTIC)
        for variant in recipe.variants():
            assert variant.grad_format is GradFormat.E5M2
            assert (variant.rounding is Rounding.STOCHASTIC) == (variant.estimator is not None)
        formats = {
            variant.full_name: variant.grad_format for variant in replace(FP8, grad_format=GradFormat.E5M2).variants()
        }
        assert formats.pop("fp8/projection=identity-once/dgrad=DENSE/wgrad=DENSE") is GradFormat.E4M3
        assert set(formats.values()) == {GradFormat.E5M2}

    @pytest.mark.parametrize("option", ["sste.grad_format", "sste.rounding", "sste.dgrad"])
    def test_experiments_are_no_options(self, option):
        with pytest.raises(ValueError, match=f"unknown option '{option}'"):
            read_options(None, {option: "e5m2"})

    def test_refusals(self):
        with pytest.raises(ValueError, match="rounding needs an estimator"):
            replace(FP8, rounding=Rounding.STOCHASTIC)
        with pytest.raises(ValueError, match="grad_format needs a product that reads gradients in FP8"):
            replace(SSTE_BF16, grad_format=GradFormat.E5M2)


class Model(nn.Module):
    """A linear that is no target, and an FFN."""

    def __init__(self, ffn):
        super().__init__()
        self.proj, self.norm, self.ffn = nn.Linear(64, 64), nn.LayerNorm(64), ffn()

    def forward(self, x):
        return self.ffn(self.norm(x + self.proj(x))).square().mean()


# By day ``test_seeds.py`` has generated code of both.
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("executor", ["eager", pytest.param("inductor", marks=pytest.mark.nightly)])
def test_the_report_says_so(ffn, executor):
    options = {"sste.executor": executor, "sste.when": "always", "sste.recipe": RECIPE}
    torch.compile(Model(ffn), backend="sste", options=options)(torch.randn(16, 64)).backward()
    rows = {row.module: row for row in sparse_compile.report().rows}
    up, proj = rows["ffn.up"], rows["proj"]
    assert up.decision == "s-ste (2:4 fp8, fp8, 2:4 fp8; e5m2 gradients; stochastic rounding)"
    assert (up.fprop, up.dgrad, up.wgrad) == ("2:4 fp8", "fp8", "2:4 fp8")
    # Linears that are no targets have the same format, and no samples to round.
    assert proj.decision == "fp8 (fp8, fp8, fp8; e5m2 gradients)"


@pytest.mark.usefixtures("uncompiled")
def test_a_dense_phase_keeps_the_format(ffn):
    options = {"sste.executor": "eager", "sste.when": "always", "sste.warmup": 1, "sste.recipe": RECIPE}
    torch.compile(Model(ffn), backend="sste", options=options)(torch.randn(16, 64)).backward()
    decisions = {row.module: row.decision for row in sparse_compile.report().rows}
    assert decisions == dict.fromkeys(("proj", "ffn.up", "ffn.down"), "fp8 (fp8, fp8, fp8; e5m2 gradients)")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("recipe", FORMS, ids=lambda recipe: recipe.full_name)
def test_every_product_reads_it(monkeypatch, recipe, transposed):
    """Gradients, and nothing else, are e5m2 in all products of backward; none has two such operands."""
    products = []

    def recorded(op, *positions):
        def run(*arguments):
            products.append({arguments[position].dtype for position in positions})
            return op(*arguments)

        return run

    monkeypatch.setattr(ops, "sparse_mm", recorded(ops.sparse_mm, 0, 2))
    monkeypatch.setattr(ops, "scaled_mm", recorded(ops.scaled_mm, 0, 1))
    for grad_format in GradFormat:
        products.clear()
        chosen = replace(recipe, grad_format=grad_format)
        weight, x = torch.randn(32, 64), torch.randn(20, 64, requires_grad=True)
        stored = (weight.t().contiguous() if transposed else weight.clone()).requires_grad_()
        arguments = (
            torch.tensor([1]),
            LinearSpec(chosen.full_name, 0, transposed, torch.float32),
            operands_of(weight, chosen),
        )
        linear(x, stored, None, *arguments).square().sum().backward()
        assert products == [{E4M3}, {E4M3, grad_format.dtype}, {E4M3, grad_format.dtype}]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "recipe",
    [
        replace(recipe, grad_format=grad_format, rounding=Rounding.STOCHASTIC if recipe.estimator else Rounding.NEAREST)
        for recipe in FORMS
        for grad_format in GradFormat
    ],
    ids=lambda recipe: recipe.full_name,
)
@pytest.mark.parametrize("size", [(1, 64, 64), (100, 144, 80), (1000, 512, 768)], ids=str)
def test_kernels_equal_their_definition(size, recipe, transposed, dtype):
    """The same samples, rounded alike; sums by tensor cores keep about 14 bits."""
    tokens, out_features, in_features = size
    weight, x = torch.randn(out_features, in_features).to(dtype), torch.randn(tokens, in_features).to(dtype).cuda()
    grad_output = torch.randn(tokens, out_features).to(dtype).cuda()
    operands = [operand.cuda() for operand in operands_of(weight, recipe)]
    stored = (weight.t().contiguous() if transposed else weight).cuda()
    results = []
    for context in (nullcontext(), ops.force_reference()):
        leaf, parameter = x.clone().requires_grad_(), stored.clone().requires_grad_()
        arguments = (torch.tensor([5], device="cuda"), LinearSpec(recipe.full_name, 3, transposed, dtype), operands)
        with context:
            output = linear(leaf, parameter, None, *arguments)
            output.backward(grad_output)
        results.append((output.detach(), leaf.grad, parameter.grad))
    band = {torch.bfloat16: 2.0**-7, torch.float32: 2.0**-10}[dtype]
    for actual, expected in zip(*results, strict=True):
        assert (actual.double() - expected.double()).norm() < band * expected.double().norm()
