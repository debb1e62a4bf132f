"""2:4 along in_features, in e4m3: S-STE's soft threshold times beta, or the two largest of each four as they are."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels import ops, reference
from sparse_compile.kernels.formats import E4M3, metadata_shape, values_shape
from sparse_compile.projections.base import BetaLimits, DenseOperand, Projection, SparseOperand, new_scale_inv

# beta is 1 for a 2:4 weight, 1.3 for heavy tails, 1.48 for normal weights, 1.75 for uniform ones.  beta * S(W) holds
# 0.74 of the energy of normal weights, 0.61 of uniform ones, 0.5 of weights of three magnitudes.
_BETA_LIMITS = BetaLimits(prior=1.48, smallest=1.25, largest=2.0, least_energy=0.55)


class PrunedWeight(NamedTuple):
    """``[N, K]`` compressed for fprop, and dense, transposed, for dgrad; see ``reference.prune_weight``."""

    values: Tensor
    metadata: Tensor
    weight_t: Tensor
    scale_inv: Tensor


class PrunedWeightOnce(NamedTuple):
    """``[N, K]`` compressed for fprop."""

    values: Tensor
    metadata: Tensor
    scale_inv: Tensor


class GroupsOfFour(Projection):
    """Groups of four along in_features, in whatever dtype.

    Args:
        hard: whether the two largest magnitudes of each four stay as they are; otherwise ``beta * S(W)`` (S-STE, Hu et
            al., NeurIPS 2024, arXiv 2409.09099).
    """

    def __init__(self, key: str, *, hard: bool) -> None:
        self.is_hard, self.beta_limits = hard, None if hard else _BETA_LIMITS
        super().__init__(key)

    def project(self, weight: Tensor, masks: Tensor | None) -> Tensor:
        return reference.hard_threshold24(weight) if self.is_hard else reference.soft_threshold24(weight)

    def fprop_operand(self, operands: Any) -> SparseOperand:
        return SparseOperand(operands.values, operands.metadata, operands.scale_inv)


class GroupsOfFourFP8(GroupsOfFour):
    """One scale serves both copies, and cancels beta from them."""

    Operands = PrunedWeight
    fills_all_experts = True

    def __init__(self, key: str, *, hard: bool, one_copy: Projection) -> None:
        self.one_copy = one_copy
        super().__init__(key, hard=hard)

    def new_operands(self, n: int, k: int, device: torch.device) -> PrunedWeight:
        return PrunedWeight(
            values=torch.empty(values_shape(n, k), dtype=E4M3, device=device),
            metadata=torch.empty(metadata_shape(n, k), dtype=torch.int32, device=device),
            weight_t=torch.empty(k, n, dtype=E4M3, device=device),
            scale_inv=new_scale_inv(device),
        )

    def fill(
        self, weight: Tensor, operands: PrunedWeight, beta: Tensor | None, masks: Tensor | None, search: bool
    ) -> None:
        prune_weight_(weight, ops.unit_beta(weight) if beta is None else beta, *operands, self.is_hard)

    def kept_for_dgrad(self, operands: PrunedWeight) -> tuple[Tensor, ...]:
        return operands.weight_t, operands.scale_inv


class GroupsOfFourOnce(GroupsOfFour):
    """The copy for dgrad is made of the one for fprop, which is 5/8 of a byte an element."""

    Operands = PrunedWeightOnce
    fills_all_experts = True
    dgrad_component = "transpose_pruned"

    def new_operands(self, n: int, k: int, device: torch.device) -> PrunedWeightOnce:
        return PrunedWeightOnce(
            values=torch.empty(values_shape(n, k), dtype=E4M3, device=device),
            metadata=torch.empty(metadata_shape(n, k), dtype=torch.int32, device=device),
            scale_inv=new_scale_inv(device),
        )

    def fill(
        self, weight: Tensor, operands: PrunedWeightOnce, beta: Tensor | None, masks: Tensor | None, search: bool
    ) -> None:
        beta = ops.unit_beta(weight) if beta is None else beta
        prune_weight_(weight, beta, operands.values, operands.metadata, None, operands.scale_inv, self.is_hard)

    def kept_for_dgrad(self, operands: PrunedWeightOnce) -> tuple[Tensor, ...]:
        return operands

    def dgrad_operand(self, *kept: Tensor) -> DenseOperand:
        values, metadata, scale_inv = kept
        return DenseOperand(ops.transpose_pruned(values, metadata), scale_inv)


@ops.of_experts_too
def _prune_weight_eager(
    weight: Tensor, beta: Tensor, values: Tensor, metadata: Tensor, weight_t: Tensor | None, scale_inv: Tensor,
    hard: bool = False,
) -> None:  # fmt: skip
    ops.fill((values, metadata, weight_t, scale_inv), reference.prune_weight(weight, beta, hard))


prune_weight_ = ops.define(
    "prune_weight_(Tensor weight, Tensor beta, Tensor(a!) values, Tensor(b!) metadata, Tensor(c!)? weight_t, "
    "Tensor(d!) scale_inv, bool hard=False) -> ()",
    _prune_weight_eager,
    ops.launcher("weight.prune_fp8.launch_prune_weight", ops.no_results),
    ops.no_results,
    any_strides=1,
)

SOFT_ONCE = GroupsOfFourOnce("soft24-once", hard=False)
TOP2_ONCE = GroupsOfFourOnce("top24-once", hard=True)
SOFT = GroupsOfFourFP8("soft24", hard=False, one_copy=SOFT_ONCE)
TOP2 = GroupsOfFourFP8("top24", hard=True, one_copy=TOP2_ONCE)
