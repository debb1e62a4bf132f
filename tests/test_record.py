"""The report of a process that is one of several: who writes which file."""

import json
import os
from pathlib import Path

import pytest

import warm

ROOT = Path(__file__).parents[1]
# Each process has a linear of its own width, by which its report is known.  The rewritten graph runs as it is.
SCRIPT = """
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from sparse_compile import backend

backend.compile_graph = lambda graph, *args, **named: graph.forward


def train(rank, start, grouped):
    if grouped:
        dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=2)
    features = 64 * (rank + 1)
    ffn = nn.Sequential(nn.Linear(64, features), nn.ReLU(), nn.Linear(features, 64))
    options = {"sste.executor": "eager", "sste.when": "always", "sste.report": "report.json"}
    torch.compile(lambda x: ffn(x), backend="sste", options=options)(torch.randn(8, 64)).sum().backward()
    if grouped:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    start, grouped = sys.argv[1], sys.argv[2] == "grouped"
    mp.start_processes(train, (start, grouped), nprocs=2, start_method=start)
"""


def run(folder: Path, *arguments: str) -> dict[str, int]:
    """The files that were written, and the out_features of the first linear in them."""
    (folder / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = warm.python("train.py", *arguments, str(folder / "group"), cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert "linears rewritten" not in done.stderr
    reports = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {name: report["graphs"][0]["rows"][0]["out_features"] for name, report in reports.items()}


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.nightly)])
def test_of_a_group_the_first_writes(tmp_path: Path, start: str) -> None:
    """Its group is gone when the process ends."""
    assert run(tmp_path, start, "grouped") == {"report.json": 64}


@pytest.mark.parametrize(
    ("start", "name"), [("fork", "ForkProcess"), pytest.param("spawn", "SpawnProcess", marks=pytest.mark.nightly)]
)
def test_processes_of_their_own_write_a_file_each(tmp_path: Path, start: str, name: str) -> None:
    assert run(tmp_path, start, "single") == {f"report-{name}-1.json": 64, f"report-{name}-2.json": 128}


def test_to_stderr_the_first_alone_writes(tmp_path: Path) -> None:
    """Where no file is asked for."""
    script = SCRIPT.replace(', "sste.report": "report.json"', "")
    (tmp_path / "train.py").write_text(script.partition("    mp.start_processes")[0] + '    train(0, "", grouped)\n')
    for rank in ("0", "1"):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": rank}
        done = warm.python("train.py", "", "single", cwd=tmp_path, env=environment, check=True)
        assert ("2 of 2 linears rewritten" in done.stderr) == (rank == "0")
