"""The search for what closes the gap to dense training, on a tiny model."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import recipe_runs
import recipe_search
import train_gpt

from sparse_compile import beta
from sparse_compile.options import read_options

pytestmark = pytest.mark.nightly  # programs of benchmarks/

TINY = train_gpt.GPTConfig(layers=2, heads=2, width=64, context=16, vocabulary=64)
TOKENS = 6 * recipe_search.BATCH * TINY.context  # of six steps


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a trial compiled."""
    seen: dict[str, Any] = {}

    def dense(model: nn.Module) -> nn.Module:
        seen["model"] = model
        return model

    def sste(model: nn.Module, options: dict[str, Any]) -> Any:
        seen["model"], seen["options"] = model, options
        return torch.compile(
            model, backend="sste", options={"sste.executor": "eager", "sste.when": "always", **options}
        )

    def tokens(vocabulary: int, at_least: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        train, held_out = (torch.randint(64, (count,), generator=generator) for count in (at_least, 2048))
        return train, held_out

    monkeypatch.setattr(recipe_runs, "compiled_dense", dense)
    monkeypatch.setattr(recipe_runs, "compiled_sste", sste)
    monkeypatch.setattr(recipe_search, "tokens", tokens)
    return seen


def run(name: str, rate: float = 1e-3) -> recipe_search.Run:
    return recipe_search.run_trial(name, rate, 0, TOKENS, "cpu", TINY)


def test_trials_are_options_that_exist() -> None:
    for trial in recipe_search.TRIALS.values():
        if trial.options is not None:
            scheduled = {"sste.total_steps": 600} if trial.options.keys() & {"sste.tail", "sste.warmup"} else {}
            read_options(None, {**trial.options, **scheduled})


def test_a_dense_trial_and_its_learning_rate(seen: dict[str, Any]) -> None:
    plain, faster = run("bf16"), run("bf16", 4e-3)
    assert plain["steps"] == 6
    assert faster["validation_loss"] != plain["validation_loss"]
    assert "options" not in seen


def test_beta_is_the_one_that_is_given(seen: dict[str, Any]) -> None:
    own = run("s-ste")
    assert min(beta(seen["model"]).values()) > 1.3
    given = run("s-ste, beta 2")
    assert beta(seen["model"]) == {f"blocks.{i}.ffn.{name}.weight": 2.0 for i in (0, 1) for name in ("up", "down")}
    assert given["validation_loss"] != own["validation_loss"]


def test_gradients_of_the_ffn_are_multiplied(seen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[dict[str, Tensor]] = []

    def norm(parameters: Any, limit: float) -> None:
        named = seen["model"].named_parameters()
        norms.append({name: parameter.grad.norm() for name, parameter in named if parameter.grad is not None})

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", norm)
    run("s-ste")
    plain = norms[0]
    norms.clear()
    run("s-ste, gradient x beta")
    for name, value in norms[0].items():
        factor = 1.484 if name.endswith(("up.weight", "down.weight")) else 1.0
        assert value / plain[name] == pytest.approx(factor, rel=1e-5), name


def test_a_schedule_knows_the_steps(seen: dict[str, Any]) -> None:
    run("ste, tail 1/3")
    assert seen["options"]["sste.total_steps"] == 6
    schedule = read_options(None, seen["options"]).schedule
    assert schedule is not None
    assert [schedule.prunes_at(step) for step in range(6)] == [True] * 4 + [False] * 2


def test_table_of_trials() -> None:
    losses = {
        ("bf16", 1e-3, 0): 2.0, ("bf16", 1e-3, 1): 2.2, ("ste", 1e-3, 0): 2.1, ("ste", 1e-3, 1): 2.4,
        ("bf16", 2e-3, 0): 1.0, ("ste", 2e-3, 0): 1.2, ("ste", 4e-3, 0): 1.2,
    }  # fmt: skip
    runs = [
        {"trial": trial, "learning_rate": rate, "seed": seed, "steps": 6, "validation_loss": loss}
        for (trial, rate, seed), loss in losses.items()
    ]
    lines = recipe_search.table(recipe_search.merged(runs[:1], runs)).splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["0.001", "bf16", "2", "2.1000", "+0.0000", "+0.00", "0.0000"],
        ["0.001", "ste", "2", "2.2500", "+0.1500", "+7.14", "0.1000"],
        ["0.002", "bf16", "1", "1.0000", "+0.0000", "+0.00", "-"],
        ["0.002", "ste", "1", "1.2000", "+0.2000", "+20.00", "-"],
        ["0.004", "ste", "1", "1.2000", "-", "-", "-"],
    ]
