"""The sparse GEMM and the layout of its operand."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from sparse_compile.kernels import reference
from sparse_compile.kernels.formats import E4M3, PAD_WORD, metadata_shape, padded
from sparse_compile.testing import assert_within, fp8_product


# The layout of metadata, derived anew from the PTX ISA's figure for wgmma.sp with 8-bit operands: the register of lane
# (g, t) = (lane // 4, lane % 4) of warp w holds 32 logical columns, from 32 (t // 2) on, of row 16 w + g + 8 (t % 2).
def nibble_by_register(metadata, row, chunk):
    """The metadata bits of group ``chunk`` (of four logical columns) of ``row``, found through the registers."""
    column = 4 * chunk
    block, within = row // 16, row % 16
    lane = 4 * (within % 8) + 2 * (column % 64 // 32) + within // 8
    word = int(metadata[column // 128, block, lane, column % 128 // 64]) & 0xFFFFFFFF
    return word >> (4 * (column % 32 // 4)) & 15


@pytest.mark.parametrize(("rows", "columns"), [(64, 256), (128, 128), (48, 80), (16, 400)])
def test_metadata_lies_where_the_instruction_reads_it(rows, columns):
    dense = torch.randn(rows, columns).to(E4M3)
    positions = torch.rand(rows, columns // 4, 4).argsort(-1)[..., :2].sort(-1).values
    values, metadata = reference.compress24(dense, positions)
    assert metadata.shape == metadata_shape(rows, columns)
    for row in range(padded(rows)):
        for chunk in range(padded(columns) // 4):
            inside = row < rows and chunk < columns // 4
            first, second = positions[row, chunk].tolist() if inside else (0, 1)
            assert nibble_by_register(metadata, row, chunk) == first | second << 2
    kept = dense.float().reshape(rows, -1, 4).gather(-1, positions).reshape(rows, -1)
    assert torch.equal(values[:, : columns // 2].float(), kept)
    assert not values[:, columns // 2 :].float().any()


def test_a_line_of_metadata_by_hand():
    """Sixteen elements, four groups: positions (0, 1), (2, 3), (0, 3), (1, 2)."""
    dense = torch.zeros(1, 16)
    dense[0, [0, 1, 6, 7, 8, 11, 13, 14]] = torch.arange(1.0, 9.0)
    positions = torch.tensor([[[0, 1], [2, 3], [0, 3], [1, 2]]])
    values, metadata = reference.compress24(dense.to(E4M3), positions)
    assert values[0, :8].float().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert int(metadata[0, 0, 0, 0]) & 0xFFFFFFFF == 0x44449CE4
    assert int(metadata[0, 0, 0, 1]) == PAD_WORD


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (48, 80), (130, 260)])
def test_compression_is_lossless(rows, columns):
    payload = reference.soft_threshold24(torch.randn(rows, columns)).to(E4M3)
    positions = payload.float().abs().reshape(rows, -1, 4).argsort(dim=-1, stable=True)[..., 2:].sort(-1).values
    restored = reference.decompress24(*reference.compress24(payload, positions))
    assert restored.shape == (rows, padded(columns))
    assert torch.equal(restored[:, :columns].float(), payload.float())
    assert not restored[:, columns:].float().any()


VARIANTS = {
    "fprop": {"transpose": True, "scaled": True, "out": "bf16"},
    "wgrad": {"transpose": False, "scaled": False, "out": "bf16"},
    "wgrad fp32": {"transpose": False, "scaled": False, "out": "fp32"},
    "wgrad fp32 transposed": {"transpose": True, "scaled": False, "out": "fp32"},
}


def compile_for_hopper(config, transpose, scaled, out):
    """The kernel compiled for sm_90a; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from sparse_compile.kernels import sparse_gemm

    kernel = sparse_gemm.sparse_gemm_kernel
    tma_store = out != "fp32"

    def descriptor(dtype, block, layout):
        return f"tensordesc<{dtype}{block},{layout!r}>"

    dense = descriptor("fp8e4nv", [config.block_d, 128], gl.NVMMASharedLayout(128, 8, 2))
    block = [config.block_d, config.block_r] if transpose else [config.block_r, config.block_d]
    types = {
        "values_desc": descriptor("fp8e4nv", [config.block_r, 64], gl.NVMMASharedLayout(64, 8, 2)),
        "dense_desc": dense,
        "out_desc": descriptor(out, block, gl.NVMMASharedLayout(128, 16, 2)) if tma_store else dense,
        "out_ptr": f"*{out}",
        "metadata_ptr": "*i32",
        "scale_inv_ptr": "*fp32",
        "dense_scale_inv_ptr": "*fp32",
    }

    def compile_kernel(offsets):
        constants = {
            **offsets,
            "BLOCK_R": config.block_r,
            "BLOCK_D": config.block_d,
            "STAGES": config.stages,
            "GROUP": config.group,
            "TRANSPOSE": transpose,
            "HAS_DENSE_SCALE": scaled,
            "TMA_STORE": tma_store,
        }
        names = kernel.arg_names
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
        aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in types if n.endswith("_ptr")}
        constexprs = {(names.index(name),): value for name, value in constants.items()}
        source = GluonASTSource(kernel, signature, constexprs=constexprs, attrs=aligned)
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})

    return compile_kernel(sparse_gemm._resolve(compile_kernel, config, tma_store))


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("block_d", [128, 256])
def test_machine_code(tmp_path, variant, block_d):
    """Two sparse instructions a stage, nothing spilled, and the shared memory of one multiprocessor suffices."""
    import triton

    from sparse_compile.kernels.sparse_gemm import Config

    compiled = compile_for_hopper(Config(block_d=block_d), **variant)
    assert compiled.metadata.shared <= 232448
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    assembler = [tools / "ptxas", "-v", "--gpu-name=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "again.cubin"]
    log = subprocess.run(assembler, capture_output=True, text=True, check=True).stderr
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    assert "serializ" not in log
    disassembler = [tools / "nvdisasm", "-c", tmp_path / "kernel.cubin"]
    listing = subprocess.run(disassembler, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"\b[QH]GMMA\S*", listing) == [f"QGMMA.SP.64x{block_d}x64.F32.E4M3.E4M3"] * 2


@pytest.mark.parametrize("fields", [{"block_r": 64}, {"block_d": 96}, {"stages": 1}, {"group": 0}])
def test_impossible_configurations_are_refused(fields):
    from sparse_compile.kernels.sparse_gemm import Config

    with pytest.raises(ValueError, match=next(iter(fields))):
        Config(**fields)


def operand(rows, columns, device="cuda"):
    """A random 2:4 operand ``[rows, columns]``, and the same dense."""
    payload = torch.randn(rows, columns, device=device).to(E4M3)
    positions = torch.rand(rows, columns // 4, 4, device=device).argsort(-1)[..., :2].sort(-1).values
    values, metadata = reference.compress24(payload, positions)
    return values, metadata, reference.decompress24(values, metadata)[:, :columns]


def poisoned(shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device="cuda")


# (rows of A, rows of B, contraction): exact tiles, less than a tile, tails in each dimension, the shapes of GPT-2.
SHAPES = [
    (128, 256, 128),
    (16, 16, 16),
    (48, 15, 80),
    (144, 1, 128),
    (3072, 4097, 768),
    (768, 1000, 3072),
    (1600, 100, 6400),
    (4096, 2048, 4096),
]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_product_is_within_its_error_budget(shape, transpose, out_dtype):
    from sparse_compile.kernels.sparse_gemm import launch_sparse_gemm

    rows, columns, contraction = shape
    values, metadata, a = operand(rows, contraction)
    b = torch.randn(columns, contraction, device="cuda").to(E4M3)
    scale_inv = torch.full((1,), 0.25, device="cuda")
    product, budget = fp8_product(a, b, columns=64)
    for dense_scale_inv in (None, torch.rand(columns, device="cuda") + 0.5):
        out = poisoned((columns, rows) if transpose else (rows, columns), out_dtype)
        launch_sparse_gemm(values, metadata, b, scale_inv, dense_scale_inv, out, transpose)
        factor = 0.25 * (1.0 if dense_scale_inv is None else dense_scale_inv.double())
        assert_within(out.t() if transpose else out, product * factor, budget * factor)


@pytest.mark.gpu
@pytest.mark.parametrize("block_d", [64, 128, 256])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_every_configuration_gives_the_same_bits(block_d, stages):
    from sparse_compile.kernels.sparse_gemm import Config, launch_sparse_gemm

    values, metadata, _ = operand(400, 1040)
    b = torch.randn(700, 1040, device="cuda").to(E4M3)
    one = torch.ones(1, device="cuda")
    outs = []
    for config in (Config(), Config(block_d=block_d, stages=stages, group=3)):
        out = poisoned((400, 700), torch.float32)
        launch_sparse_gemm(values, metadata, b, one, None, out, False, config)
        outs.append(out)
    assert torch.equal(*outs)


@pytest.mark.gpu
def test_same_bits_on_every_launch_and_stream():
    from sparse_compile.kernels.sparse_gemm import launch_sparse_gemm

    values, metadata, _ = operand(3072, 768)
    b = torch.randn(4097, 768, device="cuda").to(E4M3)
    one = torch.ones(1, device="cuda")
    outs = [poisoned((4097, 3072), torch.bfloat16) for _ in range(6)]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for index, out in enumerate(outs):
        with torch.cuda.stream(streams[index % 3]):
            launch_sparse_gemm(values, metadata, b, one, None, out, True)
    torch.cuda.synchronize()
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """An output of more than 2^31 elements: its last rows are right."""
    from sparse_compile.kernels.sparse_gemm import launch_sparse_gemm

    rows, columns = 2**15 + 16, 2**16 + 8
    values, metadata, a = operand(rows, 128)
    b = torch.randn(columns, 128, device="cuda").to(E4M3)
    one = torch.ones(1, device="cuda")
    for transpose, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        out = poisoned((columns, rows) if transpose else (rows, columns), dtype)
        launch_sparse_gemm(values, metadata, b, one, None, out, transpose)
        product, budget = fp8_product(a[-64:], b[-64:], columns=64)
        last = out[-64:, -64:]
        assert_within(last.t() if transpose else last, product, budget)
        assert bool(out[::1000].isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": lambda t: t.float()}, r"dense is torch.float32"),
        ({"dense": lambda t: t[:, :-8]}, r"dense \(64, 120\) has 120"),
        ({"dense": lambda t: t.t()}, "multiple of 16 that is not larger|dense is"),
        ({"metadata": lambda t: t[:, :4]}, "metadata is torch.int32"),
        ({"scale_inv": lambda t: t.double()}, "scale_inv is torch.float64"),
        ({"out": lambda t: t.to(torch.float64)}, "out is torch.float64; allowed are"),
        ({"out": lambda t: t[:-1]}, r"out is torch.float32 \(127, 64\)"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    from sparse_compile.kernels.sparse_gemm import launch_sparse_gemm

    values, metadata, _ = operand(128, 128)
    arguments = {
        "values": values,
        "metadata": metadata,
        "dense": torch.randn(64, 128, device="cuda").to(E4M3),
        "scale_inv": torch.ones(1, device="cuda"),
        "dense_scale_inv": None,
        "out": torch.empty(128, 64, device="cuda"),
    }
    ((name, function),) = change.items()
    arguments[name] = function(arguments[name])
    with pytest.raises(ValueError, match=message):
        launch_sparse_gemm(**arguments, transpose=False)
