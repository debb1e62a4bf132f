"""Triton's compiler for Hopper on a machine without a GPU: what it compiles is never loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget

from sparse_compile.kernels.sparse_gemm import plan as plan_module


class HopperDriver:
    """What Triton asks of a driver until a kernel is compiled; its device is no real one's, nor are its kernels."""

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def plans_that_only_compile(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans of 2:4 GEMMs stop short of loading what they compiled, which is returned."""
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not nvdisasm.exists():
        pytest.skip(f"this Triton comes without NVIDIA's tools: no {nvdisasm}")

    def compile_only(kernel: Any, grid: Any, varying: Any, sizes: Any, *, cluster: int, **constants: Any) -> Any:
        return kernel.warmup(*varying, *sizes, grid=grid, **constants)

    monkeypatch.setattr(plan_module, "plan_kernel", compile_only)
    monkeypatch.setattr(plan_module, "sm_count", lambda device: 132)
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(HopperDriver())
    yield
    triton.runtime.driver._active = active
