"""2:4-sparse times dense, in FP8 on Hopper's sparse tensor cores.

    out[r, d] = (sum over c of A[r, c] * B[d, c]) * dense_scale_inv[d] * scale_inv

A ``[R, C]`` e4m3, 2:4 along c, stored as ``values`` and ``metadata`` (see ``formats``); B ``[D, C]`` e4m3, dense,
row-major; out ``[R, D]`` or ``[D, R]`` in bf16, fp16 or fp32.  ``wgmma`` adds up FP8 products with about 14 bits.

The kernel is persistent and warp-specialised: one warp loads stages of A and B by TMA, two warpgroups multiply, 64 rows
of A each.  Triton has no operation for ``wgmma.mma_async.sp``, so inline assembly holds it, one instance per thread and
stage: its operands are all of the thread's accumulators, tied in place, and ``pack`` is their number.  The metadata
reaches it as a tensor of the accumulators' shape, whose first two registers are the words that the thread loaded.

Tails need no code in the loop.  TMA fills with zeros what lies beyond A and B and clips what lies beyond out, metadata
is padded, and direct stores are masked.
"""

from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparse_compile.kernels.configs import BLOCK_C, BLOCK_R, Config, choose
from sparse_compile.kernels.formats import E4M3, check_buffer, metadata_shape
from sparse_compile.kernels.shared_memory import resolve_offsets

_OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCK_R = gl.constexpr(BLOCK_R)
_BLOCK_C = gl.constexpr(BLOCK_C)
_GROUP = gl.constexpr(8)  # row tiles that share their tiles of B in L2
_CONSUMER_WARPS = gl.constexpr(8)  # two warpgroups
_VALUES_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=8, rank=2)
_DENSE_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
_OUT_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


@gluon.constexpr_function
def _mma_asm(block_d):
    """Assembly of one stage of a warpgroup, two instructions, with the constraints of its operands.

    Operands, R = block_d / 2 registers each: accumulators out, the same in, metadata, and 32 bits with both addresses.
    The upper halves of the descriptors name the swizzle and the bytes between blocks of eight rows (PTX ISA, "Matrix
    descriptor"): 64 bytes and 512 for A, 128 and 1024 for B.
    """
    registers = block_d // 2
    accumulators = ", ".join(f"${i}" for i in range(registers))
    metadata, address = 2 * registers, 3 * registers
    lines = [
        "{",
        ".reg .b32 low_a, low_b, high_a, high_b;",
        ".reg .b64 a, b;",
        ".reg .pred accumulate;",
        f"and.b32 low_a, ${address}, 0xffff;",
        "or.b32 low_a, low_a, 0x10000;",
        f"shr.u32 low_b, ${address}, 16;",
        "or.b32 low_b, low_b, 0x10000;",
        "mov.b32 high_a, 0x80000020;",
        "mov.b32 high_b, 0x40000040;",
        "mov.b64 a, {low_a, high_a};",
        "mov.b64 b, {low_b, high_b};",
        "setp.ne.b32 accumulate, 1, 0;",
        "wgmma.fence.sync.aligned;",
    ]
    for step in range(2):
        if step:
            # 32 bytes of a row of A and 64 of B further, in units of 16.
            lines += ["add.s64 a, a, 2;", "add.s64 b, b, 4;"]
        lines.append(
            f"wgmma.mma_async.sp.sync.aligned.m64n{block_d}k64.f32.e4m3.e4m3 "
            f"{{{accumulators}}}, a, b, ${metadata + step}, 0, accumulate, 1, 1;"
        )
    # Waiting here keeps every register of the asm, the metadata too, out of flight when it returns.
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"]
    constraints = ["=f"] * registers + [str(i) for i in range(registers)] + ["r"] * (2 * registers)
    return "\n".join(lines), ",".join(constraints)


# Gluon's own wait and arrive synchronise all consumer warps and so couple the warpgroups.
_WAIT_ASM = gl.constexpr("""{
.reg .pred done;
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
@!done bra.uni WAIT;
mov.b32 $0, 0;
}""")
_ARRIVE_ASM = gl.constexpr("""{
.reg .pred elected;
elect.sync _|elected, 0xffffffff;
@elected mbarrier.arrive.shared::cta.b64 _, [$1];
mov.b32 $0, 0;
}""")
# Taken from lane 0, so that the compiler knows it to be the same in all lanes.
_WARPGROUP_ASM = gl.constexpr("""{
.reg .b32 index;
mov.u32 index, %tid.x;
shr.u32 index, index, 7;
shfl.sync.idx.b32 $0, index, 0, 0x1f, 0xffffffff;
}""")


@gluon.jit
def _wait(barrier, phase):
    """Every thread waits."""
    gl.inline_asm_elementwise(_WAIT_ASM, "=r,r,r", [barrier, phase], gl.int32, False, 1)


