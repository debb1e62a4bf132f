"""Activations to FP8, as they lie and token-major.

    cast_transpose:    row[t, c] = fp8(x[t, c] * row_scale[t]),  column[c, t] = fp8(x[t, c] * token_scale[t])
    transpose_tokens:  out[c, t] = x[t, c]

and of ``cast_transpose``, if they are wanted, ``sums[i, c]``: of x[t, c] over the 32 tokens of block i.

``x [T, C]``, ``row [T, C]``, ``column`` and ``out [C, padded(T)]``, zero beyond T.  FP8 is e4m3 or e5m2, as the
buffers are.  Arithmetic is fp32.  Of tokens that lie sorted by expert, token-major copies are ``[C, grouped_columns]``,
each expert's padded on its own (``reference.grouped``).
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparse_compile.kernels.expert_blocks import plan_expert_blocks
from sparse_compile.kernels.formats import (
    E4M3,
    PAD,
    SUMMED,
    check_buffer,
    check_fp8,
    grouped_columns,
    padded,
    sums_shape,
)
from sparse_compile.kernels.launch_plan import NOTHING, LaunchPlan, UncachedPlan, plan_kernel, planned
from sparse_compile.kernels.tiles import (
    cast_words,
    load_tile,
    row_layout,
    split_columns,
    split_rows,
    store_tile,
    transpose_words,
)

_SUMMED = gl.constexpr(SUMMED)
# Tokens, columns and warps of a tile.
_CAST_TILE = (128, 128, 4)
_TRANSPOSE_TILE = (128, 256, 4)
# Rows of C bytes must start on 16-byte boundaries.
_COLUMNS_MULTIPLE = 16


@gluon.jit
def _rows(table_ptr, block, tokens, BLOCK_T: gl.constexpr):
    """Where a block of tokens begins in x, and where its expert's tokens end: by a table, if there are experts."""
    if table_ptr is None:
        first = block * BLOCK_T
        end = tokens
    else:
        first = gl.load(table_ptr + block * 4 + 1)
        end = gl.load(table_ptr + block * 4 + 2)
    return first, end


