"""A weight becomes what its linear computed with, where a dense phase begins."""

import torch
from torch import Tensor

from sparse_compile.kernels.reference import hard_threshold24, soft_threshold24
from sparse_compile.kernels.reference_transposable import dense_mask, transposable_masks
from sparse_compile.recipe import Projection

# Elements that are projected at once: bounds the memory that it takes.
_ELEMENTS = 2**22


def write_projected(matrix: Tensor, projection: Projection, beta: float | None, masks: Tensor | None) -> None:
    """Overwrite ``matrix [N, K]``, of any strides, with ``beta * S(W)``, computed in fp32 and rounded once.

    Args:
        beta: for projections that have one; 1 for a weight that never had any, being zero all over.
        masks: transposable ones, int16 ``[N / 4, K / 4]``; without them they are found.
    """
    if projection is Projection.TRANSPOSABLE:
        found = transposable_masks(matrix) if masks is None else masks
        matrix.copy_(matrix.where(dense_mask(found), 0))
        return
    if matrix.shape[1] % 4 != 0:
        raise ValueError(
            f"a shard of {matrix.shape[1]} in_features ends within a group of four, so this process cannot write what "
            "its linear computed with; shard along out_features, or leave the dense tail away"
        )
    for rows in matrix.split(max(1, _ELEMENTS // matrix.shape[1])):
        w = rows.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if projection is Projection.TOP2:
            rows.copy_(hard_threshold24(w))
        else:
            rows.copy_(soft_threshold24(w) * (1.0 if beta is None else beta))
