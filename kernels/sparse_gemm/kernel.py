"""The kernel of the sparse GEMM: what surrounds the loops of ``sparse_gemm_asm``.

The kernel is persistent and warp-specialised: one thread loads stages of A and B by TMA, and each of two warpgroups
multiplies 64 rows of A and stores its part of the tile on its own, while the other may go on multiplying.  Two blocks
of a cluster take neighbouring tiles of rows, and each loads half of the B that both multiply.

Where collectives share the GPU, its tiles are cut into waves (``configs.waves_of``): blocks of the next one start as
those before end, on whatever multiprocessors are free.

Tails need no code in the loops.  TMA fills with zeros what lies beyond A and B and clips what lies beyond out, metadata
is padded, and direct stores are masked.

Experts: where they share the rows of B, tokens that lie sorted by expert (``COLUMNS``), a tile has rows of one expert's
A and a block of that expert's tokens, by a table (``expert_blocks``); where they share the contraction
(``CONTRACTION``), a tile is one of an expert's product, and its stages are those of the expert's tokens.  What a tile
reads of another expert's rows is never stored: tiles with such rows leave through registers, masked.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from sparse_compile.kernels.sparse_gemm.configs import CARRY_STAGES
from sparse_compile.kernels.sparse_gemm.ptx import BLOCKS, load_asm, multiply_asm

_BLOCKS = gl.constexpr(BLOCKS)
_CARRY_STAGES = gl.constexpr(CARRY_STAGES)
# How experts share the operands: not at all, for there is one matrix; the rows of B; the contraction.
ONE, COLUMNS, CONTRACTION = 0, 1, 2
_ONE, _COLUMNS, _CONTRACTION = map(gl.constexpr, (ONE, COLUMNS, CONTRACTION))
_PIECE = gl.constexpr(64)  # rows and columns of what a warpgroup stores at once

# Gluon's partitions end in code that waits for the others with few registers.  The compiler, in fear of a way back from
# there, would serialise wgmma.
_EXIT_ASM = gl.constexpr("exit; mov.b32 $0, 0;")
_CLUSTER_SYNC_ASM = gl.constexpr("""fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
mov.b32 $0, 0;""")


@gluon.jit
def _cluster_sync():
    """Every thread of the cluster arrives and waits."""
    gl.inline_asm_elementwise(_CLUSTER_SYNC_ASM, "=r", [], gl.int32, False, 1)


@gluon.jit
def _exit():
    gl.inline_asm_elementwise(_EXIT_ASM, "=r", [], gl.int32, False, 1)


@gluon.jit
def _tile(tile, num_r, num_d, group):
    """Row of clusters and block of B: within a group, rows first."""
    group_tiles = group * num_d
    first = tile // group_tiles * group
    height = min(num_r - first, group)
    return first + tile % group_tiles % height, tile % group_tiles // height


@gluon.jit
def _tiles(table_ptr, num_r, num_d, experts, blocks, SHARED: gl.constexpr):
    """How many blocks of B there are, and how many tiles."""
    if SHARED == _COLUMNS:
        num_d = gl.load(table_ptr + blocks * 4)
    tiles = num_r * num_d
    if SHARED == _CONTRACTION:
        tiles *= experts
    return num_d, tiles


@gluon.jit
def _span(tiles, waves, CLUSTER: gl.constexpr):
    """The first tile of this cluster, where those of its wave end, and how far apart its tiles are."""
    step = gl.num_programs(0) // CLUSTER // waves
    cluster = gl.program_id(0) // CLUSTER
    share = gl.cdiv(gl.cdiv(tiles, waves), step) * step
    first = cluster // step * share
    return first + cluster % step, min(tiles, first + share), step


@gluon.jit
def _stages(table_ptr, blocks, expert):
    """The first stage of an expert's tokens, and how many there are."""
    span_ptr = table_ptr + (blocks + 1 + expert) * 4
    return gl.load(span_ptr), gl.load(span_ptr + 1)


