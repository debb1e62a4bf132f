"""The implementations of ``out = A @ B.T`` that bench_gemm.py compares, and their inputs.

A ``[R, C]`` is 2:4 for sparse implementations and dense for dense ones; B ``[D, C]`` is dense; out ``[R, D]``, or
``[D, R]`` where an implementation stores the transpose, is bf16.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from harness import set_count
from torch import Tensor

from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3, E4M3_MAX, MVUE_GAIN
from sparse_compile.kernels.reference import compress24, decompress24, saturating_cast
from sparse_compile.projections.groups_of_four import SOFT, prune_weight_

BF16 = torch.bfloat16
TOKENS = 16384
# About what a graph computes, 3 ms at 1700 TFLOP/s, or moves, 3 ms at 3.3 TB/s: its launch is nothing against that.
_GRAPH_FLOP = 5e12
_GRAPH_BYTES = 1e10
# One call for each set of inputs.
Calls = list[Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """``out = A @ B.T`` of A ``[rows, contraction]`` and B ``[columns, contraction]``."""

    name: str
    rows: int
    columns: int
    contraction: int

    @property
    def flop(self) -> int:
        return 2 * self.rows * self.columns * self.contraction

    @property
    def input_bytes(self) -> int:
        """In fp8, A compressed, less its metadata."""
        return (self.rows // 2 + self.columns) * self.contraction

    @property
    def sets(self) -> int:
        """Sets of inputs that take turns."""
        return set_count(self.input_bytes)

    @property
    def calls(self) -> int:
        """Calls in a graph, as many of each set."""
        calls = min(_GRAPH_FLOP / self.flop, _GRAPH_BYTES / (self.input_bytes + 2 * self.rows * self.columns))
        return self.sets * max(1, round(calls / self.sets))


def fprop(n: int, k: int, tokens: int = TOKENS) -> Problem:
    """output = input @ weight.T, the weight sparse; scaled for each token and stored token by token."""
    return Problem(name="fprop", rows=n, columns=tokens, contraction=k)


def wgrad(n: int, k: int, tokens: int = TOKENS) -> Problem:
    """grad_weight = grad_output.T @ input, grad_output sparse along the tokens."""
    return Problem(name="wgrad", rows=n, columns=k, contraction=tokens)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One set of inputs; the sparse A twice, as libraries take it and as the op does."""

    sparse: Tensor  # [R, C]
    values: Tensor
    metadata: Tensor
    dense: Tensor  # [R, C]
    b: Tensor  # [D, C]
    scale_inv: Tensor  # fp32 [1], of A
    column_scale_inv: Tensor | None  # fp32 [D], of B


