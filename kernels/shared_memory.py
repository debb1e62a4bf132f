"""Where the shared-memory buffers of a Gluon kernel lie: what inline assembly needs and the language does not tell.

A buffer's address is the symbol ``global_smem`` plus an offset that Triton's allocation pass chooses, after the kernel
was specialised.  So the offsets are constexpr arguments of the kernel and results of its compilation: compile, run the
same pass on the text of the compiled kernel, compile again with what it says, until the kernel was compiled with the
offsets that it has.  No kernel runs with offsets that were not verified this way.
"""

import re
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend, get_ptx_version_from_options

_CAPABILITY = 90
_ALLOCATION = re.compile(
    r"ttg\.local_alloc\s*\{allocation\.offset = (\d+) : i32\} : \(\) -> !ttg\.memdesc<((?:\d+x)+)\w+,"
)
# One compilation finds the offsets and one verifies them; a change of offsets can't move the buffers again.
_MAX_COMPILATIONS = 3


def resolve_offsets(
    compile_kernel: Callable[[dict[str, int]], Any], buffers: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """The offset in bytes of each buffer, verified.

    Args:
        compile_kernel: compiles the kernel, without running it, with these offsets as its constexpr arguments.
        buffers: the argument that takes a buffer's offset -> the buffer's shape, by which it is found.

    Raises:
        RuntimeError: a buffer is not found, or the offsets do not settle.
    """
    offsets = dict.fromkeys(buffers, 0)
    for _ in range(_MAX_COMPILATIONS):
        compiled = compile_kernel(offsets)
        found = _allocate(compiled.asm["ttgir"])
        missing = {name: shape for name, shape in buffers.items() if shape not in found}
        if missing:
            raise RuntimeError(f"shared-memory buffers {missing} are not among those allocated, {found}")
        settled, offsets = offsets, {name: found[shape] for name, shape in buffers.items()}
        if settled == offsets:
            return offsets
    raise RuntimeError(f"shared-memory offsets do not settle: compiled with {settled}, allocated at {offsets}")


def _allocate(ttgir: str) -> dict[tuple[int, ...], int]:
    """Shape -> offset of the buffers of a kernel, by Triton's own passes up to the allocation of shared memory."""
    backend = CUDABackend(GPUTarget("cuda", _CAPABILITY, 32))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(ttgir)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    module.context = context
    ptx_version = get_ptx_version_from_options(backend.parse_options({}), _CAPABILITY)
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, _CAPABILITY, ptx_version)
    manager.run(module, "allocate_shared_memory")
    allocations = [
        (tuple(int(size) for size in shape.split("x")[:-1]), int(offset))
        for offset, shape in _ALLOCATION.findall(str(module))
    ]
    if len(allocations) != len(dict(allocations)):
        raise RuntimeError(f"shared-memory buffers can't be told apart by their shapes: {allocations}")
    return dict(allocations)
