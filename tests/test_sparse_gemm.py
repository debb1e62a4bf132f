"""The 2:4-sparse FP8 GEMM: its operand format, its compilation for Hopper, its arithmetic on one."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.disasm import get_sass

from sparse_compile.kernels import configs, reference, shared_memory, sparse_gemm
from sparse_compile.kernels.formats import E4M3, PAD_WORD, metadata_shape, padded, values_shape
from sparse_compile.testing import SPARSE_INSTRUCTION, assert_within_budget

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def random_operand(rows: int, columns: int, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """``values``, ``metadata`` and ``scale_inv`` of a random weight ``[rows, columns]``."""
    values, metadata, _, scale_inv = reference.prune_weight(
        torch.randn(rows, columns, device=device), torch.tensor([1.5], device=device)
    )
    return values, metadata, scale_inv


def random_dense(rows: int, columns: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """e4m3 ``[rows, columns]`` and its ``scale_inv [rows]``."""
    x = torch.randn(rows, columns, device=device) * torch.rand(rows, 1, device=device)
    scale_inv = x.abs().amax(1) / 448
    return reference.saturating_cast(x / scale_inv[:, None]), scale_inv


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
        groups = torch.rand(rows, columns // 4, 4).argsort(-1)[..., :2].sort(-1).values
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


class HopperDriver:
    """What Triton asks of a driver until a kernel is compiled; its device is no real one's, nor are its kernels."""

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compile_launch(monkeypatch) -> Iterator[Callable[..., list]]:
    """Launches on the CPU that stop short of running; returns what they compiled."""
    nvdisasm = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    if not nvdisasm.exists():
        pytest.skip(f"this Triton comes without NVIDIA's tools: no {nvdisasm}")
    compiled = []
    kernel = sparse_gemm.sparse_gemm_kernel
    run = kernel.run

    def compile_only(*args, **kwargs):
        compiled.append(run(*args, **{**kwargs, "warmup": True}))
        return compiled[-1]

    def launch(config, rows, columns, dtype, *, scaled, transpose):
        monkeypatch.setattr(sparse_gemm, "choose", lambda *args: config)
        values, metadata, scale_inv = random_operand(rows, 256)
        dense, dense_scale_inv = random_dense(columns, 256)
        out = torch.empty((columns, rows) if transpose else (rows, columns), dtype=dtype)
        sparse_gemm.launch_sparse_gemm(
            values, metadata, dense, scale_inv, dense_scale_inv if scaled else None, out, transpose
        )
        return compiled

    monkeypatch.setattr(kernel, "run", compile_only)
    monkeypatch.setattr(sparse_gemm, "_sm_count", lambda device: 132)
    monkeypatch.setattr(sparse_gemm, "_offsets", {})
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(HopperDriver())
    yield launch
    triton.runtime.driver._active = active


@pytest.mark.parametrize("transpose", [False, True], ids=["", "transpose"])
@pytest.mark.parametrize(
    ("dtype", "rows", "columns", "scaled", "store"),
    [
        (torch.bfloat16, 64, 48, True, "UTMASTG"),
        (torch.float16, 64, 48, False, "UTMASTG"),
        (torch.float32, 64, 48, True, "STG"),
        (torch.bfloat16, 65, 49, True, "STG"),
    ],
    ids=["bf16", "fp16", "fp32", "bf16 in odd rows"],
)
@pytest.mark.parametrize("config", configs.CONFIGS, ids=lambda config: f"128x{config.block_d}")
def test_compiles_for_hopper(compile_launch, config, dtype, rows, columns, scaled, store, transpose) -> None:
    *_, verified, launched = compile_launch(config, rows, columns, dtype, scaled=scaled, transpose=transpose)
    assert launched is verified
    sass = get_sass(launched.asm["cubin"])
    multiply = re.findall(r"[QH]GMMA[.\w]*", sass)
    assert multiply == [f"QGMMA.SP.64x{config.block_d}x64.F32.E4M3.E4M3"] * 2
    assert set(re.findall(r"\b(?:UTMA)?STG\b", sass)) == {store}
    # In the loop nothing is spilled.  Around it a tile's 64 transposed columns have 64 addresses of two registers.
    loop = sass[sass.rindex("TRYWAIT", 0, sass.index("QGMMA")) : sass.rindex("QGMMA")]
    assert not re.search(r"\b(?:LDL|STL)\b", loop)
    if store == "UTMASTG" or not transpose:
        assert not re.search(r"\b(?:LDL|STL)\b", sass)


