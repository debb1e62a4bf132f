"""The fastest configuration of each 2:4 GEMM, measured when the user asks for it and kept on disk.

Sizes fall into buckets, in which they differ by at most an eighth.  Each bucket has a file, in a folder for the kind of
device, the versions of PyTorch and Triton, and the state of the kernel's sources.
"""

import json
import logging
import os
import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from uuid import uuid4

import torch

from sparse_compile.kernels.configs import Config, configs
from sparse_compile.kernels.problem import Problem
from sparse_compile.kernels.selfcheck import ELEMENTS, check_variant, random_operands, undisturbed

logger = logging.getLogger(__name__)

# What the speed of a configuration depends on.
_SOURCES = ("configs.py", "shared_memory.py", "sparse_gemm.py", "sparse_gemm_asm.py", "sparse_gemm_kernel.py")
_ROUNDS = 7
_LAUNCHES = 20  # of a configuration in a round


def lookup(problem: Problem, device: torch.device) -> Config | None:
    """The configuration that was the fastest for the problem's bucket; None if it was never tuned.

    Raises:
        ValueError: its file holds something else.
    """
    path = _path(problem, device)
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        # Who never tunes need not have a folder for it.
        return None
    try:
        return Config(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no configuration of the sparse GEMM ({error}); remove it") from error


def tune(problem: Problem, device: torch.device) -> Config:
    """Time every configuration of the sparse GEMM on random operands, keep the fastest and return it.

    Plans that were made before do not change.

    Args:
        device: a GPU with kernels.

    Raises:
        OSError: the choice can't be written.
        SparseCompileError: a configuration computes a wrong product.
    """
    path = _path(problem, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    start = perf_counter()
    candidates = list(configs())
    for config in candidates:
        check_variant(config, problem, device)
    times = measure(problem, candidates, device)
    best = min(times, key=times.__getitem__)
    # Processes may tune at the same time; who reads the file meanwhile finds one of their choices, whole.
    new = path.with_suffix(f".{uuid4().hex}")
    new.write_text(json.dumps(asdict(best)) + "\n")
    os.replace(new, path)
    logger.info("tuned %s in %.1f s: %s, %.1f us", problem, perf_counter() - start, best, times[best])
    return best


def measure(problem: Problem, candidates: Iterable[Config], device: torch.device) -> dict[Config, float]:
    """Median microseconds of the product.  In CUDA graphs, so that no host time is in them, which take turns."""
    from sparse_compile.kernels import sparse_gemm  # on first use: it imports Triton

    with undisturbed(device), torch.cuda.device(device):
        generator = torch.Generator(device).manual_seed(0)
        # Normal, as trained weights and activations nearly are: how fast a GPU may run depends on its data.
        normal = torch.randn(ELEMENTS, generator=generator, device=device, dtype=torch.float32)
        elements = (normal * 80).clamp(-448, 448).to(problem.dtype)
        values, metadata, dense = random_operands(problem, elements, generator)
        scale_inv = torch.full((1,), 2.0**-12, device=device, dtype=torch.float32)
        dense_scale_inv = scale_inv.repeat(problem.columns) if problem.scaled else None
        shape = (problem.rows, problem.columns)
        out = torch.empty(shape[::-1] if problem.transpose else shape, device=device, dtype=problem.out_dtype)
        tensors = (values, metadata, dense, scale_inv, dense_scale_inv, out)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]

        graphs = {}
        for config in candidates:
            multiply = sparse_gemm.plan(config, problem.accurate, *tensors, problem.transpose)
            graphs[config] = torch.cuda.CUDAGraph()
            # Other threads may go on using the device.
            with torch.cuda.graph(graphs[config], capture_error_mode="thread_local"):
                for _ in range(_LAUNCHES):
                    multiply(*addresses)

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times: dict[Config, list[float]] = {config: [] for config in graphs}
        for _ in range(_ROUNDS):
            for config, graph in graphs.items():
                start.record()
                graph.replay()
                end.record()
                end.synchronize()
                times[config].append(start.elapsed_time(end) * 1000 / _LAUNCHES)
        return {config: statistics.median(measured) for config, measured in times.items()}


def _path(problem: Problem, device: torch.device) -> Path:
    """The file of the problem's bucket."""
    return _folder(device) / _file_name(f"{_bucket(problem)}.json")


def _bucket(problem: Problem) -> Problem:
    """The largest problem of its bucket: sizes rounded up to three bits below the leading one."""
    return replace(
        problem,
        rows=_round_up(problem.rows),
        columns=_round_up(problem.columns),
        contraction=_round_up(problem.contraction),
    )


def _round_up(size: int) -> int:
    step = 1 << max(0, size.bit_length() - 4)
    return -(-size // step) * step


@cache
def _folder(device: torch.device) -> Path:
    named = os.environ.get("SPARSE_COMPILE_CACHE_DIR")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    sources = sha256(b"".join((Path(__file__).parent / source).read_bytes() for source in _SOURCES)).hexdigest()
    parts = ("sparse_gemm", torch.cuda.get_device_name(device), torch.__version__, version("triton"), sources[:16])
    return (Path(named) if named else Path(caches) / "sparse_compile") / _file_name("-".join(parts))


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]", "_", text)
