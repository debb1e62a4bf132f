"""What the runtime needs to know of a weight to append its operands to the inputs of a graph."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.kernels import ops
from sparse_compile.recipe import Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightSlot:
    """A weight whose operands the runtime appends to the graph's inputs."""

    name: str
    position: int  # of the parameter among the graph's inputs
    transposed: bool
    projection: Projection
    out_features: int
    in_features: int
    device: torch.device
    decay: float = 0.0
    refresh: int = 0
    beta_factor: float = 1.0
    bf16: bool = False  # whether it is kept in bf16 instead of FP8
    virtual: Projection = Projection.NONE  # what prunes it in another phase than this dense one

    def new_operands(self) -> tuple[Tensor, ...]:
        """Uninitialised operands; fake ones under a FakeTensorMode."""
        new: Callable[[int, int, torch.device], tuple[Tensor, ...]]
        if self.projection is Projection.TRANSPOSABLE:
            new = ops.new_transposable_weight
        elif self.projection.prunes:
            new = ops.new_pruned_weight_bf16 if self.bf16 else ops.new_pruned_weight
        else:
            new = ops.new_cast_weight
        return new(self.out_features, self.in_features, self.device)