class TestOffsets:
    """The search for the offsets of shared-memory buffers."""

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

    def kernel(self, second: int) -> SimpleNamespace:
        return SimpleNamespace(asm={"ttgir": self.TTGIR.replace("SECOND", str(second))})

    def test_compiles_until_they_hold(self) -> None:
        tried = []
        buffers = {"FIRST": (512,), "SECOND": (64,)}
        found = shared_memory.resolve_offsets(lambda o: (tried.append(o), self.kernel(64))[1], buffers)
        assert found == {"FIRST": 0, "SECOND": 2048}
        assert tried == [{"FIRST": 0, "SECOND": 0}, found]

    def test_refuses_a_missing_buffer(self) -> None:
        with pytest.raises(RuntimeError, match=r"\{'OTHER': \(3,\)\} are not among"):
            shared_memory.resolve_offsets(lambda offsets: self.kernel(64), {"OTHER": (3,)})

    def test_refuses_buffers_of_one_shape(self) -> None:
        with pytest.raises(RuntimeError, match="told apart"):
            shared_memory.resolve_offsets(lambda offsets: self.kernel(512), {"FIRST": (512,)})

    def test_refuses_offsets_that_move(self) -> None:
        tried = []

        def moving(offsets):
            tried.append(offsets)
            # The larger buffer comes first.
            return self.kernel(1024 * len(tried))

        with pytest.raises(RuntimeError, match="do not settle"):
            shared_memory.resolve_offsets(moving, {"FIRST": (512,)})


@pytest.mark.parametrize(
    ("rows", "columns", "block_d"),
    [
        (8192, 8192, 256),
        (128, 1, 128),
        (768, 16384, 256),
        # 60 wide tiles or 120 narrow ones: either way one round of 132 multiprocessors.
        (1280, 1536, 128),
        # 100 wide tiles fill one round, 200 narrow ones two.
        (1280, 2560, 256),
    ],
)
def test_choice_of_the_tile(rows, columns, block_d) -> None:
    assert configs.choose(rows, columns, 132).block_d == block_d


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_d": 192}, "block_d is 192"),
        ({"stages": 1}, "at least two stages"),
        ({"stages": 5}, "needs .* bytes of shared memory"),
    ],
)
def test_config_refuses(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        configs.Config(**{"block_d": 256, "stages": 4, "tile_cost": 1.0, **change})


@pytest.mark.parametrize(
    ("rows", "columns", "contraction"), [(0, 3, 32), (5, 0, 32), (5, 3, 0)], ids=["no rows", "no columns", "no sum"]
)
def test_empty_problems_launch_nothing(rows, columns, contraction) -> None:
    values = torch.empty(values_shape(rows, contraction), dtype=E4M3)
    metadata = torch.empty(metadata_shape(rows, contraction), dtype=torch.int32)
    dense = torch.empty(columns, contraction, dtype=E4M3)
    out = torch.full((rows, columns), float("nan"))
    sparse_gemm.launch_sparse_gemm(values, metadata, dense, torch.ones(1), None, out, False)
    assert torch.equal(out, torch.zeros(rows, columns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.empty(5, 60, dtype=E4M3)}, "values has 60 columns; needed is a multiple of 64"),
        ({"values": torch.empty(5, 64)}, "values is torch.float32"),
        ({"values": torch.empty(5, dtype=E4M3)}, "must have two dimensions"),
        ({"metadata": torch.empty(1, 1, 32, 2, dtype=torch.int32)}, r"needed is torch.int32 \(1, 8, 32, 2\)"),
        ({"dense": torch.empty(3, 40, dtype=E4M3)}, "dense has 40 columns; allowed are multiples of 16 up to 128"),
        ({"dense": torch.empty(3, 144, dtype=E4M3)}, "dense has 144 columns"),
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
    }
    with pytest.raises(ValueError, match=message):
        sparse_gemm.launch_sparse_gemm(**{**arguments, **change})


def assert_product(
    out: Tensor, values: Tensor, metadata: Tensor, dense: Tensor, scale_inv: Tensor, dense_scale_inv: Tensor | None
) -> None:
    """``out [R, D]`` is the product of the operands within its error budget."""
    a = reference.decompress24(values, metadata)[:, : dense.shape[1]]
    scale = scale_inv if dense_scale_inv is None else scale_inv * dense_scale_inv
    assert_within_budget(out, a, dense, scale, SPARSE_INSTRUCTION)


