"""The programs in examples/ run as the documentation says."""

import gc
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_gpt

import shared_graphs
import sparse_compile
import warm
from libraries import library
from sparse_compile.export.check import check_weights
from sparse_compile.export.read_checkpoint import read_checkpoint
from sparse_compile.reporting.report import Report

REPOSITORY = Path(__file__).parents[1]

ARGUMENTS = ("--device", "cpu", "--preset", "tiny", "--steps", "12", "--out")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
ON_A_CPU = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}

uncompiled = shared_graphs.uncompiled


def check(said: str, result: dict[str, Any], layers: int) -> None:
    """Both losses fall, and the output says what was emulated and what was rewritten."""
    assert "emulated" in said
    assert "tokens per second" in said
    assert result["emulated"] is not None
    assert set(result["runs"]) == {"dense", "sste"}
    for run in result["runs"].values():
        assert all(math.isfinite(loss) for loss in [*run["losses"], run["validation_loss"]])
        assert run["losses"][-1] < run["losses"][0] - 1.0
        assert run["validation_loss"] < run["losses"][0] - 1.0
    assert result["runs"]["sste"]["losses"] != result["runs"]["dense"]["losses"]

    rows = [row for graph in result["report"]["graphs"] for row in graph["rows"]]
    sparse = {row["module"] for row in rows if "2:4" in row["decision"]}
    assert sparse == {f"blocks.{block}.ffn.{linear}" for block in range(layers) for linear in ("up", "down")}
    assert f"blocks.*.ffn.up ({layers})" in said, "the table is missing"


@pytest.mark.usefixtures("uncompiled")
def test_train_gpt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A short run on the CPU, of a smaller shape than the program offers."""
    shape, config = train_gpt.PRESETS["tiny"]
    smaller = replace(shape, layers=2, heads=2, width=64, context=32), replace(config, validation_batches=2)
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", smaller)
    train_gpt.main([*ARGUMENTS, str(tmp_path / "run.json")])
    check(capsys.readouterr().out, json.loads((tmp_path / "run.json").read_text()), layers=2)


def test_train_gpt_is_a_program(tmp_path: Path) -> None:
    done = warm.python(REPOSITORY / "examples" / "train_gpt.py", "--help", cwd=tmp_path, env=ENVIRONMENT, check=True)
    assert "Train a small GPT twice" in done.stdout


@pytest.mark.nightly
def test_train_gpt_as_it_is(tmp_path: Path) -> None:
    command = [REPOSITORY / "examples" / "train_gpt.py", *ARGUMENTS, tmp_path / "run.json"]
    done = warm.python(*command, cwd=tmp_path, env=ENVIRONMENT, check=True)
    check(done.stdout, json.loads((tmp_path / "run.json").read_text()), layers=4)


@pytest.mark.nightly
def test_the_report_of_one_run(tmp_path: Path) -> None:
    """As CONTRIBUTING.md makes the picture in README.md, but for sizes and device."""
    command = (REPOSITORY / "CONTRIBUTING.md").read_text().partition("python -m sparse_compile --report")[2]
    arguments = shlex.split(command.partition("\n    python")[0].replace("\\\n", ""))
    assert arguments[0] == "report.json"
    assert arguments[arguments.index("--preset") + 1] == "wide"
    report_file = tmp_path / "report.json"
    sizes = ["--device", "cpu", "--preset", "tiny", "--steps", "12", "--when", "always"]  # a CPU would run dense
    command = ["-m", "sparse_compile", "--report", report_file, *arguments[1:], *sizes]
    warm.python(*command, cwd=REPOSITORY, env=ENVIRONMENT, check=True)
    report = Report.from_json(report_file.read_text())
    assert report.graphs[0].measured is not None
    assert report.dense_step_ms() is not None
    assert len(report.health) == 8
    assert all(samples[-1].noise for samples in report.health.values())


# --- the other examples -----------------------------------------------------------------------------------------------

# By day of one layer.
LLAMA = {
    "s-ste": {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")},
    "fp8": {*(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"), "lm_head"},
}
# A program, with graphs that run as they are rewritten, like the fixture ``uncompiled``.
UNCOMPILED = """
import runpy, sys
from sparse_compile import backend
backend.compile_graph = lambda graph, *_, **__: graph.forward
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def losses(said: str) -> list[float]:
    """Those that an example prints, or transformers' trainer."""
    found = re.findall(r"(?:^step \d+: loss |'loss': '?)(\d+\.\d+)", said, re.MULTILINE)
    return [float(loss) for loss in found]


