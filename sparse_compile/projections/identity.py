"""No projection: the weight as it is, in e4m3."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels import ops, reference
from sparse_compile.kernels.formats import E4M3
from sparse_compile.projections.base import DenseOperand, Projection, new_scale_inv


class CastWeight(NamedTuple):
    """``[N, K]`` for fprop, and ``[K, N]`` for dgrad; see ``reference.cast_weight``."""

    payload: Tensor
    payload_t: Tensor
    scale_inv: Tensor


class CastWeightOnce(NamedTuple):
    """``[N, K]``."""

    payload: Tensor
    scale_inv: Tensor


class CastWeightTransposed(NamedTuple):
    """``[K, N]``."""

    payload_t: Tensor
    scale_inv: Tensor


class Unpruned(Projection):
    """Nothing is pruned."""

    prunes = False
    fills_all_experts = True

    def project(self, weight: Tensor, masks: Tensor | None) -> Tensor:
        return weight

    def fprop_operand(self, operands: Any) -> DenseOperand:
        return DenseOperand(operands.payload, operands.scale_inv)


class Identity(Unpruned):
    """Each product has a copy."""

    Operands = CastWeight

    def __init__(self, key: str, *, one_copy: Projection) -> None:
        self.one_copy = one_copy
        super().__init__(key)

    def new_operands(self, n: int, k: int, device: torch.device) -> CastWeight:
        return CastWeight(
            payload=torch.empty(n, k, dtype=E4M3, device=device),
            payload_t=torch.empty(k, n, dtype=E4M3, device=device),
            scale_inv=new_scale_inv(device),
        )

    def fill(
        self, weight: Tensor, operands: CastWeight, beta: Tensor | None, masks: Tensor | None, search: bool
    ) -> None:
        cast_weight_(weight, *operands)

    def kept_for_dgrad(self, operands: CastWeight) -> tuple[Tensor, ...]:
        return operands.payload_t, operands.scale_inv


class IdentityOnce(Unpruned):
    """The copy for dgrad is made of the one for fprop, if dgrad is in FP8."""

    Operands = CastWeightOnce
    dgrad_component = "transpose_weight"

    def new_operands(self, n: int, k: int, device: torch.device) -> CastWeightOnce:
        return CastWeightOnce(
            payload=torch.empty(n, k, dtype=E4M3, device=device),
            scale_inv=new_scale_inv(device),
        )

    def fill(
        self, weight: Tensor, operands: CastWeightOnce, beta: Tensor | None, masks: Tensor | None, search: bool
    ) -> None:
        cast_weight_(weight, operands.payload, None, operands.scale_inv)

    def kept_for_dgrad(self, operands: CastWeightOnce) -> tuple[Tensor, ...]:
        return operands

    def dgrad_operand(self, *kept: Tensor) -> DenseOperand:
        payload, scale_inv = kept
        return DenseOperand(ops.transpose_tokens(payload), scale_inv)  # nothing is padded, N being a multiple of 128


class IdentityBackward(Unpruned):
    """The copy for dgrad alone: fprop multiplies with the weight itself."""

    Operands = CastWeightTransposed

    def new_operands(self, n: int, k: int, device: torch.device) -> CastWeightTransposed:
        return CastWeightTransposed(
            payload_t=torch.empty(k, n, dtype=E4M3, device=device),
            scale_inv=new_scale_inv(device),
        )

    def fill(
        self, weight: Tensor, operands: CastWeightTransposed, beta: Tensor | None, masks: Tensor | None, search: bool
    ) -> None:
        cast_weight_(weight, None, *operands)

    def fprop_operand(self, operands: CastWeightTransposed) -> DenseOperand:
        raise NotImplementedError(f"projection {self.key!r} is for recipes whose fprop is dense")

    def kept_for_dgrad(self, operands: CastWeightTransposed) -> tuple[Tensor, ...]:
        return operands


@ops.of_experts_too
def _cast_weight_eager(weight: Tensor, *buffers: Tensor | None) -> None:
    ops.fill(buffers, reference.cast_weight(weight))


cast_weight_ = ops.define(
    "cast_weight_(Tensor weight, Tensor(a!)? payload, Tensor(b!)? payload_t, Tensor(c!) scale_inv) -> ()",
    _cast_weight_eager,
    ops.launcher("weight.prune_fp8.launch_cast_weight", ops.no_results),
    ops.no_results,
    any_strides=1,
)

IDENTITY_ONCE = IdentityOnce("identity-once")
IDENTITY = Identity("identity", one_copy=IDENTITY_ONCE)
IDENTITY_BACKWARD = IdentityBackward("identity-backward")
