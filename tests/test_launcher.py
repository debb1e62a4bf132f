"""``python -m sparse_compile``: a script that knows nothing of the backend runs through it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
OURS = 'options={"sste.executor": "eager"}'


def launch(folder: Path, compile: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "scripts").mkdir()
    (folder / "scripts/train.py").write_text(SCRIPT.replace("{COMPILE}", compile))
    (folder / "scripts/helper.py").write_text("NAME = 'helper'\n")
    command = [sys.executable, "-m", "sparse_compile", *arguments]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "scripts") if "-m" in arguments else ""])}
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=300
    )


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


def test_other_backends_stay(tmp_path: Path) -> None:
    done = launch(tmp_path, 'lambda model: torch.compile(model, backend="eager")', "scripts/train.py")
    assert done.returncode == 3, done.stderr
    assert "linears rewritten" not in done.stderr


def test_a_module_and_a_report_as_a_table(tmp_path: Path) -> None:
    compile = f"lambda model: torch.compile(model, {OURS})"
    done = launch(tmp_path, compile, "--report", "report.txt", "-m", "train", "x")
    assert done.returncode == 3, done.stderr
    assert "arguments ['x'] helper" in done.stdout
    assert "2 of 2 linears rewritten" in (tmp_path / "report.txt").read_text()


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
        (("--report", "no/folder/r.txt", "scripts/train.py"), "there is no folder 'no/folder' for the report"),
        ((), "the following arguments are required: SCRIPT"),
    ],
    ids=["script", "report", "none"],
)
def test_wrong_arguments_are_explained(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = launch(tmp_path, "torch.compile", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
