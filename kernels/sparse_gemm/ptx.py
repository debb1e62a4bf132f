"""The assembly of the sparse GEMM: how a stage is loaded, and how a warpgroup multiplies the stages of a tile.

Triton has no operation for ``wgmma.mma_async.sp``, nor for TMA multicast and barriers of another block of a cluster.
So the inner loops are PTX, and Gluon holds what surrounds them.

Stages lie in a ring in shared memory.  One holds, for each of two blocks of 64 rows, the kept elements of A (64 bytes a
row) and their metadata, and ``block_d`` rows of B (128 bytes each); two instructions contract it.  Each stage has two
barriers: "full" at ``barriers + 8 * stage``, and "empty" ``8 * stages`` bytes further on.  Where a walk along the ring
stands is one int: the stage to come, plus 256 times the parity that its barrier is waited for with.
"""

from dataclasses import dataclass

from triton.experimental import gluon

KERNEL_NAME = "sparse_gemm_kernel"  # the symbols of its parameters begin with it
BLOCKS = 2  # blocks of 64 rows of a tile, each a warpgroup's
_VALUES_BYTES = 64 * 64  # of 64 rows


@dataclass(frozen=True, kw_only=True, slots=True)
class SmemPipeline:
    """The shape of the ring, where it lies, and what it is loaded from.

    Args:
        block_d: rows of B in a stage: 128, 192 or 256.
        stages: stages in the ring.
        cluster: blocks of a cluster; each loads its share of B's rows for all of them.
        words: metadata words of a lane in a stage: 2 with 8-bit operands, 1 with 16-bit ones.
        dtypes: of A and B, as PTX names them: "e5m2.e4m3".
        experts: whether A holds the matrices of experts, one after the other, of which a tile has one.
        values, metadata, dense, barriers: offsets in shared memory, bytes.
        descriptors: which parameters of the compiled kernel are descriptors: those of values, metadata, dense, and
            maybe more.
    """

    block_d: int
    stages: int
    cluster: int
    words: int
    dtypes: str
    experts: bool = False
    values: int = 0
    metadata: int = 0
    dense: int = 0
    barriers: int = 0
    descriptors: tuple[int, ...] = (0, 0, 0)

    @property
    def width(self) -> int:
        """Columns of a warpgroup's accumulators, a power of two as Triton needs it."""
        return 128 if self.block_d == 128 else 256

    @property
    def box(self) -> int:
        """Rows of B that one TMA copy brings."""
        share = self.block_d // self.cluster
        return share & -share

    @property
    def metadata_bytes(self) -> int:
        """Of 64 rows."""
        return 64 * 8 * self.words

    @property
    def dense_bytes(self) -> int:
        return 128 * self.block_d

    @property
    def stage_bytes(self) -> int:
        return BLOCKS * (_VALUES_BYTES + self.metadata_bytes) + self.dense_bytes