def assert_falls(said: str, by: float) -> None:
    first, *_, last = losses(said)
    assert last < first - by, said


def decisions() -> dict[str, set[str]]:
    """Names of linears by the recipe they got."""
    found: dict[str, set[str]] = {}
    for row in sparse_compile.report().rows:
        found.setdefault(row.decision.split()[0], set()).add(row.module)
    return found


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU; and what libraries put in the place of torch.compile ends with the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "compile", torch.compile)


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Llamas: half as much to trace."""
    transformers = library("transformers")
    config = transformers.LlamaConfig

    def smaller(**shape: Any) -> Any:
        return config(**shape | {"num_hidden_layers": 1})

    for name in ("trainer_huggingface", "export_and_infer"):
        monkeypatch.setattr(import_module(name), "LlamaConfig", smaller)


@pytest.fixture
def run(
    on_a_cpu: None,
    uncompiled: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[..., str]]:
    """What an example prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        import_module(name).main(list(arguments))
        return capsys.readouterr().out

    yield run
    # Embeddings that are alive tell what is a vocabulary head, in other tests too.
    torch._dynamo.reset()
    gc.collect()


@pytest.mark.nightly
@pytest.mark.usefixtures("one_layer")
def test_trainer_huggingface(run: Callable[..., str]) -> None:
    library("accelerate")
    said = run("trainer_huggingface", "--steps", "8")
    assert len(losses(said)) == 8
    assert_falls(said, by=1.0)
    assert decisions() == LLAMA
    assert "tokens a second (emulated)" in said


@pytest.mark.nightly
def test_trainer_lightning(run: Callable[..., str]) -> None:
    library("lightning")
    said = run("trainer_lightning", "--steps", "11")
    assert len(losses(said)) == 3
    assert_falls(said, by=1.0)
    assert decisions() == {
        "s-ste": {f"layers.{layer}.linear{number}" for layer in range(2) for number in (1, 2)},
        "fp8": {
            "head",
            *(f"layers.{layer}.self_attn.{name}" for layer in range(2) for name in ("in_proj_weight", "out_proj")),
        },
    }
    assert "tokens a second (emulated)" in said


@pytest.mark.nightly
def test_train_vit(run: Callable[..., str]) -> None:
    """With the class that is there."""
    if not find_spec("timm"):
        library("transformers")
    said = run("train_vit", "--steps", "20")
    assert_falls(said, by=0.5)
    found = decisions()
    assert sorted(name.rpartition(".")[2] for name in found["s-ste"]) == ["fc1", "fc1", "fc2", "fc2"]
    assert len(found["fp8"]) == (4 if find_spec("timm") else 8)
    (right,) = re.findall(r"(\d+)% of new images", said)
    assert int(right) > 20  # 10 by guessing
    assert "images a second (emulated)" in said


@pytest.mark.usefixtures("one_layer")
def test_export_and_infer(run: Callable[..., str], tmp_path: Path) -> None:
    said = run("export_and_infer", "--steps", "6")
    assert_falls(said, by=1.0)
    assert decisions() == LLAMA
    assert "3 of the 3 weights that training pruned are 2:4" in said
    trained, exported = map(float, re.findall(r"(\d\.\d+) as trained, (\d\.\d+) as exported", said)[0])
    assert trained == pytest.approx(exported, abs=0.05)
    assert "generated: b'    def " in said
    assert "no GPU: the comparison of speeds is skipped" in said
    # The example's own check is checked by another one.
    pruned = [row for row in check_weights(read_checkpoint(tmp_path / "out" / "export_and_infer")) if row.is_24]
    assert {row.name.removesuffix(".weight") for row in pruned} == LLAMA["s-ste"]


