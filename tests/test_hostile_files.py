"""Checkpoints and names that someone made to do harm: an error says what is wrong, and nothing else happens."""

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_compile.__main__ import main
from sparse_compile.printable import printable
from sparse_compile.reporting.model import GraphReport, Row
from sparse_compile.reporting.report import Report

ESCAPE = "up\x1b[2J\x1b]0;owned\x07\r\u202egnp.\u2028"


def check(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a file that must be refused."""
    with pytest.raises(SystemExit) as exited:
        main(["check", str(path)])
    assert exited.value.code == 2
    return " ".join(capsys.readouterr().err.split())


class Runs:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("archive", [True, False])
def test_code_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], archive: bool) -> None:
    file = tmp_path / "model.pt"
    torch.save({"up.weight": Runs(tmp_path / "made")}, file, _use_new_zipfile_serialization=archive)
    assert "cannot be loaded with weights_only=True" in check(file, capsys)
    file.write_bytes(pickle.dumps(Runs(tmp_path / "made")))
    assert "cannot be loaded with weights_only=True" in check(file, capsys)
    assert not (tmp_path / "made").exists()


def test_archives_that_would_grow_are_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("model/data.pkl", bytes(2**26))
    assert file.stat().st_size < 2**20
    assert "it holds compressed records, which torch.save never writes" in check(file, capsys)


def test_an_archive_that_says_it_is_larger_than_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.pt"
    torch.save({"up.weight": torch.ones(4, 4)}, file)
    content = bytearray(file.read_bytes())
    entry = content.index(b"PK\x01\x02")  # of the directory at the end: the sizes are 20 bytes behind
    content[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    file.write_bytes(content)
    assert "bytes but is smaller" in check(file, capsys)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["archive", "old", "safetensors"])
def test_truncated_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, cut: float) -> None:
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    weights = {"up.weight": torch.randn(64, 64)}
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(weights, file)
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=kind == "archive")
    content = file.read_bytes()
    file.write_bytes(content[: int(cut * len(content))])
    assert "model." in check(file, capsys)


def test_headers_without_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "is not a safetensors file" in check(file, capsys)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 16]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert "is not a safetensors file" in check(file, capsys)


def test_a_tensor_that_repeats_one_element(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It takes no memory, and to look at each element takes for ever."""
    torch.save({"up.weight": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "model.pt")
    assert "'up.weight' has the shape (1048576, 1048576)" in check(tmp_path / "model.pt", capsys)


def test_a_mapping_that_holds_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content: dict[str, Any] = {"up.weight": torch.zeros(4, 4)}
    content["again"] = content
    torch.save(content, tmp_path / "model.pt")
    assert "RecursionError" in check(tmp_path / "model.pt", capsys)


@pytest.mark.parametrize(
    ("placed", "message"),
    [
        ({"w": "../secret.bin"}, "names the shard '../secret.bin'; allowed is a file in the same folder"),
        ({"w": "/etc/secret.bin"}, "names the shard '/etc/secret.bin'; allowed is a file in the same folder"),
        ({"w": 3}, "is not an index of shards"),
        (["w"], "is not an index of shards"),
    ],
)
def test_an_index_that_names_other_places(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], placed: object, message: str
) -> None:
    (tmp_path / "model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    assert message in check(tmp_path, capsys)


def test_names_do_nothing_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(module=ESCAPE, role="ffn up", shape="", decision="dense", reason=ESCAPE, advice=ESCAPE, source=ESCAPE)
    text = str(Report([GraphReport(rows=(row,), execution="kernels", origin=ESCAPE, modules=ESCAPE)]))
    torch.save({ESCAPE: torch.randn(8, 8)}, tmp_path / "model.pt")
    with pytest.raises(SystemExit):
        main(["check", str(tmp_path / "model.pt")])
    for shown in (text, capsys.readouterr().out):
        assert r"up\x1b[2J\x1b]0;owned\x07\r\u202egnp.\u2028" in shown
        assert all(character.isprintable() for character in shown.replace("\n", ""))


def test_other_text_stays_as_it_is() -> None:
    text = "module  role\nblöcke.*.µ – ≥ 2³¹ 模型"
    assert printable(text) == text
    assert printable("a\tb") == r"a\tb"


def test_a_hostile_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    file.write_text("[" * 100_000)
    with pytest.raises(SystemExit) as exited:
        main(["report", str(file)])
    assert exited.value.code == 2
    assert "this is not a report of sparse_compile" in capsys.readouterr().err


def test_bytes_of_a_checkpoint_changed_at_random(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it is by then, it is read or refused."""
    buffer = io.BytesIO()
    torch.save({"up.weight": torch.randn(16, 16), "bias": torch.randn(16)}, buffer)
    generator = torch.Generator().manual_seed(0)
    file = tmp_path / "model.pt"
    codes = set()
    for _ in range(200):
        content = bytearray(buffer.getvalue())
        for place in torch.randint(len(content), (8,), generator=generator).tolist():
            content[place] = int(torch.randint(256, (1,), generator=generator))
        file.write_bytes(content)
        with pytest.raises(SystemExit) as exited:
            main(["check", str(file)])
        codes.add(exited.value.code)
        capsys.readouterr()
    assert codes <= {1, 2}
    assert 2 in codes
