"""What the sparse GEMM is asked for, but for the tensors themselves."""

from dataclasses import dataclass

import torch

from sparse_compile.kernels.formats import E4M3


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """``out = A @ B.T`` with a 2:4 A.

    Args:
        rows: of A; columns: rows of B; contraction: columns of B.
        dtype: of A and B, e4m3 or bf16.
        out_dtype: of out.
        scaled: whether each row of B has a scale.
        transpose: whether out is stored ``[columns, rows]``.
        use_fast_accum: whether sums of FP8 products may have the bits that ``wgmma`` gives them; those of bf16 do.
    """

    rows: int
    columns: int
    contraction: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    scaled: bool
    transpose: bool
    use_fast_accum: bool

    @property
    def accurate(self) -> bool:
        """Whether a carry keeps the bits of the sums."""
        return self.dtype == E4M3 and not self.use_fast_accum

    def __str__(self) -> str:
        sizes = f"{self.rows}x{self.columns}x{self.contraction}"
        form = " scaled" * self.scaled + " transposed" * self.transpose + " accurate" * self.accurate
        return f"{sizes} {self.dtype} to {self.out_dtype}{form}".replace("torch.", "")
