"""2:4-sparse FP8 GEMM on Hopper's sparse tensor cores, ``wgmma.mma_async.sp``, in Gluon.

    out[r, d] = (sum_c A[r, c] * B[d, c]) * scale_inv * dense_scale_inv[d]        or its transpose, out[d, r]

A ``[R, C]`` is 2:4 sparse along c (``values`` and ``metadata``, see ``formats``), B ``[D, C]`` dense and row-major,
both e4m3.  Accumulation is the tensor core's: fp32 registers, of which fp8 instructions keep about 14 bits.

Persistent CTAs take tiles of BLOCK_R x BLOCK_D.  One warp brings the values and B to shared memory by TMA, which also
supplies zeros beyond the edges; two warpgroups multiply, 64 rows each.  The instruction is emitted by one inline
assembly statement per stage, whose operands are the accumulator registers of a thread.  Metadata goes from global
memory straight to the registers that the instruction reads: it is loaded once as a small tensor and broadcast to the
accumulator's layout, which moves no data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_compile.kernels.formats import E4M3, check_buffer, metadata_shape
from sparse_compile.kernels.shared_memory import resolve_offsets


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Tiling of the kernel.

    Attributes:
        block_r: rows of A in a tile, 64 for each of the two warpgroups.
        block_d: rows of B in a tile: n of the instruction.
        stages: depth of the ring of shared-memory buffers; a stage holds 128 logical columns.
        group: row tiles that are visited together, so that they find their tiles of B in L2.
    """

    block_r: int = 128
    block_d: int = 256
    stages: int = 4
    group: int = 8

    def __post_init__(self) -> None:
        if self.block_r != 128:
            raise ValueError(f"block_r is {self.block_r}; two warpgroups of one instruction each take 128 rows")
        if self.block_d not in (64, 128, 256):
            raise ValueError(f"block_d is {self.block_d}; allowed are 64, 128 and 256")
        if self.stages < 2 or self.group < 1:
            raise ValueError(f"stages is {self.stages} and group {self.group}; at least 2 and 1 are needed")


BLOCK_C = gl.constexpr(128)
_BARRIERS = ("full", "empty")


