"""Every kernel once, on small operands with tails, to be watched by compute-sanitizer: scripts/sanitize.sh."""

import argparse
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from sparse_compile.kernels import grouped_ops, ops
from sparse_compile.kernels.formats import E4M3, FP8_DTYPES, metadata_shape, padded
from sparse_compile.kernels.sparse_gemm import plan as plan_module
from sparse_compile.kernels.sparse_gemm.configs import Config, configs
from sparse_compile.projections.groups_of_four import SOFT, SOFT_ONCE, prune_weight_
from sparse_compile.projections.groups_of_four_bf16 import SOFT_BF16, prune_weight_bf16_
from sparse_compile.projections.identity import IDENTITY, IDENTITY_BACKWARD, IDENTITY_ONCE, cast_weight_
from sparse_compile.projections.transposable import (
    SOFT_TRANSPOSABLE,
    TRANSPOSABLE,
    prune_soft_transposable_,
    prune_transposable_,
)

DEVICE = torch.device("cuda")
TOKENS, OUT_FEATURES, IN_FEATURES = 333, 208, 144
_WORD = 0x4C9E8D44  # eight legal pairs of positions


def memory_kernels() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(OUT_FEATURES, IN_FEATURES, device=DEVICE, dtype=dtype)
        for matrix in (weight, weight.t().contiguous().t()):
            weight_kernels(matrix)
    gradient = torch.randn(TOKENS, OUT_FEATURES, device=DEVICE, dtype=torch.bfloat16)
    scales = torch.ones(TOKENS, device=DEVICE)
    seed = torch.ones(1, dtype=torch.int64, device=DEVICE)
    for dtype in FP8_DTYPES:
        ops.cast_transpose(gradient, scales, scales, dtype)
        ops.cast_transpose_with_sums(gradient, scales, scales, dtype)
        for approximate, stochastic in product((False, True), repeat=2):
            ops.cast_mvue(gradient, scales, scales, seed, 0, approximate, stochastic, dtype)
            ops.cast_mvue_with_sums(gradient, scales, scales, seed, 0, approximate, stochastic, dtype)
    ops.transpose_tokens(gradient.to(E4M3))


def weight_kernels(matrix: torch.Tensor) -> None:
    one, shape = torch.ones(1, device=DEVICE), matrix.shape
    for hard in (False, True):
        prune_weight_(matrix, one, *SOFT.new_operands(*shape, DEVICE), hard)
        prune_weight_bf16_(matrix, one, *SOFT_BF16.new_operands(*shape, DEVICE), hard)
    prune_soft_transposable_(matrix, one, *SOFT_TRANSPOSABLE.new_operands(*shape, DEVICE))
    cast_weight_(matrix, *IDENTITY.new_operands(*shape, DEVICE))
    for projection in (SOFT_ONCE, IDENTITY_ONCE, IDENTITY_BACKWARD):
        operands = projection.new_operands(*shape, DEVICE)
        projection.fill(matrix, operands, None, None, False)
        projection.dgrad_operand(*projection.kept_for_dgrad(operands))
    masks, operands = TRANSPOSABLE.new_masks(*shape, DEVICE), TRANSPOSABLE.new_operands(*shape, DEVICE)
    for search in (True, False):
        prune_transposable_(matrix, *operands, masks, search)
    for known in (None, masks):
        ops.add_masked_decay_(torch.randn_like(matrix), matrix, one, known)


def kernels_of_experts() -> None:
    """With one that has no tokens, one that has few, and rows at the end that are nobody's."""
    offsets, sizes = torch.tensor([0, 5, TOKENS - 20, TOKENS - 20], dtype=torch.int32, device=DEVICE), (192, 128)
    ones, scales = torch.ones(4, device=DEVICE), torch.ones(TOKENS, device=DEVICE)
    weight = torch.randn(4, *sizes, device=DEVICE, dtype=torch.bfloat16)
    made = {}
    for projection in (SOFT, SOFT_TRANSPOSABLE, IDENTITY):
        made[projection] = projection.new_operands_of_experts(4, *sizes, DEVICE)
        projection.fill_experts(weight, made[projection], None, None, False)
    gradient, x = (torch.randn(TOKENS, size, device=DEVICE, dtype=torch.bfloat16) for size in sizes)
    seed = torch.ones(1, dtype=torch.int64, device=DEVICE)
    for dtype in FP8_DTYPES:
        grouped_ops.grouped_cast_transpose(gradient, scales, scales, offsets, dtype)
        for approximate, stochastic in product((False, True), repeat=2):
            sampled = grouped_ops.grouped_cast_mvue(
                gradient, scales, scales, seed, 0, offsets, approximate, stochastic, dtype
            )
    payload = x.to(E4M3)
    x_t = grouped_ops.grouped_transpose_tokens(payload, offsets)
    operand = SOFT.fprop_operand(made[SOFT])
    grouped_ops.grouped_sparse_mm(
        operand.values, operand.metadata, payload, ones, scales, offsets, torch.bfloat16, True
    )
    for transpose in (False, True):
        grouped_ops.grouped_wgrad_sparse_mm(sampled[1], sampled[2], x_t, ones, offsets, torch.bfloat16, transpose)


class Variant(NamedTuple):
    """Of the GEMM: what it is compiled for."""

    config: Config
    dtype: torch.dtype  # of the sparse operand
    dense_dtype: torch.dtype
    out_dtype: torch.dtype
    accurate: bool
    scaled: bool
    transpose: bool


def variants(every: bool) -> Iterator[Variant]:
    """Of each configuration, each pair of operands and dtype of the result; of the rest all, or by turns."""
    operands = [*product(FP8_DTYPES, repeat=2), (torch.bfloat16, torch.bfloat16)]
    results = (torch.bfloat16, torch.float16, torch.float32)
    for index, (config, (dtype, dense), out) in enumerate(product(configs(), operands, results)):
        forms = list(product((False, True), repeat=3))
        for accurate, scaled, transpose in forms if every else (forms[index % 8], forms[7 - index % 8]):
            if not (accurate and dtype is torch.bfloat16):
                yield Variant(config, dtype, dense, out, accurate, scaled, transpose)


def sparse_gemms(every: bool) -> int:
    """As many variants, with several tiles and more stages than the ring holds."""
    rows, columns, contraction = 5 * 128 + 80, 600, 20 * 128
    scale_inv, scales = torch.ones(1, device=DEVICE), torch.ones(columns, device=DEVICE)
    count = 0
    for variant in variants(every):
        values = torch.randn(rows, padded(contraction) // 2, device=DEVICE).to(variant.dtype)
        dense = torch.randn(columns, contraction, device=DEVICE).to(variant.dense_dtype)
        shape = metadata_shape(rows, contraction, variant.dtype)
        metadata = torch.full(shape, _WORD, dtype=torch.int32, device=DEVICE)
        out_shape = (columns, rows) if variant.transpose else (rows, columns)
        out = torch.empty(out_shape, device=DEVICE, dtype=variant.out_dtype)
        tensors = (values, metadata, dense, scale_inv, scales if variant.scaled else None, out)
        multiply = plan_module.plan_gemm(variant.config, variant.accurate, *tensors, variant.transpose)
        multiply(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))
        torch.cuda.synchronize()  # before the operands are freed
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all forms of the GEMM, not each with a few of the others")
    args = parser.parse_args()
    memory_kernels()
    kernels_of_experts()
    count = sparse_gemms(args.all)
    torch.cuda.synchronize()
    print(f"ran every kernel that prunes or casts, those of experts, and {count} variants of the GEMM")


if __name__ == "__main__":
    main()
