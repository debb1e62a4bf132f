"""The sparse GEMM of experts: fprop and dgrad of tokens that lie sorted by expert, and wgrad over those of each.

    fprop:  out[t, r] = (sum over c of A[e, r, c] * B[t, c]) * dense_scale_inv[t] * scale_inv[e], e the expert of t
    wgrad:  out[e, r, d] = (sum over the tokens t of expert e of A[r, t] * B[d, t]) * scale_inv[e]

FP8 alone.  Operands as in ``reference.grouped``.  The routing is read on the device: a first launch makes a table of
blocks of tokens with one expert each (``expert_blocks``), and the grid is that of multiprocessors, whatever it says.

Not used by default: these launches have not run on a GPU yet.
"""

import torch
from torch import Tensor

from sparse_compile.kernels.expert_blocks import most_blocks, plan_expert_blocks
from sparse_compile.kernels.formats import PAD, check_buffer, check_fp8, metadata_shape, values_shape
from sparse_compile.kernels.grouped_ops import FEATURES_MULTIPLE
from sparse_compile.kernels.launch_plan import LaunchPlan, UncachedPlan, planned
from sparse_compile.kernels.sparse_gemm.configs import Config, choose, contraction_stages
from sparse_compile.kernels.sparse_gemm.grouped_selfcheck import GroupedVariant, check_grouped
from sparse_compile.kernels.sparse_gemm.kernel import COLUMNS, CONTRACTION
from sparse_compile.kernels.sparse_gemm.plan import plan_grouped_gemm, sm_count

