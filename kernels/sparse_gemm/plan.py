"""How the kernel is launched for a configuration: descriptors, grid, and the places of its buffers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_compile.kernels.formats import E4M3, E5M2
from sparse_compile.kernels.launch_plan import LaunchPlan, plan_kernel
from sparse_compile.kernels.sparse_gemm.configs import Config, contraction_stages, waves_of
from sparse_compile.kernels.sparse_gemm.kernel import COLUMNS, CONTRACTION, ONE, sparse_gemm_kernel
from sparse_compile.kernels.sparse_gemm.ptx import BLOCKS, SmemPipeline
from sparse_compile.kernels.sparse_gemm.shared_memory import resolve_places

# As PTX names them.
PTX_DTYPES = {E4M3: "e4m3", E5M2: "e5m2", torch.bfloat16: "bf16"}


def plan_gemm(
    config: Config,
    accurate: bool,
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    out: Tensor,
    transpose: bool,
    waves: int | None = None,
) -> LaunchPlan:
    """The plan of ``launch_sparse_gemm`` for a config; arguments as there, checked already.

    Args:
        waves: that its tiles are cut into; None for as many as suit the process.
    """
    rows, (columns, contraction) = values.shape[0], dense.shape
    # fp32 tiles leave from registers: in shared memory they would take the place of stages.
    tma_store = out.dtype != torch.float32 and out.shape[1] * out.element_size() % 16 == 0
    size = values.element_size()
    words = 2 // size
    dtypes = f"{PTX_DTYPES[values.dtype]}.{PTX_DTYPES[dense.dtype]}"
    ring = SmemPipeline(
        block_d=config.block_d, stages=config.stages, cluster=config.cluster, words=words, dtypes=dtypes
    )
    varying = (
        _descriptor(values, [64, 64 // size], gl.NVMMASharedLayout(64, 8 * size, 2)),
        _descriptor(metadata.flatten(1), [1, 128 * words], gl.NVMMASharedLayout(0, 32, 2)),
        _descriptor(dense, [ring.box, 128 // size], gl.NVMMASharedLayout(128, 8 * size, 2)),
        scale_inv,
        dense_scale_inv,
        _descriptor(out, [64, 64], gl.NVMMASharedLayout(128, 16, 2)) if tma_store else out,
    )
    last_metadata = metadata.shape[1] * 32 * words - 128 * words
    # Of experts there are none, nor a table of their blocks.
    tiles = config.tiles(rows, columns)
    programs, waves = _grid(config, tiles, waves, out.device)
    num_k = contraction_stages(contraction, size)
    sizes = (None, None, rows, columns, num_k, config.group, last_metadata, 0, 0, 0, 0, waves)
    constants = {
        "ACCURATE": accurate,
        "TRANSPOSE": transpose,
        "OUT_BUFFERS": config.out_buffers if tma_store else 0,
        "COLUMNS_DIVISOR": 4 if columns % 4 == 0 else 1,
        "SHARED": ONE,
    }
    return plan_kernel(
        sparse_gemm_kernel, (programs,), varying, sizes,
        RING=_resolve(ring, varying, sizes, constants), **constants, num_warps=4, cluster=config.cluster,
    )  # fmt: skip


def plan_grouped_gemm(
    config: Config,
    shared: int,
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    out: Tensor,
    table: Tensor,
    blocks: int,
    transpose: bool,
    waves: int | None = None,
) -> LaunchPlan:
    """The plan of ``launch_grouped_sparse_gemm`` or, with the contraction shared, of ``launch_grouped_wgrad``.

    Args:
        table, blocks: of ``expert_blocks``; of ``config.block_d`` tokens where columns are shared, otherwise of 128.
        waves: as ``plan_gemm`` has it.
    """
    experts = scale_inv.shape[0]
    if shared == COLUMNS:
        rows, (columns, contraction) = values.shape[1], dense.shape
    else:
        rows, (columns, contraction) = values.shape[0], dense.shape
    tma_store = out.dtype != torch.float32
    ring = SmemPipeline(
        block_d=config.block_d, stages=config.stages, cluster=config.cluster, words=2,
        dtypes=f"{PTX_DTYPES[values.dtype]}.{PTX_DTYPES[dense.dtype]}", experts=shared == COLUMNS,
    )  # fmt: skip
    flat, flat_out = values.flatten(0, -2), out.flatten(0, -2)
    varying = (
        _descriptor(flat, [64, 64], gl.NVMMASharedLayout(64, 8, 2)),
        _descriptor(metadata.flatten(0, -4).flatten(1), [1, 256], gl.NVMMASharedLayout(0, 32, 2)),
        _descriptor(dense, [ring.box, 128], gl.NVMMASharedLayout(128, 8, 2)),
        scale_inv,
        dense_scale_inv,
        _descriptor(flat_out, [64, 64], gl.NVMMASharedLayout(128, 16, 2)) if tma_store else out,
        out,
        table,
    )
    row_blocks, stages = metadata.shape[-3], contraction_stages(contraction, 1)
    tiles = config.tiles(rows, columns) * experts
    if shared == COLUMNS:
        tiles = config.tiles(rows, blocks * config.block_d)
    programs, waves = _grid(config, tiles, waves, out.device)
    sizes = (
        rows, columns, stages, config.group, row_blocks * 64 - 256, experts, blocks, rows // 64, metadata.shape[-4],
        waves,
    )  # fmt: skip
    constants = {
        "ACCURATE": shared == CONTRACTION,
        "TRANSPOSE": transpose,
        "OUT_BUFFERS": config.out_buffers if tma_store else 0,
        "COLUMNS_DIVISOR": 1 if shared == COLUMNS else 64,
        "SHARED": shared,
    }
    return plan_kernel(
        sparse_gemm_kernel, (programs,), varying, sizes,
        RING=_resolve(ring, varying, sizes, constants), **constants, num_warps=4, cluster=config.cluster,
    )  # fmt: skip


def _grid(config: Config, tiles: int, waves: int | None, device: torch.device) -> tuple[int, int]:
    """How many blocks there are, and in how many waves."""
    clusters = min(tiles, sm_count(device) // config.cluster)
    if waves is None:
        waves = waves_of(tiles, clusters) if _collectives_run() else 1
    return waves * clusters * config.cluster, waves


def _collectives_run() -> bool:
    """Whether kernels of this process's collectives may hold multiprocessors of its GPU."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


