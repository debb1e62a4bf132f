"""What moves between the kernels: formats, padding and the metadata layout.  No arithmetic.

A 2:4 operand with ``rows`` rows and ``columns`` logical columns (the contraction) is stored as

* ``values``   FP8 or bf16 ``[rows, padded(columns) / 2]``: the two kept elements of each group of four, in order;
* ``metadata`` int32 ``[padded(columns) / 128, padded(rows) / 16, 32, 2]`` with FP8 and ``[padded(columns) / 64,
  padded(rows) / 16, 32, 1]`` with bf16: where they stood.

A group's four metadata bits ("nibble") are ``first | second << 2`` with ``first < second`` the positions of the kept
elements, and nibbles fill a 32-bit word from its lowest bits.  The words lie in the order in which the 32 lanes of a
warp hold them for ``wgmma.mma_async.sp`` (PTX ISA, "Sparse matrix storage").  Of a block of 16 rows,

* FP8: the eight nibbles of row ``r`` and 32-column part ``p`` are word ``p // 2`` of lane
  ``4 * (r % 8) + 2 * (p % 2) + r // 8``;
* bf16: the four nibbles of row ``r`` and 16-column part ``p`` are half ``r // 8`` of the word of lane
  ``4 * (r % 8) + p``.

Padding to multiples of 128 keeps every row 16-byte aligned for TMA and every metadata word of a tile in bounds.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E5M2 = torch.float8_e5m2  # of gradients, where it is asked for
FP8_DTYPES = (E4M3, E5M2)
# A kept element of an MVUE group is at most twice the largest magnitude of its group (both estimators).
MVUE_GAIN = 2.0
# Floor of every amax: keeps the scale of an all-zero tensor, and its product with another scale, finite.
AMAX_FLOOR = 2.0**-100
# The longest sums of products of fprop and dgrad that are left to the tensor cores' own accumulators, of some 14 bits.
FAST_ACCUM_MAX = 2**14
PAD = 128
# Tokens of one of the partial sums that the gradient of a bias adds up.
SUMMED = 32
# Padding groups name positions 0 and 1: the smallest legal nibble.
PAD_NIBBLE = 0x4
PAD_WORD = 0x44444444


def padded(size: int) -> int:
    """``size`` rounded up to a multiple of 128."""
    return (size + PAD - 1) // PAD * PAD


def sums_shape(tokens: int, columns: int) -> tuple[int, int]:
    """Of sums in each column over each SUMMED of the padded tokens."""
    return padded(tokens) // SUMMED, columns


def grouped_columns(tokens: int, experts: int) -> int:
    """Columns of an operand that contracts over the tokens of experts, each padded: enough for any routing of them."""
    return (tokens + (PAD - 1) * experts) // PAD * PAD


# Between the random numbers of two experts of one linear: more than a graph has linears.
_EXPERT_DRAWS = 2**15


def expert_stream(index: int, expert: int) -> int:
    """What distinguishes the random numbers of an expert from those of others, and of other linears of its graph."""
    return index + _EXPERT_DRAWS * expert


def values_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of the ``values`` of a 2:4 operand ``[rows, columns]``."""
    return (rows, padded(columns) // 2)


def metadata_shape(rows: int, columns: int, dtype: torch.dtype = E4M3) -> tuple[int, int, int, int]:
    """Shape of the ``metadata`` of a 2:4 operand ``[rows, columns]`` of 8-bit or 16-bit elements."""
    words = 2 // dtype.itemsize
    return (padded(columns) // (64 * words), padded(rows) // 16, 32, words)


def unscaled_dtype(out_dtype: torch.dtype) -> torch.dtype:
    """What an fp8 GEMM writes for ``out_dtype`` before rows are scaled: fp16 could not hold them."""
    return torch.bfloat16 if out_dtype is torch.bfloat16 else torch.float32


def allows_fast_accum(contraction: int) -> bool:
    """Whether fprop and dgrad leave so long a sum to the tensor cores; wgrad, over tokens, never does."""
    return contraction <= FAST_ACCUM_MAX


def check_buffer(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless ``tensor`` is contiguous and has this shape, dtype and device."""
    if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, dtype, device) or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}; "
            f"needed is {dtype} {shape}, contiguous, on {device}"
        )


def check_fp8(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless ``tensor`` is e4m3 or e5m2."""
    if tensor.dtype not in FP8_DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}; allowed are {' and '.join(map(str, FP8_DTYPES))}")


def check_weight(weight: Tensor, *, experts: bool = False) -> None:
    """Raise ValueError unless ``weight`` is bf16, fp16 or fp32 ``[N, K]``, N and K multiples of 16.

    Args:
        experts: whether it may be ``[E, N, K]`` as well.
    """
    dims, allowed = ((2, 3), "[N, K] or [E, N, K]") if experts else ((2,), "[N, K]")
    if weight.dim() not in dims or weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"weight is {weight.dtype} {tuple(weight.shape)}; allowed is bf16, fp16 or fp32 {allowed}")
    # Rows of N or K bytes must start on 16-byte boundaries.
    if any(size % 16 != 0 for size in weight.shape[-2:]):
        raise ValueError(f"weight is {tuple(weight.shape)}; needed are multiples of 16")
