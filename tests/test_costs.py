"""What a linear costs: each component is the op that runs, on operands of the linear's sizes, and is kept on disk."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile.errors import SparseCompileError
from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E5M2, FP8_DTYPES, grouped_columns, padded
from sparse_compile.kernels.timing import expert_costs, gpu_times, linear_costs
from sparse_compile.kernels.timing.components import COMPONENTS, Component, LinearShape, RandomOperands
from sparse_compile.kernels.timing.linear_costs import component_times

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
    gpu_times.folder.cache_clear()
    yield tmp_path
    gpu_times.folder.cache_clear()


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Names of the components that were timed; each takes as many microseconds as its name has letters."""
    names: list[str] = []

    def fake(name: str) -> Callable[..., Callable[[], str]]:
        return lambda shape, make: lambda: f"{name} {shape.tokens}"

    def measure(make: Callable[[Any], Callable[[], str]], operands: None) -> float:
        names.append(make(operands)())
        return float(len(names[-1].rsplit(" ", 1)[0]))

    monkeypatch.setattr(linear_costs, "RandomOperands", lambda device: None)
    monkeypatch.setattr(
        linear_costs,
        "COMPONENTS",
        {name: component._replace(make=fake(name)) for name, component in COMPONENTS.items()},
    )
    monkeypatch.setattr(linear_costs, "_measure", measure)
    return names


