"""Eager definition of the compressed 2:4 format, and of the saturating cast to FP8."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_compile.kernels.formats import E4M3, PAD_NIBBLE, padded


def saturating_cast(x: Tensor, dtype: torch.dtype = E4M3) -> Tensor:
    """``x`` clamped to the range of an FP8 format and rounded to nearest even; NaN stays NaN."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def compress24(dense: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Values and metadata of ``dense [R, C]``, keeping ``positions`` (int, ``[R, C / 4, 2]``, ascending)."""
    rows, columns = dense.shape
    extra_columns, extra_rows = padded(columns) - columns, padded(rows) - rows
    raw = dense.view(_bits(dense)).reshape(rows, columns // 4, 4)
    values = F.pad(raw.gather(-1, positions).reshape(rows, columns // 2), (0, extra_columns // 2)).view(dense.dtype)
    nibbles = positions[..., 0] | positions[..., 1] << 2
    nibbles = F.pad(nibbles, (0, extra_columns // 4, 0, extra_rows), value=PAD_NIBBLE)
    nibbles = nibbles.reshape(padded(rows) // 16, 16, padded(columns) // 4)
    words = (_to_lanes(nibbles, dense.dtype) << torch.arange(0, 32, 4, device=dense.device)).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return values, words.contiguous()


def decompress24(values: Tensor, metadata: Tensor) -> Tensor:
    """The dense ``[R, padded(C)]`` matrix, in the dtype of ``values``; inverse of ``compress24``."""
    rows = values.shape[0]
    row_blocks, columns = metadata.shape[1], 2 * values.shape[1]
    shifts = torch.arange(0, 32, 4, device=values.device)
    # Where each nibble stands among those of the words.
    order = torch.arange(row_blocks * 4 * columns, device=values.device).reshape(row_blocks, 16, columns // 4)
    nibbles = torch.empty(order.numel(), dtype=torch.int64, device=values.device)
    nibbles[_to_lanes(order, values.dtype).flatten()] = (metadata.to(torch.int64)[..., None] >> shifts & 15).flatten()
    nibbles = nibbles.reshape(row_blocks * 16, columns // 4, 1)[:rows]
    positions = torch.cat([nibbles & 3, nibbles >> 2], dim=-1)
    raw = values.view(_bits(values)).reshape(rows, columns // 4, 2)
    dense = torch.zeros(rows, columns // 4, 4, dtype=raw.dtype, device=values.device)
    return dense.scatter_(-1, positions, raw).reshape(rows, columns).view(values.dtype)


def transpose_pruned(values: Tensor, metadata: Tensor) -> Tensor:
    """What ``compress24`` has compressed, dense and transposed: ``[padded(C), R]``."""
    return decompress24(values, metadata).t().contiguous()


def _bits(x: Tensor) -> torch.dtype:
    return torch.uint8 if x.dtype.itemsize == 1 else torch.int16


def _to_lanes(nibbles: Tensor, dtype: torch.dtype) -> Tensor:
    """``[R / 16, 16, C / 4]`` in the order of metadata: ``[column block, R / 16, lane, word, nibble of the word]``."""
    row_blocks, _, groups = nibbles.shape  # none of which reshape could infer where there are no rows
    if dtype.itemsize == 1:
        # row block, row // 8, row % 8, column block, part // 2, part % 2, nibble
        parts = nibbles.reshape(row_blocks, 2, 8, groups // 32, 2, 2, 8)
        return parts.permute(3, 0, 2, 5, 1, 4, 6).reshape(groups // 32, row_blocks, 32, 2, 8)
    # row block, row // 8, row % 8, column block, part, nibble
    parts = nibbles.reshape(row_blocks, 2, 8, groups // 16, 4, 4)
    return parts.permute(3, 0, 2, 4, 1, 5).reshape(groups // 16, row_blocks, 32, 1, 8)


def kept_positions(kept: Tensor) -> Tensor:
    """Of the two elements of each group that are stored, ascending: int64 ``[N, K / 4, 2]``.

    Args:
        kept: bool ``[N, K]``, at most two of each four along K; where fewer are kept, the lowest of the others follow.
    """
    groups = kept.reshape(kept.shape[0], -1, 4).int()
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return order[..., :2].sort(dim=-1).values
