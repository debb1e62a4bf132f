"""Counts how many bits of masks flip in each step of a training script, and ends it after enough of them.

The mask of a weight after a step is the one that pruning would give it then: whether linears compute with the weight
pruned, with masks that are kept for some steps, or dense.  So runs of all three kinds are measured alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_compile.measuring.weight_health import mask_flips
from sparse_compile.projections.base import Projection, SparseOperand
from sparse_compile.runtime import on_weight
from sparse_compile.torch_internals.weak_tensors import weak
from sparse_compile.weights.operand_set import OperandSet
from sparse_compile.weights.operands import fill_operands
from sparse_compile.weights.optimizer_watch import Stage, watch
from sparse_compile.weights.slot import WeightSlot


class Enough(SystemExit):
    """Ends the script from within a step of an optimizer, as if it had ended by itself."""


class _Counted:
    """A weight, the metadata of its mask after the last step, and the flips of each step: int64 scalars."""

    __slots__ = ("elements", "flips", "metadata", "slot", "weight")

    def __init__(self, slot: WeightSlot, weight: Tensor) -> None:
        projection = _projection(slot)
        self.slot = replace(slot, projection=projection, refresh=int(projection.keeps_masks))
        self.weight = weak(weight)
        self.elements = weight.numel()
        self.metadata = self._mask(weight)
        self.flips: list[Tensor] = []

    def count(self, weight: Tensor) -> None:
        before, self.metadata = self.metadata, self._mask(weight)
        self.flips.append(mask_flips(before, self.metadata))

    def _mask(self, weight: Tensor) -> Tensor:
        operands = self.slot.new_operands()
        fill_operands(weight, self.slot, operands)
        pruned = self.slot.projection.fprop_operand(operands)
        assert isinstance(pruned, SparseOperand)
        return pruned.metadata


class FlipCounts:
    """Counts from now on, in this process.

    Args:
        steps: of an optimizer, after which it raises ``Enough``.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._counted: dict[str, _Counted] = {}
        self._taken: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        on_weight.append(self._see)
        watch.subscribe(Stage.FLIP_COUNTS, after=self._after_step)

    def by_weight(self) -> dict[str, tuple[int, list[int]]]:
        """Elements of each weight that is or would be pruned, and how many bits of its mask flipped in each step."""
        return {
            name: (counted.elements, torch.stack(counted.flips).tolist() if counted.flips else [])
            for name, counted in self._counted.items()
        }

    def _see(self, slot: WeightSlot, weight: Tensor, operands: OperandSet) -> None:
        if not _projection(slot).prunes or any(counted.weight.ref() is weight for counted in self._counted.values()):
            return
        if operands.shards is not None:
            raise ValueError(f"FSDP2 holds the weight of {slot.name!r} in shards: flips are counted without it")
        # Blocks that share a graph share its names.
        names = (slot.name if number == 1 else f"{slot.name} ({number})" for number in range(1, len(self._counted) + 2))
        self._counted[next(name for name in names if name not in self._counted)] = _Counted(slot, weight)

    def _after_step(self, optimizer: Optimizer, weights: Sequence[Tensor]) -> None:
        stepped = set(map(id, weights))
        for counted in self._counted.values():
            weight = counted.weight.ref()
            if weight is not None and id(weight) in stepped:
                counted.count(weight)
        self._taken[optimizer] = self._taken.get(optimizer, 0) + 1
        if self._taken[optimizer] >= self._steps:
            raise Enough(0)


def _projection(slot: WeightSlot) -> Projection:
    """What prunes the weight, or would."""
    return slot.projection if slot.projection.prunes else slot.shadow_projection
