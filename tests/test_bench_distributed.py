"""bench_distributed on two processes without GPUs, and its check of curves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bench_distributed


@pytest.mark.nightly
def test_two_processes_measure(tmp_path: Path) -> None:
    """On CPUs, with two small layers."""
    root = Path(__file__).parents[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [str(root / "benchmarks/bench_distributed.py"), "--tiny", "--rounds=2", "--out=."]
    paths = f"{root}:{os.environ.get('PYTHONPATH', '')}"
    # Without GPUs, wherever this runs.
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, *program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500
    )
    results = tmp_path / "bench_distributed.json"
    assert results.exists(), done.stderr[-4000:]
    rows = json.loads(results.read_text())["2 processes, CPU"]["rows"]
    assert [(row["parallelism"], row["kind"]) for row in rows] == [
        ("DDP", "bf16"), ("DDP", "sste"), ("FSDP2", "bf16"), ("FSDP2", "sste")
    ]  # fmt: skip
    # FSDP2's two layers share a graph.
    assert [row["sparse"] for row in rows] == [0, 6, 0, 3]
    assert all(row["speedup"] == 1.0 for row in rows if row["kind"] == "bf16")
    assert all(row["losses"][-1] < row["losses"][0] for row in rows)


@pytest.mark.parametrize("curve", [[10.0, 9.7], [10.0, float("nan")], [10.2, 8.0], [9.8, 8.0]])
def test_another_curve_ends_the_measurement(curve: list[float]) -> None:
    curves = {"DDP, bf16": [10.0, 8.0], "DDP, sste": curve}
    with pytest.raises(SystemExit, match=r"FAILED: losses are \[10.0, 8.0\] in DDP, bf16, .* in DDP, sste"):
        bench_distributed.require_alike(curves)
    bench_distributed.require_alike({**curves, "DDP, sste": [10.05, 9.0]})
