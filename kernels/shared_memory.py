"""Where Gluon's buffers lie in shared memory.

Inline assembly addresses shared memory by byte offsets, which Gluon does not tell.  They are the outcome of Triton's
own allocation pass, so that pass is run once more on a compiled kernel's TTGIR.  The offsets are constants of the
kernel that is being compiled: it is compiled with a guess, and again if the pass disagrees, until both agree.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from tempfile import NamedTemporaryFile
from typing import Any

from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptx_version_from_options

_CAPABILITY = 90
_ALLOCATION = re.compile(r"ttg\.local_alloc(?: %\S+)?\s*\{allocation\.offset = (\d+) : i32\}")
_MAX_COMPILATIONS = 4


def resolve_offsets(
    compile_kernel: Callable[[Mapping[str, int]], Any], names: Sequence[str], guess: Mapping[str, int]
) -> dict[str, int]:
    """Byte offsets of a kernel's buffers.

    Args:
        compile_kernel: compiles the kernel with given offsets and returns Triton's compiled kernel.
        names: of the buffers, in the order of their allocation in the kernel.
        guess: offsets to try first.

    Raises:
        RuntimeError: the offsets do not settle, or the kernel allocates other buffers.
    """
    offsets = dict(guess)
    for _ in range(_MAX_COMPILATIONS):
        found = _allocations(compile_kernel(offsets).asm["ttgir"])
        if len(found) != len(names):
            raise RuntimeError(f"the kernel allocates {len(found)} buffers, expected are {len(names)}: {list(names)}")
        actual = dict(zip(names, found, strict=True))
        if actual == offsets:
            return offsets
        offsets = actual
    raise RuntimeError(f"shared-memory offsets do not settle after {_MAX_COMPILATIONS} compilations: {offsets}")


def _allocations(ttgir: str) -> list[int]:
    """Offsets of all buffers in program order, by the passes that Triton runs up to its allocation."""
    backend = CUDABackend(GPUTarget("cuda", _CAPABILITY, 32))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with NamedTemporaryFile("w", suffix=".ttgir", delete=False) as file:
        file.write(ttgir)
    try:
        module = ir.parse_mlir_module(file.name, context)
    finally:
        os.unlink(file.name)
    module.context = context
    options = backend.parse_options({"num_warps": 8})
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    ptx_version = get_ptx_version_from_options(options, _CAPABILITY)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, _CAPABILITY, ptx_version)
    manager.run(module, "allocate_shared_memory")
    return [int(offset) for offset in _ALLOCATION.findall(str(module))]