@gluon.jit
def _producer(
    table_ptr, num_r, num_d, num_k, group, last_metadata, experts, blocks, expert_blocks, expert_stages, waves,
    SHARED: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    CLUSTER: gl.constexpr = RING.value.cluster
    ASM: gl.constexpr = load_asm(RING)
    if CLUSTER > 1:
        _cluster_sync()
    rank = gl.program_id(0) % CLUSTER
    stage = 0
    parity = 1  # a new barrier counts as one whose previous phase is complete: the stages start empty
    num_d, tiles = _tiles(table_ptr, num_r, num_d, experts, blocks, SHARED)
    first_tile, end, step = _span(tiles, waves, CLUSTER)
    for tile in range(first_tile, end, step):
        if SHARED == _CONTRACTION:
            first_k, num_k = _stages(table_ptr, blocks, tile // (num_r * num_d))
            pid_r, pid_d = _tile(tile % (num_r * num_d), num_r, num_d, group)
        else:
            first_k = 0
            pid_r, pid_d = _tile(tile, num_r, num_d, group)
        block = (pid_r * CLUSTER + rank) * _BLOCKS
        row_d = rank * (RING.value.block_d // CLUSTER)
        if SHARED == _COLUMNS:
            expert = gl.load(table_ptr + pid_d * 4)
            row_d += gl.load(table_ptr + pid_d * 4 + 1)
        else:
            row_d += pid_d * RING.value.block_d
        for k in range(num_k):
            operands = [stage | parity << 8, first_k + k, block, row_d, last_metadata, rank]
            if SHARED == _COLUMNS:
                of_expert = operands + [expert * expert_blocks, expert * expert_stages]
                gl.inline_asm_elementwise(ASM, "=r,r,r,r,r,r,r,r,r", of_expert, gl.int32, False, 1)
            else:
                gl.inline_asm_elementwise(ASM, "=r,r,r,r,r,r,r", operands, gl.int32, False, 1)
            stage += 1
            if stage == RING.value.stages:
                stage = 0
                parity ^= 1
    if CLUSTER > 1:
        # Until the peers' last copies and arrivals are through.
        _cluster_sync()
    _exit()


@gluon.jit
def _multiply(acc, zeros, done, count, WARPGROUP: gl.constexpr, RING: gl.constexpr):
    """``acc``, or zero if it is None, plus the product of ``count`` stages, the first number ``done``.  [64, width]"""
    ONTO: gl.constexpr = acc is not None
    ASM: gl.constexpr = multiply_asm(RING, WARPGROUP, ONTO)
    STAGES: gl.constexpr = RING.value.stages
    argument = zeros + (done % STAGES | done // STAGES % 2 << 8 | count << 16)
    operands = [acc, argument] if ONTO else [argument]
    return gl.inline_asm_elementwise(ASM[0], ASM[1], operands, gl.float32, False, RING.value.width // 2)


@gluon.jit
def _halves(x):
    """Left and right columns; moves no register."""
    return gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)).split()


@gluon.jit
def _whole(left, right, layout: gl.constexpr):
    """The inverse of ``_halves``."""
    x = gl.reshape(gl.permute(gl.join(left, right), (0, 2, 1)), [left.shape[0], 2 * left.shape[1]])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _widen(carry):
    """Both bf16 of each word in fp32: those of the left columns, those of the right ones."""
    return (carry << 16).to(gl.float32, bitcast=True), (carry & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _carry_over(acc, carry, layout: gl.constexpr):
    """Move what bf16 holds of ``acc + carry`` to ``carry``; the rest, at most 2^-9 of it, stays in ``acc``."""
    left, right = _halves(acc)
    carried_left, carried_right = _widen(carry)
    left += carried_left
    right += carried_right
    carry = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [left, right], gl.int32, True, 1)
    carried_left, carried_right = _widen(carry)
    return _whole(left - carried_left, right - carried_right, layout), carry


@gluon.jit
def _store_piece(piece, out, out_buf, index, row, column, TRANSPOSE: gl.constexpr):
    """Piece ``index`` of 64 columns, of a block that begins at ``row`` and ``column``."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _PIECE, 32])
    piece = gl.convert_layout(piece, layout, assert_trivial=True).to(out.dtype)
    BUFFERS: gl.constexpr = out_buf.shape[0]
    buf = out_buf.index(index % BUFFERS)
    tma.store_wait(BUFFERS - 1)
    if TRANSPOSE:
        buf.store(gl.permute(piece, (1, 0)))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [column + index * _PIECE, row], buf)
    else:
        buf.store(piece)
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [row, column + index * _PIECE], buf)


@gluon.jit
def _store_piece_masked(
    piece, out_ptr, out_buf, index, row, column, first, rows, columns, stride, TRANSPOSE: gl.constexpr
):  # fmt: skip
    """As ``_store_piece``, of what lies inside of ``rows`` and ``columns``, through registers.

    Args:
        first: the element of out at row 0 and column 0; rows of out, or with TRANSPOSE columns, are ``stride`` apart.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _PIECE, 32])
    piece = gl.convert_layout(piece, layout, assert_trivial=True).to(out_ptr.dtype.element_ty)
    # Eight neighbours a thread: they change places in shared memory.
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    tma.store_wait(0)
    buf = out_buf.index(index % out_buf.shape[0])
    outer = gl.arange(0, _PIECE, gl.SliceLayout(1, wide))
    inner = gl.arange(0, _PIECE, gl.SliceLayout(0, wide))
    if TRANSPOSE:
        buf.store(gl.permute(piece, (1, 0)))
        outer += column + index * _PIECE
        inner += row
        inside = (outer < columns)[:, None] & (inner < rows)[None, :]
    else:
        buf.store(piece)
        outer += row
        inner += column + index * _PIECE
        inside = (outer < rows)[:, None] & (inner < columns)[None, :]
    pointers = out_ptr + (first + outer.to(gl.int64) * stride)[:, None] + inner[None, :]
    gl.store(pointers, buf.load(wide), mask=inside)


@gluon.jit
def _store_direct(acc, out_ptr, offs_r, offs_d, rows, columns, end_d, TRANSPOSE: gl.constexpr):
    if TRANSPOSE:
        offsets = offs_d.to(gl.int64)[None, :] * rows + offs_r[:, None]
    else:
        offsets = offs_r.to(gl.int64)[:, None] * columns + offs_d[None, :]
    inside = (offs_r < rows)[:, None] & (offs_d < min(end_d, columns))[None, :]
    gl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _store_tile(result, out, out_buf, row, column, BLOCK_D: gl.constexpr, TRANSPOSE: gl.constexpr):
    """The result of a warpgroup, by TMA."""
    if result.shape[1] == 256:
        left, right = _halves(result)
        piece0, piece1 = _halves(left)
        piece2, piece3 = _halves(right)
        _store_piece(piece0, out, out_buf, 0, row, column, TRANSPOSE)
        _store_piece(piece1, out, out_buf, 1, row, column, TRANSPOSE)
        _store_piece(piece2, out, out_buf, 2, row, column, TRANSPOSE)
        if BLOCK_D == 256:
            _store_piece(piece3, out, out_buf, 3, row, column, TRANSPOSE)
    else:
        piece0, piece1 = _halves(result)
        _store_piece(piece0, out, out_buf, 0, row, column, TRANSPOSE)
        _store_piece(piece1, out, out_buf, 1, row, column, TRANSPOSE)


@gluon.jit
def _store_tile_masked(
    result, out_ptr, out_buf, row, column, first, rows, columns, stride, BLOCK_D: gl.constexpr, TRANSPOSE: gl.constexpr
):  # fmt: skip
    """The result of a warpgroup, of which parts lie outside of its expert's."""
    columns = min(columns, column + BLOCK_D)
    if result.shape[1] == 256:
        left, right = _halves(result)
        piece0, piece1 = _halves(left)
        piece2, piece3 = _halves(right)
        _store_piece_masked(piece0, out_ptr, out_buf, 0, row, column, first, rows, columns, stride, TRANSPOSE)
        _store_piece_masked(piece1, out_ptr, out_buf, 1, row, column, first, rows, columns, stride, TRANSPOSE)
        _store_piece_masked(piece2, out_ptr, out_buf, 2, row, column, first, rows, columns, stride, TRANSPOSE)
        if BLOCK_D == 256:
            _store_piece_masked(piece3, out_ptr, out_buf, 3, row, column, first, rows, columns, stride, TRANSPOSE)
    else:
        piece0, piece1 = _halves(result)
        _store_piece_masked(piece0, out_ptr, out_buf, 0, row, column, first, rows, columns, stride, TRANSPOSE)
        _store_piece_masked(piece1, out_ptr, out_buf, 1, row, column, first, rows, columns, stride, TRANSPOSE)


@gluon.jit
def _consumer(
    scale_inv_ptr, dense_scale_inv_ptr, out, out_ptr, table_ptr, a_buf, m_buf, b_buf, barriers, num_r, num_d, num_k,
    group, rows, columns, experts, blocks, waves,
    WARPGROUP: gl.constexpr, RING: gl.constexpr, ACCURATE: gl.constexpr, TRANSPOSE: gl.constexpr,
    OUT_BUFFERS: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    WIDTH: gl.constexpr = RING.value.width
    CLUSTER: gl.constexpr = RING.value.cluster
    BLOCK_D: gl.constexpr = RING.value.block_d
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    scale_layout: gl.constexpr = gl.BlockedLayout([WIDTH // 128], [32], [4], [0])
    if OUT_BUFFERS > 0:
        out_buf = gl.allocate_shared_memory(out.dtype, [OUT_BUFFERS, _PIECE, _PIECE], out.layout)
    if CLUSTER > 1:
        _cluster_sync()
    rank = gl.program_id(0) % CLUSTER
    if SHARED == _ONE:
        scale_inv = gl.load(scale_inv_ptr)
    done = 0  # stages multiplied so far
    # The assembly makes new accumulators; a tensor of their shape and layout is where it takes its argument from.
    zeros = gl.zeros([64, WIDTH], gl.int32, acc_layout)
    num_d, tiles = _tiles(table_ptr, num_r, num_d, experts, blocks, SHARED)
    first_tile, end, step = _span(tiles, waves, CLUSTER)
    for tile in range(first_tile, end, step):
        if SHARED == _CONTRACTION:
            expert = tile // (num_r * num_d)
            _, num_k = _stages(table_ptr, blocks, expert)
            pid_r, pid_d = _tile(tile % (num_r * num_d), num_r, num_d, group)
        else:
            pid_r, pid_d = _tile(tile, num_r, num_d, group)
        row = ((pid_r * CLUSTER + rank) * _BLOCKS + WARPGROUP) * 64
        if SHARED == _COLUMNS:
            expert = gl.load(table_ptr + pid_d * 4)
            column = gl.load(table_ptr + pid_d * 4 + 1)
            columns = gl.load(table_ptr + pid_d * 4 + 2)  # of out, where the expert's end
        else:
            column = pid_d * BLOCK_D
        if SHARED != _ONE:
            scale_inv = gl.load(scale_inv_ptr + expert)
        if dense_scale_inv_ptr is not None:
            # Two a thread, on their way while it multiplies.
            offs_s = column + gl.arange(0, WIDTH, scale_layout)
            scale = gl.load(dense_scale_inv_ptr + offs_s, mask=offs_s < columns, other=0.0) * scale_inv
        if ACCURATE:
            acc = gl.zeros([64, WIDTH], gl.float32, acc_layout)
            carry, _ = _halves(zeros)
            for first in range(0, num_k, _CARRY_STAGES):
                count = min(num_k - first, _CARRY_STAGES)
                acc, carry = _carry_over(_multiply(acc, zeros, done, count, WARPGROUP, RING), carry, acc_layout)
                done += count
            left, right = _halves(acc)
            carried_left, carried_right = _widen(carry)
            acc = _whole(left + carried_left, right + carried_right, acc_layout)
        else:
            acc = _multiply(None, zeros, done, num_k, WARPGROUP, RING)
            done += num_k

        if dense_scale_inv_ptr is not None:
            result = acc * gl.convert_layout(scale, gl.SliceLayout(0, acc_layout))[None, :]
        else:
            result = acc * scale_inv
        if SHARED == _ONE:
            if OUT_BUFFERS > 0:
                _store_tile(result, out, out_buf, row, column, BLOCK_D, TRANSPOSE)
            else:
                offs_r = row + gl.arange(0, 64, gl.SliceLayout(1, acc_layout))
                offs_d = column + gl.arange(0, WIDTH, gl.SliceLayout(0, acc_layout))
                _store_direct(result, out, offs_r, offs_d, rows, columns, column + BLOCK_D, TRANSPOSE)
        else:
            # Rows of out before the expert's.
            before = 0
            if SHARED == _CONTRACTION:
                before = expert * (columns if TRANSPOSE else rows)
            if OUT_BUFFERS > 0:
                inside = (row + 64 <= rows) & (column + BLOCK_D <= columns)
                if inside:
                    if TRANSPOSE:
                        _store_tile(result, out, out_buf, row, before + column, BLOCK_D, TRANSPOSE)
                    else:
                        _store_tile(result, out, out_buf, before + row, column, BLOCK_D, TRANSPOSE)
                else:
                    stride = rows if TRANSPOSE else columns
                    first_out = before.to(gl.int64) * stride if SHARED == _CONTRACTION else 0
                    _store_tile_masked(
                        result, out_ptr, out_buf, row, column, first_out, rows, columns, stride, BLOCK_D, TRANSPOSE
                    )  # fmt: skip
            else:
                first_ptr = out
                if SHARED == _CONTRACTION:
                    first_ptr += before.to(gl.int64) * (rows if TRANSPOSE else columns)
                offs_r = row + gl.arange(0, 64, gl.SliceLayout(1, acc_layout))
                offs_d = column + gl.arange(0, WIDTH, gl.SliceLayout(0, acc_layout))
                _store_direct(result, first_ptr, offs_r, offs_d, rows, columns, column + BLOCK_D, TRANSPOSE)
    if OUT_BUFFERS > 0:
        tma.store_wait(0)
    if CLUSTER > 1:
        _cluster_sync()
    # Only the assembly uses these.
    a_buf._keep_alive()
    m_buf._keep_alive()
    b_buf._keep_alive()
    barriers._keep_alive()
    _exit()


@gluon.jit(do_not_specialize=[
    "rows", "columns", "num_k", "group", "last_metadata", "experts", "blocks", "expert_blocks", "expert_stages", "waves"
])  # fmt: skip
def sparse_gemm_kernel(
    values_desc, metadata_desc, dense_desc, scale_inv_ptr, dense_scale_inv_ptr, out, out_ptr, table_ptr,
    rows, columns, num_k, group, last_metadata, experts, blocks, expert_blocks, expert_stages, waves,
    RING: gl.constexpr, ACCURATE: gl.constexpr, TRANSPOSE: gl.constexpr, OUT_BUFFERS: gl.constexpr,
    COLUMNS_DIVISOR: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """``out`` is a descriptor, or with OUT_BUFFERS = 0 a pointer; ``dense_scale_inv_ptr`` may be None.

    Of experts: ``out_ptr`` is out as a pointer, ``table_ptr`` that of ``expert_blocks``, ``blocks`` the most that it
    holds; ``rows`` and ``columns`` are those of one expert, but for the columns that they share; ``expert_blocks`` and
    ``expert_stages`` are what an expert has of blocks of 64 rows of A, and of rows of metadata.
    """
    STAGES: gl.constexpr = RING.value.stages
    PARTS: gl.constexpr = RING.value.block_d // RING.value.box
    # Tells the compiler how wide masked accesses may be.
    columns = columns // COLUMNS_DIVISOR * COLUMNS_DIVISOR
    if SHARED != _ONE:
        rows = rows // 64 * 64
    a_buf = gl.allocate_shared_memory(
        values_desc.dtype, [STAGES * _BLOCKS] + values_desc.block_type.shape, values_desc.layout
    )
    m_buf = gl.allocate_shared_memory(
        metadata_desc.dtype, [STAGES * _BLOCKS] + metadata_desc.block_type.shape, metadata_desc.layout
    )
    b_buf = gl.allocate_shared_memory(
        dense_desc.dtype, [STAGES * PARTS] + dense_desc.block_type.shape, dense_desc.layout
    )
    barriers = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.index(i), count=1)
        # One arrival for each warp that reads the stage, also of the other blocks of the cluster.
        mbarrier.init(barriers.index(STAGES + i), count=4 * _BLOCKS * RING.value.cluster)
    fence_async_shared()
    num_r = gl.cdiv(rows, 64 * _BLOCKS * RING.value.cluster)
    num_d = gl.cdiv(columns, RING.value.block_d)
    # The arguments are written out, because in a variable their constexprs would become tensors.
    gl.warp_specialize(
        [
            (_consumer, (
                scale_inv_ptr, dense_scale_inv_ptr, out, out_ptr, table_ptr, a_buf, m_buf, b_buf, barriers, num_r,
                num_d, num_k, group, rows, columns, experts, blocks, waves, 0, RING, ACCURATE, TRANSPOSE, OUT_BUFFERS,
                SHARED,
            )),
            (_consumer, (
                scale_inv_ptr, dense_scale_inv_ptr, out, out_ptr, table_ptr, a_buf, m_buf, b_buf, barriers, num_r,
                num_d, num_k, group, rows, columns, experts, blocks, waves, 1, RING, ACCURATE, TRANSPOSE, OUT_BUFFERS,
                SHARED,
            )),
            # Four warps, because each warp of the block must take part in barriers of the cluster.
            (_producer, (
                table_ptr, num_r, num_d, num_k, group, last_metadata, experts, blocks, expert_blocks, expert_stages,
                waves, SHARED, RING,
            )),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip
