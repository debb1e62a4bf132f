"""Kernels that Triton compiled, among the cache artifacts that PyTorch saves and loads.

Inductor takes care of the kernels that it generates.  Triton finds a kernel by a hash of its source, its
specialisation, its compiler and its target, so one that does not fit is not found.
"""

import io
from importlib.util import find_spec
from typing import Any
from zipfile import ZipFile

from sparse_compile.torch_internals.cache_artifacts import register_artifacts

# Of all stages of a compilation: what is loaded, and what ``shared_memory.resolve_places`` reads.
_SUFFIXES = (".json", ".ttgir", ".ptx", ".cubin")


def record(compiled: Any) -> None:
    """Let ``torch.compiler.save_cache_artifacts`` save a compiled kernel."""
    packed = io.BytesIO()
    try:
        with ZipFile(packed, "w") as archive:
            for name, path in compiled.metadata_group.items():
                if name.endswith(_SUFFIXES):
                    archive.write(path, name)
    except OSError:  # somebody has emptied Triton's cache since this process compiled it
        return
    _record(compiled.hash, packed.getvalue())


def _write(key: str, content: bytes) -> None:
    """Into Triton's cache."""
    if find_spec("triton") is None:
        return
    from triton.runtime.cache import get_cache_manager

    manager = get_cache_manager(key)
    with ZipFile(io.BytesIO(content)) as archive:
        paths = {name: manager.put(archive.read(name), name) for name in archive.namelist()}
    metadata = next(name for name in paths if name.endswith(".json"))
    manager.put_group(metadata, paths)  # last: what has it is complete


_record = register_artifacts("sparse_compile_kernels", _write)
