"""Each variant of the sparse GEMM of experts is checked on the device before it is first used there.

As in ``selfcheck``: small integers, whose products must be right to the last bit; here with experts that have many
tokens, few or none, blocks of tokens that end where others begin, and tokens that are nobody's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from sparse_compile.errors import SparseCompileError
from sparse_compile.kernels import reference
from sparse_compile.kernels.formats import PAD, grouped_columns
from sparse_compile.kernels.sparse_gemm.configs import BLOCK_R, STAGE_BYTES, Config
from sparse_compile.kernels.sparse_gemm.problem import Problem
from sparse_compile.kernels.sparse_gemm.selfcheck import ELEMENTS, random_operands
from sparse_compile.torch_internals.autocast import plain_arithmetic

_LARGEST = 3  # magnitude of the elements
_TILES = 3  # that each cluster multiplies, at least
_NOBODYS = 5  # tokens beyond the last expert's
_EXPERTS = 9
_UNTOUCHED = 77.0

passed: set[tuple[Config, "GroupedVariant", torch.device]] = set()
_lock = Lock()


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedVariant:
    """Code that multiplies for experts.

    Args:
        over_tokens: whether tokens are the contraction, as in wgrad, or rows of B.
        scaled: whether each row of B has a scale.
        transpose: whether out is stored ``[..., columns, rows]``.
    """

    over_tokens: bool
    dtype: torch.dtype
    dense_dtype: torch.dtype
    out_dtype: torch.dtype
    scaled: bool
    transpose: bool


# Plans a launch: config, operands, offsets, out, transposed, waves.
Planner = Callable[..., Callable[..., Any]]


def check_grouped(config: Config, variant: GroupedVariant, device: torch.device, plan: Planner) -> None:
    """Check the code that multiplies so, once for each device and process.

    Args:
        plan: plans a launch of ``(values, metadata, dense, scale_inv, dense_scale_inv, offsets, out)``, and is called
            with the config, these, whether out is transposed, and in how many waves; the plan with the addresses of
            these.

    Raises:
        SparseCompileError: the result is wrong.
        RuntimeError: a CUDA graph is being captured.
    """
    with _lock:
        if (config, variant, device) in passed:
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the sparse GEMM of experts is first used while a CUDA graph is captured, and must be checked before "
                "that: run one step with the same shapes before the capture"
            )
        _check(config, variant, device, plan)
        passed.add((config, variant, device))


def _check(config: Config, variant: GroupedVariant, device: torch.device, plan: Planner) -> None:
    with plain_arithmetic():
        operands, offsets, expected, written = _example(config, variant, device)
        out = torch.empty_like(expected)
        tensors = (*operands, offsets, out)
        for launch, waves in (("first", 1), ("second", 2)):
            multiply = plan(config, *tensors, variant.transpose, waves)
            out.fill_(_UNTOUCHED)
            multiply(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
            wrong = int((out[:written] != expected[:written]).sum())
            spilled = int((out[written:] != _UNTOUCHED).sum())
            if wrong or spilled:
                fault = f"{wrong} of {expected.numel()} elements are wrong"
                if spilled:
                    fault = f"{spilled} elements of tokens that are nobody's were written"
                raise SparseCompileError(
                    "the check of the sparse GEMM of experts",
                    f"{variant}, {config}",
                    f'on the {launch} launch, {fault}. options={{"sste.recipe": "fp8"}} avoids the kernel',
                )


def _example(
    config: Config, variant: GroupedVariant, device: torch.device
) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor, int]:
    """Operands, offsets, what is expected of them, and how many of its rows are written."""
    generator = torch.Generator(device).manual_seed(0)
    elements = torch.randint(-_LARGEST, _LARGEST + 1, (ELEMENTS,), generator=generator, device=device)
    clusters = torch.cuda.get_device_properties(device).multi_processor_count // config.cluster
    # Of the last row of clusters, a second block has nothing, and a second warpgroup neither.
    rows = BLOCK_R * config.cluster + 64
    tall = 2
    scale_inv = 2.0 ** -torch.arange(_EXPERTS, device=device).remainder(4).float()
    if variant.over_tokens:
        # More stages than the ring holds, and as many as are added up at once, and one more; few, and none.
        counts = [PAD * 17 + 1, 0, 3, PAD, PAD * 16, 0, 200, 1, 0]
        wide = -(-_TILES * clusters // (tall * (len(counts) - 3)))
        columns = wide * config.block_d - config.block_d // 2
        columns = columns // 64 * 64 + 64
        tokens = sum(counts) + _NOBODYS
        offsets = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
        problem = _problem(variant, rows, columns, grouped_columns(tokens, _EXPERTS))
        values, metadata, dense = random_operands(problem, elements, generator)
        rest = (offsets, variant.out_dtype, variant.transpose)
        expected = reference.grouped_wgrad_sparse_mm(values, metadata, dense, scale_inv, *rest)
        return (values, metadata, dense, scale_inv, None), offsets, expected, _EXPERTS
    # Blocks that are whole, and not; experts of one token, and of none.
    many = -(-_TILES * clusters // tall)
    counts = [many * config.block_d + 7, 0, 1, config.block_d, 0, 2 * config.block_d - 1, 33, 0, config.block_d + 1]
    tokens = sum(counts) + _NOBODYS
    offsets = torch.tensor(counts, device=device).cumsum(0, dtype=torch.int32)
    contraction = (config.stages + 2) * STAGE_BYTES - 48
    problem = _problem(variant, rows, tokens, contraction)
    matrices = [random_operands(problem, elements.roll(1009 * e), generator)[:2] for e in range(_EXPERTS)]
    values, metadata = (torch.stack(parts) for parts in zip(*matrices, strict=True))
    dense = random_operands(problem, elements, generator)[2]
    scales = torch.randint(1, 256, (tokens,), generator=generator, device=device).float() / 256
    of_tokens = scales if variant.scaled else None
    operands = (values, metadata, dense, scale_inv, of_tokens)
    expected = reference.grouped_sparse_mm(*operands, offsets, variant.out_dtype, True)
    return operands, offsets, expected, sum(counts)


def _problem(variant: GroupedVariant, rows: int, columns: int, contraction: int) -> Problem:
    return Problem(
        rows=rows, columns=columns, contraction=contraction, dtype=variant.dtype, dense_dtype=variant.dense_dtype,
        out_dtype=variant.out_dtype, scaled=variant.scaled, transpose=variant.transpose, use_fast_accum=False,
    )  # fmt: skip
