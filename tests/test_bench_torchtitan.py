"""bench_torchtitan without torchtitan: its reading of logs, what it refuses, its table."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_torchtitan

LINE = (
    "[titan] 2026-11-29 11:12:40,980 - root - INFO - step: {0:2}  loss:  {1}  grad_norm:  2.0109  "
    "memory: {2}GiB(12.00%)  tps: {3:,}  tflops: 1.00  mfu: 3.00%\n"
)


def row(kind: str, losses: list[float], rewritten: list[int] | None = None) -> dict[str, Any]:
    return {
        "flavor": "1B", "kind": kind, "losses": losses, "tokens_per_second": 2000.0 if rewritten else 1000.0,
        "reserved_gib": 3.0, "rewritten": rewritten,
    }  # fmt: skip


def test_the_speed_is_that_of_steps_that_compile_no_more() -> None:
    text = "noise\n" + "".join(
        LINE.format(step, f"{8 - step / 10:.5f}", 1.5 + step, 10 if step <= 5 else 1000 * step) for step in range(1, 9)
    )
    read = bench_torchtitan.read_log(text)
    assert read["losses"] == pytest.approx([8 - step / 10 for step in range(1, 9)])
    assert read["tokens_per_second"] == 7000
    assert read["reserved_gib"] == 9.5


@pytest.mark.parametrize(
    ("losses", "rewritten", "problem"),
    [
        ([8.0, 7.0, 7.0, 7.0, 7.0, 7.0], [7, 7], ""),
        ([8.1, 7.0, 7.0, 7.0, 7.0, 7.0], [7, 7], "the first loss is 8.1000, not 8.0000"),
        ([8.0, 7.0, 7.0, 7.0, 7.0, float("nan")], [7, 7], "the mean of the last 5 is nan, not 7.0000"),
        ([8.0, 7.3, 7.3, 7.3, 7.3, 7.0], [7, 7], "the mean of the last 5 is 7.2400, not 7.0000"),
        ([8.0, 7.0, 7.0, 7.0, 7.0, 7.9], [7, 7], ""),
        ([8.0, 7.0, 7.0, 7.0, 7.0, 7.0], [0, 7], "no linear is rewritten"),
    ],
)
def test_what_is_wrong(losses: list[float], rewritten: list[int], problem: str) -> None:
    problems = bench_torchtitan.wrong(row("inductor", [8.0, *[7.0] * 5]), row("sste", losses, rewritten))
    assert [text.removeprefix("1B, sste: ") for text in problems] == ([problem] if problem else [])


def test_linears_are_counted_by_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    decisions = ["s-ste (2:4 fp8, fp8, 2:4 fp8)", "dense"], ["fp8 (fp8, fp8, fp8)"]
    graphs = [{"rows": [{"decision": decision} for decision in of_graph]} for of_graph in decisions]
    report.write_text(json.dumps({"graphs": graphs}))
    assert bench_torchtitan.rewritten(report) == [2, 3]


def test_the_table_compares_with_inductor() -> None:
    table = bench_torchtitan.table([row("inductor", [8.0, 7.0]), row("sste", [8.0, *[7.2, 7.0] * 3], [7, 8])])
    cells = [cell.strip() for cell in table.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["1B", "sste", "8.0000", "7.0800", "2,000", "2.000", "3.0", "7/8"]
