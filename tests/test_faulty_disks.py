"""What is wrong with a disk costs time, or a report, not the run."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch

import warm
from sparse_compile.kernels.timing import gpu_times


@pytest.fixture(autouse=True)
def unwritten(monkeypatch):
    """Of a process that has just begun."""
    monkeypatch.setattr(gpu_times, "_unwritten", {})


def read(path: Path) -> dict[str, float] | None:
    return gpu_times.kept(path, dict[str, float])


def test_what_is_kept_is_read_by_others(tmp_path):
    path = tmp_path / "cache" / "linear" / "shape.json"
    assert read(path) is None
    gpu_times.keep(path, {"copy": 4.0})
    assert read(path) == json.loads(path.read_text()) == {"copy": 4.0}
    assert gpu_times._unwritten == {}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    first, second = (tmp_path / "file" / "linear" / name for name in ("a.json", "b.json"))
    with pytest.warns(UserWarning, match=r"file/linear can't be written \(.*set SPARSE_COMPILE_CACHE_DIR to another"):
        gpu_times.keep(first, {"copy": 4.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        gpu_times.keep(second, {"copy": 5.0})
    assert (read(first), read(second)) == ({"copy": 4.0}, {"copy": 5.0}), "this process need not measure again"


@pytest.mark.parametrize("call", ["write_bytes", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call):
    path = tmp_path / "shape.json"
    gpu_times.keep(path, {"copy": 3.0})

    def full(first, *rest):
        if call == "write_bytes":
            with open(first, "wb") as half:
                half.write(b"{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((Path, "write_bytes", full) if call == "write_bytes" else (os, "replace", full)))
    with pytest.warns(UserWarning, match="No space left on device"):
        gpu_times.keep(path, {"copy": 4.0})
    assert read(path) == {"copy": 4.0}
    assert [json.loads(file.read_text()) for file in tmp_path.iterdir()] == [{"copy": 3.0}]


@pytest.mark.parametrize("held", [b"", b"[]", b'{"copy": "fast"}', b'{"copy": 4.0', b"\xff\x00", b'{"copy": {}}'])
def test_truncated_and_foreign_files_are_measured_again(tmp_path, held):
    path = tmp_path / "shape.json"
    path.write_bytes(held)
    with pytest.warns(UserWarning, match=r"shape.json is damaged \(.*\) and ignored"):
        assert read(path) is None
    gpu_times.keep(path, {"copy": 4.0})
    assert read(path) == {"copy": 4.0}


def test_a_path_that_is_a_folder(tmp_path):
    (tmp_path / "shape.json").mkdir()
    assert read(tmp_path / "shape.json") is None
    with pytest.warns(UserWarning, match="can't be written"):
        gpu_times.keep(tmp_path / "shape.json", {"copy": 4.0})
    assert read(tmp_path / "shape.json") == {"copy": 4.0}


def test_many_that_write_at_once_leave_what_one_of_them_wrote(tmp_path):
    path = tmp_path / "shape.json"
    with ThreadPool(8) as threads:
        found = threads.map(lambda index: (gpu_times.keep(path, {"copy": float(index)}), read(path))[1], range(200))
    assert all(times is not None and set(times) == {"copy"} for times in found)
    assert list(tmp_path.iterdir()) == [path]


def test_processes_that_write_at_once(tmp_path):
    """Eight of them, of which each reads what one has written whole, though nothing can be locked."""
    path = tmp_path / "shape.json"
    many = dict.fromkeys(map(str, range(500)), 1.0)
    children = []
    for index in range(8):
        children.append(os.fork())
        if children[-1] == 0:
            wrong = 1
            with contextlib.suppress(Exception):
                fcntl.flock = fcntl.lockf = fcntl.fcntl = no_locks
                for number in range(20):
                    gpu_times.keep(path, many | {f"{index}, {number}": 1.0})
                    wrong = int(len(gpu_times.kept(path, dict[str, float])) != 501)
                    if wrong:
                        break
            os._exit(wrong)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    assert list(tmp_path.iterdir()) == [path]


def no_locks(*_: object) -> None:
    """As some network file systems answer."""
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_of_each_device_and_version_what_was_measured_there(tmp_path, monkeypatch):
    """What another GPU, PyTorch, Triton or another state of the kernels left there is not read."""
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path))
    device = torch.device("cuda", 0)
    here = {"device": "NVIDIA H200", "torch": "2.13.0", "triton": "3.7.0", "sources": b"a"}

    def path_of(**other):
        found = here | other
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: found["device"])
        monkeypatch.setattr(torch, "__version__", found["torch"])
        monkeypatch.setattr(gpu_times, "version", lambda _: found["triton"])
        monkeypatch.setattr(gpu_times, "sha256", lambda _: hashlib.sha256(found["sources"]))
        gpu_times.folder.cache_clear()
        return gpu_times.path_of("linear", "shape", device)

    try:
        gpu_times.keep(path_of(), {"copy": 3.0})
        for other in ({"device": "NVIDIA H100"}, {"torch": "2.12.0"}, {"triton": "3.6.0"}, {"sources": b"b"}):
            assert read(path_of(**other)) is None
            gpu_times.keep(path_of(**other), {"copy": 4.0})
        assert read(path_of()) == {"copy": 3.0}
    finally:
        gpu_times.folder.cache_clear()


def test_a_report_that_cannot_be_written_at_the_end(tmp_path):
    """The folder is there when training begins."""
    folder = tmp_path / "reports"
    folder.mkdir()
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import shutil
import torch

model = torch.nn.Linear(64, 64)
options = {{"sste.executor": "eager", "sste.when": "always", "sste.report": {str(folder / "report.json")!r}}}
torch.compile(model, backend="sste", options=options)(torch.randn(16, 64)).sum().backward()
shutil.rmtree({str(folder)!r})
print("trained")
"""
    )
    done = warm.python(script, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "trained\n")
    assert f"sparse_compile: {folder / 'report.json'} was not written: " in done.stderr
    assert "graph 0: 1 of 1 linears rewritten" in done.stderr