@gluon.constexpr_function
def load_asm(ring):
    """One thread of the first warp waits until a stage is empty and loads it; the others pass.

    Operands: dummy result, position in the ring, stage of the contraction, first block of 64 rows of A, this block's
    first row of B, last column of the metadata that a copy may begin at, rank in the cluster.  Of experts, two more:
    blocks of 64 rows, and rows of metadata, before those of the tile's expert.
    """
    if ring.experts:
        first_row, metadata_row = ["add.u32 y, $3, $7;", "shl.b32 y, y, 6;"], "row"
    else:
        first_row, metadata_row = ["shl.b32 y, $3, 6;"], "$2"

    def copy(descriptor, x, y, multicast=False):
        # TMA counts the zeros that it fills in beyond a tensor, too.
        instruction = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        suffix, mask = (".multicast::cluster", ", everyone") if multicast else ("", "")
        return [
            f"mov.b64 descriptor, {KERNEL_NAME}_param_{descriptor};",
            "cvta.param.u64 descriptor, descriptor;",
            f"{instruction}{suffix} [target], [descriptor, {{{x}, {y}}}], [full]{mask};",
        ]

    values, metadata, dense = ring.descriptors[:3]
    share = ring.block_d // ring.cluster
    lines = [
        "{",
        ".reg .pred elected, chosen, done;",
        ".reg .b32 stage, parity, base, full, thread, target, x, y, column;",
        ".reg .b64 descriptor;",
        ".reg .b16 everyone;",
        "elect.sync _|elected, 0xffffffff;",
        "mov.u32 thread, %tid.x;",
        "and.b32 thread, thread, 96;",
        "setp.eq.and.b32 chosen, thread, 0, elected;",
        "@!chosen bra PASS;",
        f"mov.b16 everyone, {2**ring.cluster - 1};",
        "mov.u32 base, global_smem;",
        "and.b32 stage, $1, 255;",
        "shr.u32 parity, $1, 8;",
        "mad.lo.u32 full, stage, 8, base;",
        f"add.u32 full, full, {ring.barriers};",
        "WAIT:",
        f"mbarrier.try_wait.parity.shared::cta.b64 done, [full + {8 * ring.stages}], parity;",
        "@!done bra WAIT;",
        f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], {ring.stage_bytes};",
        # B, this block's share of the rows, to all blocks of the cluster.
        f"mad.lo.u32 target, stage, {ring.dense_bytes}, base;",
        f"mad.lo.u32 target, $6, {128 * share}, target;",
        f"add.u32 target, target, {ring.dense};",
        f"mul.lo.u32 x, $2, {64 * ring.words};",
        "mov.b32 y, $4;",
    ]
    for i in range(share // ring.box):
        if i > 0:
            lines += [f"add.u32 target, target, {128 * ring.box};", f"add.u32 y, y, {ring.box};"]
        lines += copy(dense, "x", "y", multicast=ring.cluster > 1)
    lines += [
        f"mad.lo.u32 target, stage, {BLOCKS * _VALUES_BYTES}, base;",
        f"add.u32 target, target, {ring.values};",
        "shr.u32 x, x, 1;",
        *first_row,
    ]
    for i in range(BLOCKS):
        if i > 0:
            lines += [f"add.u32 target, target, {_VALUES_BYTES};", "add.u32 y, y, 64;"]
        lines += copy(values, "x", "y")
    lines += [
        f"mad.lo.u32 target, stage, {BLOCKS * ring.metadata_bytes}, base;",
        f"add.u32 target, target, {ring.metadata};",
        f"mul.lo.u32 x, $3, {128 * ring.words};",
    ]
    if ring.experts:
        lines += [".reg .b32 row;", "add.u32 row, $2, $8;"]
    for i in range(BLOCKS):
        if i > 0:
            lines += [f"add.u32 target, target, {ring.metadata_bytes};", f"add.u32 x, x, {128 * ring.words};"]
        # Rows beyond the padded operand take other rows' metadata: zeros would name no legal positions.
        lines += ["min.s32 column, x, $5;", *copy(metadata, "column", metadata_row)]
    return "\n".join([*lines, "PASS:", "mov.b32 $0, 0;", "}"])


@gluon.constexpr_function
def multiply_asm(ring, block, onto):
    """A warpgroup multiplies one or more stages; with the constraints of its operands.

    Operands, R = width / 2 of each, as elementwise assembly has them: accumulators, of which the first ``block_d / 2``
    are used; with ``onto``, what they hold before, otherwise they are fresh; and 32 bits that hold the position in the
    ring and, from bit 16 on, the number of stages.

    While a stage's instructions run, those of the next are issued; a stage is given back when those of the next have
    been.  The registers with its metadata are read until then, so two sets of them take turns.
    """
    registers = ring.width // 2
    accumulators = ", ".join(f"${i}" for i in range(ring.block_d // 2))
    argument = f"${2 * registers if onto else registers}"
    # The peers' barriers are other addresses even of this block.
    space = "shared::cta" if ring.cluster == 1 else "shared::cluster"

    def give_back():
        lines = []
        for rank in range(ring.cluster):
            lines += [
                f"mad.lo.u32 address, previous, 8, empty{rank};",
                f"@holds mbarrier.arrive.{space}.b64 _, [address];",
            ]
        return lines

    def multiply_stage(words):
        lines = [
            "mad.lo.u32 address, stage, 8, base;",
            f"WAIT_{words[0]}:",
            f"mbarrier.try_wait.parity.shared::cta.b64 done, [address + {ring.barriers}], parity;",
            f"@!done bra.uni WAIT_{words[0]};",
            f"mad.lo.u32 address, stage, {BLOCKS * ring.metadata_bytes}, lane;",
            f"ld.shared.{'v2.' if ring.words == 2 else ''}b32 {{{', '.join(words[: ring.words])}}}, "
            f"[address + {ring.metadata + block * ring.metadata_bytes}];",
            # Low halves of the descriptors: the address in units of 16 bytes, without the block's rank in the cluster.
            f"mad.lo.u32 address, stage, {BLOCKS * _VALUES_BYTES}, base;",
            f"add.u32 address, address, {ring.values + block * _VALUES_BYTES};",
            "bfe.u32 low, address, 4, 14;",
            "or.b32 low, low, 0x10000;",
            "mov.b64 a, {low, high_a};",
            f"mad.lo.u32 address, stage, {ring.dense_bytes}, base;",
            f"add.u32 address, address, {ring.dense};",
            "bfe.u32 low, address, 4, 14;",
            "or.b32 low, low, 0x10000;",
            "mov.b64 b, {low, high_b};",
            "wgmma.fence.sync.aligned;",
        ]
        for step in range(2):
            if step == 1:
                # 32 bytes of a row of A and 64 of B further.
                lines += ["add.s64 a, a, 2;", "add.s64 b, b, 4;"]
            instruction = f"wgmma.mma_async.sp.sync.aligned.m64n{ring.block_d}"
            if ring.words == 2:
                depth, word, selector, major = "k64", words[step], 0, ""
            else:
                # One word holds the metadata of both instructions, in different lanes.
                depth, word, selector, major = "k32", words[0], step, ", 0, 0"
            lines += [
                f"{instruction}{depth}.f32.{ring.dtypes} "
                f"{{{accumulators}}}, a, b, {word}, {selector}, accumulate, 1, 1{major};",
                "setp.eq.u32 accumulate, 0, 0;",
            ]
        return [
            *lines,
            "wgmma.commit_group.sync.aligned;",
            "wgmma.wait_group.sync.aligned 1;",
            *give_back(),
            "and.pred holds, elected, elected;",
            "mov.b32 previous, stage;",
            "add.u32 stage, stage, 1;",
            f"setp.eq.u32 wraps, stage, {ring.stages};",
            "@wraps mov.b32 stage, 0;",
            "@wraps xor.b32 parity, parity, 1;",
            "sub.u32 left, left, 1;",
            "setp.ne.u32 more, left, 0;",
        ]

    lines = [
        "{",
        ".reg .b32 stage, parity, left, previous, base, lane, address, low, high_a, high_b;",
        ".reg .b32 word0, word1, word2, word3;",
        ".reg .b64 a, b;",
        ".reg .pred accumulate, holds, elected, done, wraps, more;",
        *(f".reg .b32 empty{rank};" for rank in range(ring.cluster)),
        f"and.b32 stage, {argument}, 255;",
        f"bfe.u32 parity, {argument}, 8, 1;",
        f"shr.u32 left, {argument}, 16;",
        "mov.b32 previous, 0;",
        "mov.u32 base, global_smem;",
        "mov.u32 lane, %tid.x;",
        "and.b32 lane, lane, 127;",
        f"mad.lo.u32 lane, lane, {4 * ring.words}, base;",
        # Upper halves of the descriptors: swizzle, and bytes between blocks of eight rows in units of 16 (PTX ISA,
        # "Matrix descriptor").
        "mov.b32 high_a, 0x80000020;",
        "mov.b32 high_b, 0x40000040;",
        "elect.sync _|elected, 0xffffffff;",
        f"setp.{'eq' if onto else 'ne'}.u32 accumulate, 0, 0;",
        "setp.ne.u32 holds, 0, 0;",
        f"add.u32 address, base, {ring.barriers + 8 * ring.stages};",
    ]
    if not onto:
        # The first instruction does not read them, but the compiler would define them later, amid the instructions.
        lines += [f"mov.b32 ${i}, 0f00000000;" for i in range(ring.block_d // 2)]
    if ring.cluster == 1:
        lines.append("mov.b32 empty0, address;")
    else:
        lines += [f"mapa.shared::cluster.u32 empty{rank}, address, {rank};" for rank in range(ring.cluster)]
    lines += [
        "LOOP:",
        *multiply_stage(("word0", "word1")),
        "@!more bra.uni LAST;",
        *multiply_stage(("word2", "word3")),
        "@more bra.uni LOOP;",
        "LAST:",
        "wgmma.wait_group.sync.aligned 0;",
        *give_back(),
        "}",
    ]
    # Early clobbers: the loop reads its argument after it began to write.
    before = [str(i) for i in range(registers)] if onto else []
    constraints = ["=&f"] * registers + before + ["r"] * registers
    return "\n".join(lines), ",".join(constraints)
