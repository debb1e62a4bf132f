"""What the products of a linear multiply: one matrix and all tokens, or the matrix of each expert and its own tokens.

Shapes as in ``function``.  The ops of experts are those of one matrix in a loop over experts (``reference.grouped``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.kernels import grouped_ops, ops
from sparse_compile.projections.base import DenseOperand, SparseOperand


class Products:
    """Of one matrix."""

    def dense(self, x: Tensor, matrix: Tensor) -> Tensor:
        """``x @ matrix`` of ``x [T, C]`` and ``matrix [C, D]``, of one dtype."""
        return x @ matrix

    def times(self, product: Tensor, scale_inv: Tensor) -> Tensor:
        """``product [T, D]`` times the number of its matrix."""
        return product * scale_inv

    def sparse(self, x: Tensor, scale_inv: Tensor | None, weight: SparseOperand, out_dtype: torch.dtype) -> Tensor:
        """``(x * scale_inv[:, None]) @ weight.T`` of ``x [T, C]``: ``[T, R]``."""
        return ops.sparse_mm(weight.values, weight.metadata, x, weight.scale_inv, scale_inv, out_dtype, True, True)

    def scaled(self, x: Tensor, weight: DenseOperand, out_dtype: torch.dtype, use_fast_accum: bool) -> Tensor:
        """``x @ weight.T`` of FP8 ``x [T, C]``: ``[T, R]``."""
        return ops.scaled_mm(x, weight.payload, weight.scale_inv, out_dtype, use_fast_accum)

    def dense_wgrad(self, a: Tensor, b: Tensor) -> Tensor:
        """``a.T @ b`` of ``a [T, M]`` and ``b [T, D]``, of one dtype."""
        return a.t() @ b

    def sparse_wgrad(
        self, values: Tensor, metadata: Tensor, x_t: Tensor, scale_inv: Tensor, out_dtype: torch.dtype, transpose: bool
    ) -> Tensor:
        """The product of two operands that contract over tokens, the left one 2:4; transposed if that is asked for."""
        return ops.sparse_mm(values, metadata, x_t, scale_inv, None, out_dtype, transpose, False)

    def scaled_wgrad(self, a: Tensor, b: Tensor, scale_inv: Tensor, out_dtype: torch.dtype) -> Tensor:
        """The product of two operands in FP8 that contract over tokens."""
        # Tokens are many, and activations may have a mean, by which sums grow and small addends are cut.
        return ops.scaled_mm(a, b, scale_inv, out_dtype, False)

    def cast_transpose(
        self, x: Tensor, row_scale: Tensor, token_scale: Tensor, dtype: torch.dtype, with_sums: bool
    ) -> tuple[Tensor, ...]:
        """See ``reference.cast_transpose``; ``with_sums``: and ``reference.block_sums``."""
        cast = ops.cast_transpose_with_sums if with_sums else ops.cast_transpose
        return cast(x, row_scale, token_scale, dtype)

    def cast_mvue(
        self, x: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, index: int,
        sampling: tuple[bool, bool, torch.dtype], with_sums: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """See ``reference.cast_mvue``, and ``cast_transpose`` of ``with_sums``.

        Args:
            sampling: whether approximate, whether rounded at random, the dtype.
        """
        cast = ops.cast_mvue_with_sums if with_sums else ops.cast_mvue
        return cast(x, row_scale, token_scale, seed, index, *sampling)

    def transpose_tokens(self, x: Tensor) -> Tensor:
        """See ``reference.transpose_tokens``."""
        return ops.transpose_tokens(x)

    def largest(self, values: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        """The largest of ``values [T]``, floored, over the tokens of each matrix, and the same for each token.

        The floor where there are no tokens.  Fp32 ``[1]``, twice; of experts ``[E]`` and ``[T]``.
        """
        # One more element, and no branch on T, which may be known at run time alone.
        largest = F.pad(values, (0, 1), value=floor).amax(dim=0, keepdim=True)
        return largest, largest


class Experts(Products):
    """Of the matrices of experts, ``[E, ...]``.

    Args:
        offsets: int32 or int64 ``[E]``, where the tokens of each expert end; tokens lie sorted by expert.
    """

    def __init__(self, offsets: Tensor) -> None:
        self.offsets = offsets

    def dense(self, x: Tensor, matrix: Tensor) -> Tensor:
        return grouped_ops.grouped_mm(x, matrix, self.offsets)

    def times(self, product: Tensor, scale_inv: Tensor) -> Tensor:
        # Of rows that are nobody's any will do.
        return product * F.pad(scale_inv.flatten(), (0, 1))[self._experts_of_rows(product)][:, None]

    def sparse(self, x: Tensor, scale_inv: Tensor | None, weight: SparseOperand, out_dtype: torch.dtype) -> Tensor:
        return grouped_ops.grouped_sparse_mm(
            weight.values, weight.metadata, x, weight.scale_inv.flatten(), scale_inv, self.offsets, out_dtype, True
        )

    def scaled(self, x: Tensor, weight: DenseOperand, out_dtype: torch.dtype, use_fast_accum: bool) -> Tensor:
        return grouped_ops.grouped_scaled_mm(
            x, weight.payload, weight.scale_inv.flatten(), self.offsets, out_dtype, use_fast_accum
        )

    def dense_wgrad(self, a: Tensor, b: Tensor) -> Tensor:
        return grouped_ops.grouped_wgrad_mm(a, b, self.offsets)

    def sparse_wgrad(
        self, values: Tensor, metadata: Tensor, x_t: Tensor, scale_inv: Tensor, out_dtype: torch.dtype, transpose: bool
    ) -> Tensor:
        return grouped_ops.grouped_wgrad_sparse_mm(values, metadata, x_t, scale_inv, self.offsets, out_dtype, transpose)

    def scaled_wgrad(self, a: Tensor, b: Tensor, scale_inv: Tensor, out_dtype: torch.dtype) -> Tensor:
        return grouped_ops.grouped_wgrad_scaled_mm(a, b, scale_inv, self.offsets, out_dtype)

    def cast_transpose(
        self, x: Tensor, row_scale: Tensor, token_scale: Tensor, dtype: torch.dtype, with_sums: bool
    ) -> tuple[Tensor, ...]:
        assert not with_sums  # experts have no biases
        return grouped_ops.grouped_cast_transpose(x, row_scale, token_scale, self.offsets, dtype)

    def cast_mvue(
        self, x: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, index: int,
        sampling: tuple[bool, bool, torch.dtype], with_sums: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert not with_sums
        return grouped_ops.grouped_cast_mvue(x, row_scale, token_scale, seed, index, self.offsets, *sampling)

    def transpose_tokens(self, x: Tensor) -> Tensor:
        return grouped_ops.grouped_transpose_tokens(x, self.offsets)

    def largest(self, values: Tensor, floor: float) -> tuple[Tensor, Tensor]:
        experts, expert = self.offsets.shape[0], self._experts_of_rows(values)
        floors = torch.full((experts + 1,), floor, dtype=values.dtype, device=values.device)
        largest = floors.scatter_reduce(0, expert, values, "amax")
        return largest[:experts], largest[expert]

    def _experts_of_rows(self, x: Tensor) -> Tensor:
        """int64 ``[T]``, found on the device; E for rows that are nobody's."""
        rows = torch.arange(x.shape[0], device=x.device, dtype=self.offsets.dtype)
        return torch.searchsorted(self.offsets, rows, right=True)
