"""``python -m sparse_compile check``: what is 2:4, what is not, and which files are read."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import warm
from sparse_compile.__main__ import main
from sparse_compile.export.check import Verdict, check_weights
from sparse_compile.kernels.reference import soft_threshold24
from sparse_compile.weights.pattern_24 import is_24, share_of_groups


def pruned(rows: int = 16, columns: int = 32) -> Tensor:
    return soft_threshold24(torch.randn(rows, columns))


def broken(groups: int) -> Tensor:
    """Three non-zeros in so many groups."""
    weight = pruned()
    weight[:groups, :4] = torch.tensor([1.0, 0.0, 2.0, 3.0])
    return weight


WEIGHTS = {
    "up.weight": pruned(),
    "fc.weight": pruned(24, 16).t().contiguous(),
    "head.weight": torch.randn(16, 32),
    "lora.weight": torch.zeros(16, 8),
    "odd.weight": torch.randn(6, 10),
    "norm.weight": torch.ones(16),
    "ids": torch.zeros(4, 4, dtype=torch.int64),
}
GOOD = ("2:4", "2:4, stored transposed", "dense", "zero", "dense")


def run(path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return warm.python("-m", "sparse_compile", "check", path, *arguments)


def status(path: Path, *arguments: str) -> int:
    try:
        main(["check", str(path), *arguments])
    except SystemExit as exit:
        return int(exit.code)
    return 0


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ([1, 0, 0, 2], 1.0),
        ([0, 0, 0, 0], 1.0),
        ([0, 0, 0, 5], 1.0),
        ([1, 2, 0, 3], 0.75),
        ([float("nan"), 1, 1, 0], 0.75),
    ],
)
def test_share_of_groups(dim: int, group: list[float], expected: float) -> None:
    weight = torch.tensor([0.0, 1.0, -1.0, 0.0]).repeat(2, 2)
    weight[1, 4:] = torch.tensor(group)
    assert share_of_groups(weight.movedim(-1, dim), dim) == expected
    assert is_24(weight.movedim(-1, dim), dim) == (expected == 1.0)


def test_shares_that_are_not_there() -> None:
    assert share_of_groups(torch.zeros(4, 6), 1) is None
    assert share_of_groups(torch.zeros(0, 8), 1) is None
    assert not is_24(torch.zeros(4, 6), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_dtypes(dtype: torch.dtype) -> None:
    signs = pruned().sign()
    dense = torch.ones(8, 8)
    first, second = check_weights([("a", signs.to(dtype)), ("b", dense.to(dtype))])
    assert (first.verdict, second.verdict) == (Verdict.PRUNED, Verdict.DENSE)
    assert first.zeros == 1 - int((signs != 0).sum()) / signs.numel()
    assert (second.zeros, second.groups, second.groups_transposed) == (0.0, 0.0, 0.0)


def test_what_each_weight_is() -> None:
    rows = list(check_weights(WEIGHTS.items()))
    assert [row.name for row in rows] == list(WEIGHTS)[:5]
    assert tuple(row.verdict.value for row in rows) == GOOD
    assert next(check_weights([("w", broken(1))])).verdict is Verdict.IN_PART


def test_the_table_and_its_end(tmp_path: Path) -> None:
    torch.save(WEIGHTS | {"broken": broken(1)}, tmp_path / "model.pt")
    done = run(tmp_path / "model.pt")
    assert done.returncode == 1, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.partition("\n\n")[0].splitlines()}
    assert re.search(r"16 x 32 +float32 .* 100% +[\d.]+% +2:4$", lines["up.weight"])
    assert "99.22%" in lines["broken"], "one of 128 groups"
    assert "of 6 weights: 1 2:4, 1 2:4, stored transposed, 1 2:4 in part, 1 zero, 2 dense" in done.stdout
    assert done.stdout.endswith("the check failed:\n  broken is 2:4 in part\n")


@pytest.mark.parametrize(
    ("weights", "arguments", "expected"),
    [
        (WEIGHTS, (), 0),
        (WEIGHTS, ("--weights", "up.*", "--weights", "fc.weight"), 0),
        (WEIGHTS, ("--weights", "lora*"), 0),
        (WEIGHTS, ("--weights", "head*"), 1),
        (WEIGHTS, ("--weights", "up.*", "--weights", "down.*"), 1),
        (WEIGHTS, ("--weights", "norm.weight"), 1),
        ({"head.weight": WEIGHTS["head.weight"], "lora": torch.zeros(8, 8)}, (), 1),
        (WEIGHTS | {"w": broken(16)}, (), 1),
        (WEIGHTS | {"w": broken(16)}, ("--weights", "up.*"), 0),
        ({}, (), 1),
    ],
)
def test_exit_status(tmp_path: Path, weights: dict[str, Tensor], arguments: tuple[str, ...], expected: int) -> None:
    torch.save(weights, tmp_path / "model.bin")
    assert status(tmp_path, *arguments) == expected


def test_nested_checkpoints_without_their_optimizers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    content = {"model": {"up.weight": pruned()}, "optimizer": optimizer.state_dict(), "step": 3}
    torch.save(content, tmp_path / "run.ckpt")
    assert status(tmp_path / "run.ckpt", "--weights", "model.up.weight") == 0
    assert status(tmp_path / "run.ckpt") == 0
    assert "of 1 weights" in capsys.readouterr().out.splitlines()[-1]


def test_old_files_of_torch(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert status(tmp_path / "old.pt") == 0


def shards(folder: Path, suffix: str, save: object) -> None:
    placed = {"up.weight": f"one{suffix}", "fc.weight": f"two{suffix}"}
    for name, file in placed.items():
        save({name: WEIGHTS[name]}, folder / file)  # type: ignore[operator]
    (folder / f"model{suffix}.index.json").write_text(json.dumps({"weight_map": placed}))


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    save = torch.save if suffix == ".bin" else pytest.importorskip("safetensors.torch").save_file
    shards(tmp_path, suffix, save)
    assert status(tmp_path, "--weights", "up.weight", "--weights", "fc.weight") == 0
    save({"something.else": WEIGHTS["head.weight"]}, tmp_path / f"two{suffix}")
    assert status(tmp_path) == 2
    assert f"two{suffix} lacks 'fc.weight', which the index places there" in capsys.readouterr().err
    (tmp_path / f"two{suffix}").unlink()
    assert status(tmp_path) == 2
    assert f"names the shard 'two{suffix}', which does not exist" in capsys.readouterr().err


def test_safetensors_come_first(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"up.weight": WEIGHTS["up.weight"]}, tmp_path / "model.safetensors")
    torch.save({"up.weight": WEIGHTS["head.weight"]}, tmp_path / "pytorch_model.bin")
    assert status(tmp_path) == 0
    assert status(tmp_path / "pytorch_model.bin") == 1


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert status(tmp_path) == 2
    assert "to read model.safetensors, install safetensors: pip install safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        ({}, "missing.pt", r"there is no file or folder"),
        ({}, ".", r"holds neither \*\.safetensors nor \*\.pt"),
        ({"model.npz": b""}, "model.npz", r"ends in '\.npz'; allowed are \.safetensors, \.pt"),
        ({"model.pt": b"nothing"}, "model.pt", r"cannot be loaded with weights_only=True"),
        ({"model.safetensors": b"nothing"}, "model.safetensors", r"is not a safetensors file"),
        ({"model.bin.index.json": b"[]"}, ".", r"is not an index of shards"),
        ({"a.bin.index.json": b"{}", "b.bin.index.json": b"{}"}, ".", r"several checkpoints: a\.bin\.index\.json, b"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, capsys, files: dict[str, bytes], path: str, message: str) -> None:
    pytest.importorskip("safetensors")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert status(tmp_path / path) == 2
    assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_pickles_of_modules_are_not_run(tmp_path: Path, capsys) -> None:
    torch.save(torch.nn.Linear(4, 4), tmp_path / "module.pt")
    assert status(tmp_path / "module.pt") == 2
    assert "weights_only=True" in capsys.readouterr().err
