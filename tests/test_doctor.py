"""``python -m sparse_compile doctor``: what it finds, of machines that work and of others."""

import json
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from sparse_compile.__main__ import main
from sparse_compile.doctor import checks, command
from sparse_compile.doctor.checks import Finding, Status
from sparse_compile.kernels import ops
from sparse_compile.kernels.timing.components import COMPONENTS, Component

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["doctor", "--json"])
    assert exited.value.code == 1
    result = json.loads(capsys.readouterr().out)
    assert result["works"] is False
    found = {finding["what"]: finding["status"] for finding in result["findings"]}
    assert found == {
        "versions": "ok", "backend": "ok", "device": "problem", "compiler": "ok", "cache": "ok", "kernels": "skipped",
        "training step": "skipped", "speed": "skipped", "attention": "skipped",
    }  # fmt: skip
    (device,) = [finding for finding in result["findings"] if finding["what"] == "device"]
    assert "models run dense here; 'sste.when': 'always' emulates" in device["remedy"]


def test_a_machine_that_does_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "findings", lambda: iter([Finding("device", Status.PROBLEM, "none", "buy one")]))
    with pytest.raises(SystemExit) as exited:
        main(["doctor"])
    assert exited.value.code == 1
    text = capsys.readouterr().out
    assert re.search(r"^problem +device +none\n +-> buy one$", text, re.MULTILINE)
    assert "the backend does not work here (" in text


def test_a_machine_that_works(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("device 0", Status.OK, "a GPU"), Finding("attention", Status.WARNING, "slow", "look at it")]
    monkeypatch.setattr(command, "findings", lambda: iter(found))
    with pytest.raises(SystemExit) as exited:
        main(["doctor"])
    assert exited.value.code == 0, "a warning keeps nothing from working"
    assert "the backend works (" in capsys.readouterr().out


def test_a_check_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("the driver is gone")

    monkeypatch.setattr(checks, "devices", broken)
    found = {finding.what: finding for finding in command.findings()}
    assert found["broken"].status is Status.PROBLEM
    assert found["broken"].text == "the check failed: OSError: the driver is gone"


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = checks.versions()
    assert (finding.status, finding.values["torch"]) == (Status.OK, torch.__version__)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.14.0"))
    (finding,) = checks.versions()
    assert (finding.status, finding.remedy.split(":")[0]) == (Status.WARNING, "install torch>=2.11,<2.14")
    monkeypatch.setattr("sparse_compile.torch_internals.private_names.self_test", lambda: ["torch._gone"])
    _, finding = checks.versions()
    assert (finding.status, finding.text) == (Status.PROBLEM, "missing: torch._gone")
    monkeypatch.setattr(checks, "_version", lambda name: None if name == "tqdm" else "1.0")
    finding, *_ = checks.versions()
    assert (finding.status, finding.remedy) == (Status.PROBLEM, "pip install tqdm")


def test_the_versions_are_those_that_are_required() -> None:
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    (listed,) = re.findall(r"^dependencies = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)
    required = dict(re.findall(r'"(\w+)([^";]+)', listed))
    assert required.pop("torch") == f">={checks.OLDEST_TORCH},<{checks.TOO_NEW_TORCH}"
    assert set(required) == {"triton", *checks._REQUIRED}


def test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    (finding,) = checks.cache(None)
    assert (finding.status, finding.text.split(",")[0]) == (Status.OK, f"{tmp_path / 'cache'}: 0 files")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "times.json").touch()
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: checks.shutil._ntuple_diskusage(2, 2, 2**20))
    (finding,) = checks.cache(None)
    assert (finding.status, "1 files, 0.0 GiB left" in finding.text) == (Status.WARNING, True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    (finding,) = checks.cache(None)
    assert (finding.status, "cannot be written" in finding.text) == (Status.WARNING, True)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.shutil, "which", lambda name: None)
    assert [finding.status for finding in checks.compiler()] == [Status.PROBLEM]


def test_kernels_are_held_to_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU both are the definition, but of the two that are made wrong here."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    (finding,) = checks.kernels(CPU)
    assert finding.status is Status.OK
    for name in ("sparse24 wgrad", "cast_mvue exact nearest", "weight soft24", "weight transposable24"):
        assert name in finding.text
    assert "add_masked_decay" not in finding.text, "whose result is not seen"

    def wrong(shape: object, random: object) -> object:
        of_reference = torch.ones(8, dtype=torch.int32)
        return lambda: of_reference if ops._reference_forced else of_reference + torch.arange(8, dtype=torch.int32)

    def off(shape: object, random: object) -> object:
        return lambda: torch.full((2,), 1.0 if ops._reference_forced else 1.02)

    few = {"wrong": Component(wrong), "off": Component(off)}
    monkeypatch.setattr(checks, "COMPONENTS", {**few, "copy": COMPONENTS["copy"]})
    (finding,) = checks.kernels(CPU)
    assert finding.status is Status.PROBLEM
    assert finding.text == "wrong: 7 bytes of result 0 are wrong; off: result 0 is off by 2.0%"


@pytest.mark.parametrize(("factor", "status"), [(1.01, Status.OK), (1.2, Status.PROBLEM)])
def test_a_training_step(monkeypatch: pytest.MonkeyPatch, factor: float, status: Status) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda x: factor**0.5 * model(x))
    assert [finding.status for finding in checks.training_step(CPU)] == [status]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sparse_compile", "doctor", "--json"], capture_output=True, text=True, timeout=180
    )
    result = json.loads(done.stdout)
    found = {finding["what"]: finding for finding in result["findings"]}
    assert (done.returncode, result["works"]) == (0, True), found
    for what in ("versions", "backend", "device 0", "compiler", "kernels", "training step"):
        assert found[what]["status"] == "ok", found[what]
    assert found["speed"]["values"]["sparse24 fprop"] > 0
    assert found["attention"]["text"].startswith("scaled_dot_product_attention runs ")
