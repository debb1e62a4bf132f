"""Eager definition of every op: what the kernels must compute, on any device.

Written for clarity and bit-exactness, not speed: the kernels repeat these formulas in the same order in fp32, so that
payloads and metadata can be compared bit by bit.  The mathematical pieces (``soft_threshold24``, ``mvue24``) also run
in fp64, as oracles.
"""

from sparse_compile.kernels.reference.compression import compress24, decompress24, saturating_cast, transpose_pruned
from sparse_compile.kernels.reference.gemm import scaled_mm, sparse_mm
from sparse_compile.kernels.reference.grouped import (
    grouped_cast_mvue,
    grouped_cast_transpose,
    grouped_mm,
    grouped_scaled_mm,
    grouped_sparse_mm,
    grouped_transpose_tokens,
    grouped_wgrad_mm,
    grouped_wgrad_scaled_mm,
    grouped_wgrad_sparse_mm,
    tokens_of_experts,
)
from sparse_compile.kernels.reference.mvue import (
    block_sums,
    cast_mvue,
    cast_transpose,
    group_uniforms,
    mvue24,
    philox4x32,
    rounding_uniforms,
    stochastic_round,
    transpose_tokens,
)
from sparse_compile.kernels.reference.pruning import (
    add_masked_decay,
    cast_weight,
    hard_threshold24,
    prune_weight,
    prune_weight_bf16,
    soft_mask24,
    soft_mask24_both,
    soft_threshold24,
    soft_threshold24_both,
    sste_beta,
    tensorwise_scale,
    top2_mask,
)
from sparse_compile.kernels.reference.transposable import (
    dense_mask,
    prune_soft_transposable,
    prune_transposable,
    transposable_masks,
)

__all__ = [
    "add_masked_decay", "block_sums", "cast_mvue", "cast_transpose",
    "cast_weight", "compress24", "decompress24", "dense_mask", "group_uniforms", "grouped_cast_mvue",
    "grouped_cast_transpose", "grouped_mm", "grouped_scaled_mm", "grouped_sparse_mm", "grouped_transpose_tokens",
    "grouped_wgrad_mm", "grouped_wgrad_scaled_mm", "grouped_wgrad_sparse_mm", "hard_threshold24", "mvue24",
    "philox4x32", "prune_soft_transposable", "prune_transposable", "prune_weight", "prune_weight_bf16",
    "rounding_uniforms", "saturating_cast", "scaled_mm", "soft_mask24", "soft_mask24_both", "soft_threshold24",
    "soft_threshold24_both", "sparse_mm", "sste_beta", "stochastic_round", "tensorwise_scale", "tokens_of_experts",
    "top2_mask", "transposable_masks", "transpose_pruned", "transpose_tokens",
]  # fmt: skip
