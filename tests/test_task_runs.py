"""The small tasks of the quality benchmark: their data, and that an arm trains on them."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_quality
import recipe_runs
import task_runs

pytestmark = pytest.mark.nightly  # programs of benchmarks/


def test_no_held_out_piece_of_source_is_trained_on() -> None:
    task = task_runs.packages()
    examples, classes = task.train
    held_out, _ = task.test
    assert examples.shape[1] == held_out.shape[1] == task.length
    assert classes.unique().tolist() == list(range(task.classes))
    assert len(held_out) < len(examples)
    seen = {piece.numpy().tobytes() for piece in examples}
    assert not any(piece.numpy().tobytes() in seen for piece in held_out)


def test_who_always_names_the_same_package_has_learned_nothing() -> None:
    _, expected = task_runs.packages().test
    always_the_same = (expected.bincount().max() / len(expected)).item()
    assert not bench_quality._has_learned({"accuracy": always_the_same})


@pytest.mark.parametrize("arm", [recipe_runs.DENSE, "s-ste"])
def test_a_run_learns(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two classes that a few steps can tell apart."""
    classes = torch.arange(64) % 2
    examples = (classes + 7)[:, None].expand(64, 16)
    task = task_runs.Task(
        embed=partial(nn.Embedding, 256), length=16, classes=2, steps=6,
        train=(examples, classes), test=(examples, classes),
    )  # fmt: skip
    monkeypatch.setitem(task_runs.TASKS, "packages", lambda: task)
    monkeypatch.setattr(task_runs, "_BATCH", 16)
    run = task_runs.run_task("packages", arm, 0, torch.device("cpu"))
    assert run["accuracy"] > 0.9
    assert run["loss"] < math.log(2)


def test_means_over_seeds_of_the_newest_runs() -> None:
    def run(arm: str, seed: int, accuracy: float, device: str = "cpu") -> task_runs.Run:
        return {"task": "digits", "device": device, "arm": arm, "seed": seed, "loss": 0.5, "accuracy": accuracy}

    old = [run("ste", 0, 0.1), run("ste", 0, 0.3, "cuda"), run("bf16", 0, 0.9)]
    runs = task_runs.merged(old, [run("ste", 1, 0.6), run("ste", 0, 0.8)])
    assert [(run["arm"], run["accuracy"]) for run in runs] == [
        ("bf16", 0.9), ("ste", 0.8), ("ste", 0.6), ("ste", 0.3)
    ]  # fmt: skip
    assert "70.00%" in task_runs.table(runs)
    assert "60.00% to 80.00%" in task_runs.table(runs)
