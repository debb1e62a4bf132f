"""The 2:4-sparse GEMM: its operand format, its compilation for Hopper, its arithmetic on one."""

import itertools
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from triton.tools.disasm import get_sass

from hopper_compiler import plans_that_only_compile
from sparse_compile.kernels import reference
from sparse_compile.kernels.formats import E4M3, E5M2, PAD_WORD, metadata_shape, padded, values_shape
from sparse_compile.kernels.sparse_gemm import configs, launch, shared_memory
from sparse_compile.kernels.sparse_gemm import kernel as gemm_kernel
from sparse_compile.kernels.sparse_gemm import plan as plan_module
from sparse_compile.testing import SPARSE_INSTRUCTION, assert_within_budget

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_operand(
    rows: int, columns: int, device: str = "cpu", dtype: torch.dtype = E4M3
) -> tuple[Tensor, Tensor, Tensor]:
    """``values``, ``metadata`` and ``scale_inv`` of a random weight ``[rows, columns]``."""
    values, metadata, _, scale_inv = reference.prune_weight(
        torch.randn(rows, columns, device=device), torch.tensor([1.5], device=device)
    )
    return values.float().to(dtype), metadata, scale_inv


def random_positions(rows: int, columns: int, device: str = "cpu") -> Tensor:
    """What to keep of each group of four of ``[rows, columns]``."""
    return torch.rand(rows, columns // 4, 4, device=device).argsort(-1)[..., :2].sort(-1).values


def random_dense(rows: int, columns: int, device: str = "cpu", dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """FP8 ``[rows, columns]`` and its ``scale_inv [rows]``."""
    x = torch.randn(rows, columns, device=device) * torch.rand(rows, 1, device=device)
    scale_inv = x.abs().amax(1) / 448
    return reference.saturating_cast(x / scale_inv[:, None], dtype), scale_inv


def poisoned(shape: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A buffer full of NaN, and a tensor that is all of it but 1024 elements at either end."""
    size = shape[0] * shape[1]
    buffer = torch.full((size + 2048,), float("nan"), dtype=dtype, device=device)
    return buffer, buffer[1024 : 1024 + size].view(shape)


class TestFormat:
    """Metadata and values on the CPU."""

    def test_hand_written_group(self) -> None:
        dense = torch.zeros(1, 16)
        dense[0, [1, 3]] = torch.tensor([5.0, 7.0])
        dense[0, [4, 6]] = torch.tensor([1.0, 2.0])
        positions = torch.tensor([[[1, 3], [0, 2], [2, 3], [0, 1]]])
        values, metadata = reference.compress24(dense.to(E4M3), positions)
        assert values.shape == (1, 64)
        assert values[0, :8].tolist() == [5.0, 7.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0]
        # 1 | 3 << 2, 0 | 2 << 2, 2 | 3 << 2, 0 | 1 << 2, the lowest first; the rest of the word is padding.
        assert metadata[0, 0, 0, 0] == 0x44444E8D - (0 if 0x44444E8D < 2**31 else 2**32)
        metadata[0, 0, 0, 0] = PAD_WORD
        assert (metadata == PAD_WORD).all()

    @pytest.mark.parametrize("word", [0, 1])
    def test_lanes_hold_what_wgmma_reads(self, word) -> None:
        # CUTLASS, mma_traits_sm90_gmma_sparse.hpp, metadata of m64k64 with 8-bit operands: the thread's digits in mixed
        # radix (2, 2, 8, 4) times the strides (8, 2048, 1, 16), plus 64 a bit, is row + 64 * column.
        rows, columns = 128, 384
        groups = random_positions(rows, columns)
        _, metadata = reference.compress24(torch.ones(rows, columns).to(E4M3), groups)
        for block in range(columns // 128):
            for thread in range(256):  # two warpgroups
                bits = int(metadata[block, thread // 32, thread % 32, word])
                within = thread % 128
                index = within % 2 * 8 + within // 2 % 2 * 2048 + within // 4 % 8 + within // 32 * 16
                row, column = index % 64 + thread // 128 * 64, index // 64 + word * 64 + block * 128
                for group in range(8):
                    first, second = groups[row, column // 4 + group].tolist()
                    assert bits >> (4 * group) & 15 == first | second << 2

    def test_lanes_hold_what_wgmma_reads_with_16_bits(self) -> None:
        # PTX ISA, metadata of wgmma m64nNk32 with 16-bit operands: thread t of four holds, with selector t // 2, the
        # columns from 16 * (t % 2) on of the instruction's 32, of row r in the low half and of row r + 8 in the high.
        rows, columns = 128, 192
        groups = random_positions(rows, columns)
        _, metadata = reference.compress24(torch.ones(rows, columns).bfloat16(), groups)
        assert metadata.shape == metadata_shape(rows, columns, torch.bfloat16) == (4, 8, 32, 1)
        for block in range(columns // 64):
            for warp in range(8):
                for lane in range(32):
                    bits = int(metadata[block, warp, lane, 0])
                    column = 64 * block + 32 * (lane % 4 // 2) + 16 * (lane % 2)
                    for half in range(2):
                        for group in range(4):
                            first, second = groups[16 * warp + lane // 4 + 8 * half, column // 4 + group].tolist()
                            assert bits >> (16 * half + 4 * group) & 15 == first | second << 2

    @pytest.mark.parametrize("size", [(128, 128), (5, 144), (200, 1040)], ids=str)
    def test_decompression_is_the_inverse_with_16_bits(self, size) -> None:
        rows, columns = size
        dense, positions = torch.randn(size).bfloat16(), random_positions(*size)
        values, metadata = reference.compress24(dense, positions)
        assert values.shape == values_shape(*size)
        mask = torch.zeros(rows, columns // 4, 4).scatter_(-1, positions, 1.0).reshape(size)
        decompressed = reference.decompress24(values, metadata)
        assert torch.equal(decompressed[:, :columns], torch.where(mask > 0, dense, 0.0))
        assert not decompressed[:, columns:].any()

    @pytest.mark.parametrize("size", [(128, 128), (16, 16), (5, 144), (200, 1040)], ids=str)
    def test_decompression_is_the_inverse(self, size) -> None:
        rows, columns = size
        weight = torch.randn(size)
        values, metadata, payload_t, _ = reference.prune_weight(weight, torch.ones(1))
        assert values.shape == values_shape(*size)
        assert metadata.shape == metadata_shape(*size)
        dense = reference.decompress24(values, metadata)
        assert dense.shape == (rows, padded(columns))
        assert torch.equal(dense[:, :columns].float(), payload_t.t().float())
        assert not dense[:, columns:].float().any()


# Each config, with fast accumulation and, where it has the registers, without.
CONFIGS = [(config, accurate) for accurate in (False, True) for config in configs.configs()]


def config_id(argument: object) -> str:
    if isinstance(argument, configs.Config):
        return f"128x{argument.block_d}" + (" clusters" if argument.cluster > 1 else "")
    return "accurate" if argument else "fast"


@pytest.fixture
def compile_plan(monkeypatch) -> Iterator[Callable[..., Any]]:
    """Plans of some sizes, of which what was compiled is returned."""

    def plan(config, accurate, dtype, dense_dtype, rows, columns, out_dtype, *, scaled, transpose):
        values, metadata = reference.compress24(torch.randn(rows, 256).to(dtype), random_positions(rows, 256))
        out = torch.empty((columns, rows) if transpose else (rows, columns), dtype=out_dtype)
        dense = torch.randn(columns, 256).to(dense_dtype)
        scale = torch.ones(columns) if scaled else None
        return plan_module.plan_gemm(config, accurate, values, metadata, dense, torch.ones(1), scale, out, transpose)

    with plans_that_only_compile(monkeypatch):
        yield plan


# By the dtypes of A and B: without gradients, with a gradient as A, with one as B.
INSTRUCTION = {
    (E4M3, E4M3): "QGMMA.SP.64x{}x64.F32.E4M3.E4M3",
    (E5M2, E4M3): "QGMMA.SP.64x{}x64.F32.E5M2.E4M3",
    (E4M3, E5M2): "QGMMA.SP.64x{}x64.F32.E4M3.E5M2",
    (torch.bfloat16, torch.bfloat16): "HGMMA.SP.64x{}x32.F32.BF16",
}


class Product(NamedTuple):
    dtypes: tuple[torch.dtype, torch.dtype]
    out_dtype: torch.dtype
    rows: int
    columns: int
    scaled: bool
    transpose: bool
    store: str


PRODUCTS = {
    "fprop": Product((E4M3, E4M3), torch.bfloat16, 64, 48, True, True, "UTMASTG"),
    "wgrad": Product((E4M3, E4M3), torch.float16, 64, 48, False, False, "UTMASTG"),
    "wgrad fp32": Product((E4M3, E4M3), torch.float32, 64, 48, False, False, "STG"),
    "odd rows": Product((E4M3, E4M3), torch.bfloat16, 65, 49, True, True, "STG"),
    "wgrad e5m2": Product((E5M2, E4M3), torch.float16, 64, 48, False, False, "UTMASTG"),
    "dgrad e5m2": Product((E4M3, E5M2), torch.bfloat16, 64, 48, True, True, "UTMASTG"),
    "bf16": Product((torch.bfloat16, torch.bfloat16), torch.bfloat16, 64, 48, False, True, "UTMASTG"),
}


# Block_d, cluster, accurate and product.  Each config and each product is there, and block_d and cluster with either
# accumulation; the widest clusters with what needs most registers.
BY_DAY = {
    (128, 1, False, "odd rows"), (128, 2, False, "dgrad e5m2"), (192, 2, False, "wgrad"), (256, 1, False, "fprop"),
    (256, 1, False, "bf16"), (128, 1, True, "wgrad e5m2"), (192, 1, True, "wgrad"), (256, 2, True, "wgrad fp32"),
}  # fmt: skip


def compilations() -> Iterator[Any]:
    """Some by day; in a night all with all."""
    for accurate in (False, True):
        # bf16 needs no accurate accumulation, and fprop asks for none.
        products = {name: p for name, p in PRODUCTS.items() if not (accurate and p.transpose)}
        for config, (name, product) in itertools.product(configs.configs(), products.items()):
            by_day = (config.block_d, config.cluster, accurate, name) in BY_DAY
            accumulation = "accurate" if accurate else "fast"
            yield pytest.param(
                config, accurate, product, id=f"{config_id(config)}-{accumulation}-{name}",
                marks=() if by_day else pytest.mark.nightly,
            )  # fmt: skip


@pytest.mark.parametrize(("config", "accurate", "product"), list(compilations()))
def test_compiles_for_hopper(compile_plan, monkeypatch, config, accurate, product) -> None:
    dtypes, out_dtype, rows, columns, scaled, transpose, store = product
    guesses = []

    def resolve(compile_kernel, buffers, guess):
        found = shared_memory.resolve_places(compile_kernel, buffers, guess)
        guesses.append(guess == found)
        return found

    monkeypatch.setattr(plan_module, "resolve_places", resolve)
    monkeypatch.setattr(plan_module, "_rings", {})
    compiled = compile_plan(config, accurate, *dtypes, rows, columns, out_dtype, scaled=scaled, transpose=transpose)
    sass = get_sass(compiled.asm["cubin"])
    # Two warpgroups, two sets of metadata registers, two instructions a stage.
    assert re.findall(r"[QH]GMMA[.\w]*", sass) == [INSTRUCTION[dtypes].format(config.block_d)] * 8
    assert set(re.findall(r"\b(?:UTMA)?STG\b", sass)) == {store}
    assert ("MULTICAST" in sass) == (config.cluster > 1)
    # Where the compiler finds no registers to keep two stages in flight it waits after each instruction.
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", sass)
    assert sorted(waits) == ["0x0"] * 2 + ["0x1"] * 4
    # In the loops nothing is spilled: from where a stage is waited for to the jump behind its instructions.
    stages = re.findall(r"TRYWAIT(?:(?!TRYWAIT).)*?[QH]GMMA.*?BRA", sass, re.DOTALL)
    assert len(stages) == 4
    assert guesses == [True]  # or it is compiled twice
    assert not any(re.search(r"\b(?:LDL|STL)\b", stage) for stage in stages)


class TestPlaces:
    """The search for the places of shared-memory buffers and descriptors."""

    TTGIR = """
    #shared = #ttg.swizzled_shared<{vec = 1, perPhase = 1, maxPhase = 1, order = [0]}>
    #smem = #ttg.shared_memory
    module attributes {"ttg.num-ctas" = 1 : i32, "ttg.num-warps" = 8 : i32, ttg.target = "cuda:90",
                       "ttg.threads-per-warp" = 32 : i32} {
      tt.func public @kernel() {
        %0 = ttg.local_alloc : () -> !ttg.memdesc<512xi32, #shared, #smem, mutable>
        %1 = ttg.local_alloc : () -> !ttg.memdesc<SECONDxi32, #shared, #smem, mutable>
        ttg.local_dealloc %1 : !ttg.memdesc<SECONDxi32, #shared, #smem, mutable>
        ttg.local_dealloc %0 : !ttg.memdesc<512xi32, #shared, #smem, mutable>
        tt.return
      }
    }
    """

    PTX = """
    .visible .entry kernel(
        .param .u64 kernel_param_0,
        .param .align 64 .b8 kernel_param_1[128],
        .param .align 64 .b8 kernel_param_6[128]
    )
    """

    def kernel(self, second: int) -> SimpleNamespace:
        return SimpleNamespace(asm={"ttgir": self.TTGIR.replace("SECOND", str(second)), "ptx": self.PTX})

    def test_compiles_until_they_hold(self) -> None:
        tried = []
        buffers = {"first": (512,), "second": (64,)}
        found = shared_memory.resolve_places(lambda places: (tried.append(places), self.kernel(64))[1], buffers)
        assert found == {"first": 0, "second": 2048, "descriptors": (1, 6)}
        assert tried == [{}, found]

    @pytest.mark.parametrize(("second", "compilations"), [(2048, 1), (1024, 2)])
    def test_a_guess_is_verified(self, second: int, compilations: int) -> None:
        tried = []
        guess = {"first": 0, "second": second, "descriptors": (1, 6)}
        buffers = {"first": (512,), "second": (64,)}
        found = shared_memory.resolve_places(lambda places: (tried.append(places), self.kernel(64))[1], buffers, guess)
        assert found == {"first": 0, "second": 2048, "descriptors": (1, 6)}
        assert tried == [guess, found][:compilations]

    def test_refuses_a_missing_buffer(self) -> None:
        with pytest.raises(RuntimeError, match=r"other needs one shared-memory buffer of shape \(3,\); allocated are"):
            shared_memory.resolve_places(lambda places: self.kernel(64), {"other": (3,)})

    def test_refuses_buffers_of_one_shape(self) -> None:
        with pytest.raises(RuntimeError, match="first needs one shared-memory buffer"):
            shared_memory.resolve_places(lambda places: self.kernel(512), {"first": (512,)})

    def test_refuses_places_that_move(self) -> None:
        tried = []

        def moving(places):
            tried.append(places)
            # The larger buffer comes first.
            return self.kernel(1024 * len(tried))

        with pytest.raises(RuntimeError, match="do not settle"):
            shared_memory.resolve_places(moving, {"first": (512,)})


@pytest.mark.parametrize(
    ("rows", "columns", "num_k", "block_d"),
    [
        (8192, 8192, 64, 256),
        (128, 1, 8, 128),
        # 72 wide tiles leave 60 of 132 multiprocessors idle, 96 narrower ones 36.
        (3072, 768, 128, 192),
        # 36 tiles of any width are one round.
        (768, 768, 8, 128),
    ],
)
def test_choice_of_the_tile(rows, columns, num_k, block_d) -> None:
    assert configs.choose(rows, columns, num_k, 132).block_d == block_d


@pytest.mark.parametrize("change", [{"block_d": 64}, {"cluster": 4}], ids=str)
def test_config_refuses(change) -> None:
    with pytest.raises(ValueError, match=r"allowed is \(block_d, cluster\) in "):
        configs.Config(**{"block_d": 256, "cluster": 1, **change})


@pytest.mark.parametrize(
    ("rows", "columns", "contraction"), [(0, 3, 32), (5, 0, 32), (5, 3, 0)], ids=["no rows", "no columns", "no sum"]
)
def test_empty_problems_launch_nothing(rows, columns, contraction) -> None:
    values = torch.empty(values_shape(rows, contraction), dtype=E4M3)
    metadata = torch.empty(metadata_shape(rows, contraction), dtype=torch.int32)
    dense = torch.empty(columns, contraction, dtype=E4M3)
    out = torch.full((rows, columns), float("nan"))
    launch.launch_sparse_gemm(values, metadata, dense, torch.ones(1), None, out, False, True)
    assert torch.equal(out, torch.zeros(rows, columns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.empty(5, 60, dtype=E4M3)}, "values has 60 columns; needed is a multiple of 64"),
        (
            {"values": torch.empty(5, 64)},
            "values is torch.float32; allowed are torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16",
        ),
        ({"values": torch.empty(5, dtype=E4M3)}, "must have two dimensions"),
        ({"metadata": torch.empty(1, 1, 32, 2, dtype=torch.int32)}, r"needed is torch.int32 \(1, 8, 32, 2\)"),
        ({"dense": torch.empty(3, 40, dtype=E4M3)}, "dense has 40 columns; allowed are multiples of 16 up to 128"),
        ({"dense": torch.empty(3, 144, dtype=E4M3)}, "dense has 144 columns"),
        ({"dense": torch.empty(3, 48, dtype=torch.bfloat16)}, "dense is torch.bfloat16"),
        ({"values": torch.empty(5, 64, dtype=torch.bfloat16)}, "dense is torch.float8_e4m3fn"),
        ({"dense": torch.empty(48, 3).to(E4M3).t()}, r"dense is torch.float8_e4m3fn \(3, 48\) with strides \(1, 3\)"),
        ({"dense": torch.empty(3 * 48 + 1, dtype=E4M3)[1:].view(3, 48)}, "dense starts at address .* multiple of 16"),
        ({"scale_inv": torch.ones(())}, "scale_inv is"),
        ({"dense_scale_inv": torch.ones(5)}, r"dense_scale_inv is .* needed is torch.float32 \(3,\)"),
        ({"out": torch.empty(5, 3, dtype=torch.float64)}, "out is torch.float64; allowed are"),
        ({"transpose": True}, r"out is .* needed is torch.float32 \(3, 5\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_launcher_refuses_wrong_arguments(change, message) -> None:
    values, metadata, scale_inv = random_operand(5, 48)
    arguments = {
        "values": values,
        "metadata": metadata,
        "dense": torch.zeros(3, 48, dtype=E4M3),
        "scale_inv": scale_inv,
        "dense_scale_inv": None,
        "out": torch.empty(5, 3),
        "transpose": False,
        "use_fast_accum": True,
    }
    with pytest.raises(ValueError, match=message):
        launch.launch_sparse_gemm(**{**arguments, **change})


def assert_product(
    out: Tensor, values: Tensor, metadata: Tensor, dense: Tensor, scale_inv: Tensor, dense_scale_inv: Tensor | None
) -> None:
    """``out [R, D]`` is the product of the operands within its error budget."""
    a = reference.decompress24(values, metadata)[:, : dense.shape[1]]
    scale = scale_inv if dense_scale_inv is None else scale_inv * dense_scale_inv
    assert_within_budget(out, a, dense, scale, SPARSE_INSTRUCTION)


SHAPES = [(128, 256, 128), (16, 16, 16), (48, 15, 80), (3072, 4097, 768), (768, 1, 3072), (1600, 100, 6400)]


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [True, False], ids=["fast", "accurate"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("transpose", [False, True], ids=["", "transpose"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(shape, dtype, transpose, scaled, fast) -> None:
    check_budget(shape, (E4M3, E4M3), dtype, transpose, scaled, fast)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(E5M2, E4M3), (E4M3, E5M2)], ids=str)
@pytest.mark.parametrize("form", [(False, False, False), (True, True, True)], ids=["wgrad", "dgrad"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget_with_gradients_in_e5m2(shape, form, dtypes) -> None:
    check_budget(shape, dtypes, torch.bfloat16, *form)


def check_budget(
    shape: tuple[int, int, int],
    operands: tuple[torch.dtype, torch.dtype],
    dtype: torch.dtype,
    transpose: bool,
    scaled: bool,
    fast: bool,
) -> None:
    rows, columns, contraction = shape
    values, metadata, scale_inv = random_operand(rows, contraction, "cuda", operands[0])
    dense, dense_scale_inv = random_dense(columns, contraction, "cuda", operands[1])
    if not scaled:
        dense_scale_inv = None
        # Keeps fp16 in range.
        scale_inv = scale_inv / 448
    results = []
    for _ in range(2):
        buffer, out = poisoned((columns, rows) if transpose else (rows, columns), dtype, "cuda")
        launch.launch_sparse_gemm(values, metadata, dense, scale_inv, dense_scale_inv, out, transpose, fast)
        assert buffer[:1024].isnan().all()
        assert buffer[-1024:].isnan().all()
        results.append(out)
    assert torch.equal(*results)
    product = results[0].t() if transpose else results[0]
    assert_product(product, values, metadata, dense, scale_inv, dense_scale_inv)


def tiles_of(monkeypatch, program: int, programs: int, tiles: int, waves: int, cluster: int) -> list[int]:
    """What a block multiplies, as the kernel says it."""
    language = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b), num_programs=lambda axis: programs, program_id=lambda axis: program
    )
    monkeypatch.setattr(gemm_kernel, "gl", language)
    return [*range(*gemm_kernel._span.fn(tiles, waves, cluster))]


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize(("tiles", "clusters"), [(1, 1), (5, 5), (2048, 66), (512, 66), (13, 2), (7, 3)])
def test_each_tile_is_in_one_wave(monkeypatch, tiles, clusters, cluster) -> None:
    for waves in range(1, 6):
        programs = waves * clusters * cluster
        taken = [tiles_of(monkeypatch, program, programs, tiles, waves, cluster) for program in range(programs)]
        assert all(taken[block] == taken[block // cluster * cluster] for block in range(programs)), (
            "clusters go together"
        )
        by_cluster = taken[::cluster]
        assert sorted(tile for of_cluster in by_cluster for tile in of_cluster) == [*range(tiles)]
        # Those that run at a time are neighbours, as in one wave: they share operands in the L2 cache.
        assert all(tile in of_cluster for tile, of_cluster in zip(range(tiles), by_cluster[:clusters], strict=False))


def test_products_are_cut_into_waves_where_collectives_run(monkeypatch) -> None:
    config = configs.Config(block_d=256, cluster=2)
    monkeypatch.setattr(plan_module, "sm_count", lambda device: 132)
    monkeypatch.setattr(plan_module, "_collectives_run", lambda: False)
    assert plan_module._grid(config, 2048, None, torch.device("cpu")) == (132, 1)
    monkeypatch.setattr(plan_module, "_collectives_run", lambda: True)
    expected = {1: (2, 1), 66: (132, 1), 131: (132, 1), 198: (132, 1), 199: (264, 2), 2048: (264, 2)}
    assert {tiles: plan_module._grid(config, tiles, None, torch.device("cpu")) for tiles in expected} == expected
    assert plan_module._grid(config, 2048, 3, torch.device("cpu")) == (396, 3)


def test_collectives_run_in_groups_of_several_processes(monkeypatch) -> None:
    assert not plan_module._collectives_run()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for processes in (1, 2):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda processes=processes: processes)
        assert plan_module._collectives_run() == (processes > 1)


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "accurate"), CONFIGS, ids=config_id)
def test_waves_change_nothing(config, accurate) -> None:
    rows, columns, contraction = 4300, 7000, 1040  # several rounds of tiles for each program, and tails
    weight = torch.randn(rows, contraction, device="cuda").to(E4M3)
    values, metadata = reference.compress24(weight, random_positions(rows, contraction, "cuda"))
    dense = torch.randn(columns, contraction, device="cuda").to(E4M3)
    scale_inv, dense_scale_inv = torch.tensor([0.25], device="cuda"), torch.rand(columns, device="cuda")
    results = []
    for waves in (1, 2, 4, 7):
        buffer, out = poisoned((columns, rows), torch.bfloat16, "cuda")
        tensors = (values, metadata, dense, scale_inv, dense_scale_inv, out)
        multiply = plan_module.plan_gemm(config, accurate, *tensors, True, waves)
        for _ in range(3):
            multiply(*(tensor.data_ptr() for tensor in tensors))
            results.append(out.clone())
        assert buffer[:1024].isnan().all()
        assert buffer[-1024:].isnan().all()
    assert all(torch.equal(result, results[0]) for result in results)
    assert_product(results[0].t(), values, metadata, dense, scale_inv, dense_scale_inv)


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "accurate"), CONFIGS, ids=config_id)
@pytest.mark.parametrize("transpose", [False, True], ids=["", "transpose"])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16], ids=str)
def test_small_integers_are_exact(dtype, out_dtype, transpose, config, accurate) -> None:
    """Sums that need no rounding: bit for bit the reference's, with several tiles for each program and with one."""
    for rows, columns, contraction in ((2500, 3000, 2320), (250, 301, 400)):
        weight = torch.randint(-1, 2, (rows, contraction), device="cuda").to(dtype)
        values, metadata = reference.compress24(weight, random_positions(rows, contraction, "cuda"))
        dense = torch.randint(-1, 2, (columns, contraction), device="cuda").to(dtype)
        scale_inv = torch.tensor([0.25], device="cuda")
        dense_scale_inv = 2.0 ** torch.randint(-2, 3, (columns,), device="cuda")
        buffer, out = poisoned((columns, rows) if transpose else (rows, columns), out_dtype, "cuda")
        tensors = (values, metadata, dense, scale_inv, dense_scale_inv, out)
        plan_module.plan_gemm(config, accurate, *tensors, transpose)(*(tensor.data_ptr() for tensor in tensors))
        expected = reference.sparse_mm(*tensors[:-1], out_dtype, transpose, not accurate)
        assert torch.equal(out, expected)
        assert buffer[:1024].isnan().all()
        assert buffer[-1024:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0.0, 0.5])
@pytest.mark.parametrize("tokens", [16384, 262144])
def test_accurate_accumulation(tokens, mean) -> None:
    """At most twice the error of a sum in fp32 of the same operands; fast accumulation is far off where sums grow."""
    grad, x = torch.randn(2, 128, tokens, device="cuda").add_(mean).unbind()
    positions = random_positions(128, tokens, "cuda")
    scale, x_scale = 448 / grad.abs().max(), 448 / x.abs().max()
    values, metadata = reference.compress24((grad * scale).to(E4M3), positions)
    a, b = reference.decompress24(values, metadata).float(), (x * x_scale).to(E4M3)
    mask = torch.zeros(128, tokens // 4, 4, device="cuda").scatter_(-1, positions, 1.0).reshape(128, tokens)
    exact = (grad * mask).double() @ x.double().t()
    scale_inv = (1 / (scale * x_scale)).reshape(1)
    errors = {"fp32": (a @ b.float().t() * scale_inv - exact).norm() / exact.norm()}
    for fast in (False, True):
        _, out = poisoned((128, 128), torch.float32, "cuda")
        launch.launch_sparse_gemm(values, metadata, b, scale_inv, None, out, False, fast)
        errors["fast" if fast else "accurate"] = (out - exact).norm() / exact.norm()
    assert errors["accurate"] <= 2 * errors["fp32"], errors
    if mean > 0:
        assert errors["fast"] > 4 * errors["fp32"], errors


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_operands(shape) -> None:
    rows, columns, contraction = shape
    weight = torch.randn(rows, contraction, device="cuda").bfloat16()
    values, metadata = reference.compress24(weight, random_positions(rows, contraction, "cuda"))
    dense = torch.randn(columns, contraction, device="cuda").bfloat16()
    _, out = poisoned((rows, columns), torch.float32, "cuda")
    launch.launch_sparse_gemm(values, metadata, dense, torch.ones(1, device="cuda"), None, out, False, True)
    a, b = reference.decompress24(values, metadata)[:, :contraction].double(), dense.double()
    # Sums in fp32, a few thousand additions long; an element forgotten would be a larger part of them.
    assert ((out.double() - a @ b.t()).abs() <= 2.0**-16 * (a.abs() @ b.abs().t())).all()


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("tokens", [4, 100, 1000])
def test_weight_gradient(tokens, fp8) -> None:
    grad = torch.randn(tokens, 48, device="cuda")
    scale, seed = torch.full((tokens,), 40.0, device="cuda"), torch.tensor([3], device="cuda")
    _, values, metadata = reference.cast_mvue(grad, scale, scale, seed, 0, False, dtype=fp8)
    dense = reference.transpose_tokens(random_dense(tokens, 80, "cuda")[0])
    scale_inv = torch.tensor([1e-3], device="cuda")
    out = poisoned((48, 80), torch.float32, "cuda")[1]
    launch.launch_sparse_gemm(values, metadata, dense, scale_inv, None, out, False, False)
    assert_product(out, values, metadata, dense, scale_inv, None)


@pytest.mark.gpu
@pytest.mark.parametrize("transpose", [False, True], ids=["", "transpose"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_beyond_32_bits(dtype, transpose) -> None:
    rows, columns, contraction = 131072, 16400, 16
    values, metadata, scale_inv = random_operand(rows, contraction, "cuda")
    dense, _ = random_dense(columns, contraction, "cuda")
    shape = (columns, rows) if transpose else (rows, columns)
    out = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
    launch.launch_sparse_gemm(values, metadata, dense, scale_inv, None, out, transpose, True)
    product = out.t() if transpose else out
    assert_product(product[-128:], values[-128:], metadata[:, -8:], dense, scale_inv, None)
    assert_product(product[:, -256:], values, metadata, dense[-256:], scale_inv, None)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    values, metadata, scale_inv = random_operand(256, 384, "cuda")
    dense, dense_scale_inv = random_dense(96, 384, "cuda")
    eager, replayed = (torch.empty(96, 256, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    launch.launch_sparse_gemm(values, metadata, dense, scale_inv, dense_scale_inv, eager, True, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.launch_sparse_gemm(values, metadata, dense, scale_inv, dense_scale_inv, replayed, True, True)
    replayed.fill_(float("nan"))
    graph.replay()
    assert torch.equal(eager, replayed)


@pytest.mark.gpu
def test_streams_do_not_disturb_each_other() -> None:
    values, metadata, scale_inv = random_operand(3072, 768, "cuda")
    dense, _ = random_dense(4097, 768, "cuda")
    outs = [poisoned((4097, 3072), torch.bfloat16, "cuda")[1] for _ in range(6)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for index, out in enumerate(outs):
        with torch.cuda.stream(streams[index % 3]):
            launch.launch_sparse_gemm(values, metadata, dense, scale_inv, None, out, True, True)
    torch.cuda.synchronize()
    assert all(torch.equal(out, outs[0]) for out in outs)
