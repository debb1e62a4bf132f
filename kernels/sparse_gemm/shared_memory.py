"""Where a Gluon kernel has its shared-memory buffers and its descriptors, for inline assembly: Gluon does not tell.

A buffer's address is the symbol ``global_smem`` plus an offset that Triton's allocation pass chooses, a descriptor is a
parameter of the compiled kernel, and both are known only after the kernel was specialised.  So they are constexpr
arguments of the kernel and results of its compilation: compile, run the same pass on the text of the compiled kernel,
compile again with what it says, until the kernel was compiled with the places that it has.  No kernel runs with places
that were not verified this way.
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
_DESCRIPTOR = re.compile(r"\.param \.align \d+ \.b8 \w+_param_(\d+)\[128\]")
# One compilation finds the places and one verifies them, unless a guess was right; a change of places can't move the
# buffers again.
_MAX_COMPILATIONS = 3


def resolve_places(
    compile_kernel: Callable[[dict[str, Any]], Any],
    buffers: Mapping[str, tuple[int, ...]],
    guess: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The offset in bytes of each buffer and, as ``descriptors``, the number of each parameter that is one, verified.

    Args:
        compile_kernel: compiles the kernel, without running it, with these places.
        buffers: the name of a buffer -> its shape, by which it is found.
        guess: the places that are tried first, by default none; if they are right, one compilation is enough.

    Raises:
        RuntimeError: a buffer is not found, or the places do not settle.
    """
    places = guess or {}
    for _ in range(_MAX_COMPILATIONS):
        compiled = compile_kernel(places)
        allocations = _allocate(compiled.asm["ttgir"])
        settled, places = places, {name: _find(shape, name, allocations) for name, shape in buffers.items()}
        places["descriptors"] = tuple(map(int, _DESCRIPTOR.findall(compiled.asm["ptx"])))
        if settled == places:
            return places
    raise RuntimeError(f"places in shared memory do not settle: compiled with {settled}, allocated at {places}")


def _find(shape: tuple[int, ...], name: str, allocations: list[tuple[tuple[int, ...], int]]) -> int:
    offsets = [offset for allocated, offset in allocations if allocated == shape]
    if len(offsets) != 1:
        raise RuntimeError(f"{name} needs one shared-memory buffer of shape {shape}; allocated are {allocations}")
    return offsets[0]


def _allocate(ttgir: str) -> list[tuple[tuple[int, ...], int]]:
    """Shapes and offsets of the buffers of a kernel, by Triton's own passes up to the allocation of shared memory."""
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
    return [
        (tuple(int(size) for size in shape.split("x")[:-1]), int(offset))
        for offset, shape in _ALLOCATION.findall(str(module))
    ]
