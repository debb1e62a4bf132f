"""Launching: what is planned once, what varies, and which kernel parameters a launch ends up with."""

import gc
import shutil
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.compiler._cache import CacheArtifactManager
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import _allocation

from sparse_compile.kernels import launch_plan
from sparse_compile.kernels.formats import E4M3
from sparse_compile.kernels.launch_plan import (
    NOTHING,
    LaunchPlan,
    UncachedPlan,
    allocator,
    plan_kernel,
    plan_with_results,
    planned,
)

STREAM = 0x57
FUNCTION = 0xF00
LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)


@triton.jit(do_not_specialize=["shift"])
def axpy_kernel(x_ptr, y_ptr, out_ptr, shift, size, one, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = FACTOR * tl.load(x_ptr + offs, mask=offs < size, other=0.0) + shift + one - 1
    if y_ptr is not None:
        value += tl.load(y_ptr + offs, mask=offs < size, other=0.0)
    tl.store(out_ptr + offs, value, mask=offs < size)


@gluon.jit
def copy_kernel(x_desc, out_desc, columns):
    """Each program copies a tile of 64 rows and 128 columns by TMA."""
    buffer = gl.allocate_shared_memory(x_desc.dtype, x_desc.block_type.shape, x_desc.layout)
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    tiles = columns // 128
    row, column = gl.program_id(0) // tiles * 64, gl.program_id(0) % tiles * 128
    mbarrier.expect(barrier, x_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(x_desc, [row, column], barrier, buffer)
    mbarrier.wait(barrier, 0)
    tma.async_copy_shared_to_global(out_desc, [row, column], buffer)
    tma.store_wait(0)


def plan_axpy(x: Tensor, y: Tensor | None, out: Tensor, shift: int, double: bool) -> LaunchPlan:
    if x.dtype != torch.float32:
        raise ValueError(f"x is {x.dtype}")
    if x.numel() == 0:
        return NOTHING
    constants = {"FACTOR": 2.0 if double else 1.0, "BLOCK": 128}
    return plan_kernel(axpy_kernel, (triton.cdiv(x.numel(), 128),), (x, y, out, shift), (x.numel(), 1), **constants)


def plan_copy(x: Tensor, out: Tensor) -> LaunchPlan:
    rows, columns = x.shape
    descriptors = [TensorDescriptor(t, [rows, columns], [columns, 1], [64, 128], LAYOUT) for t in (x, out)]
    return plan_kernel(copy_kernel, (rows // 64 * (columns // 128),), descriptors, (columns,), num_warps=4)


def shifted(size: int, elements: int, device: str = "cpu") -> Tensor:
    """fp32 ``[size]``, ``elements`` behind a 16-byte boundary."""
    return torch.randn(size + elements, device=device)[elements:]


class Recorder(nvidia.CudaLauncher):
    """Triton's launcher, down to the function in C, which it calls in another way in each version."""

    def __init__(self, launches: list[SimpleNamespace], source: Any, metadata: Any) -> None:
        def launch(grid_x, grid_y, grid_z, stream, function, cooperative, dependent, *rest):
            if triton.__version__.startswith("3.6."):
                scratch, rest = rest[:2], rest[2:]
                packed, details, enter, leave, *arguments = rest
            else:
                packed, details, enter, leave, *scratch, annotations, signature, arguments = rest
                assert (annotations, signature) == ("annotations", "signature")
            for hook in (enter, leave):
                if hook is not None:
                    hook(details)
            grid = (grid_x, grid_y, grid_z)
            launches.append(
                SimpleNamespace(
                    grid=grid, stream=stream, packed=packed, arguments=tuple(arguments), scratch=tuple(scratch),
                    dependent=dependent,
                )
            )  # fmt: skip
            assert function == FUNCTION + len(metadata.name)

        self.launch = nvidia.wrap_handle_tensordesc(
            launch, source.signature, getattr(metadata, "tensordesc_meta", None)
        )
        self.arg_annotations, self.kernel_signature = "annotations", "signature"
        self.num_ctas, self.launch_cooperative_grid, self.launch_pdl = 1, False, metadata.launch_pdl
        self.global_scratch_size, self.global_scratch_align = metadata.global_scratch_size, 1
        self.profile_scratch_size, self.profile_scratch_align = 0, 1
        self.gsan_enabled = False


class RecordingDriver:
    """A driver without a device: compiles for Hopper, loads nothing, records launches and encoded descriptors."""

    def __init__(self) -> None:
        self.launches: list[SimpleNamespace] = []
        self.encoded: list[int] = []
        self.loaded = 0
        self.utils = SimpleNamespace(
            load_binary=self.load,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            fill_tma_descriptor=self.encode,
            fill_tma_descriptor_tiled=self.encode,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Recorder:
        return Recorder(self.launches, source, metadata)

    def load(self, name: str, *_: Any) -> tuple[int, int, int, int, int]:
        self.loaded += 1
        return 1, FUNCTION + len(name), 32, 0, 1024

    def encode(self, address: int, *_: Any) -> tuple[str, int]:
        self.encoded.append(address)
        return ("encoded", address)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        assert device == -1
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def with_scratch(passed_on: Any) -> Any:
    def wrapped(run: Any, *head: Any) -> Any:
        run.global_scratch_size = 24
        return passed_on(run, *head)

    return wrapped


@pytest.fixture
def recorder() -> Iterator[RecordingDriver]:
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this Triton comes without NVIDIA's tools")
    active = triton.runtime.driver._active
    driver = RecordingDriver()
    triton.runtime.driver.set_active(driver)
    yield driver
    for kernel in (axpy_kernel, copy_kernel):
        kernel.device_caches.clear()  # their kernels hold the driver's launcher
    gc.collect()
    triton.runtime.driver._active = active


def test_this_triton_is_known() -> None:
    assert launch_plan.self_test() == []


@pytest.mark.parametrize("version", ["3.5.1", "3.9.0", "4.0.0+git1"])
def test_refuses_an_unknown_triton(version) -> None:
    with pytest.raises(ImportError, match=rf"triton {version[:3]}.* known to work with 3\.6, 3\.7, 3\.8"):
        launch_plan._check_version(version)


class TestPlans:
    """When a plan is made, and what it is called with.  No kernel is involved."""

    def calls(self) -> tuple[Any, list[Any], list[tuple[Any, ...]]]:
        made: list[Any] = []
        ran: list[tuple[Any, ...]] = []

        def make(x: Tensor, y: Tensor | None, number: int, flag: bool) -> LaunchPlan:
            made.append((x, y, number, flag))
            return lambda *varying: ran.append(varying)

        return planned(make), made, ran

    def test_alike_arguments_share_one_plan(self) -> None:
        call, made, ran = self.calls()
        x, y = torch.ones(4, 8), torch.ones(3)
        again = torch.zeros(4, 8).requires_grad_()
        call(x, y, 5, True)
        call(again, y, 6, flag=True)
        assert made == [(x, y, 5, True)]
        assert ran == [(x.data_ptr(), y.data_ptr(), 5), (again.data_ptr(), y.data_ptr(), 6)]

    @pytest.mark.parametrize(
        "other",
        [
            (torch.ones(8, 4), None, 5, True),
            (torch.ones(8, 4).t(), None, 5, True),
            (torch.ones(4, 8).half(), None, 5, True),
            (shifted(32, 1).view(4, 8), None, 5, True),
            (torch.ones(4, 8), torch.ones(3), 5, True),
            (torch.ones(4, 8), None, 5, False),
        ],
        ids=["shape", "strides", "dtype", "alignment", "no tensor", "flag"],
    )
    def test_each_difference_has_a_plan_of_its_own(self, other) -> None:
        call, made, _ = self.calls()
        for arguments in ((torch.ones(4, 8), None, 5, True), other, (torch.ones(4, 8), None, 5, True), other):
            call(*arguments)
        assert len(made) == 2

    def test_their_number_is_bounded_and_the_oldest_goes(self, monkeypatch) -> None:
        monkeypatch.setattr(launch_plan, "_MAX_PLANS", 2)
        call, made, _ = self.calls()
        for size in (1, 2, 1, 3, 2, 1):
            call(torch.ones(size), None, 0, True)
        assert [x.numel() for x, *_ in made] == [1, 2, 3, 1]

    def test_refused_arguments_are_refused_again(self) -> None:
        call = planned(plan_axpy)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"x is torch\.float16"):
                call(torch.ones(3).half(), None, torch.ones(3), 0, False)

    def test_a_plan_for_once_is_not_kept(self) -> None:
        made: list[Tensor] = []

        def make(x: Tensor) -> LaunchPlan:
            made.append(x)
            return UncachedPlan(x.zero_)

        call = planned(make)
        first, second = torch.ones(2), torch.ones(2)
        assert call(first) is first
        assert call(second) is second
        assert len(made) == 2
        assert not second.any()

    def test_threads_share_plans(self) -> None:
        call, made, ran = self.calls()
        tensors = [torch.ones(size) for size in range(1, 9)]
        threads = [
            threading.Thread(target=lambda: [call(x, None, 0, True) for _ in range(50) for x in tensors])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ran) == 4 * 50 * 8
        assert len(tensors) <= len(made) <= 4 * len(tensors)


class TestResults:
    """Plans that allocate what they return."""

    @pytest.mark.parametrize(
        "example",
        [torch.empty(3, 5).half(), torch.empty(5, 3).t(), torch.empty(0, 4), torch.empty(())],
        ids=lambda example: str(tuple(example.shape)),
    )
    def test_allocator(self, example) -> None:
        allocate = allocator(example)
        one, other = allocate(), allocate()
        assert (one.shape, one.stride(), one.dtype, one.device) == (
            (example.shape, example.stride(), example.dtype, example.device)
        )
        assert one.numel() == 0 or one.data_ptr() != other.data_ptr()

    def test_results_are_new_and_like_the_example(self) -> None:
        ran: list[tuple[Any, ...]] = []
        launcher = planned(lambda x, flag, out, wide: lambda *varying: ran.append(varying))
        call = planned(
            lambda x, flag: plan_with_results(
                launcher, lambda x, flag: (x.new_empty(3), x.new_empty(2, 5).half()), (x, flag), lambda *a: a
            )
        )
        x = torch.ones(4)
        first, second = call(x, True), call(x, True)
        assert [(out.shape, out.dtype) for out in second] == [((3,), torch.float32), ((2, 5), torch.float16)]
        assert ran[1] == (x.data_ptr(), second[0].data_ptr(), second[1].data_ptr())
        assert {out.data_ptr() for out in first}.isdisjoint(out.data_ptr() for out in second)

    def test_the_example_is_not_kept_alive(self) -> None:
        allocated: list[weakref.ref[Tensor]] = []

        def allocate(x: Tensor) -> Tensor:
            out = torch.empty(3)
            allocated.append(weakref.ref(out))
            return out

        launcher = planned(lambda x, out: lambda *varying: None)
        call = planned(lambda x: plan_with_results(launcher, allocate, (x,), lambda *a: a))
        assert call(torch.ones(1)).shape == (3,)
        assert [example() for example in allocated] == [None]

    @pytest.mark.parametrize("results", [None, "one"])
    def test_one_result_or_none(self, results) -> None:
        launcher = planned(lambda x, *out: lambda *varying: None)
        allocate = (lambda x: x.new_empty(7)) if results else (lambda x: None)
        call = planned(lambda x: plan_with_results(launcher, allocate, (x,), lambda *a: a))
        for _ in range(2):
            result = call(torch.ones(3))
            assert result is None if results is None else result.shape == (7,)

    def test_a_plan_for_once_returns_its_results(self) -> None:
        launcher = planned(lambda x, out: UncachedPlan(out.zero_))
        call = planned(lambda x: plan_with_results(launcher, lambda x: torch.ones(3), (x,), lambda *a: a))
        assert not call(torch.ones(1)).any()
        assert not call(torch.ones(1)).any()


class TestKernels:
    """Compiled for Hopper, launched into a recorder."""

    def test_a_kernel_that_another_thread_loads(self, recorder) -> None:
        x = torch.ones(128)
        loading, load = threading.Event(), recorder.utils.load_binary

        def slow(*arguments: Any) -> Any:
            loading.set()
            time.sleep(0.3)
            return load(*arguments)

        recorder.utils.load_binary = slow
        first = threading.Thread(target=planned(plan_axpy), args=(x, x, torch.empty(128), 1, True))
        first.start()
        assert loading.wait(60)
        planned(plan_axpy)(x, x, torch.empty(128), 2, True)
        first.join()
        assert len(recorder.launches) == 2
        assert recorder.loaded == 1

    def test_parameters_grid_and_stream(self, recorder) -> None:
        call = planned(plan_axpy)
        x, y, out = (torch.randn(300) for _ in range(3))
        call(x, y, out, 7, True)
        call(out, y, x, 8, True)
        assert [one.grid for one in recorder.launches] == [(3, 1, 1)] * 2
        assert [one.stream for one in recorder.launches] == [STREAM] * 2
        # Sizes, and a place for each of the two constexprs.
        rest = (300, 1, None, None)
        assert recorder.launches[0].arguments == (x.data_ptr(), y.data_ptr(), out.data_ptr(), 7, *rest)
        assert recorder.launches[1].arguments == (out.data_ptr(), y.data_ptr(), x.data_ptr(), 8, *rest)
        assert recorder.loaded == 1

    def test_each_specialisation_is_another_kernel(self, recorder) -> None:
        call = planned(plan_axpy)
        for arguments in (
            (torch.ones(256), torch.ones(256), torch.ones(256), 0, True),
            (shifted(256, 1), torch.ones(256), torch.ones(256), 0, True),
            (torch.ones(256), None, torch.ones(256), 0, True),
            (torch.ones(256), torch.ones(256), torch.ones(256), 0, False),
            (torch.ones(250), torch.ones(250), torch.ones(250), 0, False),
        ):
            call(*arguments)
            call(*arguments)
        assert recorder.loaded == 5
        assert recorder.launches[4].arguments[1] is None

    def test_another_machine_need_not_compile(self, recorder, monkeypatch, tmp_path) -> None:
        """One that has loaded what ``torch.compiler.save_cache_artifacts`` saved."""
        found: list[bool] = []
        monkeypatch.setattr(knobs.compilation, "listener", lambda *, cache_hit, **_: found.append(cache_hit))
        x, y, out = (torch.zeros(300) for _ in range(3))
        with CacheArtifactManager.with_fresh_cache():
            monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "first"))
            planned(plan_axpy)(x, y, out, 7, False)
            artifacts, info = torch.compiler.save_cache_artifacts()
            assert len(info.artifacts["sparse_compile_kernels"]) == 1
            axpy_kernel.device_caches.clear()
            monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "second"))
            torch.compiler.load_cache_artifacts(artifacts)
            planned(plan_axpy)(x, y, out, 7, False)
            assert found == [False, True]
            # A cache that is emptied while the process runs is no error.
            CacheArtifactManager.clear()
            shutil.rmtree(tmp_path / "second")
            planned(plan_axpy)(x, y, out, 7, False)
            assert torch.compiler.save_cache_artifacts() is None
        assert len(recorder.launches) == 3

    def test_nothing_to_launch(self, recorder) -> None:
        planned(plan_axpy)(torch.ones(0), None, torch.ones(0), 0, False)
        assert not recorder.launches

    def test_a_cluster(self, recorder) -> None:
        x = torch.ones(512)
        plan = plan_kernel(axpy_kernel, (4,), (x, x, x, 0), (512, 1), cluster=2, FACTOR=1.0, BLOCK=128, num_warps=8)
        plan(x.data_ptr(), x.data_ptr(), x.data_ptr(), 0)
        # Triton's launcher multiplies the first extent of the grid.
        assert recorder.launches[0].grid == (2, 1, 1)
        assert recorder.launches[0].packed[:2] == (8, 2)

    def test_a_dependent_launch(self, recorder) -> None:
        x = torch.ones(128)
        for dependent in (False, True):
            options = {"launch_pdl": True} if dependent else {}
            plan = plan_kernel(axpy_kernel, (1,), (x, x, x, 0), (128, 1), FACTOR=1.0, BLOCK=128, **options)
            plan(x.data_ptr(), x.data_ptr(), x.data_ptr(), 0)
        assert [one.dependent for one in recorder.launches] == [False, True]

    def test_scratch_memory(self, recorder, monkeypatch) -> None:
        # No kernel of ours needs any, but a profiler may instrument one.
        monkeypatch.setattr(launch_plan, "_passed_on", with_scratch(launch_plan._passed_on))
        monkeypatch.setattr(_allocation, "_allocator", SimpleNamespace(get=lambda: lambda *request: request))
        x = torch.ones(512)
        plan = plan_kernel(axpy_kernel, (4,), (x, x, x, 0), (512, 1), FACTOR=1.0, BLOCK=128)
        plan(x.data_ptr(), x.data_ptr(), x.data_ptr(), 0)
        assert recorder.launches[0].scratch == ((4 * 24, 1, STREAM), None)
        assert recorder.launches[0].arguments[3:6] == (0, 512, 1)

    def test_an_int_that_varies_must_not_be_specialised_on(self, recorder) -> None:
        x = torch.ones(128)
        with pytest.raises(AssertionError, match="axpy_kernel"):
            plan_kernel(axpy_kernel, (1,), (x, x, x, 0, 128), (1,), FACTOR=1.0, BLOCK=128)

    def test_descriptors_are_encoded_once_for_each_address(self, recorder) -> None:
        call = planned(plan_copy)
        x, out, other = (torch.zeros(128, 256, dtype=E4M3) for _ in range(3))
        for source in (x, x, other):
            call(source, out)
        assert recorder.encoded == [x.data_ptr(), out.data_ptr(), other.data_ptr()]
        expected = [("encoded", x.data_ptr()), 128, 256, 256, 1, ("encoded", out.data_ptr()), 128, 256, 256, 1, 256]
        assert list(recorder.launches[1].arguments) == expected
        assert recorder.launches[2].arguments[0] == ("encoded", other.data_ptr())

    def test_their_number_is_bounded(self, recorder, monkeypatch) -> None:
        monkeypatch.setattr(launch_plan, "_MAX_DESCRIPTORS", 1)
        call = planned(plan_copy)
        x, out, other = (torch.zeros(64, 128, dtype=E4M3) for _ in range(3))
        for source in (x, other, x):
            call(source, out)
        assert recorder.encoded == [t.data_ptr() for t in (x, out, other, x)]

    def test_plans_keep_no_tensor_alive(self, recorder) -> None:
        call = planned(plan_copy)
        x = torch.zeros(64, 128, dtype=E4M3)
        alive = weakref.ref(x)
        call(x, torch.zeros(64, 128, dtype=E4M3))
        del x
        assert alive() is None

    def test_hooks_of_profilers_are_called(self, recorder) -> None:
        call = planned(plan_axpy)
        x = torch.ones(128)
        call(x, x, x, 0, True)
        seen: list[tuple[str, dict[str, Any]]] = []
        enter, leave = (
            lambda details: seen.append(("enter", details.get())),
            lambda details: seen.append(("exit", {})),
        )
        knobs.runtime.launch_enter_hook.add(enter)
        knobs.runtime.launch_exit_hook.add(leave)
        try:
            call(x, x, x, 0, True)
        finally:
            knobs.runtime.launch_enter_hook.remove(enter)
            knobs.runtime.launch_exit_hook.remove(leave)
        call(x, x, x, 0, True)
        assert [when for when, _ in seen] == ["enter", "exit"]
        assert seen[0][1]["name"] == "axpy_kernel"
        assert seen[0][1]["stream"] == STREAM
        assert len(recorder.launches) == 3


