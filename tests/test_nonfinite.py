"""NaN and infinity in inputs, weights and gradients come out where dense linears let them out; health says where."""

import copy
import math

import pytest
import torch
from torch import Tensor

import shared_graphs
import sparse_compile
from ffn_training import EAGER, FFN, adamw, compiled
from sparse_compile.measuring import weight_health
from sparse_compile.reporting.model import GraphReport
from sparse_compile.reporting.report import Report

clean_slate = shared_graphs.kept

RECIPES = [
    "s-ste",
    *(pytest.param(name, marks=pytest.mark.nightly) for name in ("fp8", "ste", "s-ste-bf16", "t-sr-ste")),
]


@pytest.fixture(scope="module")
def trained() -> dict[str, FFN]:
    """By its recipe, the model that tests share, after a step."""
    return {}


def model_of(recipe: str, trained: dict[str, FFN]) -> FFN:
    if recipe not in trained:
        trained.clear()
        model = trained[recipe] = FFN()
        model.optimizer = adamw(model)
        step_of(model, recipe)(torch.randn(16, 64)).sum().backward()
        model.optimizer.step()
        model.optimizer.zero_grad()
    return trained[recipe]


def step_of(model: FFN, recipe: str) -> torch.nn.Module:
    return compiled(model, EAGER | {"sste.recipe": recipe, "sste.targets": "all"}, dynamic=False)


def broken(model: FFN, step: torch.nn.Module, where: str, value: float) -> dict[str, Tensor]:
    """Which elements of the outputs and the gradients are NaN or infinite where one of what goes in is so."""
    x, grad = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(3)).unbind()
    if where == "input":
        x[3, 5] = value
    elif where == "gradient":
        grad[3, 5] = value
    else:
        with torch.no_grad():
            model.get_parameter(where)[7, 9] = value
    x.requires_grad_()
    y = step(x)
    y.backward(grad)
    found = {"output": y, "gradient of input": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return {name: ~found[name].detach().isfinite() for name in found}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("where", ["input", "gradient", "up.weight", "down.weight"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_as_dense_does(trained: dict[str, FFN], recipe: str, where: str, value: float) -> None:
    """A token that is whole stays so, what is broken is never hidden, and a whole gradient of a weight is whole."""
    model = model_of(recipe, trained)
    before = copy.deepcopy(model.state_dict())
    dense = FFN()
    dense.load_state_dict(before)
    expected, actual = broken(dense, dense, where, value), broken(model, step_of(model, recipe), where, value)
    assert any(elements.any() for elements in expected.values())
    health = sparse_compile.health()
    model.load_state_dict(before)
    for name, elements in expected.items():
        assert not (elements & ~actual[name]).any(), f"{name} hides what is broken"
        if name in ("output", "gradient of input"):
            assert torch.equal(elements.any(1), actual[name].any(1)), name
        else:
            assert elements.any() == actual[name].any(), name
    if recipe != "fp8":
        weights = {id(parameter): name for name, parameter in model.named_parameters()}
        watched = {found.name: weights.get(id(found.weight.ref())) for found in weight_health.monitor.watched.values()}
        health = {watched[name]: sample for name, sample in health.items() if watched[name]}  # not of other tests
        assert {name: sample.nonfinite for name, sample in health.items()} == {
            name: where == name for name in ("up.weight", "down.weight")
        }
        graph = GraphReport(rows=(), execution="kernels")
        shown = str(Report([graph], {name: [sample] for name, sample in health.items()}))
        assert ("NaN or infinity in " in shown) == where.endswith("weight")


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_a_scaler_skips_the_step_and_training_goes_on(trained: dict[str, FFN], where: str) -> None:
    model = model_of("s-ste", trained)
    step = step_of(model, "s-ste")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(16, 64)
    for bad in (True, False):
        tokens, grad = x.clone(), torch.ones(16, 64)
        if bad:
            (tokens if where == "input" else grad)[2, 7] = math.inf
        (scaler.scale(step(tokens)) * grad).sum().backward()
        scaler.step(model.optimizer)
        scaler.update()
        model.optimizer.zero_grad()
        same = [torch.equal(value, before[name]) for name, value in model.state_dict().items()]
        assert all(same) if bad else not any(same)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
