"""``python -m sparse_compile``: a script that knows nothing of the backend runs through it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import warm
from sparse_compile.__main__ import main
from sparse_compile.options import UserOptions
from sparse_compile.reporting.report import Report

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
for compile in ({COMPILE},):
    torch._dynamo.reset()
    model = Net()
    step = compile(model)
    step(torch.randn(8, 64)).sum().backward()
    print("gradients", all(parameter.grad is not None for parameter in model.parameters()))
sys.exit(3)
"""
# Rewritten graphs run as they are, which saves compiling them.
HELPER = """
from sparse_compile import backend
backend.compile_graph = lambda graph, *args, **named: graph.forward
NAME = "helper"
"""
# The option is accepted by this backend alone.
OURS = 'options={"sste.executor": "eager", "sste.when": "always"}'


def launch(
    folder: Path, compile: str, *arguments: str, run: Callable[..., Any] = warm.python, **environment: str
) -> "subprocess.CompletedProcess[str]":
    (folder / "scripts").mkdir()
    (folder / "scripts/train.py").write_text(SCRIPT.replace("{COMPILE}", compile))
    (folder / "scripts/helper.py").write_text(HELPER)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder / "scripts") if "-m" in arguments else ""])}
    return run("-m", "sparse_compile", *arguments, cwd=folder, env={**os.environ, **paths, **environment})


def test_torch_compile_means_this_backend(tmp_path: Path) -> None:
    ways = (
        f"lambda model: torch.compile(model, {OURS})",
        f'lambda model: torch.compile(model, backend="inductor", {OURS})',
        f"torch.compile({OURS})",
        f"lambda model: (model.compile({OURS}), model)[1]",
    )
    done = launch(tmp_path, ", ".join(ways), "--report", "report.json", "scripts/train.py", "--lr", "1", "-m")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines() == ["arguments ['--lr', '1', '-m'] helper", *["gradients True"] * len(ways)]
    graphs = json.loads((tmp_path / "report.json").read_text())["graphs"]
    decisions = [[row["decision"].split()[0] for row in graph["rows"]] for graph in graphs]
    assert decisions == [["s-ste", "s-ste"]] * len(ways)
    assert "linears rewritten" not in done.stderr, "the report is in its file"


def alone(*arguments: str, **more: Any) -> "subprocess.CompletedProcess[str]":
    """In a process that imports torch itself."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, **more)


@pytest.mark.by_day(1)
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
    assert done.stderr == "sparse_compile: compiling Net (33,088 parameters) with backend 'sste'\n"
    (graph,) = json.loads((tmp_path / "report.json").read_text())["graphs"]
    assert [row["decision"].split()[0] for row in graph["rows"]] == ["fp8", "fp8"]
    assert "2 of 2 linears rewritten" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "compile", "reason"),
    [
        (
            (),
            "lambda model: model",
            "the script calls neither torch.compile nor Module.compile; to compile its model, use `python",
        ),
        (
            (),
            'lambda model: torch.compile(model, backend="eager")',
            "called only with other backends, which are kept: eager",
        ),
        (
            ("--auto",),
            "lambda model: model.requires_grad_(False)(torch.ones(8, 64)) is None or exit(3)",
            "no module wi",
        ),
        (
            (),
            "lambda model: [torch.compile(model), exit(3)]",
            "no compiled function was called, or none had a graph to trace",
        ),
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


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """The scripts that would have run, with their arguments; in a folder with files that are called like commands."""
    scripts: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        "sparse_compile.launcher.run_script.run", lambda script, arguments, **_: scripts.append((script, arguments))
    )
    monkeypatch.delenv("SPARSE_COMPILE", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("train.py", "report.py", "report", "run", "options"):
        (tmp_path / name).touch()
    return scripts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.py",), "there is no file 'nothing.py'; to run a module, use -m nothing.py"),
        (("--report", "no/folder/r.txt", "train.py"), "there is no folder 'no/folder' for the report file"),
        (("--report", "r.xml", "train.py"), "'r.xml' must end in .txt or .json or .html"),
        ((), "the following arguments are required: SCRIPT"),
        (("--option", "recipe=fp8", "train.py"), "'recipe=fp8' is not of the form sste.NAME=VALUE"),
        (("--option", "sste.recipe=fp9", "train.py"), "option 'sste.recipe' is 'fp9'; did you mean 'fp8'?"),
        (("--option", "sste.health=-1", "train.py"), "option 'sste.health' is '-1'; allowed is a number"),
        (("--option", "sste.report=r.xml", "train.py"), "'r.xml' must end in .txt or .json or .html"),
    ],
    ids=["script", "folder", "format", "none", "form", "option", "number", "report option"],
)
def test_wrong_arguments_are_explained(
    ran: list[tuple[str, list[str]]], capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not ran


@pytest.mark.parametrize(
    ("arguments", "script"),
    [
        (("report.py",), "report.py"),
        (("./report",), "./report"),
        (("run", "report"), "report"),
        (("run", "run"), "run"),
        (("--auto", "options"), "options"),
        (("--option", "sste.recipe=fp8", "report"), "report"),
        (("--report", "r.txt", "report"), "report"),
        (("run", "--report", "r.txt", "--", "report"), "report"),
        (("-m", "report"), "report"),
    ],
)
def test_a_script_and_its_arguments_are_told_from_commands(
    ran: list[tuple[str, list[str]]], arguments: tuple[str, ...], script: str
) -> None:
    scripts_own: tuple[list[str], ...] = (
        [],
        ["report", "--auto", "-m", "--option", "x"],
        ["--", "x", "--", "--lr=1"],
        ["--help"],
        ["--o", "1"],
        ["", "a b", "-a b", "--=x"],
    )
    for own in scripts_own:
        main([*arguments, *own])
    assert ran == [(script, own) for own in scripts_own]


@pytest.mark.parametrize("command", ["report", "check", "tune-decay", "options", "doctor"])
def test_the_first_argument_may_be_a_command(
    ran: list[tuple[str, list[str]]], capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m sparse_compile {command} [-h]" in capsys.readouterr().out
    assert not ran


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = re.findall(r"^    (\S+)  +\S+ .*$", capsys.readouterr().out, re.MULTILINE)
    assert listed == ["run", "report", "check", "tune-decay", "options", "doctor"]


def test_nothing_heavy_is_imported_for_help_and_reports(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(Report().to_json())
    code = """
import sys
from sparse_compile.__main__ import main
for arguments in (["--help"], ["run", "--help"], ["tune-decay", "--help"], ["check", "--help"], ["nothing.py"]):
    try:
        main(arguments)
    except SystemExit:
        pass
main(["report", "report.json"])
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_options_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    main(["options"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[2:] if line[0] != " "]
    assert names == [f"sste.{field.name}" for field in fields(UserOptions)]
    assert max(map(len, lines)) <= 120
    (tune,) = [line.split()[:5] for line in lines if line.startswith("sste.tune")]
    assert tune == ["sste.tune", "False", "True", "or", "False"]
    main(["options", "--markdown"])
    assert '| `sste.head` | `"fp8"` | `"dense"`, `"fp8"`, `"fp8-backward"` or a Recipe | ' in capsys.readouterr().out
