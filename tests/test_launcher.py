"""``python -m sparse_compile``: a script that knows nothing of the backend runs through it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import warm

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys

import torch
from torch import nn
from helper import NAME  # lies beside the script



class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


assert __name__ == "__main__"
print("arguments", sys.argv[1:], NAME)
model = Net()
compile = {COMPILE}
step = compile(model)
step(torch.randn(8, 64)).sum().backward()
print("gradients", all(parameter.grad is not None for parameter in model.parameters()))
sys.exit(3)
"""
# The option is accepted by this backend alone; it also saves compiling C++.
OURS = 'options={"sste.executor": "eager", "sste.when": "always"}'


def launch(
    folder: Path, compile: str, *arguments: str, run: Callable[..., Any] = warm.python, **environment: str
) -> "subprocess.CompletedProcess[str]":
    (folder / "scripts").mkdir()
    (folder / "scripts/train.py").write_text(SCRIPT.replace("{COMPILE}", compile))
    (folder / "scripts/helper.py").write_text("NAME = 'helper'\n")
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "scripts") if "-m" in arguments else ""])}
    return run("-m", "sparse_compile", *arguments, cwd=folder, env={**os.environ, **paths, **environment})


@pytest.mark.parametrize(
    "compile",
    [
        f"lambda model: torch.compile(model, {OURS})",
        f'lambda model: torch.compile(model, backend="inductor", {OURS})',
        f"torch.compile({OURS})",
        f"lambda model: (model.compile({OURS}), model)[1]",
    ],
    ids=["no backend", "inductor", "decorator", "method"],
)
def test_torch_compile_means_this_backend(tmp_path: Path, compile: str) -> None:
    done = launch(tmp_path, compile, "--report", "report.json", "scripts/train.py", "--lr", "1", "-m")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == ["arguments ['--lr', '1', '-m'] helper", "gradients True"]
    (graph,) = json.loads((tmp_path / "report.json").read_text())["graphs"]
    assert [row["decision"].split()[0] for row in graph["rows"]] == ["s-ste", "s-ste"]
    assert "linears rewritten" not in done.stderr, "the report is in its file"


def alone(*arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    """In a process that imports torch itself."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **more)


@pytest.mark.parametrize("run", [alone, warm.python], ids=["alone", "warm"])
def test_a_module_and_a_report_as_a_table(tmp_path: Path, run: Callable[..., Any]) -> None:
    compile = f"lambda model: torch.compile(model, {OURS})"
    done = launch(tmp_path, compile, "--report", "report.txt", "-m", "train", "x", run=run)
    assert done.returncode == 3, done.stderr
    assert "arguments ['x'] helper" in done.stdout
    assert "2 of 2 linears rewritten" in (tmp_path / "report.txt").read_text()


def test_auto_compiles_a_model_that_the_script_does_not(tmp_path: Path) -> None:
    """With the options of the command line; and the report finds its file though the script changes the folder."""
    options = ["--auto", "--option", "sste.executor=eager", "--option", "sste.when=always", "--report", "report.json"]
    options += ["--option", "sste.recipe=fp8"]
    options += ["--option", "sste.health=1", "--option", "sste.tune=false", "--option", "sste.report=report.html"]
    done = launch(tmp_path, "lambda model: (__import__('os').chdir('/'), model)[1]", *options, "scripts/train.py")
    assert done.returncode == 3, done.stderr
    assert done.stderr == "sparse_compile: compiles Net (33,088 parameters) with backend 'sste'\n"
    (graph,) = json.loads((tmp_path / "report.json").read_text())["graphs"]
    assert [row["decision"].split()[0] for row in graph["rows"]] == ["fp8", "fp8"]
    assert "2 of 2 linears rewritten" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "compile", "reason"),
    [
        ((), "lambda model: model", "the script calls neither torch.compile nor Module.compile; `python -m sparse_com"),
        ((), 'lambda model: torch.compile(model, backend="eager")', "other backends alone, which stay: eager"),
        (
            ("--auto",),
            "lambda model: model.requires_grad_(False)(torch.ones(8, 64)) is None or exit(3)",
            "no module wi",
        ),
        ((), "lambda model: [torch.compile(model), exit(3)]", "was never called with a graph to trace"),
    ],
    ids=["no call", "another backend", "nothing to train", "no graph"],
)
def test_that_nothing_was_compiled_is_said(
    tmp_path: Path, arguments: tuple[str, ...], compile: str, reason: str
) -> None:
    done = launch(tmp_path, compile, *arguments, "scripts/train.py")
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("sparse_compile: nothing was compiled with backend 'sste' in this process: ")
    assert reason in done.stderr


def test_of_several_processes_the_first_writes(tmp_path: Path) -> None:
    done = launch(
        tmp_path, f"lambda model: torch.compile(model, {OURS})", "--report", "r.txt", "scripts/train.py", RANK="1"
    )
    assert done.returncode == 3, done.stderr
    assert not (tmp_path / "r.txt").exists()
    assert "linears rewritten" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.py",), "there is no file 'nothing.py'; for a module, say -m nothing.py"),
        (("--report", "no/folder/r.txt", "scripts/train.py"), "there is no folder 'no/folder' for the report's file"),
        (("--report", "r.xml", "scripts/train.py"), "'r.xml' must end in .txt or .json or .html"),
        ((), "the following arguments are required: SCRIPT"),
        (("--option", "recipe=fp8", "scripts/train.py"), "'recipe=fp8' is not of the form sste.NAME=VALUE"),
        (("--option", "sste.recipe=fp9", "scripts/train.py"), "option 'sste.recipe' is 'fp9'; did you mean 'fp8'?"),
        (("--option", "sste.health=-1", "scripts/train.py"), "option 'sste.health' is '-1'; allowed is a number"),
        (("--option", "sste.report=r.xml", "scripts/train.py"), "'r.xml' must end in .txt or .json or .html"),
    ],
    ids=["script", "folder", "format", "none", "form", "option", "number", "report option"],
)
def test_wrong_arguments_are_explained(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = launch(tmp_path, "torch.compile", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
