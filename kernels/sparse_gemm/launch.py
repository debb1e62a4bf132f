"""2:4-sparse times dense on Hopper's sparse tensor cores, in FP8 or bf16.

    out[r, d] = (sum over c of A[r, c] * B[d, c]) * dense_scale_inv[d] * scale_inv

A ``[R, C]`` is 2:4 along c, stored as ``values`` and ``metadata`` (see ``formats``); B ``[D, C]`` is dense, row-major,
both are bf16, or each is e4m3 or e5m2; out ``[R, D]`` or ``[D, R]`` in bf16, fp16 or fp32.  ``wgmma`` adds up FP8
products with about 14 bits, of the largest number at hand.  Without fast accumulation its sums are therefore kept
small: every 2048 columns they move to a bf16 carry, but for what bf16 does not hold of them, so that nothing is lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_compile.kernels.formats import E4M3, E5M2, FP8_DTYPES, PAD, check_buffer, metadata_shape
from sparse_compile.kernels.launch_plan import NOTHING, Once, Plan, plan_kernel, planned
from sparse_compile.kernels.sparse_gemm.configs import STAGE_BYTES, Config, choose, contraction_stages
from sparse_compile.kernels.sparse_gemm.kernel import sparse_gemm_kernel
from sparse_compile.kernels.sparse_gemm.problem import Problem
from sparse_compile.kernels.sparse_gemm.ptx import BLOCKS, Ring
from sparse_compile.kernels.sparse_gemm.selfcheck import check_variant
from sparse_compile.kernels.sparse_gemm.shared_memory import resolve_places
from sparse_compile.kernels.sparse_gemm.tuning import lookup

_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# As PTX names them.
_DTYPES = {E4M3: "e4m3", E5M2: "e5m2", torch.bfloat16: "bf16"}
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
) -> Plan:
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
        return Once(out.zero_)
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
        config = choose(rows, columns, num_k, _sm_count(out.device))
    check_variant(config, problem, out.device)
    return plan(config, problem.accurate, values, metadata, dense, scale_inv, dense_scale_inv, out, transpose)


def plan(
    config: Config,
    accurate: bool,
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    out: Tensor,
    transpose: bool,
) -> Plan:
    """The plan of ``launch_sparse_gemm`` for a config; arguments as there, checked already."""
    rows, (columns, contraction) = values.shape[0], dense.shape
    # fp32 tiles leave from registers: in shared memory they would take the place of stages.
    tma_store = out.dtype != torch.float32 and out.shape[1] * out.element_size() % 16 == 0
    size = values.element_size()
    words = 2 // size
    dtypes = f"{_DTYPES[values.dtype]}.{_DTYPES[dense.dtype]}"
    ring = Ring(block_d=config.block_d, stages=config.stages, cluster=config.cluster, words=words, dtypes=dtypes)
    varying = (
        _descriptor(values, [64, 64 // size], gl.NVMMASharedLayout(64, 8 * size, 2)),
        _descriptor(metadata.flatten(1), [1, 128 * words], gl.NVMMASharedLayout(0, 32, 2)),
        _descriptor(dense, [ring.box, 128 // size], gl.NVMMASharedLayout(128, 8 * size, 2)),
        scale_inv,
        dense_scale_inv,
        _descriptor(out, [64, 64], gl.NVMMASharedLayout(128, 16, 2)) if tma_store else out,
    )
    last_metadata = metadata.shape[1] * 32 * words - 128 * words
    sizes = (rows, columns, contraction_stages(contraction, size), config.group, last_metadata)
    constants = {
        "ACCURATE": accurate,
        "TRANSPOSE": transpose,
        "OUT_BUFFERS": config.out_buffers if tma_store else 0,
        "COLUMNS_DIVISOR": 4 if columns % 4 == 0 else 1,
    }
    clusters = min(config.tiles(rows, columns), _sm_count(out.device) // config.cluster)
    return plan_kernel(
        sparse_gemm_kernel, (clusters * config.cluster,), varying, sizes,
        RING=_resolve(ring, varying, sizes, constants), **constants, num_warps=4, cluster=config.cluster,
    )  # fmt: skip


_rings: dict[tuple[object, ...], Ring] = {}


def _resolve(ring: Ring, varying: Sequence[Any], sizes: Sequence[int], constants: Mapping[str, Any]) -> Ring:
    """The ring with its place in shared memory and its descriptors, which a compilation tells."""
    # Triton also specialises on the alignment of the pointers, which changes neither.
    scaled, out = varying[4] is not None, varying[5]
    key = (ring, *constants.values(), scaled, out.base.dtype if isinstance(out, TensorDescriptor) else out.dtype)
    if key not in _rings:
        buffers = {
            "values": (ring.stages * BLOCKS, *varying[0].block_shape),
            "metadata": (ring.stages * BLOCKS, *varying[1].block_shape),
            "dense": (ring.stages * ring.block_d // ring.box, *varying[2].block_shape),
            "barriers": (2 * ring.stages, 1),
        }
        found = resolve_places(
            lambda places: sparse_gemm_kernel.warmup(
                *varying, *sizes, RING=replace(ring, **places), **constants, grid=(1,), num_warps=4
            ),
            buffers,
        )
        # The descriptors' swizzles start anew every 1024 bytes.
        assert found["values"] % 1024 == found["dense"] % 1024 == 0, found
        _rings[key] = replace(ring, **found)
    return _rings[key]


def _descriptor(tensor: Tensor, block: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    # Not the tensor's own strides, which mean nothing along a dimension of size 1.
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.shape[1], 1], block, layout)


@cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    if values.dtype not in _DTYPES:
        raise ValueError(f"values is {values.dtype}; allowed are {', '.join(map(str, _DTYPES))}")
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
