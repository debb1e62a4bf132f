"""The programs in examples/ run as README.md says."""

import json
import math
import os
import shlex
from pathlib import Path

import pytest

import warm
from sparse_compile.reporting.report import Report

REPOSITORY = Path(__file__).parent.parent


def test_train_gpt(tmp_path: Path) -> None:
    """A short run on the CPU: both losses fall, and the output says what was emulated and what was rewritten."""
    result_file = tmp_path / "run.json"
    command = [REPOSITORY / "examples" / "train_gpt.py", "--device", "cpu", "--preset", "tiny", "--steps", "12"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = warm.python(*command, "--out", result_file, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "emulated" in done.stdout
    assert "tokens per second" in done.stdout

    result = json.loads(result_file.read_text())
    assert result["emulated"] is not None
    assert set(result["runs"]) == {"dense", "sste"}
    for run in result["runs"].values():
        assert all(math.isfinite(loss) for loss in [*run["losses"], run["validation_loss"]])
        assert run["losses"][-1] < run["losses"][0] - 1.0
        assert run["validation_loss"] < run["losses"][0] - 1.0
    assert result["runs"]["sste"]["losses"] != result["runs"]["dense"]["losses"]

    rows = [row for graph in result["report"]["graphs"] for row in graph["rows"]]
    sparse = {row["module"] for row in rows if "2:4" in row["decision"]}
    assert sparse == {f"blocks.{block}.ffn.{linear}" for block in range(4) for linear in ("up", "down")}
    assert "blocks.*.ffn.up (4)" in done.stdout, "the table is missing"


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
    warm.python(*command, cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True)
    report = Report.from_json(report_file.read_text())
    assert report.graphs[0].measured is not None
    assert report.dense_step_ms() is not None
    assert len(report.health) == 8
    assert all(samples[-1].noise for samples in report.health.values())
