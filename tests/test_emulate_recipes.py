"""The emulation of recipes: what its linears compute, and when."""

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import emulate_recipes
import train_gpt
from emulate_recipes import PrunedLinear, Trial

import sparse_compile
from sparse_compile.kernels.reference import hard_threshold24, soft_threshold24, sste_beta
from sparse_compile.options import read_options
from sparse_compile.projections.groups_of_four import SOFT, TOP2

TINY = train_gpt.GPTConfig(layers=1, heads=1, width=16, context=8)


def model() -> train_gpt.GPT:
    torch.manual_seed(0)
    return train_gpt.GPT(TINY)


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("beta", [None, 2.0])
def test_gradients_go_straight_through_the_projection(beta: float | None) -> None:
    linear = nn.Linear(16, 8)
    linear.__class__ = PrunedLinear
    assert isinstance(linear, PrunedLinear)
    linear.become(Trial(projection=SOFT, beta=beta), "ffn.up")
    linear.prunes = True
    x = torch.randn(4, 16)
    out = linear(x)
    weight = linear.weight.detach()
    scale = sste_beta(weight) if beta is None else beta
    torch.testing.assert_close(out, x @ (scale * soft_threshold24(weight)).t() + linear.bias)
    (grad,) = torch.autograd.grad(out.square().sum(), [linear.weight])
    torch.testing.assert_close(grad, 2 * out.detach().t() @ x)


def test_weights_that_are_not_pruned_may_be_multiplied() -> None:
    gpt = model()
    plain = gpt(tokens(), tokens())
    call = emulate_recipes.scheduled(gpt, Trial(gain=2.0), 1)
    doubled = call(tokens(), tokens())
    (grad,) = torch.autograd.grad(doubled, [gpt.blocks[0].ffn.up.weight])
    other = model()
    emulate_recipes.scheduled(other, Trial(), 1)
    for layer in ("up", "down"):
        getattr(other.blocks[0].ffn, layer).weight.data *= 2
    expected = other(tokens(), tokens())
    assert doubled == expected != plain
    assert torch.equal(grad, torch.autograd.grad(expected, [other.blocks[0].ffn.up.weight])[0])


def test_phases_and_what_a_tail_begins_with() -> None:
    gpt = model()
    call = emulate_recipes.scheduled(gpt, Trial(projection=TOP2, warmup=0.25, tail=0.5), 4)
    up = gpt.blocks[0].ffn.up
    assert isinstance(up, PrunedLinear)
    phases = []
    before = up.weight.detach().clone()
    for _ in range(4):
        call(tokens(), tokens())
        phases.append(up.prunes)
    assert phases == [False, True, False, False]
    assert torch.equal(up.weight, hard_threshold24(before))
    with torch.no_grad():
        call(tokens(), tokens())
    assert not up.prunes


def test_groups_along_out_features() -> None:
    gpt = model()
    call = emulate_recipes.scheduled(gpt, Trial(projection=SOFT, across=True), 1)
    call(tokens(), tokens())
    up = gpt.blocks[0].ffn.up
    assert isinstance(up, PrunedLinear)
    weight = up.weight.detach()
    assert up.beta == sste_beta(weight.t().contiguous())
    assert torch.equal(up.projected(), (soft_threshold24(weight.t()) * up.beta).t())


def test_without_a_tail_evaluation_is_pruned() -> None:
    gpt = model()
    call = emulate_recipes.scheduled(gpt, Trial(projection=TOP2, layers=("down",)), 1)
    call(tokens(), tokens())
    with torch.no_grad():
        loss = call(tokens(), tokens())
    down = gpt.blocks[0].ffn.down
    assert isinstance(down, PrunedLinear)
    assert down.prunes
    assert not isinstance(gpt.blocks[0].ffn.up, PrunedLinear)
    down.prunes = False
    assert gpt(tokens(), tokens()) != loss


@pytest.mark.nightly
def test_trials_of_the_backend_are_what_they_say() -> None:
    """Their linears are pruned by the kernels' definitions, in FP8, the FFN's second one only where it is a target."""
    names = [name for name, trial in emulate_recipes.TRIALS.items() if trial.backend is not None]
    decisions = {}
    for name in ("s-ste x 1.7, no MVUE, by the backend", "s-ste x 1.7, ffn-up, by the backend"):
        assert name in names
        torch.manual_seed(0)
        gpt = train_gpt.GPT(replace(TINY, width=64))
        call = emulate_recipes.scheduled(gpt, emulate_recipes.TRIALS[name], 1)
        call(tokens(), tokens()).backward()
        rows = {row.module: row.decision for row in sparse_compile.report().graphs[-1].rows}
        decisions[name] = [rows[f"blocks.0.ffn.{layer}"] for layer in ("up", "down")]
    pruned, dense = "s-ste (2:4 fp8, fp8, {})", "fp8 (fp8, fp8, fp8)"
    assert list(decisions.values()) == [[pruned.format("fp8")] * 2, [pruned.format("2:4 fp8"), dense]]
    for name in names:
        read_options(None, emulate_recipes.TRIALS[name].backend)


@pytest.mark.nightly
def test_runs_of_a_seed_start_alike_and_the_table_compares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_gpt, "corpus", cache(train_gpt.corpus))  # many files
    runs = [emulate_recipes.run_trial(name, 1e-3, seed, 3, TINY) for name in ("dense", "ste") for seed in (0, 1)]
    assert runs[0] == emulate_recipes.run_trial("dense", 1e-3, 0, 3, TINY)
    assert len({run["validation_loss"] for run in runs}) == 4
    gaps = [100 * (runs[2 + seed]["validation_loss"] / runs[seed]["validation_loss"] - 1) for seed in (0, 1)]
    cells = [cell.strip() for cell in emulate_recipes.table(runs).splitlines()[-1].split("|")[1:-1]]
    assert cells[:3] == ["0.001", "ste", "2"]
    assert float(cells[4]) == pytest.approx(sum(gaps) / 2, abs=0.006)