@gluon.jit
def _arrive(barrier):
    """One arrival for each warp."""
    gl.inline_asm_elementwise(_ARRIVE_ASM, "=r,r", [barrier], gl.int32, False, 1)


@gluon.jit
def _tile(tile, num_r, num_d):
    """Row and column of a tile: within a group of row tiles, rows first."""
    group_tiles = _GROUP * num_d
    first = tile // group_tiles * _GROUP
    height = min(num_r - first, _GROUP)
    return first + tile % group_tiles % height, tile % group_tiles // height


@gluon.jit
def _load_metadata(block_ptr, BLOCK_D: gl.constexpr):
    """The words of 128 rows and 128 columns, two a thread: [row / 16, 1, row % 8, 1, 2 * (lane % 4) + word]"""
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 2, 1, BLOCK_D // 8, 2], [1, 1, 8, 1, 4], [_CONSUMER_WARPS, 1, 1, 1, 1], [4, 1, 3, 2, 0]
    )
    without_4: gl.constexpr = gl.SliceLayout(4, layout)
    without_34: gl.constexpr = gl.SliceLayout(3, without_4)
    offs_0 = gl.arange(0, _BLOCK_R // 16, gl.SliceLayout(1, gl.SliceLayout(2, without_34)))
    offs_2 = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, without_34)))
    offs_4 = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout)))))
    offsets = offs_0[:, None, None, None, None] * 64 + offs_2[None, None, :, None, None] * 8
    return gl.load(block_ptr + (offsets + offs_4[None, None, None, None, :]))


