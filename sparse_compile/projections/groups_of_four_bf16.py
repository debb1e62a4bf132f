"""2:4 along in_features, in bf16: as ``groups_of_four``, for recipes without FP8."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels import ops, reference
from sparse_compile.kernels.formats import metadata_shape, values_shape
from sparse_compile.projections.base import new_scale_inv
from sparse_compile.projections.groups_of_four import GroupsOfFour


class PrunedWeightBF16(NamedTuple):
    """``[N, K]`` compressed for fprop, and dense, as it lies, for dgrad; see ``reference.prune_weight_bf16``."""

    values: Tensor
    metadata: Tensor
    dense: Tensor
    scale_inv: Tensor


class GroupsOfFourBF16(GroupsOfFour):
    """beta is applied after the products."""

    Operands = PrunedWeightBF16
    dtype = torch.bfloat16

    def new_operands(self, n: int, k: int, device: torch.device) -> PrunedWeightBF16:
        return PrunedWeightBF16(
            values=torch.empty(values_shape(n, k), dtype=torch.bfloat16, device=device),
            metadata=torch.empty(metadata_shape(n, k, torch.bfloat16), dtype=torch.int32, device=device),
            dense=torch.empty(n, k, dtype=torch.bfloat16, device=device),
            scale_inv=new_scale_inv(device),
        )

    def fill(
        self, weight: Tensor, operands: PrunedWeightBF16, beta: Tensor | None, masks: Tensor | None, search: bool
    ) -> None:
        prune_weight_bf16_(weight, ops.unit_beta(weight) if beta is None else beta, *operands, self.is_hard)

    def kept_for_dgrad(self, operands: PrunedWeightBF16) -> tuple[Tensor, ...]:
        return operands.dense, operands.scale_inv


def _prune_weight_bf16_eager(
    weight: Tensor, beta: Tensor, values: Tensor, metadata: Tensor, dense: Tensor, scale_inv: Tensor,
    hard: bool = False,
) -> None:  # fmt: skip
    ops.fill((values, metadata, dense, scale_inv), reference.prune_weight_bf16(weight, beta, hard))


prune_weight_bf16_ = ops.define(
    "prune_weight_bf16_(Tensor weight, Tensor beta, Tensor(a!) values, Tensor(b!) metadata, Tensor(c!) dense, "
    "Tensor(d!) scale_inv, bool hard=False) -> ()",
    _prune_weight_bf16_eager,
    ops.launcher("weight.prune_bf16.launch_prune_weight_bf16", ops.no_results),
    ops.no_results,
    any_strides=1,
)

SOFT_BF16 = GroupsOfFourBF16("soft24-bf16", hard=False)
TOP2_BF16 = GroupsOfFourBF16("top24-bf16", hard=True)