@pytest.mark.nightly
@pytest.mark.parametrize("before", [["-c", UNCOMPILED], []], ids=["uncompiled", "compiled"])
def test_train_fsdp(tmp_path: Path, before: list[str]) -> None:
    """A run that is resumed is the run that went on: the losses that it prints, and all that its checkpoints hold."""
    program = [*before, REPOSITORY / "examples" / "train_fsdp.py"]
    program += ["--steps", "4", "--save-every", "2", "--checkpoints"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    first, other = warm.group(2, *program, whole, cwd=tmp_path, env=ON_A_CPU)
    assert (first.returncode, other.returncode) == (0, 0), first.stderr + other.stderr
    assert_falls(first.stdout, by=1.0)
    assert "4 of 4 linears rewritten, emulated" in first.stdout
    assert "blocks.0.layer.linear1" in first.stdout
    assert other.stdout == ""

    shutil.copytree(whole / "2", resumed / "2")
    again, other = warm.group(2, *program, resumed, "--resume", cwd=tmp_path, env=ON_A_CPU)
    assert (again.returncode, other.returncode) == (0, 0), again.stderr + other.stderr
    assert len(losses(again.stdout)) == 1
    assert losses(again.stdout)[-1] == losses(first.stdout)[-1]
    states = []
    for folder in (whole, resumed):
        dcp_to_torch_save(folder / "4", folder / "4.pt")
        states.append(torch.load(folder / "4.pt"))
    assert any("sste_beta" in kept for kept in states[0]["optimizer"]["state"].values())
    assert_equal(*states)


def assert_equal(one: Any, other: Any) -> None:
    """Nested dictionaries of the same tensors."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


AS_THEY_ARE = {
    "export_and_infer.py": ("15 of 15 linears rewritten", "6 of the 6 weights that training pruned are 2:4"),
    "train_vit.py": ("linears rewritten", "of new images"),
    "trainer_huggingface.py": ("15 of 15 linears rewritten", "tokens a second"),
    "trainer_lightning.py": ("9 of 9 linears rewritten", "tokens a second"),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_as_they_are(tmp_path: Path, name: str) -> None:
    """The programs in their own processes, of their own sizes, and compiled."""
    done = warm.python(REPOSITORY / "examples" / name, cwd=tmp_path, env=ON_A_CPU, check=True)
    assert_falls(done.stdout, by=1.0)
    for expected in AS_THEY_ARE[name]:
        assert expected in done.stdout


@pytest.mark.gpu
@pytest.mark.nightly
@pytest.mark.parametrize("name", AS_THEY_ARE)
def test_on_a_gpu(tmp_path: Path, name: str) -> None:
    """Meaningful sizes; what is measured to be faster is rewritten, so less may be than when emulated."""
    done = warm.python(REPOSITORY / "examples" / name, cwd=tmp_path, env=ENVIRONMENT, check=True)
    assert_falls(done.stdout, by=1.0)
    assert re.search(r"[1-9]\d* of \d+ linears rewritten, kernels", done.stdout)
    assert "emulated" not in done.stdout
    if name == "export_and_infer.py":
        assert re.search(r"2:4 FP8 +compiled +\d+\.\d+ ms", done.stdout)
        assert re.search(r"2:4 bf16 +eager +\d+\.\d+ ms", done.stdout)


@pytest.mark.gpus2
@pytest.mark.nightly
def test_train_fsdp_on_gpus(tmp_path: Path) -> None:
    program = [REPOSITORY / "examples" / "train_fsdp.py", "--checkpoints", tmp_path / "checkpoints"]
    first, other = warm.group(2, *program, cwd=tmp_path, env=ENVIRONMENT)
    assert (first.returncode, other.returncode) == (0, 0), first.stderr + other.stderr
    assert_falls(first.stdout, by=1.0)
    assert re.search(r"[1-9]\d* of \d+ linears rewritten, kernels", first.stdout)
