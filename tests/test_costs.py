"""What a linear costs: each piece is the op that runs, on operands of the linear's sizes, and is kept on disk."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_compile.kernels import costs, measured, ops
from sparse_compile.kernels.costs import PIECES, LinearShape, piece_times
from sparse_compile.kernels.formats import padded

DEVICE = torch.device("cuda", 0)
SHAPE = LinearShape(
    tokens=100, in_features=64, out_features=48, dtype=torch.bfloat16, weight_dtype=torch.float32, transposed=False
)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(costs, "undisturbed", lambda device: nullcontext())
    measured.folder.cache_clear()
    yield tmp_path
    measured.folder.cache_clear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Names of the pieces that were timed; each takes as many microseconds as its name has letters."""
    names: list[str] = []

    def fake(name: str) -> Callable[..., str]:
        return lambda shape, make: f"{name} {shape.tokens}"

    def measure(call: str) -> float:
        names.append(call)
        return float(len(call.rsplit(" ", 1)[0]))

    monkeypatch.setattr(costs, "_Operands", lambda device: None)
    monkeypatch.setattr(costs, "PIECES", {name: fake(name) for name in PIECES})
    monkeypatch.setattr(costs, "_measure", measure)
    return names


class TestPieces:
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("name", PIECES)
    def test_runs_with_the_sizes_of_the_linear(self, name: str, transposed: bool) -> None:
        make = costs._Operands(torch.device("cpu"))
        call = PIECES[name](replace(SHAPE, transposed=transposed), make)
        result: Any = call()
        shapes = [tuple(r.shape) for r in (result if isinstance(result, tuple) else (result,)) if r is not None]
        gradient = (64, 48) if transposed else (48, 64)
        expected = {
            "hp fprop": [(100, 48)], "fp8 fprop": [(100, 48)], "2:4 fp8 fprop": [(100, 48)],
            "2:4 bf16 fprop": [(100, 48)], "bf16 dgrad": [(100, 64)], "bf16 wgrad": [gradient],
            "2:4 fp8 dgrad": [(100, 64)], "hp dgrad": [(100, 64)], "fp8 dgrad": [(100, 64)],
            "hp wgrad": [gradient], "fp8 wgrad": [gradient], "2:4 fp8 wgrad": [gradient],
            "transpose_tokens": [(64, padded(100))], "cast_transpose": [(100, 48), (48, padded(100))],
            "copy": [(100, 48)],
        }  # fmt: skip
        if name in expected:
            assert shapes == expected[name]
        elif name.startswith("cast_mvue"):
            assert shapes[:2] == [(100, 48), (48, padded(100) // 2)]
        else:
            assert result is None  # written into buffers

    def test_products_are_of_random_operands(self) -> None:
        make = costs._Operands(torch.device("cpu"))
        for name in PIECES:
            result: Any = PIECES[name](SHAPE, make)()
            if isinstance(result, torch.Tensor):
                values = result.float()
                assert values.std() > 0, name
                assert values.isfinite().all(), name

    def test_the_weight_lies_as_it_is_stored(self) -> None:
        make = costs._Operands(torch.device("cpu"))
        assert costs._weight(SHAPE, make).is_contiguous()
        transposed = costs._weight(replace(SHAPE, transposed=True), make)
        assert transposed.shape == (48, 64)
        assert transposed.t().is_contiguous()


class TestDisk:
    def test_each_piece_is_measured_once(self, timed: list[str]) -> None:
        assert piece_times(SHAPE, DEVICE, ["hp fprop", "copy"]) == {
            "hp fprop": pytest.approx(8 * 100 / 104), "copy": pytest.approx(4 * 100 / 104)
        }  # fmt: skip
        piece_times(SHAPE, DEVICE, ["copy", "fp8 dgrad", "copy"])
        assert timed == ["hp fprop 104", "copy 104", "fp8 dgrad 104"]

    def test_tokens_of_a_bucket_share_a_measurement(self, timed: list[str]) -> None:
        first = piece_times(SHAPE, DEVICE, ["copy", "prune_weight_"])
        second = piece_times(replace(SHAPE, tokens=104), DEVICE, ["copy", "prune_weight_"])
        assert len(timed) == 2
        assert second["copy"] == pytest.approx(first["copy"] * 1.04)
        assert second["prune_weight_"] == first["prune_weight_"], "it does not depend on tokens"

    def test_many_tokens_cost_in_proportion(self, timed: list[str]) -> None:
        assert piece_times(replace(SHAPE, tokens=2**20), DEVICE, ["copy"]) == {"copy": 4 * 64.0}
        assert timed == [f"copy {2**14}"]

    @pytest.mark.parametrize(
        "change",
        [
            {"in_features": 128}, {"out_features": 64}, {"dtype": torch.float16}, {"weight_dtype": torch.bfloat16},
            {"transposed": True}, {"tokens": 200},
        ],
        ids=str,
    )  # fmt: skip
    def test_other_linears_are_measured_anew(self, timed: list[str], change: dict[str, Any]) -> None:
        piece_times(SHAPE, DEVICE, ["copy"])
        piece_times(replace(SHAPE, **change), DEVICE, ["copy"])
        assert len(timed) == 2

    def test_nothing_is_measured_under_capture(self, timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        piece_times(SHAPE, DEVICE, ["copy"])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        piece_times(SHAPE, DEVICE, ["copy"])
        with pytest.raises(RuntimeError, match="run one step with the same shapes before the capture"):
            piece_times(SHAPE, DEVICE, ["copy", "fp8 dgrad"])
        assert timed == ["copy 104"]

    @pytest.mark.parametrize("text", ["", "[]", '{"copy": "fast"}', "{"])
    def test_a_corrupt_file_is_named(self, timed: list[str], folder: Path, text: str) -> None:
        piece_times(SHAPE, DEVICE, ["copy"])
        (file,) = folder.glob("*/linear/*")
        assert json.loads(file.read_text()) == {"copy": 4.0}
        file.write_text(text)
        with pytest.raises(ValueError, match=r"holds no times of a linear .*; remove it"):
            piece_times(SHAPE, DEVICE, ["copy"])


@pytest.mark.gpu
def test_times_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """More than the launch, and no more than a hundred times what the slowest of its limits allows."""
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path))
    measured.folder.cache_clear()
    shape = replace(SHAPE, tokens=4096, in_features=1024, out_features=2048, weight_dtype=torch.bfloat16)
    device = torch.device("cuda", torch.cuda.current_device())
    assert ops.emulation_reason(device) is None
    times = piece_times(shape, device, PIECES)
    assert times.keys() == PIECES.keys()
    for piece, time in times.items():
        assert 1.0 < time < 1000.0, (piece, time)
    assert times["fp8 fprop"] < times["hp fprop"]
    assert times["2:4 fp8 fprop"] < times["hp fprop"]
    assert times == piece_times(shape, device, PIECES), "read from disk"
    measured.folder.cache_clear()