@gluon.constexpr_function
def _mma_assembly(block_d):
    """Assembly and constraints of one stage: two instructions of 64 logical columns on a warpgroup's 64 rows.

    Operands, R = block_d / 2 registers each: accumulators out, accumulators in (tied), metadata words, and copies of
    one register with the shared-memory addresses of A (low half) and B (high half), in units of 16 bytes.
    """
    registers = block_d // 2
    accumulators = ", ".join(f"${i}" for i in range(registers))
    metadata, addresses = 2 * registers, 3 * registers
    lines = [
        "{",
        ".reg .b32 la, lb, ha, hb;",
        ".reg .b64 da, db;",
        ".reg .pred p;",
        f"and.b32 la, ${addresses}, 0xffff;",
        "or.b32 la, la, 0x10000;",
        f"shr.u32 lb, ${addresses}, 16;",
        "or.b32 lb, lb, 0x10000;",
        # Descriptors' upper words: swizzle mode and the distance of groups of eight rows, in units of 16 bytes.
        "mov.b32 ha, 0x80000020;",  # rows of 64 bytes
        "mov.b32 hb, 0x40000040;",  # rows of 128 bytes
        "setp.ne.b32 p, 1, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(2):
        # 64 logical columns are 32 bytes of A's rows and 64 of B's.
        lines += [
            "mov.b64 da, {la, ha};",
            "mov.b64 db, {lb, hb};",
            f"add.s64 da, da, {2 * step};",
            f"add.s64 db, db, {4 * step};",
            f"wgmma.mma_async.sp.sync.aligned.m64n{block_d}k64.f32.e4m3.e4m3 "
            f"{{{accumulators}}}, da, db, ${metadata + step}, 0, p, 1, 1;",
        ]
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"]
    constraints = ["=f"] * registers + [str(i) for i in range(registers)] + ["r"] * (2 * registers)
    return "\n".join(lines), ",".join(constraints)


_SHARED_BASE = gl.constexpr("mov.u32 $0, global_smem;")
_WARPGROUP = gl.constexpr(
    "{\n.reg .b32 t;\nmov.u32 t, %tid.x;\nshr.u32 t, t, 7;\nshfl.sync.idx.b32 $0, t, 0, 0x1f, 0xffffffff;\n}"
)
# Gluon's own wait and arrive synchronise all consumer warps, which would couple the two warpgroups.
_WAIT = gl.constexpr(
    "{\n.reg .pred P;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 P, [$1], $2;\n@P bra.uni DONE;\n"
    "bra.uni WAIT;\nDONE:\nmov.b32 $0, 0;\n}"
)
_ARRIVE = gl.constexpr(
    "{\n.reg .pred P;\nelect.sync _|P, 0xffffffff;\n@P mbarrier.arrive.shared::cta.b64 _, [$1];\nmov.b32 $0, 0;\n}"
)


@gluon.jit
def _wait(barrier, parity):
    gl.inline_asm_elementwise(_WAIT, "=r,r,r", [barrier, parity], gl.int32, False, 1)


@gluon.jit
def _arrive(barrier):
    """One arrival of this warp."""
    gl.inline_asm_elementwise(_ARRIVE, "=r,r", [barrier], gl.int32, False, 1)


@gluon.jit
def _tile(index, tiles_r, tiles_d, GROUP: gl.constexpr):
    """Row and column of a tile; GROUP rows of tiles are walked column by column."""
    per_group = GROUP * tiles_d
    first = index // per_group * GROUP
    size = min(tiles_r - first, GROUP)
    return first + index % per_group % size, index % per_group // size


@gluon.jit
def _load_metadata(metadata_ptr, stage_c, block16, row_blocks, BLOCK_R: gl.constexpr, BLOCK_D: gl.constexpr):
    """The words of one stage, so laid out that each thread holds the two of its lane.  [BLOCK_R/16, 2, 8, 1, 8]

    Dimensions: block of 16 rows, row bit 3, row % 8, -, accumulator column % 8.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 2, 1, BLOCK_D // 8, 2], [1, 1, 8, 1, 4], [8, 1, 1, 1, 1], [4, 1, 3, 2, 0])
    S3: gl.constexpr = gl.SliceLayout(3, gl.SliceLayout(4, L))
    i0 = gl.arange(0, BLOCK_R // 16, gl.SliceLayout(1, gl.SliceLayout(2, S3)))[:, None, None, None, None]
    i2 = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, S3)))[None, None, :, None, None]
    S0: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    i4 = gl.arange(0, 8, S0)[None, None, None, None, :]
    base = (stage_c.to(gl.int64) * row_blocks + block16) * 64
    return gl.load(metadata_ptr + base + (i0 * 64 + i2 * 8 + i4))


@gluon.jit
def _broadcast_metadata(words, BLOCK_R: gl.constexpr, BLOCK_D: gl.constexpr, LAYOUT: gl.constexpr):
    """Metadata in the registers of the accumulator's layout; the assertion proves that no data moves."""
    zeros = gl.full([BLOCK_R // 16, 2, 8, BLOCK_D // 8, 8], 0, gl.int32, words.type.layout)
    return gl.convert_layout(gl.reshape(words + zeros, [BLOCK_R, BLOCK_D]), LAYOUT, assert_trivial=True)


@gluon.jit
def _produce(
    values_desc, dense_desc, values_buf, dense_buf, full, empty, tiles_r, tiles_d, stages_c,
    BLOCK_R: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The warp that fills the ring: TMA loads of both operands, stage after stage, tile after tile."""
    slot = 0
    phase = 1
    for index in range(gl.program_id(0), tiles_r * tiles_d, gl.num_programs(0)):
        tile_r, tile_d = _tile(index, tiles_r, tiles_d, GROUP)
        for stage in range(stages_c):
            mbarrier.wait(empty.index(slot), phase)
            # A box counts in full, also where it reaches beyond the edge and is filled with zeros.
            mbarrier.expect(full.index(slot), values_desc.block_type.nbytes + dense_desc.block_type.nbytes)
            origin_r, origin_d = tile_r * BLOCK_R, tile_d * BLOCK_D
            tma.async_copy_global_to_shared(
                values_desc, [origin_r, stage * (BLOCK_C // 2)], full.index(slot), values_buf.index(slot)
            )
            tma.async_copy_global_to_shared(
                dense_desc, [origin_d, stage * BLOCK_C], full.index(slot), dense_buf.index(slot)
            )
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


@gluon.jit
def _consume(
    metadata_ptr, scale_inv_ptr, dense_scale_inv_ptr, out_desc, out_ptr, values_buf, dense_buf, out_buf,
    rows, columns, tiles_r, tiles_d, stages_c, row_blocks, out_stride_r, out_stride_d,
    VALUES_OFFSET: gl.constexpr, DENSE_OFFSET: gl.constexpr, FULL_OFFSET: gl.constexpr, EMPTY_OFFSET: gl.constexpr,
    BLOCK_R: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    TRANSPOSE: gl.constexpr, HAS_DENSE_SCALE: gl.constexpr, TMA_STORE: gl.constexpr,
):  # fmt: skip
    """The two warpgroups that multiply, scale and store."""
    ASSEMBLY: gl.constexpr = _mma_assembly(BLOCK_D)
    TEXT: gl.constexpr = ASSEMBLY[0]
    CONSTRAINTS: gl.constexpr = ASSEMBLY[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BLOCK_D, 32])
    VALUES_BYTES: gl.constexpr = BLOCK_R * BLOCK_C // 2
    DENSE_BYTES: gl.constexpr = BLOCK_D * BLOCK_C
    base = gl.inline_asm_elementwise(_SHARED_BASE, "=r", [], gl.int32, True, 1)
    warpgroup = gl.inline_asm_elementwise(_WARPGROUP, "=r", [], gl.int32, False, 1)
    values_base = base + VALUES_OFFSET + warpgroup * (VALUES_BYTES // 2)
    dense_base = base + DENSE_OFFSET
    slot = 0
    phase = 0
    for index in range(gl.program_id(0), tiles_r * tiles_d, gl.num_programs(0)):
        tile_r, tile_d = _tile(index, tiles_r, tiles_d, GROUP)
        block16 = tile_r * (BLOCK_R // 16)
        acc = gl.zeros([BLOCK_R, BLOCK_D], gl.float32, LAYOUT)
        words = _load_metadata(metadata_ptr, gl.to_tensor(0), block16, row_blocks, BLOCK_R, BLOCK_D)
        for stage in range(stages_c):
            # The next stage's metadata is on its way while this stage waits and multiplies.
            following = min(stage + 1, stages_c - 1)
            next_words = _load_metadata(metadata_ptr, following, block16, row_blocks, BLOCK_R, BLOCK_D)
            _wait(base + FULL_OFFSET + slot * 8, phase)
            addresses = (values_base + slot * VALUES_BYTES) >> 4 | (dense_base + slot * DENSE_BYTES) >> 4 << 16
            metadata = _broadcast_metadata(words, BLOCK_R, BLOCK_D, LAYOUT)
            acc = gl.inline_asm_elementwise(
                TEXT, CONSTRAINTS, [acc, metadata, addresses], gl.float32, False, BLOCK_D // 2
            )
            _arrive(base + EMPTY_OFFSET + slot * 8)
            words = next_words
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
        offs_d = tile_d * BLOCK_D + gl.arange(0, BLOCK_D, gl.SliceLayout(0, LAYOUT))
        acc = acc * gl.load(scale_inv_ptr)
        if HAS_DENSE_SCALE:
            acc = acc * gl.load(dense_scale_inv_ptr + offs_d, mask=offs_d < columns, other=0.0)[None, :]
        out = acc.to(out_ptr.dtype.element_ty)
        if TMA_STORE:
            tma.store_wait(0)
            if TRANSPOSE:
                out_buf.store(gl.permute(out, (1, 0)))
                fence_async_shared()
                tma.async_copy_shared_to_global(out_desc, [tile_d * BLOCK_D, tile_r * BLOCK_R], out_buf)
            else:
                out_buf.store(out)
                fence_async_shared()
                tma.async_copy_shared_to_global(out_desc, [tile_r * BLOCK_R, tile_d * BLOCK_D], out_buf)
        else:
            offs_r = tile_r * BLOCK_R + gl.arange(0, BLOCK_R, gl.SliceLayout(1, LAYOUT))
            offsets = offs_r.to(gl.int64)[:, None] * out_stride_r + offs_d.to(gl.int64)[None, :] * out_stride_d
            gl.store(out_ptr + offsets, out, mask=(offs_r < rows)[:, None] & (offs_d < columns)[None, :])
    if TMA_STORE:
        tma.store_wait(0)
    values_buf._keep_alive()
    dense_buf._keep_alive()


@gluon.jit
def sparse_gemm_kernel(
    values_desc, dense_desc, out_desc, out_ptr, metadata_ptr, scale_inv_ptr, dense_scale_inv_ptr,
    rows, columns, tiles_r, tiles_d, stages_c, row_blocks, out_stride_r, out_stride_d,
    VALUES_OFFSET: gl.constexpr, DENSE_OFFSET: gl.constexpr, FULL_OFFSET: gl.constexpr, EMPTY_OFFSET: gl.constexpr,
    BLOCK_R: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    TRANSPOSE: gl.constexpr, HAS_DENSE_SCALE: gl.constexpr, TMA_STORE: gl.constexpr,
):  # fmt: skip
    """Allocate the ring, split the CTA into its producer and its consumers.  Eight warps, and one for the producer."""
    dense_buf = gl.allocate_shared_memory(dense_desc.dtype, [STAGES] + dense_desc.block_type.shape, dense_desc.layout)
    values_buf = gl.allocate_shared_memory(
        values_desc.dtype, [STAGES] + values_desc.block_type.shape, values_desc.layout
    )
    if TMA_STORE:
        out_buf = gl.allocate_shared_memory(out_desc.dtype, out_desc.block_type.shape, out_desc.layout)
    else:
        out_buf = values_buf
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=8)  # one arrival of each consumer warp
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                metadata_ptr, scale_inv_ptr, dense_scale_inv_ptr, out_desc, out_ptr, values_buf, dense_buf, out_buf,
                rows, columns, tiles_r, tiles_d, stages_c, row_blocks, out_stride_r, out_stride_d,
                VALUES_OFFSET, DENSE_OFFSET, FULL_OFFSET, EMPTY_OFFSET, BLOCK_R, BLOCK_D, STAGES, GROUP,
                TRANSPOSE, HAS_DENSE_SCALE, TMA_STORE,
            )),
            (_produce, (
                values_desc, dense_desc, values_buf, dense_buf, full, empty, tiles_r, tiles_d, stages_c,
                BLOCK_R, BLOCK_D, STAGES, GROUP,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


def choose_config(rows: int, columns: int, multiprocessors: int) -> Config:
    """Wide tiles, unless they leave multiprocessors without one: then more, narrower tiles."""
    wide = Config()
    tiles = -(-rows // wide.block_r) * -(-columns // wide.block_d)
    return wide if tiles >= multiprocessors else Config(block_d=128, stages=6)


def launch_sparse_gemm(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    out: Tensor,
    transpose: bool,
    config: Config | None = None,
) -> None:
    """Multiply into ``out``, which is written in full.

    Args:
        values, metadata: the 2:4 operand A ``[R, C]``, e4m3 ``[R, padded(C) / 2]`` and int32, see ``formats``.
        dense: B, e4m3 ``[D, c]`` contiguous, c a multiple of 16 and at most padded(C); columns beyond c are zero.
        scale_inv: fp32 ``[1]``.
        dense_scale_inv: fp32 ``[D]``, or None for ones.
        out: ``[D, R]`` if ``transpose``, else ``[R, D]``; bf16, fp16 or fp32, contiguous.
        config: tiling; chosen by the shape if None.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    rows, columns, contraction = values.shape[0], dense.shape[0], 2 * values.shape[1]
    _check(values, metadata, dense, scale_inv, dense_scale_inv, out, transpose)
    if out.numel() == 0:
        return
    if contraction == 0 or dense.shape[1] == 0:
        out.zero_()
        return
    multiprocessors = _multiprocessors(out.device)
    config = config or choose_config(rows, columns, multiprocessors)
    # TMA needs rows of whole 16 bytes; an fp32 tile would take the shared memory of two stages.
    tma_store = out.element_size() == 2 and out.stride(0) % 8 == 0
    descriptors = _descriptors(config, values, dense, out if tma_store else None, transpose)
    tiles_r, tiles_d = -(-rows // config.block_r), -(-columns // config.block_d)
    stride_r, stride_d = out.stride()[::-1] if transpose else out.stride()
    arguments = (
        *descriptors, out, metadata, scale_inv, scale_inv if dense_scale_inv is None else dense_scale_inv,
        rows, columns, tiles_r, tiles_d, -(-dense.shape[1] // BLOCK_C.value), metadata.shape[1], stride_r, stride_d,
    )  # fmt: skip
    constants = {
        "BLOCK_R": config.block_r,
        "BLOCK_D": config.block_d,
        "STAGES": config.stages,
        "GROUP": config.group,
        "TRANSPOSE": transpose,
        "HAS_DENSE_SCALE": dense_scale_inv is not None,
        "TMA_STORE": tma_store,
    }
    grid = (min(multiprocessors, tiles_r * tiles_d),)
    key = (*constants.values(), out.dtype, out.device)
    if key not in _offsets:

        def compile_kernel(offsets: Mapping[str, int]) -> Any:
            return sparse_gemm_kernel.warmup(*arguments, **offsets, **constants, num_warps=8, grid=grid)

        _offsets[key] = _resolve(compile_kernel, config, tma_store)
    sparse_gemm_kernel[grid](*arguments, **_offsets[key], **constants, num_warps=8)


_offsets: dict[tuple[Any, ...], dict[str, int]] = {}


def _resolve(compile_kernel: Any, config: Config, tma_store: bool) -> dict[str, int]:
    names = ["DENSE_OFFSET", "VALUES_OFFSET", *(["OUT_OFFSET"] if tma_store else []), "FULL_OFFSET", "EMPTY_OFFSET"]
    dense_bytes = config.stages * config.block_d * BLOCK_C.value
    guess = dict.fromkeys(names, 0) | {"VALUES_OFFSET": dense_bytes}

    def without_out(offsets: Mapping[str, int]) -> Any:
        return compile_kernel({name: offset for name, offset in offsets.items() if name != "OUT_OFFSET"})

    offsets = resolve_offsets(without_out, names, guess)
    offsets.pop("OUT_OFFSET", None)
    # The swizzle of the operands is a function of the address: their buffers must begin where its pattern does.
    assert offsets["DENSE_OFFSET"] % 1024 == 0, offsets
    assert offsets["VALUES_OFFSET"] % 1024 == 0, offsets
    return offsets


def _descriptors(config: Config, values: Tensor, dense: Tensor, out: Tensor | None, transpose: bool) -> tuple[Any, ...]:
    """TMA descriptors of the operands and of the output; without TMA for the output, B's stands in and is not read."""
    half = BLOCK_C.value // 2
    values_desc = TensorDescriptor.from_tensor(values, [config.block_r, half], gl.NVMMASharedLayout(64, 8, 2))
    dense_desc = TensorDescriptor.from_tensor(dense, [config.block_d, BLOCK_C.value], gl.NVMMASharedLayout(128, 8, 2))
    if out is None:
        return values_desc, dense_desc, dense_desc
    block = [config.block_d, config.block_r] if transpose else [config.block_r, config.block_d]
    return values_desc, dense_desc, TensorDescriptor.from_tensor(out, block, gl.NVMMASharedLayout(128, 16, 2))


@cache
def _multiprocessors(device: torch.device) -> int:
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
    rows, contraction = values.shape[0], 2 * values.shape[1]
    columns, given = dense.shape
    if contraction % 128 or given % 16 or given > contraction:
        raise ValueError(
            f"values {tuple(values.shape)} hold {contraction} logical columns, dense {tuple(dense.shape)} has {given}; "
            "needed are a multiple of 128, and a multiple of 16 that is not larger"
        )
    if out.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"out is {out.dtype}; allowed are bf16, fp16 and fp32")
    check_buffer("values", values, (rows, contraction // 2), E4M3, values.device)
    check_buffer("metadata", metadata, metadata_shape(rows, contraction), torch.int32, values.device)
    check_buffer("dense", dense, (columns, given), E4M3, values.device)
    check_buffer("scale_inv", scale_inv, (1,), torch.float32, values.device)
    if dense_scale_inv is not None:
        check_buffer("dense_scale_inv", dense_scale_inv, (columns,), torch.float32, values.device)
    check_buffer("out", out, (columns, rows) if transpose else (rows, columns), out.dtype, values.device)
