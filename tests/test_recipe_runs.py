"""The runs of the quality benchmark: which are made, kept and compared; nothing is trained."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_quality
import recipe_runs

from sparse_compile.options import read_options
from sparse_compile.recipe import SSTE, Gemm


def run(arm: str, losses: list[float], *, seed: int = 0, speed: float = 16384.0) -> dict[str, Any]:
    return {
        "arm": arm, "seed": seed, "steps": len(losses), "losses": losses, "validation_loss": losses[-1],
        "tokens_per_second": speed, "tokens_a_step": 16384,
    }  # fmt: skip


def test_a_run_takes_the_place_of_an_older_one() -> None:
    old = [run("s-ste", [3.0]), run("bf16", [2.0]), run("s-ste", [9.0, 9.0])]
    runs = recipe_runs.merged(old, [run("s-ste", [4.0]), run("s-ste", [5.0], seed=1)])
    assert [(run["arm"], run["seed"], run["validation_loss"]) for run in runs] == [
        ("bf16", 0, 2.0), ("s-ste", 0, 4.0), ("s-ste", 1, 5.0), ("s-ste", 0, 9.0)
    ]  # fmt: skip


def test_every_arm_is_one_the_backend_knows() -> None:
    recipes = {arm: read_options(None, options(600)) for arm, options in recipe_runs.ARMS.items()}
    assert recipes["ste-dense-tail"].schedule == recipes["s-ste, dense tail"].schedule is not None
    assert recipes["s-ste, no MVUE"].recipe.estimator is None
    assert {options.recipe.name for options in recipes.values()} >= {"ste", "sr-ste", "t-sr-ste", "s-ste-bf16"}
    assert recipes["s-ste, 2:4 dgrad"].recipe == replace(SSTE, dgrad=Gemm.MVUE24)


def test_seconds_until_the_mean_loss_is_reached() -> None:
    losses = [4.0] * 150 + [2.0] * 150
    assert recipe_runs.seconds_to(run("bf16", losses), 3.0) == 200.0, "half of the last hundred"
    assert recipe_runs.seconds_to(run("bf16", losses, speed=32768.0), 3.0) == 100.0
    assert recipe_runs.seconds_to(run("bf16", losses), 1.9) is None


def test_speeds_are_those_of_short_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each arm once, and bf16 for the dense phases of the others."""
    monkeypatch.setattr(recipe_runs, "tokens", lambda vocabulary, at_least: None)
    trained = []

    def train(arm: str, shape: Any, config: Any, *rest: Any, scheduled_for: int) -> dict[str, Any]:
        trained.append((arm, config.steps))
        return {"tokens_per_second": 1000.0 if arm == recipe_runs.DENSE else 2000.0}

    monkeypatch.setattr(recipe_runs, "_train", train)
    old = [{**run("ste, dense half", [2.0], seed=seed), "tokens_per_second": None} for seed in (0, 1)]
    runs = [*old, run("s-ste", [3.0]), run("ste", [2.5])]
    timed = list(recipe_runs.measure_speeds(runs, ["ste, dense half", "s-ste"], 1, torch.device("cpu")))
    assert trained == [("bf16", 50), ("ste, dense half", 50), ("s-ste", 50)]
    assert [(run["arm"], round(run["tokens_per_second"], 3)) for run in timed] == [
        ("ste, dense half", 1333.333), ("ste, dense half", 1333.333), ("s-ste", 2000.0)
    ]  # fmt: skip
    assert timed[2]["training_seconds"] == 16384 / 2000
    table = recipe_runs.table(old + [run("bf16", [2.5])])
    assert "2.0000" in table
    assert "tokens a second" in table


def test_speeds_of_arms_without_runs_are_refused_before_any_trains(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"--speeds names \['fp8'\], of which there is no run; name them in --arms"):
        bench_quality.recipes_part(["s-ste"], [0], 1, 1, ["fp8", "s-ste"], tmp_path)


def test_a_stopped_program_keeps_the_runs_that_have_ended(tmp_path: Path) -> None:
    def runs() -> Any:
        yield run("bf16", [2.0])
        yield run("ste", [3.0])
        raise KeyboardInterrupt

    arguments = ("recipes", [run("s-ste", [2.5])], runs(), recipe_runs.merged, recipe_runs.table, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        bench_quality._kept(*arguments)
    assert [run["arm"] for run in bench_quality._runs_in(tmp_path, "recipes")] == ["bf16", "s-ste", "ste"]
    assert "+0.5000" in (tmp_path / "bench_quality.md").read_text()


def test_a_run_that_has_learned_nothing_is_a_failure(tmp_path: Path) -> None:
    new = [run("ste", [float("nan")]), run("s-ste", [9.1]), run("bf16", [2.0])]
    results, _ = bench_quality._kept("recipes", [], new, recipe_runs.merged, recipe_runs.table, tmp_path)
    assert results["failed"] == ["s-ste, 0", "ste, 0"]


def test_the_gap_is_to_the_dense_run_of_the_same_seed() -> None:
    runs = [
        run("bf16", [2.0]),
        run("bf16", [4.0], seed=1),
        run("ste", [3.0]),
        run("ste", [4.1], seed=1),
    ]
    text = recipe_runs.table(runs)
    assert "+1.0000" in text
    assert "+50.00" in text
    assert "+0.1000" in text
