"""Runs of the same time, and the texts that runs are validated on; nothing is trained."""

import gzip
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import debian_text
import fair_runs
import source_text
import timed_runs
import train_gpt

CPU = torch.device("cpu")


def test_each_arm_is_given_as_many_steps_as_its_own_speed_makes_in_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []
    text = torch.arange(10)

    def train(setting: str, arm: str, factor: float, rate: float, seed: int, steps: int, *rest: Any) -> dict[str, Any]:
        trained.append((arm, factor, rate, steps))
        for curve in rest[2:]:
            curve.points.append((99.5, 2.0))
        return {
            "setting": setting, "arm": arm, "factor": factor, "learning_rate": rate, "steps": steps,
            "tokens_a_step": 16384, "tokens_per_second": 16384.0 * (1 if arm == "dense" else 2), "validation_loss": 2.0,
        }  # fmt: skip

    monkeypatch.setattr(fair_runs, "train", train)
    monkeypatch.setattr(fair_runs.Setting, "text", lambda setting, at_least: (text, text))
    runs = list(timed_runs.train_for_as_long("gpt2", [("dense", 1.0, 1e-3), ("s-ste", 1.7, 2e-3)], 100.0, CPU))
    assert trained == [
        ("dense", 1.0, 1e-3, 50), ("dense", 1.0, 1e-3, 100), ("s-ste", 1.7, 2e-3, 50), ("s-ste", 1.7, 2e-3, 200),
    ]  # fmt: skip
    assert [run["curve"] for run in runs] == [[(99.5, 2.0)]] * 2
    assert timed_runs.table(runs).count("99.5") == 2
    again = {**runs[1], "validation_loss": 1.5}
    assert timed_runs.merged(runs, [again]) == [runs[0], again]


def test_a_curve_is_over_the_time_of_the_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 steps of a second, the first of them of a minute, and validations that take ten."""
    now = 0.0

    def validate(*arguments: Any) -> float:
        nonlocal now
        now += 10.0
        return 3.0

    monkeypatch.setattr(train_gpt, "validation_loss", validate)
    monkeypatch.setattr("time.perf_counter", lambda: now)
    config = train_gpt.TrainConfig(steps=40, batch=1, learning_rate=1.0, seed=0)
    curve = timed_runs.Curve(torch.arange(10), 4, config.steps, CPU)
    for step in range(config.steps):
        now += 60.0 if step == 0 else 1.0
        curve(step, lambda tokens, targets: tokens, config)
    assert curve.points == [(pytest.approx(float(done)), 3.0) for done in range(6, 41, 2)]


def test_another_text_has_the_encoding_of_the_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(source_text, "texts", lambda: ["def double(number):\n    return number + number\n"] * 100)
    monkeypatch.setattr(source_text, "_PIECE", 20)
    train, _ = source_text.tokens(300, 100)
    other = tmp_path / "other.txt"
    other.write_text("double the number\n" * 20)
    found = source_text.tokens_of(other, 300)
    decoded = source_text._encoding(300, lambda: pytest.fail("it is kept")).decode(found.tolist())
    assert decoded == other.read_text()
    assert found.dtype == train.dtype == torch.int32
    assert found.max() < 300
    assert len(found) < 0.6 * len(other.read_text()), "words of the sources are few tokens"
    monkeypatch.setattr(source_text, "_encoding", lambda *arguments: pytest.fail("tokens are kept, too"))
    assert torch.equal(source_text.tokens_of(other, 300), found)


def test_what_documentation_says(tmp_path: Path) -> None:
    page = "<html><style>p {}</style><p>one &amp;\n\ntwo</p><script>var x</script></html>"
    (tmp_path / "a.html").write_text(page)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"three\n\n\nfour"))
    (tmp_path / "c.txt").write_text("three\nfour\n")
    (tmp_path / "d.png").write_bytes(b"five")
    assert list(debian_text.documents(tmp_path)) == ["one &\ntwo\n", "three\nfour\n"]
