"""A weight as its linear computes with it, before the cast to FP8."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.projections.base import Projection
from sparse_compile.weights.record import Scale

# Elements that are projected at once: bounds the memory that it takes.
_ELEMENTS = 2**22


def project(matrix: Tensor, projection: Projection, beta: Scale | None, masks: Tensor | None) -> Tensor:
    """``beta * S(W)`` of ``matrix [N, K]``, fp32; of ``[E, N, K]``, of each expert's.

    Args:
        beta: None for a weight that never had any, S(W) being zero all over; projections that have none ignore what
            another recipe or a checkpoint has left.
        masks: of projections that keep some; without them they are found.
    """
    if matrix.ndim == 3:
        return torch.stack([project(*of_expert) for of_expert in _of_experts(matrix, projection, beta, masks)])
    assert not isinstance(beta, tuple)
    w = matrix.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    projected = projection.project(w, masks)
    return projected if beta is None or not projection.has_beta else projected * beta


def write_projected(matrix: Tensor, projection: Projection, beta: Scale | None, masks: Tensor | None) -> None:
    """Overwrite ``matrix [N, K]``, of any strides, with its projection, rounded once; arguments as of ``project``."""
    if matrix.ndim == 3:
        for of_expert in _of_experts(matrix, projection, beta, masks):
            write_projected(*of_expert)
        return
    assert not isinstance(beta, tuple)
    n, k = matrix.shape
    if k % 4 != 0 or n % projection.rows != 0:
        raise ValueError(
            f"a shard of {n} out_features and {k} in_features ends within a tile of {projection.rows} x 4, so this "
            f"process cannot write what its linear computed with; shard along {'out' if k % 4 else 'in'}_features, or "
            "over another number of processes, or remove 'sste.tail'"
        )
    step = max(1, _ELEMENTS // k // 4) * 4
    for first in range(0, n, step):
        rows, tiles = matrix[first : first + step], slice(first // 4, (first + step) // 4)
        rows.copy_(project(rows, projection, beta, None if masks is None else masks[tiles]))


def _of_experts(
    matrices: Tensor, projection: Projection, beta: Scale | None, masks: Tensor | None
) -> Iterator[tuple[Tensor, Projection, float | None, Tensor | None]]:
    """The arguments for each expert's matrix."""
    scales = beta if isinstance(beta, tuple) else (beta,) * len(matrices)
    for e, (matrix, scale) in enumerate(zip(matrices, scales, strict=True)):
        yield matrix, projection, scale, None if masks is None else masks[e]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectionState:
    """How a weight is projected."""

    projection: Projection
    beta: Scale | None  # of S-STE
    masks: Tensor | None  # transposable ones that are kept for some steps
    transposed: bool | None  # whether the weight is stored [in_features, out_features]; None where no call has told
    finalized: bool  # whether the weight was made its own projection, and no training has used it since

    def project(self, weight: Tensor, *, transposed: bool) -> Tensor:
        """The projected weight in the layout and dtype of the weight, computed in fp32."""
        projected = project(weight.mT if transposed else weight, self.projection, self.beta, self.masks)
        return (projected.mT if transposed else projected).to(weight.dtype)