@gluon.jit(do_not_specialize=["tokens"])
def _cast_transpose_kernel(
    x_ptr, row_scale_ptr, token_scale_ptr, row_ptr, column_ptr, sums_ptr, table_ptr, tokens, columns, tokens_padded,
    EVEN: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_T tokens by BLOCK_C columns; ``table_ptr``: see ``expert_blocks``, or None, as ``sums_ptr``."""
    FORMAT: gl.constexpr = row_ptr.dtype.element_ty
    # 16 neighbouring tokens a thread, so that it transposes to 16 bytes of a row.
    layout: gl.constexpr = row_layout([BLOCK_T, BLOCK_C], 16, 8, gl.num_warps())
    column_tiles = gl.cdiv(columns, BLOCK_C)
    token = gl.program_id(0) // column_tiles * BLOCK_T
    column = gl.program_id(0) % column_tiles * BLOCK_C
    first, end = _rows(table_ptr, gl.program_id(0) // column_tiles, tokens, BLOCK_T)
    x = load_tile(x_ptr, first, column, end, columns, columns, 1, BLOCK_T, BLOCK_C, EVEN, layout).to(gl.float32)
    offs_t = first + gl.arange(0, BLOCK_T, gl.SliceLayout(1, layout))
    row_scale = gl.load(row_scale_ptr + offs_t, mask=offs_t < end, other=0.0)[:, None]
    token_scale = gl.load(token_scale_ptr + offs_t, mask=offs_t < end, other=0.0)[:, None]

    x0, x1, x2, x3 = split_columns(x * row_scale)
    words = cast_words(x0, x1, x2, x3, FORMAT)  # [BLOCK_T, BLOCK_C / 4]
    words_layout: gl.constexpr = row_layout([BLOCK_T, BLOCK_C // 4], 16, 2, gl.num_warps())
    row_word_ptr = row_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    store_tile(row_word_ptr, words, first, column // 4, end, columns // 4, EVEN, words_layout)

    # Here, between the stores, it takes no more registers.
    if sums_ptr is not None:
        sums = gl.sum(gl.reshape(x, [BLOCK_T // _SUMMED, _SUMMED, BLOCK_C]), 1)
        sums_layout: gl.constexpr = row_layout([BLOCK_T // _SUMMED, BLOCK_C], 1, 4, gl.num_warps())
        store_tile(sums_ptr, sums, token // _SUMMED, column, tokens_padded // _SUMMED, columns, EVEN, sums_layout)

    # BLOCK_T divides the padded number of tokens, and tokens beyond T were loaded as zeros.
    x0, x1, x2, x3 = split_rows(x * token_scale)
    words = gl.permute(cast_words(x0, x1, x2, x3, FORMAT), [1, 0])  # [BLOCK_C, BLOCK_T / 4]
    column_layout: gl.constexpr = row_layout([BLOCK_C, BLOCK_T // 4], 1, 4, gl.num_warps())
    column_word_ptr = column_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    store_tile(column_word_ptr, words, column, token // 4, columns, tokens_padded // 4, EVEN, column_layout)


@gluon.jit(do_not_specialize=["tokens"])
def _transpose_tokens_kernel(
    x_ptr, out_ptr, table_ptr, tokens, columns, tokens_padded,
    EVEN: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_C: gl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_T tokens by BLOCK_C columns; ``table_ptr`` as above."""
    layout: gl.constexpr = row_layout([BLOCK_T, BLOCK_C // 4], 16, 4, gl.num_warps())
    column_tiles = gl.cdiv(columns, BLOCK_C)
    token = gl.program_id(0) // column_tiles * BLOCK_T
    column = gl.program_id(0) % column_tiles * BLOCK_C
    word_ptr = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    first, end = _rows(table_ptr, gl.program_id(0) // column_tiles, tokens, BLOCK_T)
    words = load_tile(
        word_ptr, first, column // 4, end, columns // 4, columns // 4, 1, BLOCK_T, BLOCK_C // 4, EVEN, layout
    )
    words = transpose_words(words)  # [BLOCK_C, BLOCK_T / 4]
    words_layout: gl.constexpr = row_layout([BLOCK_C, BLOCK_T // 4], 1, 4, gl.num_warps())
    out_word_ptr = out_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    store_tile(out_word_ptr, words, column, token // 4, columns, tokens_padded // 4, EVEN, words_layout)


@planned
def launch_cast_transpose(
    x: Tensor, row_scale: Tensor, token_scale: Tensor, row: Tensor, column: Tensor, sums: Tensor | None = None
) -> LaunchPlan:
    """Cast ``x`` into both buffers, which are written in full.

    Args:
        x: ``[T, C]`` contiguous, bf16, fp16 or fp32; C a multiple of 16.
        row_scale, token_scale: fp32 ``[T]``.
        row: e4m3 or e5m2 ``[T, C]``.
        column: of the same dtype, ``[C, padded(T)]``.
        sums: fp32 ``[padded(T) / 32, C]``, or None.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    _check_cast(x, row_scale, token_scale, row, column, padded(x.shape[0]))
    if sums is not None:
        check_buffer("sums", sums, sums_shape(*x.shape), torch.float32, x.device)
    if x.numel() == 0:
        return NOTHING
    cast = _plan(_cast_transpose_kernel, (x, row_scale, token_scale, row, column, sums), _CAST_TILE)

    def run(x: int, row_scale: int, token_scale: int, row: int, column: int, sums: int | None = None) -> None:
        cast(x, row_scale, token_scale, row, column, sums)

    return run


@planned
def launch_grouped_cast_transpose(
    x: Tensor, row_scale: Tensor, token_scale: Tensor, offsets: Tensor, row: Tensor, column: Tensor
) -> LaunchPlan:
    """``launch_cast_transpose`` of tokens that lie sorted by expert.

    Args:
        offsets: int32 or int64 ``[E]``, where the tokens of each expert end.
        row: rows beyond the last offset are left as they are.
        column: ``[C, grouped_columns]``, written in full.
    """
    total = grouped_columns(x.shape[0], len(offsets))
    _check_cast(x, row_scale, token_scale, row, column, total)
    if x.numel() == 0:
        return UncachedPlan(lambda: column.view(torch.uint8).zero_())
    tensors = (x, row_scale, token_scale, row, column, None)
    cast = _plan_grouped(_cast_transpose_kernel, tensors, offsets, total, _CAST_TILE)
    return lambda x, row_scale, token_scale, offsets, row, column: cast(
        offsets, x, row_scale, token_scale, row, column, None
    )


@planned
def launch_transpose_tokens(x: Tensor, out: Tensor) -> LaunchPlan:
    """Transpose ``x`` into ``out``, which is written in full.

    Args:
        x: e4m3 ``[T, C]`` contiguous, on a 16-byte boundary; C a multiple of 16.
        out: e4m3 ``[C, padded(T)]``.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    _check_input(x, (E4M3,))
    tokens, columns = x.shape
    check_buffer("out", out, (columns, padded(tokens)), E4M3, x.device)
    if x.numel() == 0:
        return NOTHING
    if x.data_ptr() % 16 != 0:
        raise ValueError(f"x starts {x.data_ptr() % 16} bytes after a 16-byte boundary")
    return _plan(_transpose_tokens_kernel, (x, out), _TRANSPOSE_TILE)


@planned
def launch_grouped_transpose_tokens(x: Tensor, offsets: Tensor, out: Tensor) -> LaunchPlan:
    """``launch_transpose_tokens`` of tokens that lie sorted by expert, into ``[C, grouped_columns]``."""
    _check_input(x, (E4M3,))
    tokens, columns = x.shape
    total = grouped_columns(tokens, len(offsets))
    check_buffer("out", out, (columns, total), E4M3, x.device)
    if x.numel() == 0:
        return UncachedPlan(lambda: out.view(torch.uint8).zero_())
    if x.data_ptr() % 16 != 0:
        raise ValueError(f"x starts {x.data_ptr() % 16} bytes after a 16-byte boundary")
    transpose = _plan_grouped(_transpose_tokens_kernel, (x, out), offsets, total, _TRANSPOSE_TILE)
    return lambda x, offsets, out: transpose(offsets, x, out)


def _plan(kernel: Any, tensors: Sequence[Tensor | None], tile: tuple[int, int, int]) -> LaunchPlan:
    """Over tiles of the padded tokens of the first tensor; EVEN where all of them lie inside of it."""
    assert tensors[0] is not None
    tokens, columns = tensors[0].shape
    block_t, block_c, warps = tile
    token_tiles, column_tiles = triton.cdiv(padded(tokens), block_t), triton.cdiv(columns, block_c)
    even = (token_tiles * block_t, column_tiles * block_c) == (tokens, columns)
    plan = plan_kernel(
        kernel, (token_tiles * column_tiles,), (*tensors, None), (tokens, columns, padded(tokens)),
        EVEN=even, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=warps,
    )  # fmt: skip
    return plan if isinstance(plan, UncachedPlan) else lambda *addresses: plan(*addresses, None)


def _plan_grouped(
    kernel: Any, tensors: Sequence[Tensor | None], offsets: Tensor, total: int, tile: tuple[int, int, int]
) -> LaunchPlan:
    """Over all blocks of experts' tokens; called with the address of the offsets, then those of the tensors."""
    assert tensors[0] is not None
    tokens, columns = tensors[0].shape
    block_t, block_c, warps = tile
    assert block_t == PAD  # a block of tokens is one of the padded columns
    new_table, table, find_blocks = plan_expert_blocks(offsets, tokens, block_t)
    plan = plan_kernel(
        kernel, (total // block_t * triton.cdiv(columns, block_c),), (*tensors, table), (tokens, columns, total),
        EVEN=False, BLOCK_T=block_t, BLOCK_C=block_c, num_warps=warps,
    )  # fmt: skip

    def run(offsets: int, *addresses: int | None) -> None:
        table = new_table()
        find_blocks(offsets, table.data_ptr())
        plan(*addresses, table.data_ptr())

    return run


def _check_cast(x: Tensor, row_scale: Tensor, token_scale: Tensor, row: Tensor, column: Tensor, total: int) -> None:
    _check_input(x, (torch.bfloat16, torch.float16, torch.float32))
    tokens, columns = x.shape
    check_buffer("row_scale", row_scale, (tokens,), torch.float32, x.device)
    check_buffer("token_scale", token_scale, (tokens,), torch.float32, x.device)
    check_fp8("row", row)
    check_buffer("row", row, (tokens, columns), row.dtype, x.device)
    check_buffer("column", column, (columns, total), row.dtype, x.device)


def _check_input(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dim() != 2 or x.dtype not in dtypes or not x.is_contiguous() or x.shape[1] % _COLUMNS_MULTIPLE != 0:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} with strides {x.stride()}; needed is one of "
            f"{', '.join(map(str, dtypes))}, [T, C], contiguous, C a multiple of {_COLUMNS_MULTIPLE}"
        )
