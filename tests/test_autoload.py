"""SPARSE_COMPILE: what the variable may say.  What it does where the package is installed: ``test_packaging.py``."""

import subprocess
import sys

import pytest

from sparse_compile.autoload import autoload


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SPARSE_COMPILE": "0"},
            "SPARSE_COMPILE is '0'; allowed are 1, by which .* and auto, .*; unset it",
        ),
        ({"SPARSE_COMPILE": ""}, "SPARSE_COMPILE is ''; allowed are 1"),
        ({"SPARSE_COMPILE_REPORT": "r.json"}, "SPARSE_COMPILE_REPORT is 'r.json', but SPARSE_COMPILE is not set"),
        (
            {"SPARSE_COMPILE": "1", "SPARSE_COMPILE_REPORT": "no/r.json"},
            "REPORT: there is no folder 'no'",
        ),
        (
            {"SPARSE_COMPILE": "1", "SPARSE_COMPILE_REPORT": "r.xml"},
            "SPARSE_COMPILE_REPORT: the report's file 'r.xml' must end in .txt or .json or .html",
        ),
    ],
)
def test_other_values_are_explained(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        autoload()


def test_together_with_the_launcher_it_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_COMPILE", "1")
    command = [sys.executable, "-m", "sparse_compile", __file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "SPARSE_COMPILE is set, which does without this launcher" in done.stderr