_rings: dict[tuple[object, ...], SmemPipeline] = {}


def _resolve(
    ring: SmemPipeline, varying: Sequence[Any], sizes: Sequence[int | None], constants: Mapping[str, Any]
) -> SmemPipeline:
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
            _likely_places(ring, buffers, constants["OUT_BUFFERS"], scaled),
        )
        # The descriptors' swizzles start anew every 1024 bytes.
        assert found["values"] % 1024 == found["dense"] % 1024 == 0, found
        _rings[key] = replace(ring, **found)
    return _rings[key]


def _likely_places(
    ring: SmemPipeline, buffers: Mapping[str, tuple[int, ...]], out_buffers: int, scaled: bool
) -> dict[str, Any]:
    """What Triton 3.6 and 3.7 make of it: buffers lie one behind the other, the largest first."""
    size = 2 // ring.words
    values = prod(buffers["dense"]) * size
    metadata = values + prod(buffers["values"]) * size + out_buffers * 2 * 64 * 64 * 2  # of two warpgroups, 16 bits
    barriers = metadata + prod(buffers["metadata"]) * 4
    if scaled:
        barriers += 8 * triton.next_power_of_2(ring.block_d)  # the scales of two tiles
    elif not out_buffers:
        barriers += 128
    # Five parameters are a matrix's; scales are pointers.
    descriptors = (0, 5, 10, *((16 + scaled,) if out_buffers else ()))
    return {"values": values, "metadata": metadata, "dense": 0, "barriers": barriers, "descriptors": descriptors}


def _descriptor(tensor: Tensor, block: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    # Not the tensor's own strides, which mean nothing along a dimension of size 1.
    return TensorDescriptor(tensor, list(tensor.shape), [tensor.shape[1], 1], block, layout)


@cache
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
