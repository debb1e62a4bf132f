"""The operands of one weight: what linears multiply with, made of it by a projection, in one layout."""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor

from sparse_compile.projections.base import Projection
from sparse_compile.torch_internals.weak_tensors import WeakTensor

# What shows that a weight changed: the last step of the optimizer that owns it, its version and its address.
WeightVersion = tuple[int | None, int, int]
STALE: WeightVersion = (-1, -1, -1)  # that no weight has


class OperandLayout(NamedTuple):
    """Weights have operands of their own for each."""

    projection: Projection
    transposed: bool
    device: torch.device

    def projects_as(self, other: "OperandLayout") -> bool:
        """Whether linears compute the same with both, up to the precision of their copies."""
        along = self.projection.prunes_both_ways or self.transposed == other.transposed
        return along and self.projection.projects_as(other.projection)


class OperandSet:
    """The operands of one weight in one layout.

    Attributes:
        shards: the parameter that an optimizer owns, where FSDP2 gathers the weight; None for every other weight.
        shape: of the weight.
        freed: whether the operands have no memory, because FSDP2 freed that of the gathered weight.
        made_at: how many steps optimizers had made, of whatever weights, when the operands were made.
    """

    __slots__ = (
        "__weakref__", "dropped", "freed", "made_at", "mask_steps", "masks", "operands", "readers", "refreshes",
        "reuses", "sample", "shape", "shards", "steps", "trains", "used", "version",
    )  # fmt: skip

    def __init__(self, shards: WeakTensor | None) -> None:
        self.shards = shards
        self.shape: torch.Size | None = None
        self.operands: Any = ()  # a NamedTuple of the projection; empty until they are made
        self.freed = False
        self.dropped = False  # by the record
        self.masks: Tensor | None = None  # transposable ones, and the optimizer steps since they were found
        self.mask_steps = 0
        self.steps = 0  # of the weight, when the operands were made
        self.made_at = 0
        self.version: WeightVersion | None = None
        self.sample: Tensor | None = None  # of the weight that the operands were made from
        self.refreshes = 0  # how often the operands were made
        self.readers: WeakSet[object] = WeakSet()  # compiled graphs
        self.used = False  # since the weight's last step
        self.trains = False  # the same, in a call that records gradients
        self.reuses = 0  # how often calls that record gradients used them again, since an edit or an evaluation

    def free(self) -> None:
        """Give the operands' memory back; the tensors stay, because a backward may hold them."""
        # But for the last, the scale: it is one number, and pruning again begins with it.
        if self.operands and not self.freed:
            for listener in before_freeing:
                listener(self)
            for operand in self.operands[:-1]:
                operand.untyped_storage().resize_(0)
            self.freed = True

    def allocate(self) -> None:
        """Uninitialised memory for operands that were freed."""
        for operand in self.operands[:-1]:
            operand.untyped_storage().resize_(operand.nbytes)
        self.freed = False


# Called with each set whose operands are about to be freed.
before_freeing: list[Callable[[OperandSet], None]] = []
