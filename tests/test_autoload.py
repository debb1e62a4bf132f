"""SPARSE_COMPILE: what the variable may say.  What it does where the package is installed: ``test_packaging.py``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import warm
from sparse_compile.launcher.autoload import autoload

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SPARSE_COMPILE": "0"},
            "SPARSE_COMPILE is '0'; allowed are 1 (torch.compile uses backend 'sste') and auto (models that the ",
        ),
        ({"SPARSE_COMPILE": ""}, "SPARSE_COMPILE is ''; allowed are 1"),
        (
            {"SPARSE_COMPILE": "yes", "SPARSE_COMPILE_REPORT": "no/r.json"},
            "REPORT: there is no folder 'no' for the report file 'no/r.json'; create it first",
        ),
        (
            {"SPARSE_COMPILE_REPORT": "r.xml"},
            "SPARSE_COMPILE_REPORT: the report file 'r.xml' must end in .txt or .json or .html",
        ),
        ({"SPARSE_COMPILE_REPORT": ""}, "SPARSE_COMPILE_REPORT: the report file '.' must end in .txt"),
        ({"SPARSE_COMPILE_REPORT": "folder.txt"}, "'folder.txt' cannot be written; choose another"),
        ({"SPARSE_COMPILE_REPORT": "read_only/r.txt"}, "'read_only/r.txt' cannot be written"),
        ({"SPARSE_COMPILE_REPORT": "read_only.txt"}, "'read_only.txt' cannot be written"),
        ({"SPARSE_COMPILE_REPORT": f"{'x' * 5000}/r.txt"}, "there is no folder 'xxx"),
        ({"SPARSE_COMPILE_REPORT": "a file/r.txt"}, "there is no folder 'a file'"),
    ],
)
def test_other_values_are_explained_and_count_as_unset(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    variables: dict[str, str],
    message: str,
) -> None:
    """On stderr: what raises here makes ``import torch`` fail, in every process."""
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "read_only").mkdir()
    (tmp_path / "read_only.txt").touch()
    (tmp_path / "a file").touch()
    monkeypatch.chdir(tmp_path)
    # Root may write everywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).startswith("read_only"))
    for name in ("SPARSE_COMPILE", "SPARSE_COMPILE_REPORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    autoload()
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("sparse_compile: SPARSE_COMPILE")
    assert said.count("\n") == len(variables)


COMPILED = """
import warnings
import torch
warnings.simplefilter("error", UserWarning)
from sparse_compile.launcher.autoload import autoload
autoload()
ffn = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
if {compiles}:
    torch.compile(ffn, backend="sste", options={{"sste.executor": "eager", "sste.when": "always"}})(torch.ones(8, 64))
{then}
"""


def run(folder: Path, *, compiles: bool = True, then: str = "", **variables: str) -> "subprocess.CompletedProcess[str]":
    command = ["-c", COMPILED.format(compiles=compiles, then=then)]
    without = {name: value for name, value in os.environ.items() if not name.startswith("SPARSE_COMPILE")}
    environment = {**without, "PYTHONPATH": str(ROOT), **variables}
    return warm.python(*command, cwd=folder, env=environment)


def test_the_report_alone_is_that_of_a_script_that_uses_the_backend_itself(tmp_path: Path) -> None:
    done = run(tmp_path, then="import os; os.chdir('/')", SPARSE_COMPILE_REPORT="report.txt")
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 of 2 linears rewritten" in (tmp_path / "report.txt").read_text()
    (tmp_path / "report.txt").unlink()
    done = run(tmp_path, compiles=False, SPARSE_COMPILE_REPORT="report.txt")
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir()), "there is nothing to say"


def test_a_report_that_cannot_be_written_at_the_end_goes_to_stderr(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = run(tmp_path, then="import os; os.rmdir('folder')", SPARSE_COMPILE_REPORT="folder/r.txt", RANK="none")
    assert done.returncode == 0
    assert done.stderr.startswith(f"sparse_compile: {tmp_path}/folder/r.txt was not written: there is no folder")
    assert "2 of 2 linears rewritten" in done.stderr


def test_together_with_the_launcher_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_COMPILE", "1")
    command = [sys.executable, "-m", "sparse_compile", __file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "SPARSE_COMPILE is set and already enables the backend" in done.stderr
