"""Every kernel once, on small operands with tails, to be watched by compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/all_kernels.py
compute-sanitizer --tool racecheck --error-exitcode 1 python benchmarks/all_kernels.py
"""

import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3, FP8_DTYPES, padded
from sparse_compile.kernels.sparse_gemm import plan as plan_module
from sparse_compile.kernels.sparse_gemm.configs import configs
from sparse_compile.projections.groups_of_four import SOFT, SOFT_ONCE, prune_weight_
from sparse_compile.projections.groups_of_four_bf16 import SOFT_BF16, prune_weight_bf16_
from sparse_compile.projections.identity import IDENTITY, IDENTITY_ONCE, cast_weight_
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
        for approximate, stochastic in product((False, True), repeat=2):
            ops.cast_mvue(gradient, scales, scales, seed, 0, approximate, stochastic, dtype)
    ops.transpose_tokens(gradient.to(E4M3))


def weight_kernels(matrix: torch.Tensor) -> None:
    one, shape = torch.ones(1, device=DEVICE), matrix.shape
    for hard in (False, True):
        prune_weight_(matrix, one, *SOFT.new_operands(*shape, DEVICE), hard)
        prune_weight_bf16_(matrix, one, *SOFT_BF16.new_operands(*shape, DEVICE), hard)
    prune_soft_transposable_(matrix, one, *SOFT_TRANSPOSABLE.new_operands(*shape, DEVICE))
    cast_weight_(matrix, *IDENTITY.new_operands(*shape, DEVICE))
    for projection in (SOFT_ONCE, IDENTITY_ONCE):
        operands = projection.new_operands(*shape, DEVICE)
        projection.fill(matrix, operands, None, None, False)
        projection.dgrad_operand(*projection.kept_for_dgrad(operands))
    masks, operands = TRANSPOSABLE.new_masks(*shape, DEVICE), TRANSPOSABLE.new_operands(*shape, DEVICE)
    for search in (True, False):
        prune_transposable_(matrix, *operands, masks, search)
    for known in (None, masks):
        ops.add_masked_decay_(torch.randn_like(matrix), matrix, one, known)


def sparse_gemms() -> None:
    """Every configuration, with several tiles and more stages than the ring holds."""
    rows, columns, contraction = 5 * 128 + 80, 600, 20 * 128
    out = torch.empty(rows * columns, device=DEVICE, dtype=torch.bfloat16)
    values = torch.randn(rows, padded(contraction) // 2, device=DEVICE).to(E4M3)
    dense = torch.randn(columns, contraction, device=DEVICE).to(E4M3)
    metadata = torch.full((contraction // 128, padded(rows) // 16, 32, 2), _WORD, dtype=torch.int32, device=DEVICE)
    scale_inv, scales = torch.ones(1, device=DEVICE), torch.ones(columns, device=DEVICE)
    for config in configs():
        for accurate, dense_scale_inv, shape in ((False, scales, (columns, rows)), (True, None, (rows, columns))):
            tensors = (values, metadata, dense, scale_inv, dense_scale_inv, out.view(shape))
            multiply = plan_module.plan_gemm(config, accurate, *tensors, shape[0] == columns)
            multiply(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


if __name__ == "__main__":
    memory_kernels()
    sparse_gemms()
    torch.cuda.synchronize()
    print("ran every kernel")
