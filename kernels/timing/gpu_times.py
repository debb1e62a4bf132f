"""GPU times: measured in CUDA graphs, so that no host time is in them, and kept on disk.

What is kept lies in a folder for the kind of device, the versions of PyTorch and Triton, and the state of the kernels'
sources.
"""

import json
import os
import re
import statistics
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch

from sparse_compile.from_json import from_json
from sparse_compile.torch_internals.cache_artifacts import register_artifacts

K = TypeVar("K")
T = TypeVar("T")

# What does not change the speed of a kernel.
_NO_KERNELS = ("kernel_artifacts.py", "ops.py", "reference", "selfcheck.py", "timing", "tuning.py")


def root() -> Path:
    """The folder for all devices and versions."""
    named = os.environ.get("SPARSE_COMPILE_CACHE_DIR")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(named) if named else Path(caches) / "sparse_compile"


@cache
def folder(device: torch.device) -> Path:
    kernels = Path(__file__).parents[1]
    sources = sorted(
        path for path in kernels.rglob("*.py") if not set(path.relative_to(kernels).parts) & set(_NO_KERNELS)
    )
    state = sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    parts = (torch.cuda.get_device_name(device), torch.__version__, version("triton"), state[:16])
    return root() / _file_name("-".join(parts))


def path_of(kind: str, what: object, device: torch.device) -> Path:
    """The file in which what was measured of ``what`` is kept."""
    return folder(device) / kind / _file_name(f"{what}.json")


# What could not be written, for this process.
_unwritten: dict[Path, bytes] = {}


def keep(path: Path, value: object) -> None:
    """Write a file whole: processes may measure at the same time, and who reads it finds what one of them wrote.

    Where it can't be written, this process keeps it in memory, and a warning says so.
    """
    text = f"{json.dumps(value)}\n".encode()
    _write(path, text)
    _record(_key(path), text)


def _write(path: Path, text: bytes) -> None:
    new = path.with_suffix(f".{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(text)
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        if not _unwritten:
            warnings.warn(
                f"sparse_compile: {path.parent} can't be written ({error}), so every process measures again what could "
                "be kept there; set SPARSE_COMPILE_CACHE_DIR to another folder",
                stacklevel=2,
            )
        _unwritten[path] = text


def kept(path: Path, kind: type[T]) -> T | None:
    """What a file holds; None where nothing was kept, or something else, of which a warning tells."""
    try:
        text = _unwritten.get(path) or path.read_bytes()
    except OSError:  # there is no such file, or the folder can't be read
        return None
    try:
        value = from_json(kind, text)
    except ValueError as error:
        warnings.warn(f"sparse_compile: {path} is damaged ({error}) and ignored", stacklevel=2)
        return None
    _record(_key(path), text)
    return value


def _key(path: Path) -> str:
    """Folder, kind and name: the same on each machine."""
    return str(Path(*path.parts[-3:]))


# What a process has measured, or found, goes to other machines with PyTorch's caches.
_record = register_artifacts("sparse_compile_times", lambda key, text: _write(root() / key, text))


def round_up(size: int) -> int:
    """To three bits below the leading one, so that sizes of one bucket differ by at most an eighth."""
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


def set_count(nbytes: int, device: torch.device) -> int:
    """How many sets of operands, of so many bytes each, take turns so that none is found in the L2 cache."""
    return -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // nbytes)


def median_microseconds(
    calls: Mapping[K, Sequence[Callable[[], object]]], launches: int, rounds: int
) -> dict[K, float]:
    """Median time of a call of each name, on the current device.

    The names take turns, each as a CUDA graph of so many launches.  What they compile they must have compiled before.

    Args:
        calls: of each name those that take turns in its graph, one for each set of operands.
    """
    graphs = {}
    for name, of_name in calls.items():
        graphs[name] = torch.cuda.CUDAGraph()
        turns = cycle(of_name)
        # Results take turns as well: memory that is free again would be written while it is in the L2 cache.
        results = deque[object](maxlen=len(of_name))
        # Other threads may go on using the device.
        with torch.cuda.graph(graphs[name], capture_error_mode="thread_local"):
            for _ in range(launches):
                results.append(next(turns)())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: dict[K, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1000 / launches)
    return {name: statistics.median(measured) for name, measured in times.items()}


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]", "_", text)
