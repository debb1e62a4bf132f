"""2:4 along both dimensions, so that dgrad is 2:4 like fprop: by soft thresholds times beta, or by masks."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels import ops, reference
from sparse_compile.kernels.formats import E4M3, metadata_shape, values_shape
from sparse_compile.projections.base import BetaLimits, Projection, SparseOperand, new_scale_inv


class TransposableWeight(NamedTuple):
    """``[N, K]`` compressed for fprop, and ``[K, N]`` for dgrad; see ``reference.prune_transposable``."""

    values: Tensor
    metadata: Tensor
    values_t: Tensor
    metadata_t: Tensor
    scale_inv: Tensor


class Transposable(Projection):
    """Tiles of 4 x 4, however they are pruned."""

    Operands = TransposableWeight
    fills_all_experts = True
    prunes_both_ways = True
    rows = 4

    def new_operands(self, n: int, k: int, device: torch.device) -> TransposableWeight:
        return TransposableWeight(
            values=torch.empty(values_shape(n, k), dtype=E4M3, device=device),
            metadata=torch.empty(metadata_shape(n, k), dtype=torch.int32, device=device),
            values_t=torch.empty(values_shape(k, n), dtype=E4M3, device=device),
            metadata_t=torch.empty(metadata_shape(k, n), dtype=torch.int32, device=device),
            scale_inv=new_scale_inv(device),
        )

    def fprop_operand(self, operands: TransposableWeight) -> SparseOperand:
        return SparseOperand(operands.values, operands.metadata, operands.scale_inv)

    def kept_for_dgrad(self, operands: TransposableWeight) -> tuple[Tensor, ...]:
        return operands.values_t, operands.metadata_t, operands.scale_inv


class SoftTransposable(Transposable):
    """``beta * S(W)``: of S-STE's soft thresholds along in_features and along out_features the larger one.

    Of normal weights it keeps 0.37, and beta is 1.74; uniform ones have 2.34, heavy tails 1.43.  ``beta * S(W)`` holds
    0.65 of the energy of normal weights, 0.50 of uniform ones, 0.41 of weights of three magnitudes.
    """

    beta_limits = BetaLimits(prior=1.74, smallest=1.38, largest=2.6, least_energy=0.45)

    def fill(
        self, weight: Tensor, operands: TransposableWeight, beta: Tensor | None, masks: Tensor | None, search: bool
    ) -> None:
        prune_soft_transposable_(weight, ops.unit_beta(weight) if beta is None else beta, *operands)

    def project(self, weight: Tensor, masks: Tensor | None) -> Tensor:
        return reference.soft_threshold24_both(weight)


class MaskedTransposable(Transposable):
    """What masks keep stays as it is (T-SR-STE, arXiv 2404.01847).

    Masks of 4 x 4 tiles, int16 ``[N / 4, K / 4]``; see ``reference.transposable_masks``.
    """

    keeps_masks = True
    is_hard = True

    def new_masks(self, n: int, k: int, device: torch.device) -> Tensor:
        return torch.empty(n // 4, k // 4, dtype=torch.int16, device=device)

    def fill(
        self, weight: Tensor, operands: TransposableWeight, beta: Tensor | None, masks: Tensor | None, search: bool
    ) -> None:
        assert masks is not None
        prune_transposable_(weight, *operands, masks, search)

    def project(self, weight: Tensor, masks: Tensor | None) -> Tensor:
        masks = reference.transposable_masks(weight) if masks is None else masks
        return weight.where(reference.dense_mask(masks), 0)


@ops.of_experts_too
def _prune_soft_transposable_eager(
    weight: Tensor, beta: Tensor, values: Tensor, metadata: Tensor, values_t: Tensor, metadata_t: Tensor,
    scale_inv: Tensor,
) -> None:  # fmt: skip
    ops.fill((values, metadata, values_t, metadata_t, scale_inv), reference.prune_soft_transposable(weight, beta))


prune_soft_transposable_ = ops.define(
    "prune_soft_transposable_(Tensor weight, Tensor beta, Tensor(a!) values, Tensor(b!) metadata, Tensor(c!) values_t, "
    "Tensor(d!) metadata_t, Tensor(e!) scale_inv) -> ()",
    _prune_soft_transposable_eager,
    ops.launcher("weight.prune_fp8.launch_prune_soft_transposable", ops.no_results),
    ops.no_results,
    any_strides=1,
)


@ops.of_experts_too
def _prune_transposable_eager(
    weight: Tensor, values: Tensor, metadata: Tensor, values_t: Tensor, metadata_t: Tensor, scale_inv: Tensor,
    masks: Tensor, search: bool,
) -> None:  # fmt: skip
    if search:
        masks.copy_(reference.transposable_masks(weight))
    ops.fill((values, metadata, values_t, metadata_t, scale_inv), reference.prune_transposable(weight, masks))


prune_transposable_ = ops.define(
    "prune_transposable_(Tensor weight, Tensor(a!) values, Tensor(b!) metadata, Tensor(c!) values_t, "
    "Tensor(d!) metadata_t, Tensor(e!) scale_inv, Tensor(f!) masks, bool search) -> ()",
    _prune_transposable_eager,
    ops.launcher("weight.prune_fp8.launch_prune_transposable", ops.no_results),
    ops.no_results,
    any_strides=1,
)

SOFT_TRANSPOSABLE = SoftTransposable("soft-transposable24")
TRANSPOSABLE = MaskedTransposable("transposable24")