@gluon.jit
def _multiply(acc, metadata, a_address, b_address, BLOCK_D: gl.constexpr):
    """``acc`` plus the product of a stage.  [BLOCK_R, BLOCK_D]"""
    asm: gl.constexpr = _mma_asm(BLOCK_D)
    zeros = gl.full([_BLOCK_R // 16, 2, 8, BLOCK_D // 8, 8], 0, gl.int32, metadata.type.layout)
    # Trivial: the accumulators' registers run over column bit 0, row bit 3, column / 8, and so do these.
    spread = gl.convert_layout(gl.reshape(metadata + zeros, [_BLOCK_R, BLOCK_D]), acc.type.layout, assert_trivial=True)
    addresses = a_address >> 4 | b_address >> 4 << 16
    return gl.inline_asm_elementwise(asm[0], asm[1], [acc, spread, addresses], gl.float32, False, BLOCK_D // 2)


@gluon.jit
def _store_direct(acc, out_ptr, offs_r, offs_d, rows, columns, TRANSPOSE: gl.constexpr):
    if TRANSPOSE:
        offsets = offs_d.to(gl.int64)[None, :] * rows + offs_r[:, None]
    else:
        offsets = offs_r.to(gl.int64)[:, None] * columns + offs_d[None, :]
    inside = (offs_r < rows)[:, None] & (offs_d < columns)[None, :]
    gl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _producer(values_desc, dense_desc, a_buf, b_buf, barriers, num_r, num_d, num_k, BLOCK_D: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    stage = 0
    phase = 1  # a new barrier counts as one whose previous phase is complete: the stages start empty
    for tile in range(gl.program_id(0), num_r * num_d, gl.num_programs(0)):
        pid_r, pid_d = _tile(tile, num_r, num_d)
        for k in range(num_k):
            full = barriers.index(stage)
            mbarrier.wait(barriers.index(STAGES + stage), phase)
            # TMA counts the zeros that it fills in, too.
            mbarrier.expect(full, values_desc.block_type.nbytes + dense_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(
                values_desc, [pid_r * _BLOCK_R, k * (_BLOCK_C // 2)], full, a_buf.index(stage)
            )
            tma.async_copy_global_to_shared(dense_desc, [pid_d * BLOCK_D, k * _BLOCK_C], full, b_buf.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _consumer(
    metadata_ptr, scale_inv_ptr, dense_scale_inv_ptr, out, a_buf, b_buf, barriers, num_r, num_d, num_k,
    rows, columns, row_blocks, A_OFFSET: gl.constexpr, B_OFFSET: gl.constexpr, BARRIERS_OFFSET: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, TRANSPOSE: gl.constexpr, TMA_STORE: gl.constexpr,
):  # fmt: skip
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [_CONSUMER_WARPS, 1], [16, BLOCK_D, 32])
    if TMA_STORE:
        out_buf = gl.allocate_shared_memory(out.dtype, out.block_type.shape, out.layout)
    base = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], gl.int32, True, 1)
    warpgroup = gl.inline_asm_elementwise(_WARPGROUP_ASM, "=r", [], gl.int32, False, 1)
    a_base = base + A_OFFSET + warpgroup * (64 * _BLOCK_C // 2)
    full_base = base + BARRIERS_OFFSET
    scale_inv = gl.load(scale_inv_ptr)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), num_r * num_d, gl.num_programs(0)):
        pid_r, pid_d = _tile(tile, num_r, num_d)
        tile_ptr = metadata_ptr + pid_r.to(gl.int64) * (_BLOCK_R // 16 * 64)
        acc = gl.zeros([_BLOCK_R, BLOCK_D], gl.float32, acc_layout)
        metadata = _load_metadata(tile_ptr, BLOCK_D)
        for k in range(num_k):
            # The next stage's words, on their way while this thread waits; the last stage loads its own again.
            next_k = min(k + 1, num_k - 1).to(gl.int64)
            next_metadata = _load_metadata(tile_ptr + next_k * row_blocks * 64, BLOCK_D)
            _wait(full_base + stage * 8, phase)
            a_address = a_base + stage * (_BLOCK_R * _BLOCK_C // 2)
            acc = _multiply(acc, metadata, a_address, base + B_OFFSET + stage * (BLOCK_D * _BLOCK_C), BLOCK_D)
            _arrive(full_base + (STAGES + stage) * 8)
            metadata = next_metadata
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1

        offs_r = pid_r * _BLOCK_R + gl.arange(0, _BLOCK_R, gl.SliceLayout(1, acc_layout))
        offs_d = pid_d * BLOCK_D + gl.arange(0, BLOCK_D, gl.SliceLayout(0, acc_layout))
        if dense_scale_inv_ptr is not None:
            acc = acc * gl.load(dense_scale_inv_ptr + offs_d, mask=offs_d < columns, other=0.0)[None, :]
        acc = acc * scale_inv
        if TMA_STORE:
            tma.store_wait(0)
            if TRANSPOSE:
                out_buf.store(gl.permute(acc.to(out.dtype), (1, 0)))
                fence_async_shared()
                tma.async_copy_shared_to_global(out, [pid_d * BLOCK_D, pid_r * _BLOCK_R], out_buf)
            else:
                out_buf.store(acc.to(out.dtype))
                fence_async_shared()
                tma.async_copy_shared_to_global(out, [pid_r * _BLOCK_R, pid_d * BLOCK_D], out_buf)
        else:
            _store_direct(acc, out, offs_r, offs_d, rows, columns, TRANSPOSE)
    if TMA_STORE:
        tma.store_wait(0)
    # Only the assembly uses these here.
    a_buf._keep_alive()
    b_buf._keep_alive()
    barriers._keep_alive()


@gluon.jit(do_not_specialize=["rows", "columns", "row_blocks", "num_k"])
def sparse_gemm_kernel(
    values_desc, dense_desc, out, metadata_ptr, scale_inv_ptr, dense_scale_inv_ptr, rows, columns, row_blocks, num_k,
    A_OFFSET: gl.constexpr, B_OFFSET: gl.constexpr, BARRIERS_OFFSET: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, TRANSPOSE: gl.constexpr, TMA_STORE: gl.constexpr, COLUMNS_DIVISOR: gl.constexpr,
):  # fmt: skip
    """``out`` is a descriptor with TMA_STORE, a pointer without; ``dense_scale_inv_ptr`` may be None."""
    # Tells the compiler how wide masked accesses may be.
    columns = columns // COLUMNS_DIVISOR * COLUMNS_DIVISOR
    a_buf = gl.allocate_shared_memory(values_desc.dtype, [STAGES] + values_desc.block_type.shape, values_desc.layout)
    b_buf = gl.allocate_shared_memory(dense_desc.dtype, [STAGES] + dense_desc.block_type.shape, dense_desc.layout)
    # The first STAGES: the stage is full.  The others: it is empty again.
    barriers = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=1)
        mbarrier.init(barriers.index(STAGES + i), count=_CONSUMER_WARPS)
    fence_async_shared()
    num_r = gl.cdiv(rows, _BLOCK_R)
    num_d = gl.cdiv(columns, BLOCK_D)
    gl.warp_specialize(
        [
            (_consumer, (
                metadata_ptr, scale_inv_ptr, dense_scale_inv_ptr, out, a_buf, b_buf, barriers, num_r, num_d, num_k,
                rows, columns, row_blocks, A_OFFSET, B_OFFSET, BARRIERS_OFFSET, BLOCK_D, STAGES, TRANSPOSE, TMA_STORE,
            )),
            (_producer, (
                values_desc, dense_desc, a_buf, b_buf, barriers, num_r, num_d, num_k, BLOCK_D, STAGES,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip


def launch_sparse_gemm(
    values: Tensor,
    metadata: Tensor,
    dense: Tensor,
    scale_inv: Tensor,
    dense_scale_inv: Tensor | None,
    out: Tensor,
    transpose: bool,
) -> None:
    """Multiply into ``out``, which is written in full.

    Args:
        values: A's kept elements, e4m3 ``[R, C / 2]``, C a multiple of 128.
        metadata: where they stood, int32 ``[C / 128, padded(R) / 16, 32, 2]``, every word legal.
        dense: B, e4m3 ``[D, c]``, c a multiple of 16 and at most C; columns beyond c count as zero.
        scale_inv: fp32 ``[1]``.
        dense_scale_inv: fp32 ``[D]`` or None.
        out: bf16, fp16 or fp32 ``[R, D]``, or ``[D, R]`` with ``transpose``.
        transpose: whether out is transposed.

    Raises:
        ValueError: a tensor has another shape, dtype, layout, alignment or device.
    """
    _check(values, metadata, dense, scale_inv, dense_scale_inv, out, transpose)
    rows, (columns, contraction) = values.shape[0], dense.shape
    if out.numel() == 0:
        return
    if contraction == 0:
        out.zero_()
        return
    sm_count = _sm_count(out.device)
    config = choose(rows, columns, sm_count)
    # fp32 tiles leave from registers: in shared memory they would take the place of stages.
    tma_store = out.dtype != torch.float32 and out.shape[1] * out.element_size() % 16 == 0
    block_d = config.block_d
    out_block = [block_d, BLOCK_R] if transpose else [BLOCK_R, block_d]
    arguments = (
        _descriptor(values, [BLOCK_R, BLOCK_C // 2], _VALUES_LAYOUT),
        _descriptor(dense, [block_d, BLOCK_C], _DENSE_LAYOUT),
        _descriptor(out, out_block, _OUT_LAYOUT) if tma_store else out,
        metadata, scale_inv, dense_scale_inv, rows, columns, metadata.shape[1], triton.cdiv(contraction, BLOCK_C),
    )  # fmt: skip
    constants = {
        "BLOCK_D": block_d, "STAGES": config.stages, "TRANSPOSE": transpose, "TMA_STORE": tma_store,
        "COLUMNS_DIVISOR": 4 if columns % 4 == 0 else 1,
    }  # fmt: skip
    options = {"grid": (min(config.tiles(rows, columns), sm_count),), "num_warps": _CONSUMER_WARPS.value}
    # Triton also specialises on the alignment of the pointers, which changes no shared memory.
    key = (*constants.values(), out.dtype, dense_scale_inv is None)
    if key not in _offsets:
        _offsets[key] = resolve_offsets(
            lambda offsets: sparse_gemm_kernel.warmup(*arguments, **offsets, **constants, **options),
            _buffer_shapes(config),
        )
        # The descriptors' swizzles start anew every 1024 bytes.
        assert all(_offsets[key][name] % 1024 == 0 for name in ("A_OFFSET", "B_OFFSET")), _offsets[key]
    sparse_gemm_kernel.run(*arguments, **_offsets[key], **constants, **options, warmup=False)


_offsets: dict[tuple[object, ...], dict[str, int]] = {}


def _buffer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The buffers whose offsets the kernel takes."""
    return {
        "A_OFFSET": (config.stages, BLOCK_R, BLOCK_C // 2),
        "B_OFFSET": (config.stages, config.block_d, BLOCK_C),
        "BARRIERS_OFFSET": (2 * config.stages, 1),
    }


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
    (rows, kept), (columns, contraction), device = values.shape, dense.shape, dense.device
    if kept % (BLOCK_C // 2) != 0:
        raise ValueError(f"values has {kept} columns; needed is a multiple of {BLOCK_C // 2}")
    if contraction % 16 != 0 or contraction > 2 * kept:
        raise ValueError(f"dense has {contraction} columns; allowed are multiples of 16 up to {2 * kept}")
    if out.dtype not in _OUT_DTYPES:
        raise ValueError(f"out is {out.dtype}; allowed are {', '.join(map(str, _OUT_DTYPES))}")
    check_buffer("values", values, (rows, kept), E4M3, device)
    check_buffer("dense", dense, (columns, contraction), E4M3, device)
    check_buffer("metadata", metadata, metadata_shape(rows, 2 * kept), torch.int32, device)
    check_buffer("scale_inv", scale_inv, (1,), torch.float32, device)
    if dense_scale_inv is not None:
        check_buffer("dense_scale_inv", dense_scale_inv, (columns,), torch.float32, device)
    check_buffer("out", out, (columns, rows) if transpose else (rows, columns), out.dtype, device)
    for name, tensor in (("values", values), ("metadata", metadata), ("dense", dense), ("out", out)):
        if tensor.data_ptr() % 16 != 0:
            raise ValueError(f"{name} starts at address {tensor.data_ptr():#x}; needed is a multiple of 16")
