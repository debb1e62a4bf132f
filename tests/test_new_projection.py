"""A new projection takes its class, its definition and a recipe, all in this file; nothing else names it."""

import copy
import pickle
from collections import Counter
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compile
from sparse_compile.kernels import reference
from sparse_compile.kernels.formats import E4M3, metadata_shape, values_shape
from sparse_compile.kernels.timing.components import COMPONENTS
from sparse_compile.passes.choose import choose
from sparse_compile.passes.decide import decide
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.projections.base import DenseOperand, Projection, SparseOperand, projection_of
from sparse_compile.projections.groups_of_four import TOP2
from sparse_compile.projections.transposable import TRANSPOSABLE
from sparse_compile.recipe import Gemm, Recipe, recipe_named
from sparse_compile.weights.projection import project, write_projected


class FixedWeight(NamedTuple):
    dense_t: Tensor
    kept: Tensor
    where: Tensor
    scale_inv: Tensor


class FirstAndThird(Projection):
    """Of each four elements along in_features, the first and the third, as they are."""

    Operands = FixedWeight
    is_hard = True

    def new_operands(self, n: int, k: int, device: torch.device) -> FixedWeight:
        return FixedWeight(
            dense_t=torch.empty(k, n, dtype=E4M3, device=device),
            kept=torch.empty(values_shape(n, k), dtype=E4M3, device=device),
            where=torch.empty(metadata_shape(n, k), dtype=torch.int32, device=device),
            scale_inv=torch.ones(1, device=device),
        )

    def fill(
        self, weight: Tensor, operands: FixedWeight, beta: Tensor | None, masks: Tensor | None, search: bool
    ) -> None:
        assert beta is None
        assert masks is None
        projected = self.project(weight.float(), None)
        scale, scale_inv = reference.tensorwise_scale(projected)
        payload = reference.saturating_cast(projected * scale)
        positions = torch.arange(0, 4, 2, device=weight.device).expand(len(weight), weight.shape[1] // 4, 2)
        values, metadata = reference.compress24(payload, positions)
        for operand, made in zip(operands, (payload.t(), values, metadata, scale_inv), strict=True):
            operand.copy_(made)

    def project(self, weight: Tensor, masks: Tensor | None) -> Tensor:
        return weight * (torch.arange(weight.shape[1], device=weight.device) % 2 == 0)

    def fprop_operand(self, operands: FixedWeight) -> SparseOperand:
        return SparseOperand(operands.kept, operands.where, operands.scale_inv)

    def kept_for_dgrad(self, operands: FixedWeight) -> tuple[Tensor, ...]:
        return operands.dense_t, operands.scale_inv

    def dgrad_operand(self, *kept: Tensor) -> DenseOperand:
        return DenseOperand(*kept)


FIXED = FirstAndThird("first-and-third")
RECIPE = Recipe(
    name="fixed", projection=FIXED, fprop=Gemm.SPARSE24, dgrad=Gemm.FP8, wgrad=Gemm.FP8, estimator=None, decay=2e-4
)
OPTIONS = {"sste.recipe": RECIPE, "sste.when": "always", "sste.executor": "eager"}


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


def projected(model: FFN) -> FFN:
    dense = copy.deepcopy(model)
    for linear in (dense.up, dense.down):
        linear.weight.data = FIXED.project(linear.weight.data, None)
    return dense


def test_a_recipe_with_it_trains_and_is_finalized() -> None:
    model, x = FFN(), torch.randn(32, 64)
    compiled = torch.compile(model, backend="sste", options=OPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        expected, actual = projected(model)(x), compiled(x)
        assert (actual - expected).norm() < 0.06 * expected.norm()
        actual.square().mean().backward()
        assert model.up.weight.grad is not None
        assert bool((model.up.weight.grad[:, 1::2] != 0).any()), "straight through, dropped elements too"
        optimizer.step()
    rows = {row.module: row for row in sparse_compile.report().rows}
    assert rows["up"].decision == "fixed (2:4 fp8, fp8, fp8)"
    assert {"up", "down"} <= sparse_compile.health().keys()
    assert sparse_compile.beta(model) == {}
    before, expected = compiled(x).detach(), projected(model).up.weight
    assert sparse_compile.finalize(model) == ["up.weight", "down.weight"]
    assert torch.equal(model.up.weight, expected)
    assert torch.equal(compiled(x), before)


def test_it_is_priced_with_its_own_component(trace, small_gpt, batch, monkeypatch) -> None:
    monkeypatch.setattr("sparse_compile.kernels.ops.emulation_reason", lambda device: None)
    plans, _ = decide(find(Flow(trace(small_gpt(depth=1), *batch))).sites, RECIPE, "ffn", ParameterOwners())
    asked: Counter[str] = Counter()

    def clock(questions):
        asked.update(component for components in questions.values() for component in components)
        slow = {"dense fprop", "dense dgrad", "dense wgrad"}
        return {
            question: {
                component: 100.0 if component in slow else 7.0 if component == FIXED.cost_key else 1.0
                for component in components
            }
            for question, components in questions.items()
        }

    kept = {plan.site.name: plan for plan in choose(plans, clock)[0]}
    assert asked[FIXED.cost_key] > 0
    assert FIXED.cost_key in COMPONENTS
    # Fused bytes aside, at a copy of 1 us: fprop, dgrad, wgrad, the cast and transpose of g and of x, the decay.
    assert kept["blocks.0.up"].price.rewritten > 6 * 1.0 + 7.0
    assert kept["blocks.0.up"].recipe.projection is FIXED


def test_graphs_name_it(tmp_path) -> None:
    assert RECIPE.full_name.startswith("fixed/projection=first-and-third/fprop=SPARSE24")
    named = recipe_named(RECIPE.full_name)
    assert (named.projection, named.fprop, named.dgrad, named.wgrad) == (FIXED, Gemm.SPARSE24, Gemm.FP8, Gemm.FP8)
    assert all(recipe_named(variant.full_name).full_name == variant.full_name for variant in RECIPE.variants())


def test_it_stays_what_it_is() -> None:
    assert copy.deepcopy(FIXED) is FIXED
    assert pickle.loads(pickle.dumps(FIXED)) is FIXED
    assert projection_of("first-and-third") is FIXED
    with pytest.raises(ValueError, match="there is a projection 'first-and-third' already"):
        FirstAndThird("first-and-third")
    with pytest.raises(ValueError, match=r"no projection 'second'; known are 'first-and-third', .* 'soft24', "):
        projection_of("second")


@pytest.mark.parametrize("projection", [TOP2, TRANSPOSABLE, FIXED], ids=repr)
def test_a_scale_that_another_recipe_left_changes_nothing(projection: Projection) -> None:
    """Linears compute without it, and so does what is written into a weight."""
    weight = torch.randn(32, 64)
    expected = projection.project(weight, None)
    assert torch.equal(project(weight, projection, 1.5, None), expected)
    write_projected(weight, projection, 1.5, None)
    assert torch.equal(weight, expected)


def test_its_scale_comes_last() -> None:
    class Wrong(NamedTuple):
        scale_inv: Tensor
        kept: Tensor

    class Other(FirstAndThird):
        Operands = Wrong

    with pytest.raises(TypeError, match="the last operand of projection 'other' is 'kept', not 'scale_inv'"):
        Other("other")
