"""What the sparse GEMM is asked for, but for the tensors themselves."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """``out = A @ B.T`` with a 2:4 A.

    Args:
        rows: of A; columns: rows of B; contraction: columns of B.
        dtype, dense_dtype: of A and of B, FP8 or bf16 both.
        out_dtype: of out.
        scaled: whether each row of B has a scale.
        transpose: whether out is stored ``[columns, rows]``.
        use_fast_accum: whether sums of FP8 products may have the bits that ``wgmma`` gives them; those of bf16 do.
    """

    rows: int
    columns: int
    contraction: int
    dtype: torch.dtype
    dense_dtype: torch.dtype
    out_dtype: torch.dtype
    scaled: bool
    transpose: bool
    use_fast_accum: bool

    @property
    def accurate(self) -> bool:
        """Whether a carry keeps the bits of the sums."""
        return self.dtype.itemsize == 1 and not self.use_fast_accum

    def __str__(self) -> str:
        sizes = f"{self.rows}x{self.columns}x{self.contraction}"
        form = " scaled" * self.scaled + " transposed" * self.transpose + " accurate" * self.accurate
        operands = str(self.dtype) if self.dense_dtype == self.dtype else f"{self.dtype} by {self.dense_dtype}"
        return f"{sizes} {operands} to {self.out_dtype}{form}".replace("torch.", "")
