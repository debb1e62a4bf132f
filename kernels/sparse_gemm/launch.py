"""2:4-sparse times dense on Hopper's sparse tensor cores, in FP8 or bf16.

    out[r, d] = (sum over c of A[r, c] * B[d, c]) * dense_scale_inv[d] * scale_inv

A ``[R, C]`` is 2:4 along c, stored as ``values`` and ``metadata`` (see ``formats``); B ``[D, C]`` is dense, row-major,
both are bf16, or each is e4m3 or e5m2; out ``[R, D]`` or ``[D, R]`` in bf16, fp16 or fp32.  ``wgmma`` adds up FP8
products with about 14 bits, of the largest number at hand.  Without fast accumulation its sums are therefore kept
small: every 2048 columns they move to a bf16 carry, but for what bf16 does not hold of them, so that nothing is lost.
"""

import torch
from torch import Tensor

from sparse_compile.kernels.formats import FP8_DTYPES, PAD, check_buffer, metadata_shape
from sparse_compile.kernels.launch_plan import NOTHING, LaunchPlan, UncachedPlan, planned
from sparse_compile.kernels.sparse_gemm.configs import STAGE_BYTES, choose, contraction_stages
from sparse_compile.kernels.sparse_gemm.plan import PTX_DTYPES, plan_gemm, sm_count
from sparse_compile.kernels.sparse_gemm.problem import Problem
from sparse_compile.kernels.sparse_gemm.selfcheck import check_variant
from sparse_compile.kernels.sparse_gemm.tuning import lookup

_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_STAGES = 2**16 - 1  # that the kernel can count


@planned
def launch_sparse_gemm(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    out: Tensor,
    transpose: bool,
    use_fast_accum: bool,
) -> LaunchPlan:
    """Multiply into ``out``, which is written in full.

    Args:
        values: A's kept elements, e4m3, e5m2 or bf16 ``[R, C / 2]``, C a multiple of 128.
        metadata: where they stood, every word legal (see ``formats``).
        dense: B, of the same dtype or both in FP8, ``[D, c]``, rows of a multiple of 16 bytes, c <= C; columns beyond c
            count as zero.
        scale_inv: fp32 ``[1]``.
        dense_scale_inv: fp32 ``[D]`` or None.
        out: bf16, fp16 or fp32 ``[R, D]``, or ``[D, R]`` with ``transpose``.
        transpose: whether out is transposed.
        use_fast_accum: add FP8 products up as ``wgmma`` does, without fp32 on the way; bf16 needs no such help.

    Raises:
        ValueError: a tensor has another shape, dtype, layout, alignment or device.
        SparseCompileError: the kernel's check on this device found a wrong product.
        RuntimeError: the kernel is first used, and so to be checked, while a CUDA graph is captured.
    """
    _check(values, metadata, dense, scale_inv, dense_scale_inv, out, transpose)
    if out.numel() == 0:
        return NOTHING
    if dense.numel() == 0:
        return UncachedPlan(out.zero_)
    rows, columns = values.shape[0], dense.shape[0]
    problem = Problem(
        rows=rows,
        columns=columns,
        contraction=dense.shape[1],
        dtype=values.dtype,
        dense_dtype=dense.dtype,
        out_dtype=out.dtype,
        scaled=dense_scale_inv is not None,
        transpose=transpose,
        use_fast_accum=use_fast_accum,
    )
    config = lookup(problem, out.device)
    if config is None:
        num_k = contraction_stages(problem.contraction, dense.element_size())
        config = choose(rows, columns, num_k, sm_count(out.device))
    check_variant(config, problem, out.device)
    return plan_gemm(config, problem.accurate, values, metadata, dense, scale_inv, dense_scale_inv, out, transpose)


def _check(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    out: Tensor,
    transpose: bool,
) -> None:
    if values.dim() != 2 or dense.dim() != 2:
        raise ValueError(f"values {tuple(values.shape)} and dense {tuple(dense.shape)} must have two dimensions")
    if values.dtype not in PTX_DTYPES:
        raise ValueError(f"values is {values.dtype}; allowed are {', '.join(map(str, PTX_DTYPES))}")
    dense_dtype = dense.dtype if dense.dtype in FP8_DTYPES and values.dtype in FP8_DTYPES else values.dtype
    (rows, kept), (columns, contraction), device = values.shape, dense.shape, dense.device
    if kept % (PAD // 2) != 0:
        raise ValueError(f"values has {kept} columns; needed is a multiple of {PAD // 2}")
    divisor = 16 // values.element_size()
    if contraction % divisor != 0 or contraction > 2 * kept:
        raise ValueError(f"dense has {contraction} columns; allowed are multiples of {divisor} up to {2 * kept}")
    if out.dtype not in _OUT_DTYPES:
        raise ValueError(f"out is {out.dtype}; allowed are {', '.join(map(str, _OUT_DTYPES))}")
    if contraction_stages(contraction, dense.element_size()) > _MAX_STAGES:
        raise ValueError(
            f"dense has {contraction} columns; the kernel counts up to {_MAX_STAGES} times {STAGE_BYTES} bytes"
        )
    check_buffer("values", values, (rows, kept), values.dtype, device)
    check_buffer("dense", dense, (columns, contraction), dense_dtype, device)
    check_buffer("metadata", metadata, metadata_shape(rows, 2 * kept, values.dtype), torch.int32, device)
    check_buffer("scale_inv", scale_inv, (1,), torch.float32, device)
    check_buffer("out", out, (columns, rows) if transpose else (rows, columns), out.dtype, device)
    aligned = {"values": values, "metadata": metadata, "dense": dense, "out": out, "scale_inv": scale_inv}
    if dense_scale_inv is not None:
        check_buffer("dense_scale_inv", dense_scale_inv, (columns,), torch.float32, device)
        aligned["dense_scale_inv"] = dense_scale_inv
    for name, tensor in aligned.items():
        if tensor.data_ptr() % 16 != 0:
            raise ValueError(f"{name} starts at address {tensor.data_ptr():#x}; needed is a multiple of 16")
