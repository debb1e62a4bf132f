"""What the runtime needs to know of a weight to append its operands to the inputs of a graph."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.projections.base import Projection
from sparse_compile.projections.identity import IDENTITY


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
    experts: int | None = None  # whose matrices it holds, [E, N, K]; None for one matrix
    decay: float = 0.0
    refresh: int = 0
    beta_factor: float = 1.0
    shadow_projection: Projection = IDENTITY  # what prunes it in another phase than this dense one

    def new_operands(self) -> Any:
        """Operands to be filled, a NamedTuple of the projection; fake ones under a FakeTensorMode."""
        matrix = self.out_features, self.in_features, self.device
        if self.experts is None:
            return self.projection.new_operands(*matrix)
        return self.projection.new_operands_of_experts(self.experts, *matrix)

    def new_masks(self) -> Tensor | None:
        """Uninitialised masks; None for projections that keep none."""
        matrix = self.out_features, self.in_features, self.device
        if self.experts is None:
            return self.projection.new_masks(*matrix)
        return self.projection.new_masks_of_experts(self.experts, *matrix)

    def fill(self, weight: Tensor, operands: Any, beta: Tensor | None, masks: Tensor | None, search: bool) -> None:
        """Make operands of the weight ``[N, K]``, or ``[E, N, K]``; arguments as of the projection's ``fill``."""
        fill = self.projection.fill if self.experts is None else self.projection.fill_experts
        fill(weight, operands, beta, masks, search)
