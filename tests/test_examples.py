"""The programs in examples/ run as the documentation says."""

import json
import math
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_gpt

import warm
from sparse_compile.reporting.report import Report

REPOSITORY = Path(__file__).parents[1]

ARGUMENTS = ("--device", "cpu", "--preset", "tiny", "--steps", "12", "--out")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}


def check(said: str, result: dict[str, Any], layers: int) -> None:
    """Both losses fall, and the output says what was emulated and what was rewritten."""
    assert "emulated" in said
    assert "tokens per second" in said
    assert result["emulated"] is not None
    assert set(result["runs"]) == {"dense", "sste"}
    for run in result["runs"].values():
        assert all(math.isfinite(loss) for loss in [*run["losses"], run["validation_loss"]])
        assert run["losses"][-1] < run["losses"][0] - 1.0
        assert run["validation_loss"] < run["losses"][0] - 1.0
    assert result["runs"]["sste"]["losses"] != result["runs"]["dense"]["losses"]

    rows = [row for graph in result["report"]["graphs"] for row in graph["rows"]]
    sparse = {row["module"] for row in rows if "2:4" in row["decision"]}
    assert sparse == {f"blocks.{block}.ffn.{linear}" for block in range(layers) for linear in ("up", "down")}
    assert f"blocks.*.ffn.up ({layers})" in said, "the table is missing"


def test_train_gpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A short run on the CPU, of a smaller shape than the program offers."""
    shape, config = train_gpt.PRESETS["tiny"]
    smaller = replace(shape, layers=2, heads=2, width=64, context=32), replace(config, validation_batches=2)
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", smaller)
    train_gpt.main([*ARGUMENTS, str(tmp_path / "run.json")])
    check(capsys.readouterr().out, json.loads((tmp_path / "run.json").read_text()), layers=2)


def test_train_gpt_is_a_program(tmp_path: Path) -> None:
    done = warm.python(REPOSITORY / "examples" / "train_gpt.py", "--help", cwd=tmp_path, env=ENVIRONMENT, check=True)
    assert "Train a small GPT twice" in done.stdout


@pytest.mark.nightly
def test_train_gpt_as_it_is(tmp_path: Path) -> None:
    command = [REPOSITORY / "examples" / "train_gpt.py", *ARGUMENTS, tmp_path / "run.json"]
    done = warm.python(*command, cwd=tmp_path, env=ENVIRONMENT, check=True)
    check(done.stdout, json.loads((tmp_path / "run.json").read_text()), layers=4)


@pytest.mark.nightly
def test_the_report_of_one_run(tmp_path: Path) -> None:
    """As CONTRIBUTING.md makes the picture in README.md, but for sizes and device."""
    command = (REPOSITORY / "CONTRIBUTING.md").read_text().partition("python -m sparse_compile --report")[2]
    arguments = shlex.split(command.partition("\n    python")[0].replace("\\\n", ""))
    assert arguments[0] == "report.json"
    assert arguments[arguments.index("--preset") + 1] == "wide"
    report_file = tmp_path / "report.json"
    sizes = ["--device", "cpu", "--preset", "tiny", "--steps", "12", "--when", "always"]  # a CPU would run dense
    command = ["-m", "sparse_compile", "--report", report_file, *arguments[1:], *sizes]
    warm.python(*command, cwd=REPOSITORY, env=ENVIRONMENT, check=True)
    report = Report.from_json(report_file.read_text())
    assert report.graphs[0].measured is not None
    assert report.dense_step_ms() is not None
    assert len(report.health) == 8
    assert all(samples[-1].noise for samples in report.health.values())
