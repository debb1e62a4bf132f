"""What the benchmark programs share: runs side by side, and files of results."""

import json
import os
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "provenance", lambda: {"device": "none"})


def test_inputs_that_take_turns_exceed_the_cache() -> None:
    for size in (1000, 10**6, 10**8):
        total = harness.set_count(size) * size
        assert 200 * 2**20 <= total < 200 * 2**20 + size
    assert harness.set_count(10**9) == 2


@pytest.mark.nightly
def test_runs_side_by_side_have_a_process_each_and_take_turns_on_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    # One after the other: what the first process was given, a second one alone can differ from.
    seen = list(harness.side_by_side(os.getenv, [("CUDA_VISIBLE_DEVICES",), ("CUDA_VISIBLE_DEVICES",)], 1))
    assert seen == ["3", "GPU-5"]
    runs = harness.side_by_side(divmod, [(1, 0), (7, 2)], 1)
    assert next(runs) == (3, 1), "a run that fails does not cost the others"
    with pytest.raises(ZeroDivisionError):
        next(runs)


def test_runs_that_share_a_gpu_train_one_at_a_time(tmp_path: Path) -> None:
    forked = get_context("fork")
    events, started = forked.SimpleQueue(), forked.Value("i", 0)

    def run() -> None:
        harness._choose_gpu(started, ["3"], str(tmp_path))
        harness.take_gpu()
        events.put("begins")
        time.sleep(0.1)
        events.put("ends")

    runs = [forked.Process(target=run) for _ in range(3)]
    for process in runs:
        process.start()
    for process in runs:
        process.join()
    assert [events.get() for _ in range(6)] == ["begins", "ends"] * 3


@pytest.mark.usefixtures("nowhere")
def test_parts_are_written_side_by_side(tmp_path: Path) -> None:
    for part in ("first", "second"):
        harness.write("program", part, {"rows": [part]}, f"table of {part}", tmp_path)
    assert harness.earlier("program", "first", tmp_path)["rows"] == ["first"]
    page = (tmp_path / "program.md").read_text()
    assert page.index("table of first") < page.index("table of second")


@pytest.mark.usefixtures("nowhere")
def test_a_run_replaces_the_one_before_it_on_such_a_device_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for device, rows in (("CPU", 1), ("NVIDIA H200", 2), ("CPU", 3)):
        monkeypatch.setattr(harness, "_device", lambda device=device: {"device": device})
        harness.write("program", "part", {"rows": rows}, "", tmp_path)
    found = json.loads((tmp_path / "program.json").read_text())
    assert {title: part["rows"] for title, part in found.items()} == {"part, CPU": 3, "part, NVIDIA H200": 2}
    assert harness.earlier("program", "part", tmp_path)["rows"] == 3
    assert harness.earlier("program", "another part", tmp_path) == harness.earlier("none", "part", tmp_path) == {}


@pytest.mark.usefixtures("nowhere")
def test_a_list_of_numbers_takes_one_line(tmp_path: Path) -> None:
    results = {"losses": [2.5, -1e-05, 3], "rows": [{"command": "[\n 1 ]"}], "failed": [], "unknown": [float("nan"), 1]}
    harness.write("program", "part", results, "", tmp_path)
    text = (tmp_path / "program.json").read_text()
    assert "[ 2.5, -1e-05, 3 ]" in text
    (kept,) = json.loads(text).values()
    assert [kept[key] for key in ("losses", "rows", "failed")] == [results[key] for key in ("losses", "rows", "failed")]
    assert kept["unknown"][1] == 1