SHAPES = [(128, 256, 128), (16, 16, 16), (48, 15, 80), (3072, 4097, 768), (768, 1, 3072), (1600, 100, 6400)]


@pytest.mark.gpu
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("transpose", [False, True], ids=["", "transpose"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(shape, dtype, transpose, scaled) -> None:
    rows, columns, contraction = shape
    values, metadata, scale_inv = random_operand(rows, contraction, "cuda")
    dense, dense_scale_inv = random_dense(columns, contraction, "cuda")
    if not scaled:
        dense_scale_inv = None
        # Keeps fp16 in range.
        scale_inv = scale_inv / 448
    results = []
    for _ in range(2):
        buffer, out = poisoned((columns, rows) if transpose else (rows, columns), dtype, "cuda")
        sparse_gemm.launch_sparse_gemm(values, metadata, dense, scale_inv, dense_scale_inv, out, transpose)
        assert buffer[:1024].isnan().all()
        assert buffer[-1024:].isnan().all()
        results.append(out)
    assert torch.equal(*results)
    product = results[0].t() if transpose else results[0]
    assert_product(product, values, metadata, dense, scale_inv, dense_scale_inv)


@pytest.mark.gpu
@pytest.mark.parametrize("config", configs.CONFIGS, ids=lambda config: f"128x{config.block_d}")
@pytest.mark.parametrize("transpose", [False, True], ids=["", "transpose"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2500, 3000, 1040), (4096, 4096, 128), (250, 301, 400)], ids=str)
def test_small_integers_are_exact(monkeypatch, shape, dtype, transpose, config) -> None:
    """Sums that need no rounding: bit for bit the reference's, with several tiles for each program and with one."""
    monkeypatch.setattr(sparse_gemm, "choose", lambda *args: config)
    rows, columns, contraction = shape
    weight = torch.randint(-1, 2, (rows, contraction), device="cuda").float()
    positions = torch.rand(rows, contraction // 4, 4, device="cuda").argsort(-1)[..., :2].sort(-1).values
    values, metadata = reference.compress24(weight.to(E4M3), positions)
    dense = torch.randint(-1, 2, (columns, contraction), device="cuda").float().to(E4M3)
    scale_inv = torch.tensor([0.25], device="cuda")
    dense_scale_inv = 2.0 ** torch.randint(-2, 3, (columns,), device="cuda")
    buffer, out = poisoned((columns, rows) if transpose else (rows, columns), dtype, "cuda")
    sparse_gemm.launch_sparse_gemm(values, metadata, dense, scale_inv, dense_scale_inv, out, transpose)
    expected = reference.sparse_mm(values, metadata, dense, scale_inv, dense_scale_inv, dtype, transpose)
    assert torch.equal(out, expected)
    assert buffer[:1024].isnan().all()
    assert buffer[-1024:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4, 100, 1000])
def test_weight_gradient(tokens) -> None:
    grad = torch.randn(tokens, 48, device="cuda")
    scale, seed = torch.full((tokens,), 40.0, device="cuda"), torch.tensor([3], device="cuda")
    _, values, metadata = reference.cast_mvue(grad, scale, scale, seed, 0, False)
    dense = reference.transpose_tokens(random_dense(tokens, 80, "cuda")[0])
    scale_inv = torch.tensor([1e-3], device="cuda")
    out = poisoned((48, 80), torch.float32, "cuda")[1]
    sparse_gemm.launch_sparse_gemm(values, metadata, dense, scale_inv, None, out, False)
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
    sparse_gemm.launch_sparse_gemm(values, metadata, dense, scale_inv, None, out, transpose)
    product = out.t() if transpose else out
    assert_product(product[-128:], values[-128:], metadata[:, -8:], dense, scale_inv, None)
    assert_product(product[:, -256:], values, metadata, dense[-256:], scale_inv, None)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    values, metadata, scale_inv = random_operand(256, 384, "cuda")
    dense, dense_scale_inv = random_dense(96, 384, "cuda")
    eager, replayed = (torch.empty(96, 256, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    sparse_gemm.launch_sparse_gemm(values, metadata, dense, scale_inv, dense_scale_inv, eager, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sparse_gemm.launch_sparse_gemm(values, metadata, dense, scale_inv, dense_scale_inv, replayed, True)
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
            sparse_gemm.launch_sparse_gemm(values, metadata, dense, scale_inv, None, out, True)
    torch.cuda.synchronize()
    assert all(torch.equal(out, outs[0]) for out in outs)
