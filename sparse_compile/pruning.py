"""The projected weight: what the forward pass multiplies with, before its cast to FP8."""

from dataclasses import dataclass

from torch import Tensor

from sparse_compile.projected import project
from sparse_compile.recipe import Projection


@dataclass(frozen=True, kw_only=True, slots=True)
class Pruning:
    """How a weight is pruned."""

    projection: Projection
    beta: float | None  # of S-STE; None while S(W) is zero everywhere
    masks: Tensor | None  # transposable ones that are kept for some steps
    transposed: bool | None  # whether the weight is stored [in_features, out_features]; None where no call has told
    finalized: bool  # whether the weight was made its own projection, and no training has used it since

    def project(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """The projected weight in the layout and dtype of the weight, computed in fp32."""
        projected = project(weight.t() if transposed else weight, self.projection, self.beta, self.masks)
        return (projected.t() if transposed else projected).to(weight.dtype)
