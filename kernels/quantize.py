"""Activations to e4m3, as they lie and token-major.

    cast_transpose:    row[t, c] = e4m3(x[t, c] * row_scale[t]),  column[c, t] = e4m3(x[t, c] * token_scale[t])
    transpose_tokens:  out[c, t] = x[t, c]

``x [T, C]``, ``row [T, C]``, ``column`` and ``out [C, padded(T)]``, zero beyond T.  Arithmetic is fp32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_compile.kernels.formats import E4M3, check_buffer, padded

# A tile is read and written in pieces of 64 bytes or more along the contiguous dimension of each tensor.
_BLOCK_T, _BLOCK_C = 128, 64


@triton.jit
def _transpose_kernel(
    x_ptr, row_scale_ptr, token_scale_ptr, row_ptr, column_ptr, tokens, columns, tokens_padded,
    CAST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_T tokens by BLOCK_C columns; without CAST the bytes are moved as they are."""
    column_tiles = tl.cdiv(columns, BLOCK_C)
    pid_t, pid_c = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    offs_t = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_t, mask_c = offs_t < tokens, offs_c < columns
    offsets = offs_t.to(tl.int64)[:, None] * columns + offs_c[None, :]  # [BLOCK_T, BLOCK_C]
    inside = mask_t[:, None] & mask_c[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0)
    if CAST:
        # No clamp: the conversion to e4m3 saturates in hardware and keeps NaN.
        x = x.to(tl.float32)
        row_scale = tl.load(row_scale_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
        tl.store(row_ptr + offsets, (x * row_scale).to(row_ptr.dtype.element_ty), mask=inside)
        x = x * tl.load(token_scale_ptr + offs_t, mask=mask_t, other=0.0)[:, None]
    # BLOCK_T divides the padded number of tokens, and tokens beyond T were loaded as zeros.
    offsets_t = offs_c.to(tl.int64)[None, :] * tokens_padded + offs_t[:, None]
    tl.store(column_ptr + offsets_t, x.to(column_ptr.dtype.element_ty), mask=mask_c[None, :])


def launch_cast_transpose(x: Tensor, row_scale: Tensor, token_scale: Tensor, row: Tensor, column: Tensor) -> None:
    """Cast ``x`` into both buffers, which are written in full.

    Args:
        x: ``[T, C]`` contiguous, bf16, fp16 or fp32.
        row_scale, token_scale: fp32 ``[T]``.
        row: e4m3 ``[T, C]``.
        column: e4m3 ``[C, padded(T)]``.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    _check_input(x, (torch.bfloat16, torch.float16, torch.float32))
    tokens, columns = x.shape
    check_buffer("row_scale", row_scale, (tokens,), torch.float32, x.device)
    check_buffer("token_scale", token_scale, (tokens,), torch.float32, x.device)
    check_buffer("row", row, (tokens, columns), E4M3, x.device)
    check_buffer("column", column, (columns, padded(tokens)), E4M3, x.device)
    _launch(x, row_scale, token_scale, row, column, cast=True)


def launch_transpose_tokens(x: Tensor, out: Tensor) -> None:
    """Transpose ``x`` into ``out``, which is written in full.

    Args:
        x: e4m3 ``[T, C]`` contiguous.
        out: e4m3 ``[C, padded(T)]``.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device.
    """
    _check_input(x, (E4M3,))
    tokens, columns = x.shape
    check_buffer("out", out, (columns, padded(tokens)), E4M3, x.device)
    payload, payload_t = x.view(torch.uint8), out.view(torch.uint8)
    # The scales and the row-major copy are not touched without a cast.
    _launch(payload, payload, payload, payload, payload_t, cast=False)


def _launch(x: Tensor, row_scale: Tensor, token_scale: Tensor, row: Tensor, column: Tensor, *, cast: bool) -> None:
    tokens, columns = x.shape
    if x.numel() == 0:
        return
    grid = (padded(tokens) // _BLOCK_T * triton.cdiv(columns, _BLOCK_C),)
    _transpose_kernel[grid](
        x, row_scale, token_scale, row, column, tokens, columns, padded(tokens),
        CAST=cast, BLOCK_T=_BLOCK_T, BLOCK_C=_BLOCK_C, num_warps=4,
    )  # fmt: skip


def _check_input(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dim() != 2 or x.dtype not in dtypes or not x.is_contiguous():
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} with strides {x.stride()}; "
            f"needed is one of {', '.join(map(str, dtypes))}, [T, C], contiguous"
        )