def make_inputs(problem: Problem, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Random normal A and B in ``dtype``, A pruned as the recipe prunes it."""
    rows, columns, contraction = problem.rows, problem.columns, problem.contraction
    prune = _pruned_gradient if problem.name == "wgrad" else _pruned_weight
    values, metadata = prune(rows, contraction, device)
    if dtype is E4M3:
        sparse = decompress24(values, metadata)
    else:
        kept = decompress24(torch.ones_like(values.view(torch.uint8)), metadata).bool()
        positions = kept.view(rows, -1, 4).nonzero()[:, 2].view(rows, -1, 2)
        values, metadata = compress24(_normal(rows, kept.shape[1], dtype, device), positions)
        sparse = decompress24(values, metadata)
    return Inputs(
        sparse=sparse[:, :contraction].contiguous(),
        values=values,
        metadata=metadata,
        dense=_normal(rows, contraction, dtype, device),
        b=_normal(columns, contraction, dtype, device),
        scale_inv=torch.rand(1, device=device) + 0.5,
        column_scale_inv=torch.rand(columns, device=device) + 0.5 if problem.name == "fprop" else None,
    )


def _normal(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard deviation 100: the largest of a row of some thousand elements is then near the largest e4m3 value."""
    normal = torch.randn(rows, columns, device=device) * 100
    return saturating_cast(normal) if dtype is E4M3 else normal.to(dtype)


def _pruned_weight(n: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Values and metadata of a projected weight ``[n, k]``."""
    values, metadata, weight_t, scale_inv = SOFT.new_operands(n, k, device)
    weight = torch.randn(n, k, device=device, dtype=BF16)
    prune_weight_(weight, torch.ones(1, device=device), values, metadata, weight_t, scale_inv)
    return values, metadata


def _pruned_gradient(n: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Values and metadata of the sampled transpose ``[n, tokens]`` of a gradient."""
    grad = torch.randn(tokens, n, device=device, dtype=BF16)
    scale = (E4M3_MAX / MVUE_GAIN / grad.abs().amax().float()).expand(tokens).contiguous()
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    _, values, metadata = ops.cast_mvue(grad, scale, scale, seed, 0, False, False, E4M3)
    return values, metadata


def sparse_mm(sets: Sequence[Inputs], transpose: bool, *, use_fast_accum: bool) -> Calls:
    """This package's op."""

    def call(x: Inputs) -> Tensor:
        return ops.sparse_mm(
            x.values, x.metadata, x.b, x.scale_inv, x.column_scale_inv, BF16, transpose, use_fast_accum
        )

    return [partial(call, x) for x in sets]


def cublas(sets: Sequence[Inputs], transpose: bool) -> Calls:
    return [partial(torch.mm, a, b.t()) for a, b in _dense_operands(sets, transpose)]


def scaled_mm_tensorwise(sets: Sequence[Inputs], transpose: bool, *, use_fast_accum: bool = True) -> Calls:
    one = torch.ones((), device=sets[0].b.device)
    scaled_mm = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=BF16, use_fast_accum=use_fast_accum)
    return [partial(scaled_mm, a, b.t()) for a, b in _dense_operands(sets, transpose)]


def scaled_mm_rowwise(sets: Sequence[Inputs], transpose: bool) -> Calls:
    calls: Calls = []
    for x, (a, b) in zip(sets, _dense_operands(sets, transpose), strict=True):
        scales = [_row_scale_inv(x), column_scale_inv(x)]
        a_scale_inv, b_scale_inv = reversed(scales) if transpose else scales
        scaled_mm = partial(torch._scaled_mm, scale_a=a_scale_inv[:, None], scale_b=b_scale_inv[None, :])
        calls.append(partial(scaled_mm, a, b.t(), out_dtype=BF16, use_fast_accum=True))
    return calls


def _dense_operands(sets: Sequence[Inputs], transpose: bool) -> list[tuple[Tensor, Tensor]]:
    return [(x.b, x.dense) if transpose else (x.dense, x.b) for x in sets]


def cusparselt(sets: Sequence[Inputs], transpose: bool) -> Calls:
    """With the algorithm that the library's own search finds fastest."""
    compressed = [torch._cslt_compress(x.sparse) for x in sets]
    out_dtype = BF16 if sets[0].b.dtype is E4M3 else None  # it takes an output's dtype for 8-bit inputs only
    algorithm, split_k, split_k_mode, _ = torch._C._cusparselt.mm_search(
        compressed[0], sets[0].b.t(), None, None, out_dtype, transpose
    )
    chosen = {"alg_id": algorithm, "split_k": split_k, "split_k_mode": split_k_mode}
    product = partial(torch._cslt_sparse_mm, out_dtype=out_dtype, transpose_result=transpose, **chosen)
    return [partial(product, a, x.b.t()) for a, x in zip(compressed, sets, strict=True)]


def cusparselt_version() -> str | None:
    """Of the library that this process has loaded: a newer one than PyTorch's by LD_PRELOAD."""
    try:
        library = ctypes.CDLL("libcusparseLt.so.0")
    except OSError:
        return None
    parts = [ctypes.c_int() for _ in range(3)]
    for which, part in enumerate(parts):
        library.cusparseLtGetProperty(which, ctypes.byref(part))
    return ".".join(str(part.value) for part in parts)


def cutlass(sets: Sequence[Inputs], transpose: bool) -> Calls:
    """torchao's op; it stores the transpose only."""
    from torchao.ops import rowwise_scaled_linear_sparse_cutlass_f8f8, to_sparse_semi_structured_cutlass_sm9x_f8

    assert transpose
    calls: Calls = []
    for x in sets:
        values, metadata = to_sparse_semi_structured_cutlass_sm9x_f8(x.sparse)
        operands = x.b, column_scale_inv(x), values, metadata, _row_scale_inv(x)
        calls.append(partial(rowwise_scaled_linear_sparse_cutlass_f8f8, *operands, out_dtype=BF16))
    return calls


def _row_scale_inv(x: Inputs) -> Tensor:
    return x.scale_inv.expand(x.dense.shape[0]).contiguous()


def column_scale_inv(x: Inputs) -> Tensor:
    """fp32 ``[D]``, also of inputs that have none."""
    return torch.ones(x.b.shape[0], device=x.b.device) if x.column_scale_inv is None else x.column_scale_inv


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """An implementation of the product; ``layouts``: whether it may store the transpose."""

    name: str
    dtype: torch.dtype
    prepare: Callable[[Sequence[Inputs], bool], Calls]
    sparse: bool
    scaled: bool
    layouts: tuple[bool, ...] = (False, True)


OURS = "sparse_compile"
OURS_ACCURATE = f"{OURS} accurate"
CUBLAS = Gemm(name="cuBLAS bf16", dtype=BF16, prepare=cublas, sparse=False, scaled=False)
CUSPARSELT_BF16 = Gemm(name="cuSPARSELt bf16", dtype=BF16, prepare=cusparselt, sparse=True, scaled=False)
SCALED_MM = Gemm(name="_scaled_mm tensorwise", dtype=E4M3, prepare=scaled_mm_tensorwise, sparse=False, scaled=False)
FP8_LIBRARIES = (
    SCALED_MM,
    Gemm(name="_scaled_mm rowwise", dtype=E4M3, prepare=scaled_mm_rowwise, sparse=False, scaled=True),
    Gemm(name="cuSPARSELt fp8", dtype=E4M3, prepare=cusparselt, sparse=True, scaled=False),
    Gemm(name="CUTLASS fp8", dtype=E4M3, prepare=cutlass, sparse=True, scaled=True, layouts=(True,)),
)
# As a linear runs its dense wgrad.
SCALED_MM_ACCURATE = Gemm(
    name="_scaled_mm accurate",
    dtype=E4M3,
    prepare=partial(scaled_mm_tensorwise, use_fast_accum=False),
    sparse=False,
    scaled=False,
)


def ours(dtype: torch.dtype, layouts: tuple[bool, ...], *, use_fast_accum: bool = True) -> Gemm:
    """The sparse GEMM; without fast accumulation, sums of fp8 products move to fp32 on the way."""
    name = f"{OURS} bf16" if dtype is BF16 else OURS if use_fast_accum else OURS_ACCURATE
    prepare = partial(sparse_mm, use_fast_accum=use_fast_accum)
    return Gemm(name=name, dtype=dtype, prepare=prepare, sparse=True, scaled=True, layouts=layouts)