class TestOperands:
    """Those of a measurement take turns, so that none is found in the cache."""

    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One with 50 MiB of L2 cache, that calls take 100 us."""
        properties = SimpleNamespace(L2_cache_size=50 * 2**20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=lambda other: 0.1)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)

    @pytest.mark.parametrize(
        ("nbytes", "sets"),
        [(4, 30), (2 * 2**20, 30), (10 * 2**20, 10), (2**28, 1)],
        ids=["a few bytes: as many as launches", "2 MiB: too", "10 MiB", "256 MiB: they do not fit in any case"],
    )
    def test_as_many_as_the_cache_does_not_hold(
        self, gpu: None, monkeypatch: pytest.MonkeyPatch, nbytes: int, sets: int
    ) -> None:
        seen: list[tuple[int, list[int]]] = []

        def clock(calls: Any, launches: int, rounds: int) -> dict[str, float]:
            seen.append((launches, [call() for call in calls[""]]))
            return {"": 7.0}

        monkeypatch.setattr(linear_costs, "median_microseconds", clock)
        made: list[int] = []

        def make(operands: Any) -> Callable[[], int]:
            made.append(len(made))
            return partial(int, made[-1])

        operands: Any = SimpleNamespace(device=DEVICE, nbytes=nbytes)
        assert linear_costs._measure(make, operands) == 7.0
        assert seen == [(30, list(range(sets)))]  # 3 ms of launches

    @pytest.mark.parametrize("make", [RandomOperands.normal, RandomOperands.fp8])
    def test_their_bytes_are_counted(self, make: Callable[..., Tensor]) -> None:
        operands = RandomOperands(torch.device("cpu"))
        made = [make(operands, 64, 32, dtype=E5M2), operands.ones(7), operands.weight(SHAPE)]
        assert operands.nbytes == sum(tensor.nbytes for tensor in made) == 64 * 32 + 7 * 4 + 64 * 48 * 4


def times_of(shape: LinearShape, device: torch.device, components: Iterable[str]) -> dict[str, float]:
    """Of one linear."""
    (times,) = component_times({(shape, device): components}).values()
    return times


class TestComponents:
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("grad_dtype", FP8_DTYPES, ids=str)
    @pytest.mark.parametrize("name", COMPONENTS)
    def test_runs_with_the_sizes_of_the_linear(self, name: str, grad_dtype: torch.dtype, transposed: bool) -> None:
        make = RandomOperands(torch.device("cpu"))
        call = COMPONENTS[name].make(replace(SHAPE, grad_dtype=grad_dtype, transposed=transposed), make)
        result: Any = call()
        shapes = [tuple(r.shape) for r in (result if isinstance(result, tuple) else (result,)) if r is not None]
        gradient = (64, 48) if transposed else (48, 64)
        expected = {
            "dense fprop": [(100, 48)], "fp8 fprop": [(100, 48)], "sparse24 fprop": [(100, 48)],
            "sparse24_bf16 fprop": [(100, 48)], "bf16 dgrad": [(100, 64)], "bf16 wgrad": [gradient],
            "mvue24 dgrad": [(padded(100), 64)],
            "sparse24 dgrad": [(100, 64)], "dense dgrad": [(100, 64)], "fp8 dgrad": [(100, 64)],
            "fp8_accurate dgrad": [(100, 64)],
            "dense wgrad": [gradient], "fp8 wgrad": [gradient], "sparse24 wgrad": [gradient],
            "transpose_tokens": [(64, padded(100))], "cast_transpose": [(100, 48), (48, padded(100))],
            "copy": [(100, 48)], "transpose_pruned": [(padded(64), 48)], "transpose_weight": [(64, padded(48))],
        }  # fmt: skip
        if name in expected:
            assert shapes == expected[name]
        elif name.startswith("cast_mvue for dgrad"):
            assert shapes[:2] == [(48, padded(100)), (padded(100), padded(48) // 2)]
        elif name.startswith("cast_mvue"):
            assert shapes[:2] == [(100, 48), (48, padded(100) // 2)]
        else:
            assert result is None  # written into buffers

    def test_products_are_of_random_operands(self) -> None:
        make = RandomOperands(torch.device("cpu"))
        for name in COMPONENTS:
            result: Any = COMPONENTS[name].make(SHAPE, make)()
            if isinstance(result, torch.Tensor):
                values = result.float()
                assert values.std() > 0, name
                assert values.isfinite().all(), name

    def test_the_weight_lies_as_it_is_stored(self) -> None:
        make = RandomOperands(torch.device("cpu"))
        for experts, stack in ((None, ()), (3, (3,))):
            shape = replace(SHAPE, experts=experts)
            assert make.weight(shape).is_contiguous()
            transposed = make.weight(replace(shape, transposed=True))
            assert transposed.shape == (*stack, 48, 64)
            assert transposed.mT.is_contiguous()

    @pytest.mark.parametrize("skewed", [False, True])
    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    def test_experts_have_all_but_what_they_do_not_run(
        self, dtype: torch.dtype, transposed: bool, skewed: bool
    ) -> None:
        make, total = RandomOperands(torch.device("cpu")), grouped_columns(100, 3)
        shape = replace(SHAPE, experts=3, skewed=skewed, transposed=transposed, dtype=dtype)
        without = set()
        for name, component in COMPONENTS.items():
            if component.of_experts is None:
                without.add(name)
                continue
            result: Any = component.of_experts(shape, make)()
            results = result if isinstance(result, (tuple, list)) else (result,)
            shapes = [tuple(r.shape) for r in results if r is not None]
            gradient = (3, 64, 48) if transposed else (3, 48, 64)
            if name == "dense wgrad" and dtype is torch.float32:
                assert shapes == [gradient[1:]] * 3, name  # in a loop
            elif name.endswith("wgrad"):
                assert shapes == [gradient], name
            elif name.endswith(("fprop", "dgrad")):
                assert shapes == [(100, 48 if name.endswith("fprop") else 64)], name
            elif name.startswith(("cast", "transpose")):
                of_input = name == "transpose_tokens"
                columns = total // 2 if "mvue" in name else total
                assert (64 if of_input else 48, columns) in shapes, name
            else:
                assert name == "copy" or result is None, name  # written into buffers
        sampled = {name for name in COMPONENTS if name.startswith("cast_mvue for dgrad")}
        of_one_copy = {"transpose_pruned", "transpose_weight"}
        assert without == {"mvue24 dgrad", "sparse24_bf16 fprop", "bf16 dgrad", "bf16 wgrad", *sampled, *of_one_copy}

    def test_routings(self) -> None:
        assert expert_costs.ends(100, 4, skewed=False) == [25, 50, 75, 100]
        assert expert_costs.ends(100, 4, skewed=True) == [48, 72, 88, 100]
        assert expert_costs.ends(3, 8, skewed=True)[-1] == 3


class TestDisk:
    def test_each_component_is_measured_once(self, timed: list[str]) -> None:
        assert times_of(SHAPE, DEVICE, ["dense fprop", "copy"]) == {
            "dense fprop": pytest.approx(11 * 100 / 104), "copy": pytest.approx(4 * 100 / 104)
        }  # fmt: skip
        times_of(SHAPE, DEVICE, ["copy", "fp8 dgrad", "copy"])
        assert timed == ["dense fprop 104", "copy 104", "fp8 dgrad 104"]

    def test_tokens_of_a_bucket_share_a_measurement(self, timed: list[str]) -> None:
        first = times_of(SHAPE, DEVICE, ["copy", "weight soft24"])
        second = times_of(replace(SHAPE, tokens=104), DEVICE, ["copy", "weight soft24"])
        assert len(timed) == 2
        assert second["copy"] == pytest.approx(first["copy"] * 1.04)
        assert second["weight soft24"] == first["weight soft24"], "it does not depend on tokens"

    def test_many_tokens_cost_in_proportion(self, timed: list[str]) -> None:
        assert times_of(replace(SHAPE, tokens=2**20), DEVICE, ["copy"]) == {"copy": 4 * 64.0}
        assert timed == [f"copy {2**14}"]

    @pytest.mark.parametrize(
        "change",
        [
            {"in_features": 128}, {"out_features": 64}, {"dtype": torch.float16}, {"weight_dtype": torch.bfloat16},
            {"transposed": True}, {"tokens": 200}, {"grad_dtype": E5M2},
        ],
        ids=str,
    )  # fmt: skip
    def test_other_linears_are_measured_anew(self, timed: list[str], change: dict[str, Any]) -> None:
        times_of(SHAPE, DEVICE, ["copy"])
        times_of(replace(SHAPE, **change), DEVICE, ["copy"])
        assert len(timed) == 2

    def test_nothing_is_measured_under_capture(self, timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        times_of(SHAPE, DEVICE, ["copy"])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        times_of(SHAPE, DEVICE, ["copy"])
        with pytest.raises(RuntimeError, match="run one step with the same shapes before the capture"):
            times_of(SHAPE, DEVICE, ["copy", "fp8 dgrad"])
        assert timed == ["copy 104"]

    def test_linears_of_one_bucket_are_measured_once(self, timed: list[str]) -> None:
        larger = replace(SHAPE, tokens=104)
        times = component_times({(SHAPE, DEVICE): ["copy"], (larger, DEVICE): ["copy", "fp8 dgrad"]})
        assert timed == ["copy 104", "fp8 dgrad 104"]
        assert times[larger, DEVICE] == {"copy": 4.0, "fp8 dgrad": 9.0}
        assert times[SHAPE, DEVICE] == {"copy": pytest.approx(4.0 * 100 / 104)}

    def test_kernels_compile_side_by_side_before_anything_is_measured(
        self, timed: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        together = Barrier(2, timeout=60)  # which one thread alone would not pass
        compiled: list[str] = []

        def kernel(name: str) -> Callable[..., Callable[[], str]]:
            def call() -> str:
                if name not in compiled:
                    assert not timed
                    together.wait()
                    compiled.append(name)
                return name + " 104"

            return lambda shape, make: call

        monkeypatch.setattr(linear_costs.os, "cpu_count", lambda: 2)
        monkeypatch.setattr(
            linear_costs,
            "COMPONENTS",
            {
                name: component if component.of_library else component._replace(make=kernel(name))
                for name, component in linear_costs.COMPONENTS.items()
            },
        )
        times_of(SHAPE, DEVICE, ["copy", "cast_transpose", "weight soft24"])
        assert sorted(compiled) == ["cast_transpose", "weight soft24"]
        assert [name.rsplit(" ", 1)[0] for name in timed] == ["copy", "cast_transpose", "weight soft24"]

    def test_what_does_not_compile_is_raised_and_nothing_is_kept(
        self, timed: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(shape: LinearShape, make: object) -> Callable[[], str]:
            raise SparseCompileError("the check of the sparse GEMM", "this variant", "a wrong product")

        monkeypatch.setattr(linear_costs, "COMPONENTS", linear_costs.COMPONENTS | {"sparse24 fprop": Component(broken)})
        with pytest.raises(SparseCompileError, match="a wrong product"):
            times_of(SHAPE, DEVICE, ["copy", "sparse24 fprop"])
        assert list(folder.glob("*/linear-cold/*")) == []

    def test_a_damaged_file_is_measured_again(self, timed: list[str], folder: Path) -> None:
        times_of(SHAPE, DEVICE, ["copy"])
        (file,) = folder.glob("*/linear-cold/*")
        file.write_text("{")
        with pytest.warns(UserWarning, match="is damaged"):
            times_of(SHAPE, DEVICE, ["copy"])
        assert timed == ["copy 104", "copy 104"]
        assert json.loads(file.read_text()) == {"copy": 4.0}


@pytest.mark.gpu
def test_times_on_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """More than the launch, and no more than a hundred times what the slowest of its limits allows."""
    shape = replace(SHAPE, tokens=4096, in_features=1024, out_features=2048, weight_dtype=torch.bfloat16)
    device = torch.device("cuda", torch.cuda.current_device())
    assert ops.emulation_reason(device) is None

    def measured(folder: Path) -> dict[str, float]:
        monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(folder))
        gpu_times.folder.cache_clear()
        times = times_of(shape, device, COMPONENTS)
        assert times.keys() == COMPONENTS.keys()
        assert times == times_of(shape, device, COMPONENTS), "read from disk"
        return times

    # Another process on the same GPU can only make a measurement slower.
    repeated = [measured(tmp_path / str(number)) for number in range(3)]
    times = {component: min(found[component] for found in repeated) for component in COMPONENTS}
    for component, time in times.items():
        assert 1.0 < time < 1000.0, (component, time)
    assert times["fp8 fprop"] < times["dense fprop"]
    assert times["sparse24 fprop"] < times["dense fprop"]
    gpu_times.folder.cache_clear()


@pytest.mark.gpu
def test_a_copy_is_not_faster_than_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Though both of its sides would fit the L2 cache, which is faster."""
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path))
    gpu_times.folder.cache_clear()
    shape = replace(SHAPE, tokens=4096, out_features=2048)
    microseconds = times_of(shape, DEVICE, ["copy"])["copy"]
    gpu_times.folder.cache_clear()
    assert 2 * shape.tokens * shape.out_features * 2 / microseconds < 5.0e6  # bytes a microsecond
