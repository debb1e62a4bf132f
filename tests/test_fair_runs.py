"""The comparison at each arm's best learning rate: its table, its arms, and the model and optimizers of its own."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import fair_runs
import modern_gpt
import moe_gpt
import train_gpt

import sparse_compile
from sparse_compile.options import read_options

SHAPE = train_gpt.GPTConfig(layers=1, heads=1, width=64, context=16, vocabulary=64)


def run(
    arm: str, rate: float, loss: float, seed: int = 0, factor: float = 1.0, setting: str = "gpt2", text: str = "a"
) -> dict[str, Any]:
    return {
        "setting": setting, "arm": arm, "factor": factor, "learning_rate": rate, "seed": seed, "steps": 10,
        "text": text, "validation_loss": loss,
    }  # fmt: skip


def test_each_arm_is_compared_at_its_own_best() -> None:
    dense = [run("dense", 1e-3, 2.0), run("dense", 2e-3, 1.9) | {"other_loss": 2.7}, run("dense", 4e-3, 2.5)]
    dense += [run("dense", rate, loss, factor=1.5) for rate, loss in ((1e-3, 2.6), (2e-3, 2.2), (4e-3, 2.1))]
    pruned = [run("s-ste", 1e-3, 2.4), run("s-ste", 2e-3, 2.0), run("s-ste", 4e-3, 1.938)]
    lines = [line.split("|") for line in fair_runs.table([*pruned, *dense]).splitlines()[2:]]
    found = {cells[3].strip(): [cell.strip() for cell in cells[4:-1]] for cells in lines}
    assert found["dense"] == ["0.002", "1", "1", "1.9000", "-", "+0.00", "2.7000"]
    assert found["s-ste"] == ["0.004 (edge)", "1", "1", "1.9380", "-", "+2.00", "-"]


def test_runs_on_another_text_are_not_compared() -> None:
    runs = [run("dense", 1e-3, 2.0), run("dense", 1e-3, 1.0, text="b"), run("s-ste", 1e-3, 2.0)]
    lines = [line.split("|") for line in fair_runs.table(runs).splitlines()[2:]]
    assert [(cells[3].strip(), cells[-3].strip()) for cells in lines] == [
        ("dense", "+0.00"), ("s-ste", "+0.00"), ("dense", "+0.00"),
    ]  # fmt: skip


def test_more_seeds_count_before_a_lucky_one() -> None:
    runs = [run("dense", 2e-3, loss, seed) for seed, loss in enumerate((2.0, 2.1, 2.2))] + [run("dense", 1e-3, 1.0)]
    (line,) = fair_runs.table(runs).splitlines()[2:]
    assert [cell.strip() for cell in line.split("|")[6:9]] == ["3", "2.1000", "0.1000"]


def test_arms_are_compared_on_the_seeds_that_both_have() -> None:
    """Or an arm with the easier seed alone would be ahead.  One rate that was tried has no edges."""
    dense = [run("dense", 2e-3, 2.0, 0), run("dense", 2e-3, 2.2, 1)]
    lines = [line.split("|") for line in fair_runs.table([*dense, run("s-ste", 2e-3, 2.04, 0)]).splitlines()[2:]]
    assert [[cells[4].strip(), cells[-3].strip()] for cells in lines] == [["0.002", "+0.00"], ["0.002", "+2.00"]]
    (_, other) = fair_runs.table([*dense, run("s-ste", 2e-3, 2.04, 2)]).splitlines()[2:]
    assert other.split("|")[-3].strip() == "-"


def test_a_run_takes_the_place_of_an_older_one() -> None:
    merged = fair_runs.merged([run("s-ste", 1e-3, 3.0), run("dense", 1e-3, 2.0)], [run("s-ste", 1e-3, 2.5)])
    assert [(each["arm"], each["validation_loss"]) for each in merged] == [("dense", 2.0), ("s-ste", 2.5)]


def test_options_of_all_arms_are_right() -> None:
    for arm in fair_runs.ARMS.values():
        for factor in arm.factors:
            if arm.options is not None:
                assert read_options(None, arm.options_of(factor, 100)).recipe.beta_factor == factor


@pytest.mark.parametrize(("arm", "end"), [("s-ste, last quarter dense", 75), ("s-ste, last half dense", 50)])
def test_an_arm_that_ends_dense_knows_how_long_the_run_is(arm: str, end: int) -> None:
    schedule = read_options(None, fair_runs.ARMS[arm].options_of(1.0, 100)).schedule
    assert schedule is not None
    assert schedule.end == end


def test_losses_of_the_twentieths_of_a_run() -> None:
    assert [list(part) for part in fair_runs._parts(range(40))] == [[2 * i, 2 * i + 1] for i in range(20)]
    assert [list(part) for part in fair_runs._parts(range(3))] == [[0], [1], [2]]


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_dense_model_multiplies_with_a_multiple_of_the_ffn_s_weights(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setattr("recipe_runs.compiled_dense", lambda model: model)
    torch.manual_seed(0)
    plain, scaled = modern_gpt.FeedForward(SHAPE), nn.ModuleDict({"ffn": modern_gpt.FeedForward(SHAPE)})
    scaled["ffn"].load_state_dict(plain.state_dict())
    fair_runs.compiled(scaled, fair_runs.ARMS["dense"], factor, 1)
    x = torch.randn(4, 64)
    torch.testing.assert_close(scaled["ffn"](x), factor**3 * plain(x))  # the square of a ReLU lies between them


@pytest.mark.parametrize("factor", [1.0, 1.7])
def test_an_emulated_arm_multiplies_with_pruned_weights(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    monkeypatch.setattr("recipe_runs.compiled_dense", lambda model: model)
    torch.manual_seed(0)
    model = nn.ModuleDict({"ffn": modern_gpt.FeedForward(SHAPE)})
    nn.init.zeros_(model["ffn"].down.weight)  # as output projections begin
    fair_runs.compiled(model, fair_runs.ARMS["s-ste both ways, emulated"], factor, 1)
    up, weight, x = model["ffn"].up, model["ffn"].up.weight.detach(), torch.randn(4, 64)
    pruned = up(torch.eye(64)).detach().t()
    torch.testing.assert_close(up(x), x @ pruned.t())
    for groups in (pruned.unflatten(1, (-1, 4)), pruned.t().unflatten(1, (-1, 4))):
        assert int((groups != 0).sum(dim=-1).max()) == 2
    # The least squares of what is kept, times the factor.
    assert float((weight * pruned).sum() / pruned.square().sum()) == pytest.approx(1 / factor, rel=1e-3)
    assert model["ffn"].down.beta == pytest.approx(factor * 1.58, rel=0.05)  # that of normal weights


@pytest.mark.nightly
def test_the_modern_setting_learns() -> None:
    """Also that output projections begin at zero, and that both optimizers follow the schedule."""
    torch.manual_seed(0)
    model = modern_gpt.ModernGPT(SHAPE)
    optimizer = modern_gpt.MuonAndAdamW(model, train_gpt.TrainConfig(steps=20, batch=4, learning_rate=1e-2, seed=0))
    tokens = torch.randint(0, 64, (4, 17))
    losses = []
    for _ in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.log(torch.tensor(64.0)).item(), abs=1e-4), "the head begins at zero"
    assert losses[-1] < 0.7 * losses[0]
    rates = [group["lr"] for each in optimizer._optimizers for group in each.param_groups]
    assert rates == pytest.approx([1e-2, 3e-2])


@pytest.mark.gpu
def test_a_graphed_function_has_the_bits_of_its_calls() -> None:
    def function(x: torch.Tensor, factor: float) -> torch.Tensor:
        return (x.T @ x) * factor

    graphed = modern_gpt.Graphed(function)
    for size, factor in ((8, 2.0), (8, 2.0), (8, 3.0), (16, 3.0)):
        x = torch.randn(size, size, device="cuda")
        assert torch.equal(graphed(x, factor), function(x, factor))


@pytest.mark.nightly
def test_the_experts_of_the_mixture_are_rewritten_and_learn() -> None:
    torch.manual_seed(0)
    model = moe_gpt.MoEGPT(SHAPE)
    config = train_gpt.TrainConfig(steps=1, batch=4, learning_rate=3e-3, seed=0)
    optimizer = fair_runs.SETTINGS["moe"].make_optimizer(model, config)
    step = torch.compile(model, backend="sste", options={"sste.executor": "eager", "sste.when": "always"})
    tokens = torch.randint(0, 64, (4, 17))
    losses = []
    for _ in range(8):
        loss = step(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    decisions = {row.module: row.decision for row in sparse_compile.report().graphs[-1].rows}
    assert {name for name, decision in decisions.items() if decision.startswith("s-ste")} == {
        "blocks.0.experts.gate_up", "blocks.0.experts.down"
    }  # fmt: skip
    recorded = model(tokens[:, :-1], tokens[:, 1:]).item()
    with torch.no_grad():
        alone = model(tokens[:, :-1], tokens[:, 1:]).item()
    # The routers' part: 1 with tokens spread evenly, the number of experts with all at one.
    assert 0.0099 < recorded - alone < 0.01 * moe_gpt.NUMBER