def axpy(x: Tensor, y: Tensor | None, shift: int, double: bool) -> Tensor:
    return (2 * x if double else x) + shift + (0 if y is None else y)


@pytest.mark.gpu
class TestOnTheGPU:
    def test_one_plan_for_many_addresses(self) -> None:
        call = planned(plan_axpy)
        for size, elements in ((1000, 0), (1000, 0), (1000, 1), (1000, 3), (1000, 0), (77, 2)):
            for shift in (0, 1, 5, 16):
                x, y = shifted(size, elements, "cuda"), shifted(size, elements, "cuda")
                out = torch.full((size,), float("nan"), device="cuda")
                call(x, y, out, shift, True)
                torch.testing.assert_close(out, axpy(x, y, shift, True))
                call(x, None, out, shift, False)
                torch.testing.assert_close(out, axpy(x, None, shift, False))

    def test_descriptors(self) -> None:
        call = planned(plan_copy)
        for shape in ((128, 256), (64, 1024), (128, 256)):
            for _ in range(3):
                x = torch.randn(shape, device="cuda").to(E4M3)
                out = torch.zeros(shape, device="cuda").to(E4M3)
                call(x, out)
                assert torch.equal(out.view(torch.uint8), x.view(torch.uint8))

    def test_on_the_current_stream(self) -> None:
        call = planned(plan_axpy)
        x, out = torch.zeros(1 << 20, device="cuda"), torch.empty(1 << 20, device="cuda")
        call(x, None, out, 0, False)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            x.fill_(3)
            call(x, None, out, 0, False)
        torch.cuda.current_stream().synchronize()
        assert not stream.query()
        stream.synchronize()
        assert (out == 3).all()

    def test_streams_in_threads(self) -> None:
        call = planned(plan_axpy)
        outs: list[Tensor] = []

        def work(value: float) -> None:
            with torch.cuda.stream(torch.cuda.Stream()):
                x = torch.full((4096,), value, device="cuda")
                for _ in range(100):
                    out = torch.empty_like(x)
                    call(x, None, out, 1, False)
                torch.cuda.current_stream().synchronize()
                outs.append(out - value)

        threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outs) == 4
        assert all((out == 1).all() for out in outs)

    def test_descriptors_in_a_new_thread(self) -> None:
        """Which nothing has made enter the context of the device yet."""
        call = planned(plan_copy)
        source = torch.randn(128, 256, device="cuda").to(E4M3)
        outs = [torch.empty_like(source) for _ in range(3)]
        call(source, outs[0])
        threads = [threading.Thread(target=call, args=(source, out)) for out in outs[1:]]
        for thread in threads:
            thread.start()
            thread.join()
        torch.cuda.synchronize()
        assert all(torch.equal(out.view(torch.uint8), source.view(torch.uint8)) for out in outs)

    def test_captured_in_a_cuda_graph(self) -> None:
        axpy_call, copy_call = planned(plan_axpy), planned(plan_copy)
        x, y, out = (torch.randn(512, device="cuda") for _ in range(3))
        source, copied = (torch.randn(128, 256, device="cuda").to(E4M3) for _ in range(2))
        axpy_call(x, y, torch.empty_like(out), 2, False)
        copy_call(source, torch.empty_like(copied))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            axpy_call(x, y, out, 3, False)
            copy_call(source, copied)
        out.zero_()
        x.add_(1)
        graph.replay()
        torch.testing.assert_close(out, axpy(x, y, 3, False))
        assert torch.equal(copied.view(torch.uint8), source.view(torch.uint8))

    def test_hooks_of_profilers_are_called(self) -> None:
        call = planned(plan_axpy)
        x = torch.ones(128, device="cuda")
        seen: list[dict[str, Any]] = []
        hook = lambda details: seen.append(details.get())  # noqa: E731
        call(x, x, torch.empty_like(x), 0, True)
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            call(x, x, torch.empty_like(x), 0, True)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert [details["name"] for details in seen] == ["axpy_kernel"]

    def test_on_the_tensors_device(self) -> None:
        if torch.cuda.device_count() < 2:
            return  # a gpu test is never skipped
        call = planned(plan_axpy)
        for device in ("cuda:1", "cuda:0", "cuda:1"):
            x = torch.randn(300, device=device)
            out = torch.empty_like(x)
            call(x, None, out, 1, False)
            torch.testing.assert_close(out, x + 1)
            assert torch.cuda.current_device() == 0
