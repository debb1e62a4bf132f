"""Each variant of the sparse GEMM is checked on the device before it is first used there.

It multiplies small integers, with scales of few bits: no product and no sum needs rounding, not even with the 14 bits
of FP8 tensor cores.  So the result must be right to the last bit, and one wrong row, column, scale or stage shows.
"""

from collections import defaultdict
from dataclasses import replace
from math import gcd, prod
from threading import Lock

import torch
from torch import Tensor

from sparse_compile.errors import SparseCompileError
from sparse_compile.kernels.formats import metadata_shape, values_shape
from sparse_compile.kernels.reference import sparse_mm
from sparse_compile.kernels.sparse_gemm.configs import BLOCK_R, CARRY_STAGES, STAGE_BYTES, Config
from sparse_compile.kernels.sparse_gemm.problem import Problem
from sparse_compile.torch_internals.autocast import plain_arithmetic

_LARGEST = 3  # magnitude of the elements
_SCALE_BITS = 10  # of the product of both scales
_TILES = 3  # that each cluster multiplies, at least
_GUARD = 1024  # elements before and after out
# The pairs of positions that two kept elements of four may have, as metadata encodes them.
_NIBBLES = (0x4, 0x8, 0xC, 0x9, 0xD, 0xE)
# Elements and metadata words that are drawn and then repeated: primes, so that no two rows or tiles are alike.
ELEMENTS = 2**19 - 1
_WORDS = 2**17 - 1

passed: set[tuple[Config, Problem, torch.device]] = set()
_locks: defaultdict[object, Lock] = defaultdict(Lock)


def check_variant(config: Config, problem: Problem, device: torch.device) -> None:
    """Check the code that multiplies such problems in this configuration; once for each device and process.

    Raises:
        SparseCompileError: the result is wrong.
        RuntimeError: a CUDA graph is being captured.
    """
    # More stages than the ring holds and than are added up at once; an odd and an even number of them, because the loop
    # takes two at a time.
    most = max(config.stages, CARRY_STAGES if problem.accurate else 0)
    examples = [_example(config, problem, num_k, device) for num_k in (most + 1, most + 2)]
    variant = (config, examples[0], device)
    with _locks[variant]:  # variants that threads compile side by side do not wait for each other
        if variant in passed:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the sparse GEMM ({problem}) is first used while a CUDA graph is captured, and must be checked before "
                "that: run one step with the same shapes before the capture"
            )
        for example in examples:
            _check(config, example, device)
        passed.add(variant)


def _example(config: Config, problem: Problem, num_k: int, device: torch.device) -> Problem:
    """A small problem of ``num_k`` stages that runs the same code.

    All its sizes have tails, and clusters have several tiles each, in more than one group.
    """
    high = config.group + 2
    clusters = torch.cuda.get_device_properties(device).multi_processor_count // config.cluster
    wide = max(2, -(-_TILES * clusters // high))
    # Of the last row of clusters, a second block has nothing, and a second warpgroup little to do.  Compiled kernels
    # differ by the alignment of the sizes.
    return replace(
        problem,
        rows=(high - 1) * BLOCK_R * config.cluster + 64 + gcd(problem.rows, 8),
        columns=(wide - 1) * config.block_d + 32 + gcd(problem.columns, 8),
        contraction=(num_k * STAGE_BYTES - 48) // problem.dtype.itemsize,
    )


def _check(config: Config, problem: Problem, device: torch.device) -> None:
    """Raise unless the product is right, twice in a row, also in several waves."""
    from sparse_compile.kernels.sparse_gemm.plan import plan_gemm  # on first use: it imports Triton

    with plain_arithmetic():
        generator = torch.Generator(device).manual_seed(0)
        elements = torch.randint(-_LARGEST, _LARGEST + 1, (ELEMENTS,), generator=generator, device=device)
        values, metadata, dense = random_operands(problem, elements, generator)
        scale_inv = torch.full((1,), 0.75, device=device, dtype=torch.float32)
        scales = torch.randint(1, 256, (problem.columns,), generator=generator, device=device)
        dense_scale_inv = scales.float() / 256 if problem.scaled else None
        # fp32 holds every sum, times both scales; so TF32 or another order changes nothing in what is expected, either.
        assert problem.contraction // 2 * _LARGEST**2 < 2 ** (24 - _SCALE_BITS), problem
        operands = (values, metadata, dense, scale_inv, dense_scale_inv)
        expected = sparse_mm(*operands, problem.out_dtype, problem.transpose, problem.use_fast_accum)

        buffer = torch.empty(expected.numel() + 2 * _GUARD, dtype=problem.out_dtype, device=device)
        before, flat, after = buffer.split([_GUARD, expected.numel(), _GUARD])
        out = flat.view(expected.shape)
        tensors = (*operands, out)
        for launch, waves in (("first", 1), ("second", 2)):
            multiply = plan_gemm(config, problem.accurate, *tensors, problem.transpose, waves)
            buffer.fill_(float("nan"))
            multiply(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
            fault = _fault(out, expected) or _spill(before, after)
            if fault is not None:
                raise SparseCompileError(
                    "the check of the sparse GEMM",
                    f"{problem}, {config}",
                    f'on the {launch} launch, {fault}. options={{"sste.recipe": "fp8"}} avoids the kernel',
                )


def _fault(out: Tensor, expected: Tensor) -> str | None:
    # NaN, which nobody wrote, is unequal to reference.
    wrong = out != expected
    count = int(wrong.sum())
    if count == 0:
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    return (
        f"{count} of {wrong.numel()} elements are wrong, the first at {list(first)}: {float(out[first])} instead of "
        f"{float(expected[first])}"
    )


def _spill(before: Tensor, after: Tensor) -> str | None:
    written = int((~before.isnan()).sum() + (~after.isnan()).sum())
    return f"{written} elements next to the result were written" if written else None


def random_operands(problem: Problem, elements: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Operands made of ``elements``, of a prime number, in the problem's dtypes; the metadata is random and legal.

    Returns:
        ``values`` and ``metadata`` of A ``[rows, contraction]`` (see ``formats``) and B ``[columns, contraction]``.
    """
    device = elements.device
    chosen = torch.randint(len(_NIBBLES), (_WORDS, 8), generator=generator, device=device)
    nibbles = torch.tensor(_NIBBLES, device=device)[chosen]
    words = (nibbles << torch.arange(0, 32, 4, device=device)).sum(dim=1).view(torch.int32)[::2]  # their lower halves
    return (
        _repeated(elements.to(problem.dtype), values_shape(problem.rows, problem.contraction)),
        _repeated(words, metadata_shape(problem.rows, problem.contraction, problem.dtype)),
        _repeated(elements.to(problem.dense_dtype), (problem.columns, problem.contraction)),
    )


def _repeated(items: Tensor, shape: tuple[int, ...]) -> Tensor:
    size = prod(shape)
    return items.repeat(-(-size // items.numel()))[:size].view(shape)
