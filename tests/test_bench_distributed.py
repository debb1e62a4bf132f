"""bench_distributed on processes without GPUs, and what it makes of their rows."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_distributed
import distributed_worker


@pytest.mark.nightly
@pytest.mark.parametrize("processes", [(1, 2), (1, 4, 8)], ids=str)
@pytest.mark.timeout(1800)
def test_processes_measure(tmp_path: Path, processes: tuple[int, ...]) -> None:
    """On CPUs, with two small layers; that losses and betas agree, the program requires."""
    root = Path(__file__).parents[1]
    program = [str(root / "benchmarks/bench_distributed.py"), "--tiny", "--rounds=2", "--kinds", "sste", "--out=."]
    paths = f"{root}:{os.environ.get('PYTHONPATH', '')}"
    # Without GPUs, wherever this runs.
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *program, "--gpus", *map(str, processes)],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "bench_distributed.json").read_text())
    rows = results[f"up to {processes[-1]} processes, CPU"]["rows"]
    assert [(row["processes"], row["parallelism"], row["kind"]) for row in rows] == [
        (count, parallelism, kind)
        for parallelism in ("DDP", "FSDP2")
        for count in processes
        for kind in ("bf16", "sste")
    ]  # fmt: skip
    for row in rows:
        # FSDP2's two layers share a graph.
        sparse = {"bf16": 0, "sste": 6 if row["parallelism"] == "DDP" else 3}
        assert row["sparse"] == sparse[row["kind"]]
        assert row["betas"] == (6 if row["kind"] == "sste" else 0)
        assert row["losses"][-1] < row["losses"][0]
        assert row["profile"]["busy"] > row["profile"]["communication"] > 0
        assert row["host_ms"] > 0
        assert row["kind"] != "bf16" or row["speedup"] == 1.0
        assert row["processes"] != 1 or row["efficiency"] == row["speedup_kept"] == 1.0
    page = (tmp_path / "bench_distributed.html").read_text()
    assert page.count("<polyline") == 4 * (1 + len(processes)), "a curve of each candidate, and its dots"


def row(**fields: Any) -> dict[str, Any]:
    return {
        "model": "tiny", "parallelism": "DDP", "kind": "bf16", "processes": 1, "losses": [10.0, *[9.0] * 9],
        "ms": {"median": 10.0, "low": 9.0, "high": 11.0}, "peak_gib": None, "host_ms": 5.0,
        "profile": {"communication": 4.0, "communication alone": 1.0, "busy": 9.0}, "sparse": 0, "linears": 0, **fields,
    }  # fmt: skip


def milliseconds(median: float) -> dict[str, float]:
    return {"median": median, "low": median, "high": median}


def test_scaling_is_of_the_same_candidate_on_one() -> None:
    rows = [
        row(),
        row(kind="sste", ms=milliseconds(8.0)),
        row(processes=4, ms=milliseconds(12.5)),
        row(processes=4, kind="sste", ms=milliseconds(12.5)),
    ]
    bench_distributed.compare(rows)
    assert [found["speedup"] for found in rows] == [1.0, 1.25, 1.0, 1.0]
    assert [found["efficiency"] for found in rows] == [1.0, 1.0, 0.8, 0.64]
    assert [found["speedup_kept"] for found in rows] == [1.0, 1.0, 1.0, 0.8]
    lines = bench_distributed.table(rows).splitlines()
    assert "efficiency" in lines[0]
    assert " 0.640 " in lines[-1]
    assert " 32.0% " in lines[-1], "communication is 4 of 12.5 ms"
    assert "tiny, DDP, sste: 0.640" in bench_distributed.plot(rows)


def test_what_runs_at_the_same_time_counts_once() -> None:
    assert distributed_worker.covered([(3.0, 5.0), (0.0, 2.0), (1.0, 4.0), (7.0, 8.0), (7.2, 7.5)]) == 6.0
    assert distributed_worker.covered([]) == 0.0


@pytest.mark.parametrize(
    "losses", [[10.1, *[9.0] * 9], [10.0, *[9.0] * 8, 9.5], [10.0, *[9.0] * 8, math.nan]], ids=["first", "last", "NaN"]
)
def test_other_losses_than_those_of_one_process_end_the_measurement(losses: list[float]) -> None:
    one = row(expected={"1": row()["losses"], "2": [10.01, *[8.9] * 9]})
    bench_distributed.require_those_of_one([one, row(processes=2)])
    with pytest.raises(SystemExit, match=r"FAILED: losses of tiny, DDP, bf16 on 2 are .*, of one process \[10.01, "):
        bench_distributed.require_those_of_one([one, row(processes=2, losses=losses)])


@pytest.mark.parametrize("curve", [[10.0, 9.7], [10.0, float("nan")], [10.2, 8.0], [9.8, 8.0]])
def test_another_curve_ends_the_measurement(curve: list[float]) -> None:
    curves = {"DDP, bf16": [10.0, 8.0], "DDP, sste": curve}
    with pytest.raises(SystemExit, match=r"FAILED: losses are \[10.0, 8.0\] in DDP, bf16, .* in DDP, sste"):
        bench_distributed.require_alike(curves)
    bench_distributed.require_alike({**curves, "DDP, sste": [10.05, 9.0]})