_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@planned
def launch_grouped_sparse_gemm(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    offsets: Tensor,
    out: Tensor,
) -> LaunchPlan:
    """Multiply each token with the matrix of its expert.

    Args:
        values, metadata: FP8 ``[E, R, padded(C) / 2]`` and int32 ``[E, padded(C) / 128, padded(R) / 16, 32, 2]``, R a
            multiple of 64.
        dense: FP8 ``[T, C]``, C a multiple of 16.
        scale_inv: fp32 ``[E]``; dense_scale_inv: fp32 ``[T]`` or None.
        offsets: int32 or int64 ``[E]``, where the tokens of each expert end.
        out: bf16, fp16 or fp32 ``[T, R]``; rows beyond the last offset are left as they are.

    Raises:
        ValueError: a tensor has another shape, dtype, layout, alignment or device.
        SparseCompileError: the kernel's check on this device found a wrong product.
        RuntimeError: the kernel is first used, and so to be checked, while a CUDA graph is captured.
    """
    experts, rows, _ = values.shape
    tokens, contraction = dense.shape
    check_fp8("values", values)
    check_fp8("dense", dense)
    _check_multiples(R=(rows, FEATURES_MULTIPLE), C=(contraction, 16))
    check_buffer("values", values, (experts, *values_shape(rows, contraction)), values.dtype, dense.device)
    check_buffer("metadata", metadata, (experts, *metadata_shape(rows, contraction)), torch.int32, dense.device)
    check_buffer("dense", dense, (tokens, contraction), dense.dtype, dense.device)
    check_buffer("scale_inv", scale_inv, (experts,), torch.float32, dense.device)
    if dense_scale_inv is not None:
        check_buffer("dense_scale_inv", dense_scale_inv, (tokens,), torch.float32, dense.device)
    _check_out(out, (tokens, rows), dense.device)
    _check_aligned(values=values, metadata=metadata, dense=dense, out=out)
    if tokens == 0:
        return UncachedPlan(lambda: None)
    # As if all experts had as many tokens.
    even = -(-tokens // experts)
    config = choose(rows * experts, even, contraction_stages(contraction, 1), sm_count(out.device))
    variant = GroupedVariant(
        over_tokens=False, dtype=values.dtype, dense_dtype=dense.dtype, out_dtype=out.dtype,
        scaled=dense_scale_inv is not None, transpose=True,
    )  # fmt: skip
    check_grouped(config, variant, out.device, plan_tokens)
    return plan_tokens(config, values, metadata, dense, scale_inv, dense_scale_inv, offsets, out)


def plan_tokens(
    config: Config, values: Tensor, metadata: Tensor, dense: Tensor, scale_inv: Tensor, dense_scale_inv: Tensor | None,
    offsets: Tensor, out: Tensor, transpose: bool = True, waves: int | None = None,
) -> LaunchPlan:  # fmt: skip
    """The plan of ``launch_grouped_sparse_gemm`` for a config; arguments as there, checked already."""
    blocks = most_blocks(dense.shape[0], offsets.shape[0], config.block_d)
    new_table, table, find_blocks = plan_expert_blocks(offsets, dense.shape[0], config.block_d)
    operands = (values, metadata, dense, scale_inv, dense_scale_inv)
    multiply = plan_grouped_gemm(config, COLUMNS, *operands, out, table, blocks, transpose, waves)

    def run(
        values: int, metadata: int, dense: int, scale_inv: int, dense_scale_inv: int | None, offsets: int, out: int
    ) -> None:
        table = new_table()
        find_blocks(offsets, table.data_ptr())
        multiply(values, metadata, dense, scale_inv, dense_scale_inv, out, out, table.data_ptr())

    return run


@planned
def launch_grouped_wgrad(
    values: Tensor, metadata: Tensor, dense: Tensor, scale_inv: Tensor, offsets: Tensor, out: Tensor, transpose: bool
) -> LaunchPlan:
    """Multiply over the tokens of each expert, in accurate sums.

    Args:
        values, metadata: of the 2:4 operand, FP8 ``[R, grouped_columns]``, R a multiple of 64.
        dense: FP8 ``[D, grouped_columns]``, D a multiple of 64.
        scale_inv: fp32 ``[E]``.
        offsets: int32 or int64 ``[E]``, where the tokens of each expert end.
        out: bf16, fp16 or fp32 ``[E, R, D]``, or ``[E, D, R]`` with ``transpose``; zero where an expert has no tokens.

    Raises:
        ValueError: a tensor has another shape, dtype, layout, alignment or device.
    """
    experts, total = offsets.shape[0], dense.shape[1]
    rows, columns = values.shape[0], dense.shape[0]
    check_fp8("values", values)
    check_fp8("dense", dense)
    _check_multiples(R=(rows, FEATURES_MULTIPLE), D=(columns, FEATURES_MULTIPLE))
    check_buffer("values", values, values_shape(rows, total), values.dtype, dense.device)
    check_buffer("metadata", metadata, metadata_shape(rows, total), torch.int32, dense.device)
    check_buffer("dense", dense, (columns, total), dense.dtype, dense.device)
    check_buffer("scale_inv", scale_inv, (experts,), torch.float32, dense.device)
    _check_out(out, (experts, columns, rows) if transpose else (experts, rows, columns), dense.device)
    _check_aligned(values=values, metadata=metadata, dense=dense, out=out)
    if total == 0:
        return UncachedPlan(out.zero_)
    config = choose(rows * experts, columns, -(-total // PAD // experts), sm_count(out.device))
    variant = GroupedVariant(
        over_tokens=True, dtype=values.dtype, dense_dtype=dense.dtype, out_dtype=out.dtype, scaled=False,
        transpose=transpose,
    )  # fmt: skip
    check_grouped(config, variant, out.device, plan_wgrad)
    multiply = plan_wgrad(config, values, metadata, dense, scale_inv, None, offsets, out, transpose)
    return lambda values, metadata, dense, scale_inv, offsets, out: multiply(
        values, metadata, dense, scale_inv, None, offsets, out
    )


def plan_wgrad(
    config: Config, values: Tensor, metadata: Tensor, dense: Tensor, scale_inv: Tensor, dense_scale_inv: Tensor | None,
    offsets: Tensor, out: Tensor, transpose: bool, waves: int | None = None,
) -> LaunchPlan:  # fmt: skip
    """The plan of ``launch_grouped_wgrad`` for a config; arguments as there, checked already, no scale of rows."""
    total = dense.shape[1]
    # The operands do not tell how many tokens they have; that they have columns enough is their makers' matter.
    blocks = total // PAD
    new_table, table, find_blocks = plan_expert_blocks(offsets, total, PAD, blocks)
    operands = (values, metadata, dense, scale_inv, dense_scale_inv)
    multiply = plan_grouped_gemm(config, CONTRACTION, *operands, out, table, blocks, transpose, waves)

    def run(
        values: int, metadata: int, dense: int, scale_inv: int, dense_scale_inv: None, offsets: int, out: int
    ) -> None:
        table = new_table()
        find_blocks(offsets, table.data_ptr())
        multiply(values, metadata, dense, scale_inv, dense_scale_inv, out, out, table.data_ptr())

    return run


def _check_multiples(**sizes: tuple[int, int]) -> None:
    for name, (size, multiple) in sizes.items():
        if size % multiple != 0 or size == 0:
            raise ValueError(f"{name} is {size}; needed is a multiple of {multiple}")


def _check_out(out: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if out.dtype not in _OUT_DTYPES:
        raise ValueError(f"out is {out.dtype}; allowed are {', '.join(map(str, _OUT_DTYPES))}")
    check_buffer("out", out, shape, out.dtype, device)


def _check_aligned(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.data_ptr() % 16 != 0:
            raise ValueError(f"{name} starts at address {tensor.data_ptr():#x}; needed is a multiple of 16")
