"""A 2:4 operand, dense and transposed: ``out[c, r] = A[r, c]``, zero where nothing was kept.

``A [R, C]`` is ``values [R, C / 2]`` and ``metadata`` (see ``formats``), C a multiple of 128; ``out [C, R]``.  No
arithmetic: bytes are moved.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparse_compile.kernels.formats import E4M3, PAD, check_buffer, metadata_shape
from sparse_compile.kernels.launch_plan import NOTHING, LaunchPlan, plan_kernel, planned
from sparse_compile.kernels.tiles import (
    load_metadata,
    load_tile,
    permute_bytes,
    row_layout,
    store_tile,
    transpose_words,
    with_layout_of,
    word_ptr,
)

# Rows, columns and warps of a tile.
_TILE = (128, 256, 4)
_ROWS_MULTIPLE = 16


@gluon.jit
def _expand(values, nibbles, FIRST: gl.constexpr):
    """The four columns of a group: a word, of the values ``FIRST`` and ``FIRST + 1`` of a word of values."""
    # A selector names for each byte of the result one of ``values``, or byte 4, which is zero.
    first, second = (nibbles & 3) * 4, nibbles & 12
    selector = 0x4444 - (4 - FIRST << first) - (3 - FIRST << second)
    return permute_bytes(values, values * 0, selector)


@gluon.jit
def _transpose_pruned_kernel(
    values_ptr, metadata_ptr, out_ptr, rows, columns,
    EVEN: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_R rows by BLOCK_C columns."""
    # 16 neighbouring rows a thread, so that it transposes to 16 bytes of a row.
    layout: gl.constexpr = row_layout([BLOCK_R, BLOCK_C // 8], 16, 2, gl.num_warps())
    column_tiles = gl.cdiv(columns, BLOCK_C)
    row = gl.program_id(0) // column_tiles * BLOCK_R
    column = gl.program_id(0) % column_tiles * BLOCK_C
    values = load_tile(
        word_ptr(values_ptr), row, column // 8, rows, columns // 8, columns // 8, 1, BLOCK_R, BLOCK_C // 8, EVEN, layout
    )
    pairs = load_metadata(metadata_ptr, row, column, rows, columns, BLOCK_R, BLOCK_C, EVEN)
    pairs = with_layout_of(pairs, values)
    words = gl.join(_expand(values, pairs & 15, 0), _expand(values, pairs >> 4, 2))
    words = transpose_words(gl.reshape(words, [BLOCK_R, BLOCK_C // 4]))  # [BLOCK_C, BLOCK_R / 4]
    words_layout: gl.constexpr = row_layout([BLOCK_C, BLOCK_R // 4], 1, 4, gl.num_warps())
    store_tile(word_ptr(out_ptr), words, column, row // 4, columns, rows // 4, EVEN, words_layout)


@planned
def launch_transpose_pruned(values: Tensor, metadata: Tensor, out: Tensor) -> LaunchPlan:
    """Expand and transpose a 2:4 operand into ``out``, which is written in full.

    Args:
        values: e4m3 ``[R, C / 2]`` contiguous; R a multiple of 16, C of 128.
        metadata: int32 ``[C / 128, padded(R) / 16, 32, 2]``.
        out: e4m3 ``[C, R]``.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    if values.dim() != 2 or values.shape[0] % _ROWS_MULTIPLE or values.shape[1] % (PAD // 2):
        raise ValueError(f"values are {tuple(values.shape)}; needed are multiples of {_ROWS_MULTIPLE} and {PAD // 2}")
    rows, columns = values.shape[0], 2 * values.shape[1]
    check_buffer("values", values, tuple(values.shape), E4M3, values.device)
    check_buffer("metadata", metadata, metadata_shape(rows, columns), torch.int32, values.device)
    check_buffer("out", out, (columns, rows), E4M3, values.device)
    if values.numel() == 0:
        return NOTHING
    block_r, block_c, warps = _TILE
    tiles_r, tiles_c = triton.cdiv(rows, block_r), triton.cdiv(columns, block_c)
    return plan_kernel(
        _transpose_pruned_kernel, (tiles_r * tiles_c,), (values, metadata, out), (rows, columns),
        EVEN=(tiles_r * block_r, tiles_c * block_c) == (rows, columns), BLOCK_R=block_r, BLOCK_C=block_c,
        num_warps=warps,
    )  # fmt: skip
