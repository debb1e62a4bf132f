"""The fastest configuration of each 2:4 GEMM, measured when the user asks for it and kept on disk.

Sizes fall into buckets, in which they differ by at most an eighth; each bucket has a file.
"""

import logging
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from sparse_compile.kernels.sparse_gemm.configs import Config, configs
from sparse_compile.kernels.sparse_gemm.problem import Problem
from sparse_compile.kernels.sparse_gemm.selfcheck import ELEMENTS, check_variant, random_operands
from sparse_compile.kernels.timing.gpu_times import (
    keep,
    kept,
    median_microseconds,
    path_of,
    round_up,
    set_count,
)
from sparse_compile.progress import tracked
from sparse_compile.torch_internals.autocast import plain_arithmetic

logger = logging.getLogger(__name__)

_ROUNDS = 7
_LAUNCHES = 20  # of a configuration in a round


def lookup(problem: Problem, device: torch.device) -> Config | None:
    """The configuration that was the fastest for the problem's bucket; None if it was never tuned."""
    return kept(_path(problem, device), Config)


def tune(problem: Problem, device: torch.device) -> Config:
    """Time every configuration of the sparse GEMM on random operands, keep the fastest and return it.

    Plans that were made before do not change.

    Args:
        device: a GPU with kernels.

    Raises:
        SparseCompileError: a configuration computes a wrong product.
    """
    start = perf_counter()
    candidates = list(configs())
    for config in tracked(candidates, f"compiling the 2:4 GEMM for {problem}"):
        check_variant(config, problem, device)
    times = measure(problem, candidates, device)
    best = min(times, key=times.__getitem__)
    keep(_path(problem, device), asdict(best))
    logger.info("tuned %s in %.1f s: %s, %.1f us", problem, perf_counter() - start, best, times[best])
    return best


def measure(problem: Problem, candidates: Iterable[Config], device: torch.device) -> dict[Config, float]:
    """Median microseconds of the product."""
    from sparse_compile.kernels.sparse_gemm.plan import plan_gemm  # on first use: it imports Triton

    with plain_arithmetic(), torch.cuda.device(device):
        generator = torch.Generator(device).manual_seed(0)
        # Normal, as trained weights and activations nearly are: how fast a GPU may run depends on its data.
        normal = torch.randn(ELEMENTS, generator=generator, device=device, dtype=torch.float32)
        elements = (normal * 80).clamp(-448, 448)
        scale_inv = torch.full((1,), 2.0**-12, device=device, dtype=torch.float32)
        dense_scale_inv = scale_inv.repeat(problem.columns) if problem.scaled else None
        shape = (problem.rows, problem.columns)

        def operands() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
            out = torch.empty(shape[::-1] if problem.transpose else shape, device=device, dtype=problem.out_dtype)
            return (*random_operands(problem, elements, generator), scale_inv, dense_scale_inv, out)

        sets = [operands()]
        nbytes = sum(tensor.nbytes for tensor in sets[0] if tensor is not None)
        # They take turns, so that none is in the L2 cache.
        sets += [operands() for _ in range(min(_LAUNCHES, set_count(nbytes, device)) - 1)]
        addresses = [[None if tensor is None else tensor.data_ptr() for tensor in tensors] for tensors in sets]
        plans = {config: plan_gemm(config, problem.accurate, *sets[0], problem.transpose) for config in candidates}
        calls = {config: [partial(plan, *each) for each in addresses] for config, plan in plans.items()}
        return median_microseconds(calls, _LAUNCHES, _ROUNDS)


def _path(problem: Problem, device: torch.device) -> Path:
    """The file of the problem's bucket."""
    return path_of("sparse_gemm", _bucket(problem), device)


def _bucket(problem: Problem) -> Problem:
    """The largest problem of its bucket."""
    return replace(
        problem,
        rows=round_up(problem.rows),
        columns=round_up(problem.columns),
        contraction=round_up(problem.contraction),
    )
