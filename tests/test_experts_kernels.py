"""Kernels of experts: that they compile, and on a GPU that they compute what the eager definitions do."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.tools.disasm import get_sass

from hopper_compiler import plans_that_only_compile
from sparse_compile.errors import SparseCompileError
from sparse_compile.kernels import grouped_ops, reference
from sparse_compile.kernels.activation import cast_mvue, cast_transpose
from sparse_compile.kernels.expert_blocks import most_blocks, plan_expert_blocks
from sparse_compile.kernels.formats import (
    E4M3,
    E5M2,
    FP8_DTYPES,
    grouped_columns,
    metadata_shape,
    values_shape,
)
from sparse_compile.kernels.sparse_gemm import configs, grouped, grouped_selfcheck
from sparse_compile.kernels.sparse_gemm import plan as plan_module
from sparse_compile.kernels.sparse_gemm.grouped_selfcheck import GroupedVariant
from sparse_compile.kernels.sparse_gemm.kernel import COLUMNS, CONTRACTION
from sparse_compile.projections.base import Projection
from sparse_compile.projections.groups_of_four import SOFT
from sparse_compile.projections.identity import IDENTITY
from sparse_compile.projections.transposable import SOFT_TRANSPOSABLE
from sparse_compile.testing import assert_same_bits

# Tokens of each expert: skewed, empty ones, one alone, whole blocks, none at all.
ROUTINGS = {
    "skewed": (3, 700, 1, 130),
    "empty ones": (0, 256, 0, 0, 5, 0),
    "whole blocks": (256, 512),
    "all to one": (0, 1000),
    "none": (0, 0),
    "many": tuple(range(128)),
}


@pytest.fixture
def compile_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with plans_that_only_compile(monkeypatch):
        yield


def zeros(*shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8 if dtype in FP8_DTYPES else dtype).view(dtype)


# What shares what, the dtype of out, transposed.
PRODUCTS = {
    "fprop": (COLUMNS, torch.bfloat16, True),
    "fprop fp32": (COLUMNS, torch.float32, True),
    "wgrad": (CONTRACTION, torch.bfloat16, False),
    "wgrad transposed": (CONTRACTION, torch.bfloat16, True),
    "wgrad fp32": (CONTRACTION, torch.float32, False),
}


def compilations() -> Iterator[Any]:
    for config, name in product(configs.configs(), PRODUCTS):
        by_day = (config.block_d, config.cluster, name) == (128, 1, "fprop")
        marks = () if by_day else pytest.mark.nightly
        yield pytest.param(config, name, id=f"128x{config.block_d}-{config.cluster}-{name}", marks=marks)


@pytest.mark.parametrize(("config", "name"), list(compilations()))
def test_compiles_for_hopper(compile_only: None, config: configs.Config, name: str) -> None:
    """With two stages in flight and nothing spilled in the loops, as the GEMM of one matrix."""
    shared, out_dtype, transpose = PRODUCTS[name]
    experts, n, k, tokens = 4, 256, 512, 1000
    total = grouped_columns(tokens, experts)
    if shared == COLUMNS:
        operands = (zeros(experts, *values_shape(n, k)), zeros(experts, *metadata_shape(n, k), dtype=torch.int32))
        dense, scale, out, block = zeros(tokens, k), torch.ones(tokens), zeros(tokens, n, dtype=out_dtype), 128
    else:
        operands = (zeros(*values_shape(n, total)), zeros(*metadata_shape(n, total), dtype=torch.int32))
        shape = (experts, k, n) if transpose else (experts, n, k)
        dense, scale, out, block = zeros(k, total), None, zeros(*shape, dtype=out_dtype), 128
    blocks = most_blocks(tokens, experts, block)
    table = torch.zeros(blocks + 1 + experts, 4, dtype=torch.int32)
    compiled: Any = plan_module.plan_grouped_gemm(
        config, shared, *operands, dense, torch.ones(experts), scale, out, table, blocks, transpose
    )
    sass = get_sass(compiled.asm["cubin"])
    assert re.findall(r"[QH]GMMA[.\w]*", sass) == [f"QGMMA.SP.64x{config.block_d}x64.F32.E4M3.E4M3"] * 8
    # Tiles with rows or columns of other experts leave through registers.
    stores = {"STG"} if out_dtype is torch.float32 else {"STG", "UTMASTG"}
    assert set(re.findall(r"\b(?:UTMA)?STG\b", sass)) == stores
    assert sorted(re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", sass)) == ["0x0"] * 2 + ["0x1"] * 4
    stages = re.findall(r"TRYWAIT(?:(?!TRYWAIT).)*?[QH]GMMA.*?BRA", sass, re.DOTALL)
    assert len(stages) == 4
    assert not any(re.search(r"\b(?:LDL|STL)\b", stage) for stage in stages)


def test_blocks_refuse_offsets_that_are_none() -> None:
    with pytest.raises(ValueError, match=r"offsets is torch.float32 \(2,\)"):
        plan_expert_blocks(torch.tensor([3.0, 10.0]), 10, 128)


@pytest.mark.parametrize("what", ["R", "C", "out"])
def test_launchers_refuse(what: str) -> None:
    rows, contraction = (80 if what == "R" else 64), (72 if what == "C" else 80)
    values, metadata = zeros(2, *values_shape(rows, 80)), zeros(2, *metadata_shape(rows, 80), dtype=torch.int32)
    out = torch.empty(10, rows, dtype=torch.int32 if what == "out" else torch.bfloat16)
    message = {"R": "R is 80; needed is a multiple of 64", "C": "C is 72", "out": "out is torch.int32"}[what]
    operands = values, metadata, zeros(10, contraction), torch.ones(2), None
    with pytest.raises(ValueError, match=message):
        grouped.launch_grouped_sparse_gemm(*operands, torch.tensor([3, 10]), out)


FPROP = GroupedVariant(
    over_tokens=False, dtype=E4M3, dense_dtype=E4M3, out_dtype=torch.bfloat16, scaled=True, transpose=True
)
WGRAD = replace(FPROP, over_tokens=True, scaled=False, transpose=False)
CONFIG = configs.Config(block_d=128, cluster=1)


class Kernel:
    """Multiplies as the definition does, but for a mistake on its way."""

    def __init__(self, mistake: Callable[..., None] = lambda *_: None) -> None:
        self.mistake, self.launches = mistake, 0

    def plan(self, config: configs.Config, *arguments: Any) -> Callable[..., None]:
        *operands, offsets, out, transpose, _ = arguments

        def multiply(*addresses: int | None) -> None:
            assert addresses == tuple(None if t is None else t.data_ptr() for t in arguments[:-2])
            self.launches += 1
            made: Any
            if operands[0].dim() == 3:
                made = reference.grouped_sparse_mm(*operands, offsets, out.dtype, True)
                out[: offsets[-1]] = made[: offsets[-1]]
            else:
                made = reference.grouped_wgrad_sparse_mm(*operands[:4], offsets, out.dtype, transpose)
                out.copy_(made)
            self.mistake(out, offsets, self.launches)

        return multiply


@pytest.fixture
def three_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_selfcheck, "passed", set())
    properties = SimpleNamespace(multi_processor_count=3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.mark.usefixtures("three_multiprocessors")
@pytest.mark.parametrize("variant", [FPROP, WGRAD, replace(WGRAD, transpose=True, dtype=E5M2)], ids=str)
def test_a_right_product_passes_once(variant: GroupedVariant) -> None:
    kernel = Kernel()
    for _ in range(2):
        grouped_selfcheck.check_grouped(CONFIG, variant, torch.device("cpu"), kernel.plan)
    assert kernel.launches == 2
    grouped_selfcheck.check_grouped(configs.Config(block_d=128, cluster=2), variant, torch.device("cpu"), kernel.plan)
    assert kernel.launches == 4


def one_element(out: Tensor, offsets: Tensor, launch: int) -> None:
    out.flatten()[-1 if out.dim() == 3 else 5] += 1


def beyond_the_last(out: Tensor, offsets: Tensor, launch: int) -> None:
    out[offsets[-1]] = 0


def on_the_second_launch(out: Tensor, offsets: Tensor, launch: int) -> None:
    out[0] *= launch


def not_zero_for_an_empty_expert(out: Tensor, offsets: Tensor, launch: int) -> None:
    out[1, 0, 0] = 1.0


MISTAKES = {
    "one element": (FPROP, one_element, "1 of .* elements are wrong"),
    "one of wgrad": (WGRAD, one_element, "1 of .* elements are wrong"),
    "nobody's": (FPROP, beyond_the_last, "elements of tokens that are nobody's were written"),
    "second launch": (FPROP, on_the_second_launch, "on the second launch"),
    "empty expert": (WGRAD, not_zero_for_an_empty_expert, "1 of .* elements are wrong"),
}


@pytest.mark.usefixtures("three_multiprocessors")
@pytest.mark.parametrize(("variant", "mistake", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_wrong_product_is_found(variant: GroupedVariant, mistake: Callable[..., None], message: str) -> None:
    with pytest.raises(SparseCompileError, match=message):
        grouped_selfcheck.check_grouped(CONFIG, variant, torch.device("cpu"), Kernel(mistake).plan)


def test_no_check_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, three_multiprocessors: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="run one step with the same shapes before the capture"):
        grouped_selfcheck.check_grouped(CONFIG, FPROP, torch.device("cpu"), Kernel().plan)


def offsets_of(counts: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(counts, device="cuda").cumsum(0, dtype=dtype)


def random_fp8(*shape: int, dtype: torch.dtype = E4M3) -> Tensor:
    """Small integers, whose sums are exact."""
    return torch.randint(-3, 4, shape, device="cuda").float().to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [128, 192, 256])
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_blocks_have_one_expert(counts: tuple[int, ...], block: int) -> None:
    tokens = sum(counts) + 7  # some of them nobody's
    for dtype in (torch.int32, torch.int64):
        offsets = offsets_of(counts, dtype)
        new_table, _, find = plan_expert_blocks(offsets, tokens, block)
        table = new_table()
        find(offsets.data_ptr(), table.data_ptr())
        expected, spans, begin = [], [], 0
        for expert, count in enumerate(counts):
            spans.append((len(expected), -(-count // block)))
            expected += [(expert, first, begin + count, begin) for first in range(begin, begin + count, block)]
            begin += count
        blocks = most_blocks(tokens, len(counts), block)
        unused = [(-1, 0, 0, 0)] * (blocks - len(expected))
        rows = [tuple(row) for row in table.tolist()]
        assert rows[:blocks] == expected + unused
        assert rows[blocks][0] == len(expected)
        assert [row[:2] for row in rows[blocks + 1 :]] == spans


@pytest.mark.gpu
@pytest.mark.parametrize("projection", [SOFT, SOFT_TRANSPOSABLE, IDENTITY], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_weights_of_experts(projection: Projection, transposed: bool) -> None:
    for experts, n, k in ((3, 80, 144), (8, 512, 256), (64, 128, 192)):
        stored = torch.randn(experts, *((k, n) if transposed else (n, k)), device="cuda").bfloat16()
        weight = stored.mT if transposed else stored
        weight *= torch.logspace(-3, 3, experts, device="cuda")[:, None, None].bfloat16()
        beta = torch.linspace(1.1, 1.9, experts, device="cuda")
        made, expected = (projection.new_operands_of_experts(experts, n, k, weight.device) for _ in range(2))
        made.scale_inv.fill_(0.7)
        for e, matrix in enumerate(weight):
            of_one = projection.Operands(*(operand[e] for operand in expected))
            projection.fill(matrix, of_one, beta[e : e + 1] if projection.has_beta else None, None, False)
        for _ in range(2):  # by the scales that stood there, and by the right ones
            projection.fill_experts(weight, made, beta if projection.has_beta else None, None, False)
            for field, actual, wanted in zip(made._fields, made, expected, strict=True):
                assert_same_bits(actual, wanted, field)


@pytest.mark.gpu
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS.keys())
@pytest.mark.parametrize("fp8", FP8_DTYPES, ids=str)
def test_casts(counts: tuple[int, ...], fp8: torch.dtype) -> None:
    offsets, tokens, end = offsets_of(counts), sum(counts) + 7, sum(counts)
    for columns, dtype in ((144, torch.bfloat16), (256, torch.float32)):
        total = grouped_columns(tokens, len(counts))
        x = torch.randn(tokens, columns, device="cuda").to(dtype)
        row_scale, token_scale = torch.rand(2, tokens, device="cuda").mul(10).unbind()
        row, column = (torch.empty(shape, dtype=fp8, device="cuda") for shape in ((tokens, columns), (columns, total)))
        cast_transpose.launch_grouped_cast_transpose(x, row_scale, token_scale, offsets, row, column)
        expected = reference.grouped_cast_transpose(x, row_scale, token_scale, offsets, fp8)
        assert_same_bits(row[:end], expected[0][:end], "row")
        assert_same_bits(column, expected[1], "column")

        payload, out = reference.saturating_cast(x.float()), torch.empty(columns, total, dtype=E4M3, device="cuda")
        cast_transpose.launch_grouped_transpose_tokens(payload, offsets, out)
        assert_same_bits(out, reference.grouped_transpose_tokens(payload, offsets), "transposed")

        seed = torch.tensor([42], device="cuda")
        values = torch.empty(values_shape(columns, total), dtype=fp8, device="cuda")
        metadata = torch.empty(metadata_shape(columns, total), dtype=torch.int32, device="cuda")
        for approximate, stochastic in product((False, True), (False, True)):
            arguments = (x, row_scale, token_scale, seed, 5, offsets, approximate, stochastic)
            cast_mvue.launch_grouped_cast_mvue(*arguments, row, values, metadata)
            wanted = reference.grouped_cast_mvue(*arguments, fp8)
            assert_same_bits(row[:end], wanted[0][:end], "row")
            assert_same_bits(values, wanted[1], "values")
            assert_same_bits(metadata, wanted[2], "metadata")


@pytest.mark.gpu
@pytest.mark.parametrize("config", list(configs.configs()), ids=str)
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_tokens_times_the_matrix_of_their_expert(config: configs.Config, counts: tuple[int, ...]) -> None:
    """To the last bit; what is nobody's stays as it was."""
    offsets, tokens, experts = offsets_of(counts), sum(counts) + 7, len(counts)
    for index, (n, k, out_dtype) in enumerate(
        ((64, 80, torch.bfloat16), (448, 2048, torch.bfloat16), (320, 512, torch.float32), (128, 16, torch.float16))
    ):
        weight = SOFT.new_operands_of_experts(experts, n, k, offsets.device)
        SOFT.fill_experts(torch.randint(-7, 8, (experts, n, k), device="cuda").float(), weight, None, None, False)
        dense = random_fp8(tokens, k, dtype=(E4M3, E5M2)[index % 2])
        scale_inv = 2.0 ** -torch.arange(experts, device="cuda").float().remainder(4)
        of_tokens = 2.0 ** -torch.arange(tokens, device="cuda").float().remainder(3) if index != 3 else None
        operands = (weight.values, weight.metadata, dense, scale_inv, of_tokens)
        out = torch.full((tokens, n), 77.0, dtype=out_dtype, device="cuda")
        plan = grouped.plan_tokens(config, *operands, offsets, out)
        addresses = [None if t is None else t.data_ptr() for t in (*operands, offsets, out)]
        expected = reference.grouped_sparse_mm(*operands, offsets, out_dtype, True)
        for _ in range(2):
            out.fill_(77.0)
            plan(*addresses)
            assert torch.equal(out[: sum(counts)], expected[: sum(counts)])
            assert (out[sum(counts) :] == 77.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("config", list(configs.configs()), ids=str)
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_variant_passes_its_check(config: configs.Config, out_dtype: torch.dtype) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for variant in (FPROP, replace(FPROP, dense_dtype=E5M2), replace(FPROP, scaled=False)):
        grouped_selfcheck.check_grouped(config, replace(variant, out_dtype=out_dtype), device, grouped.plan_tokens)
    for dtype, transpose in product(FP8_DTYPES, (False, True)):
        variant = replace(WGRAD, dtype=dtype, transpose=transpose, out_dtype=out_dtype)
        grouped_selfcheck.check_grouped(config, variant, device, grouped.plan_wgrad)


@pytest.mark.gpu
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_wgrad_of_experts(counts: tuple[int, ...], transpose: bool) -> None:
    offsets, tokens, experts = offsets_of(counts), sum(counts) + 7, len(counts)
    seed, ones = torch.tensor([3], device="cuda"), torch.ones(tokens, device="cuda")
    for n, k, dtype, out_dtype in (
        (64, 128, E4M3, torch.bfloat16), (448, 320, E5M2, torch.bfloat16), (192, 64, E4M3, torch.float32)
    ):  # fmt: skip
        # Groups of four equal elements are drawn without rounding.
        grad = torch.randint(-1, 2, (-(-tokens // 4), n), device="cuda").float().repeat_interleave(4, 0)[:tokens]
        _, values, metadata = reference.grouped_cast_mvue(grad, ones, ones, seed, 0, offsets, False, dtype=dtype)
        x_t = reference.grouped_transpose_tokens(random_fp8(tokens, k), offsets)
        scale_inv = 2.0 ** -torch.arange(experts, device="cuda").float().remainder(4)
        shape = (experts, k, n) if transpose else (experts, n, k)
        out = torch.full(shape, float("nan"), dtype=out_dtype, device="cuda")
        expected = reference.grouped_wgrad_sparse_mm(values, metadata, x_t, scale_inv, offsets, out_dtype, transpose)
        for _ in range(2):
            out.fill_(float("nan"))
            grouped.launch_grouped_wgrad(values, metadata, x_t, scale_inv, offsets, out, transpose)
            torch.testing.assert_close(out, expected, rtol=1e-2, atol=1e-3)
            assert not out[[e for e, count in enumerate(counts) if count == 0]].any()


@pytest.mark.gpu
@pytest.mark.parametrize("counts", ROUTINGS.values(), ids=ROUTINGS.keys())
def test_dense_products_are_pytorch_s(counts: tuple[int, ...]) -> None:
    offsets, tokens, experts, n, k = offsets_of(counts), sum(counts) + 7, len(counts), 192, 256
    end, scale_inv = sum(counts), torch.rand(experts, device="cuda") + 0.5
    a, b = random_fp8(tokens, k), random_fp8(experts, n, k)
    actual = grouped_ops._grouped_scaled_mm_kernel(a, b, scale_inv, offsets, torch.bfloat16, True)
    expected = reference.grouped_scaled_mm(a, b, scale_inv, offsets, torch.bfloat16, True)
    torch.testing.assert_close(actual[:end], expected[:end], rtol=1e-2, atol=1e-2)
    grad_t, x_t = (reference.grouped_transpose_tokens(random_fp8(tokens, size), offsets) for size in (n, k))
    actual = grouped_ops._grouped_wgrad_scaled_mm_kernel(grad_t, x_t, scale_inv, offsets, torch.bfloat16)
    expected = reference.grouped_wgrad_scaled_mm(grad_t, x_t, scale_inv, offsets, torch.bfloat16)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)
    x, matrices = torch.randn(tokens, k, device="cuda").bfloat16(), torch.randn(experts, k, n, device="cuda").bfloat16()
    actual, expected = (f(x, matrices, offsets) for f in (grouped_ops._grouped_mm_kernel, reference.grouped_mm))
    torch.testing.assert_close(actual[:end], expected[:end], rtol=2e-2, atol=2e-2)
