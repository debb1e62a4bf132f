"""The programs in examples/ run as README.md says."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent


def test_train_gpt(tmp_path: Path) -> None:
    """A short run on the CPU: both losses fall, and the output says what was emulated and what was rewritten."""
    result_file = tmp_path / "run.json"
    command = [sys.executable, REPOSITORY / "examples" / "train_gpt.py", "--device", "cpu", "--preset", "tiny"]
    done = subprocess.run(
        [*map(str, command), "--steps", "12", "--out", str(result_file)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
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
