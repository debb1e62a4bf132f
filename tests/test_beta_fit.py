"""The scale of a weight: fitted where its elements say something, a prior where not; and training from zero."""

import pytest
import torch
from torch import nn

import shared_graphs
import sparse_compile
from sparse_compile.kernels.reference import soft_threshold24, sste_beta
from sparse_compile.projections.groups_of_four import SOFT
from sparse_compile.weights.beta_fit import fit_beta

clean_slate = shared_graphs.kept

SHAPE = (128, 256)
LIMITS = SOFT.beta_limits


def normal(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def steps_of_sign_descent(steps):
    return sum((normal(0) + normal(seed)).sign() for seed in range(1, steps + 1))


DEGENERATE = {
    "zero": torch.zeros(SHAPE),
    "one bit": normal().sign(),
    "nearly equal": normal().sign() * (1 + 1e-5 * normal(1)),
    "a spread of a tenth": normal().sign() * (1 + 0.1 * normal(1)),
    "a spread of a third": normal().sign() * (1 + 0.3 * normal(1)),
    "ternary": normal().sign() * (normal(1) > 0),
    "constant": torch.ones(SHAPE),
    "half of the groups constant": torch.where(torch.arange(256) // 4 % 2 == 0, normal(), torch.ones(SHAPE)),
    "Adam's first step, half of the inputs dead": normal().sign() * (normal(1)[:1] > 0) * (1 + 1e-5 * normal(2)),
    "a step of sign descent": steps_of_sign_descent(1),
    "two steps of sign descent": steps_of_sign_descent(2),
    "one step in bf16": (1e-3 * normal().sign() * (1 + 1e-5 * normal(1))).bfloat16(),
}


@pytest.mark.parametrize("weight", DEGENERATE.values(), ids=DEGENERATE.keys())
def test_what_says_nothing_keeps_the_prior(weight):
    fit = fit_beta(weight, SOFT)
    assert (fit.value, fit.representative, fit.is_24) == (LIMITS.prior, False, False)


REPRESENTATIVE = {
    "normal": (normal(), 1.48),
    "normal in bf16": (normal().bfloat16(), 1.48),
    "normal and small": (1e-6 * normal(), 1.48),
    "uniform": (torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) - 0.5, 1.75),
    "orthogonal": (nn.init.orthogonal_(torch.empty(SHAPE)), 1.48),
    "truncated": (nn.init.trunc_normal_(torch.empty(SHAPE), a=-1, b=1), 1.68),
    "exponential": (normal().sign() * -torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)).log(), 1.29),
}


@pytest.mark.parametrize(("weight", "value"), REPRESENTATIVE.values(), ids=REPRESENTATIVE.keys())
def test_real_distributions_are_fitted(weight, value):
    fit = fit_beta(weight, SOFT)
    assert fit.value == pytest.approx(value, rel=0.02)
    assert fit.value == sste_beta(weight)
    assert (fit.representative, fit.is_24) == (True, False)


def test_a_24_weight_has_1():
    fit = fit_beta(soft_threshold24(normal()), SOFT)
    assert (fit.value, fit.is_24) == (1.0, True)
    one_bit = normal().sign() * torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(64)
    assert fit_beta(one_bit, SOFT).is_24
    nearly = soft_threshold24(normal()) + 0.01 * normal(1)
    assert 1.0 < fit_beta(nearly, SOFT).value < 1.05


def test_outliers_do_not_decide():
    weight = normal()
    weight[3, 5] = 1e4
    assert sste_beta(weight) < 1.01
    assert fit_beta(weight, SOFT).value == pytest.approx(1.48, rel=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_has_none(value):
    weight = normal()
    weight[3, 5] = value
    assert fit_beta(weight, SOFT) is None


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_weight_the_scale_is_in_range(seed):
    """And so W~ is never larger than a small multiple of W."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(64, 128, generator=generator)
    power = 10 * torch.rand(1, generator=generator) - 5
    weight = weight.sign() * weight.abs() ** power  # from nearly equal magnitudes to outliers of all sizes
    weight *= torch.rand(64, 128, generator=generator) > torch.rand(1, generator=generator)
    fit = fit_beta(weight, SOFT)
    assert 1.0 <= fit.value <= LIMITS.largest
    assert (fit.value * soft_threshold24(weight)).norm() <= LIMITS.largest * weight.norm()


# Training from zero.


class Lion(torch.optim.Optimizer):
    def __init__(self, weights, lr):
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                weight.sub_(momentum.lerp(weight.grad, 0.1).sign(), alpha=group["lr"])
                momentum.lerp_(weight.grad, 0.01)


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Lion": lambda p: Lion(p, lr=3e-4),
    "Muon": lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.0),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
}


class FFN(nn.Module):
    def __init__(self, spread):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)
        nn.init.normal_(self.down.weight, std=spread) if spread else nn.init.zeros_(self.down.weight)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


def losses_of(spread, make, dtype, warmup, steps):
    torch.manual_seed(0)
    model = FFN(spread).to(dtype)
    teacher = nn.Linear(64, 64, bias=False)
    options = {"sste.executor": "eager", "sste.when": "always", "sste.mvue": "off"} | (
        {"sste.warmup": warmup} if warmup else {}
    )
    run = torch.compile(model, backend="sste", options=options)
    optimizer, losses = make(model.parameters()), []
    for step in range(steps):
        torch.manual_seed(step)
        x = torch.randn(128, 64)
        y = x + 2 * torch.tanh(teacher(x)).detach() + 0.3 * torch.randn(128, 64)
        loss = (run(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


BEGINNINGS = {"fp32 at once": (torch.float32, 0), "bf16 after a warm-up": (torch.bfloat16, 5)}


def beginnings():
    """By day one; in a night all, for longer."""
    yield pytest.param(OPTIMIZERS["RMSprop"], torch.bfloat16, 5, 60, id="short")
    for name, make in OPTIMIZERS.items():
        for kind, (dtype, warmup) in BEGINNINGS.items():
            yield pytest.param(make, dtype, warmup, 300, id=f"{name}-{kind}-long", marks=pytest.mark.nightly)


@pytest.mark.parametrize(("make", "dtype", "warmup", "steps"), list(beginnings()))
def test_a_projection_that_begins_at_zero_trains_as_from_a_small_random_start(make, dtype, warmup, steps):
    zero, model = losses_of(0.0, make, dtype, warmup, steps)
    small, _ = losses_of(1e-3, make, dtype, warmup, steps)
    assert all(1.0 <= value <= LIMITS.largest for value in sparse_compile.beta(model).values())
    assert max(zero) <= 1.02 * max(zero[:3])  # batches differ
    last, expected = sum(zero[-20:]) / 20, sum(small[-20:]) / 20
    assert last == pytest.approx(expected, rel=0.05)
    assert last < 0.85 * zero[0]
