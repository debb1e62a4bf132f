"""grad_output in one reading: its FP8 cast for dgrad, and its MVUE-pruned transpose for wgrad.

    row[t, n] = fp8(grad[t, n] * row_scale[t])
    operand[n, t] = fp8(MVUE24(grad[t, n] * token_scale[t])), pruned 2:4 along the tokens

    sums[i, n] = sum of grad[t, n] over the 32 tokens of part i, which the gradient of a bias adds up; if wanted

``grad [T, N]``, ``row [T, N]``; the operand ``[N, T]`` is stored as ``values [N, padded(T) / 2]`` and ``metadata`` (see
``formats``).  FP8 is e4m3 or e5m2, as the buffers are.  Both estimators of ``MVUE24``, and the rounding of what they
keep, are in fp32, every operation in the order of their eager definition.

Of tokens that lie sorted by expert, the operand is ``[N, grouped_columns]``, the tokens of each padded and drawn on
their own (``reference.grouped``).

A program takes PARTS parts of 32 tokens, a word of metadata each.  With a warp for each part and 128 columns, a thread
holds all tokens of four neighbouring columns: it samples, packs and describes their groups on its own, and only the
finished values and words change places, for wide stores.

Layouts are given (Gluon), not found: Triton's pass that finds them looks at all of a program for each access to memory,
which made three quarters of the time that this one took to compile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparse_compile.kernels.expert_blocks import plan_expert_blocks
from sparse_compile.kernels.formats import (
    PAD_WORD,
    check_buffer,
    check_fp8,
    expert_stream,
    grouped_columns,
    metadata_shape,
    sums_shape,
    values_shape,
)
from sparse_compile.kernels.launch_plan import NOTHING, LaunchPlan, UncachedPlan, plan_kernel, planned
from sparse_compile.kernels.tiles import join_columns, row_layout, store_tile, with_layout_of

_PAD_WORD = gl.constexpr(PAD_WORD)
_EXPERT_DRAWS = gl.constexpr(expert_stream(0, 1))
_APPROX_EPS = gl.constexpr(2.0**-23)
_TOTAL_FLOOR = gl.constexpr(2.0**-100)
# Loads of AHEAD tokens are issued before the first store: the compiler does not move them past one.
_PARTS, _BLOCK_N, _AHEAD = 4, 128, 8
_BLOCK_T = 32 * _PARTS
_REGISTERS = 168  # of a thread, so that three programs fit a multiprocessor


@gluon.jit
def _minimum(x, y):
    return gl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


# Triton's: ten rounds of Philox4x32.
_philox = gluon.jit(tl.random.philox_impl.fn)


@gluon.jit
def _draw_words(seed_ptr, index, offs_part, start_n, like, CALL: gl.constexpr):
    """The four words of one of Philox's calls for each part of 32 tokens and column, held as ``like`` is.

    Drawn column by column of the threads: each draws for the columns that it holds.
    """
    PARTS: gl.constexpr = like.shape[0]
    FOURS: gl.constexpr = like.shape[1] // 4
    layout: gl.constexpr = row_layout([PARTS, FOURS], 1, 1, gl.num_warps())
    seed = gl.load(seed_ptr)
    key_low, key_high = (seed & 0xFFFFFFFF).to(gl.uint32), (seed >> 32 & 0xFFFFFFFF).to(gl.uint32)
    part = gl.convert_layout(offs_part, gl.SliceLayout(1, layout)).to(gl.uint32)[:, None]
    column = (start_n + 4 * gl.arange(0, FOURS, gl.SliceLayout(0, layout))).to(gl.uint32)[None, :]
    index = index.to(gl.uint32)
    x0, y0, z0, w0 = _philox(column, part, index, CALL, key_low, key_high)
    x1, y1, z1, w1 = _philox(column + 1, part, index, CALL, key_low, key_high)
    x2, y2, z2, w2 = _philox(column + 2, part, index, CALL, key_low, key_high)
    x3, y3, z3, w3 = _philox(column + 3, part, index, CALL, key_low, key_high)
    return (
        with_layout_of(join_columns(x0, x1, x2, x3), like),
        with_layout_of(join_columns(y0, y1, y2, y3), like),
        with_layout_of(join_columns(z0, z1, z2, z3), like),
        with_layout_of(join_columns(w0, w1, w2, w3), like),
    )


@gluon.jit
def _drawn(words, Q: gl.constexpr):
    """The 16 bits of group Q."""
    return words[Q // 2] >> 16 if Q % 2 else words[Q // 2] & 0xFFFF


@gluon.jit
def _uniform(words, Q: gl.constexpr):
    """(k + 1/2) / 2^16, k the 16 bits of group Q."""
    # As the low mantissa bits of 2^23, k is a float without a conversion; every operation is exact.
    return gl.fma((_drawn(words, Q) | 0x4B000000).to(gl.float32, bitcast=True), 2.0**-16, 2.0**-17 - 2.0**7)


@gluon.jit
def _rounding_uniforms(words, Q: gl.constexpr):
    """(k + 1/2) / 2^8 for both kept elements of group Q, k the lower 8 of its 16 bits and the upper."""
    drawn = _drawn(words, Q)
    low, high = drawn & 0xFF, drawn >> 8
    # As in _uniform.
    return (
        gl.fma((low | 0x4B000000).to(gl.float32, bitcast=True), 2.0**-8, 2.0**-9 - 2.0**15),
        gl.fma((high | 0x4B000000).to(gl.float32, bitcast=True), 2.0**-8, 2.0**-9 - 2.0**15),
    )


@gluon.jit
def _systematic(w0, w3, w01, w23, unit, u):
    """Whether the first kept element is beyond 0 and 1, and the second beyond 1 and 2."""
    t = u * unit
    t_right = unit - t
    beyond0, beyond1 = w0 <= t, w01 <= t
    return beyond0, beyond1, (w23 >= t_right) | beyond0, (w3 >= t_right) | beyond1


@gluon.jit
def _pick(kept, x0, x1, x2, x3):
    """The two kept of four."""
    first_beyond0, first_beyond1, second_beyond1, second_beyond2 = kept
    x_first = gl.where(first_beyond1, x2, gl.where(first_beyond0, x1, x0))
    return x_first, gl.where(second_beyond2, x3, gl.where(second_beyond1, x2, x1))


@gluon.jit
def _nibble(kept):
    first_beyond0, first_beyond1, second_beyond1, second_beyond2 = kept
    first = gl.where(first_beyond1, 2, gl.where(first_beyond0, 1, 0))
    return first | gl.where(second_beyond2, 3 << 2, gl.where(second_beyond1, 2 << 2, 1 << 2))


@gluon.jit
def _raise_magnitude(a, unit):
    """``a``, its magnitude at least ``unit``."""
    magnitude = gl.maximum(gl.abs(a), unit, propagate_nan=tl.PropagateNan.ALL)
    sign = a.to(gl.int32, bitcast=True) & -0x80000000
    return (magnitude.to(gl.int32, bitcast=True) | sign).to(gl.float32, bitcast=True)


@gluon.jit
def _mvue24_exact(a0, a1, a2, a3, u):
    """The two kept elements of each group, rescaled, and its nibble."""
    b0, b1, b2, b3 = gl.abs(a0), gl.abs(a1), gl.abs(a2), gl.abs(a3)
    b01, b23 = b0 + b1, b2 + b3
    rest = _minimum(b01 + _minimum(b2, b3), b23 + _minimum(b0, b1))
    unit = _minimum(rest, (b01 + b23) * 0.5)
    kept = _systematic(b0, b3, b01, b23, unit, u)
    a_first, a_second = _pick(kept, a0, a1, a2, a3)
    return _raise_magnitude(a_first, unit), _raise_magnitude(a_second, unit), _nibble(kept)


@gluon.jit
def _mvue24_approximate(a0, a1, a2, a3, u):
    """The two kept elements of each group, rescaled, and its nibble."""
    b0, b1, b2, b3 = gl.abs(a0), gl.abs(a1), gl.abs(a2), gl.abs(a3)
    total_inv = gl.div_rn(1.0, ((b0 + b1) + (b2 + b3)) + _TOTAL_FLOOR)
    x0, x1 = b0 * total_inv + _APPROX_EPS, b1 * total_inv + _APPROX_EPS
    x2, x3 = b2 * total_inv + _APPROX_EPS, b3 * total_inv + _APPROX_EPS
    x01, x23 = x0 + x1, x2 + x3
    d0, d1, d2, d3 = x1 + x23, x0 + x23, x01 + x3, x01 + x2
    d01, d23 = d0 * d1, d2 * d3
    d_inv = gl.div_rn(1.0, d01 * d23)
    d01_inv, d23_inv = d_inv * d23, d_inv * d01
    odds0, odds1 = x0 * (d1 * d01_inv), x1 * (d0 * d01_inv)
    odds2, odds3 = x2 * (d3 * d23_inv), x3 * (d2 * d23_inv)
    odds01, odds23 = odds0 + odds1, odds2 + odds3
    y0, y1 = x0 * (1.0 + (odds1 + odds23)), x1 * (1.0 + (odds0 + odds23))
    y2, y3 = x2 * (1.0 + (odds01 + odds3)), x3 * (1.0 + (odds01 + odds2))
    y01, y23 = y0 + y1, y2 + y3
    unit = (y01 + y23) * 0.5
    kept = _systematic(y0, y3, y01, y23, unit, u)
    a_first, a_second = _pick(kept, a0, a1, a2, a3)
    y_first, y_second = _pick(kept, y0, y1, y2, y3)
    gain = unit * gl.div_rn(1.0, y_first * y_second)
    return a_first * (y_second * gain), a_second * (y_first * gain), _nibble(kept)


@gluon.constexpr_function
def _mantissa_bits(dtype):
    return dtype.fp_mantissa_width


@gluon.constexpr_function
def _least_exponent(dtype):
    """Of the smallest normal number, as fp32 has it."""
    return 127 + 1 - dtype.exponent_bias


@gluon.jit
def _round(a, u, FORMAT: gl.constexpr):
    """One of the neighbours of ``a`` in FORMAT: the larger magnitude if ``u`` is beyond what ``a`` lacks of it."""
    MANTISSA: gl.constexpr = _mantissa_bits(FORMAT)
    LEAST: gl.constexpr = _least_exponent(FORMAT)
    bits = a.to(gl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # The distance of FORMAT's numbers where they are as large: a power of two, so that products with it are exact.
    ulp = gl.maximum(magnitude & 0x7F800000, LEAST << 23) - (MANTISSA << 23)
    ulp_inv = (254 << 23) - ulp
    steps = gl.floor(gl.fma(magnitude.to(gl.float32, bitcast=True), ulp_inv.to(gl.float32, bitcast=True), u))
    rounded = steps * ulp.to(gl.float32, bitcast=True)
    return (rounded.to(gl.int32, bitcast=True) | (bits & -0x80000000)).to(gl.float32, bitcast=True)


@gluon.jit
def _pack(first, second, FORMAT: gl.constexpr):
    """Both in FP8, the first in the low byte."""
    low, high = gl.split(gl.join(first, second).to(FORMAT).to(gl.uint8, bitcast=True))
    return low.to(gl.uint16) | high.to(gl.uint16) << 8


@gluon.jit
def _load(ptrs, inside, EVEN: gl.constexpr):
    return gl.load(ptrs) if EVEN else gl.load(ptrs, mask=inside, other=0.0)


@gluon.jit(do_not_specialize=["index"])
def _cast_mvue_kernel(
    grad_ptr, row_scale_ptr, token_scale_ptr, seed_ptr, index, row_ptr, values_ptr, metadata_ptr, sums_ptr, table_ptr,
    tokens, values_stride, metadata_stride, columns: gl.constexpr,
    APPROXIMATE: gl.constexpr, STOCHASTIC: gl.constexpr, EVEN: gl.constexpr,
    PARTS: gl.constexpr, BLOCK_N: gl.constexpr, AHEAD: gl.constexpr,
):  # fmt: skip
    """One tile of 32 * PARTS tokens by BLOCK_N columns of the padded operand; EVEN: none of them is padding.

    ``sums_ptr``: None where no sums are wanted.
    ``table_ptr``: of blocks of 32 * PARTS tokens with one expert each, see ``expert_blocks``; None for one matrix.
    ``columns`` is a constant, so that the rows of a tile have constant distances: offsets within the instructions.
    """
    FORMAT: gl.constexpr = row_ptr.dtype.element_ty
    column_tiles: gl.constexpr = (columns + BLOCK_N - 1) // BLOCK_N
    pid_t, pid_n = gl.program_id(0) // column_tiles, gl.program_id(0) % column_tiles
    layout: gl.constexpr = row_layout([PARTS, BLOCK_N], 1, 4, gl.num_warps())
    parts = gl.arange(0, PARTS, gl.SliceLayout(1, layout))
    offs_part = pid_t * PARTS + parts
    offs_t = offs_part * 32
    if table_ptr is not None:
        expert, first = gl.load(table_ptr + pid_t * 4), gl.load(table_ptr + pid_t * 4 + 1)
        tokens, begin = gl.load(table_ptr + pid_t * 4 + 2), gl.load(table_ptr + pid_t * 4 + 3)
        offs_part = (first - begin) // 32 + parts
        offs_t = first + parts * 32
        index += _EXPERT_DRAWS * expert
    offs_n = pid_n * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    mask_n = offs_n < columns
    offsets = offs_t.to(gl.int64)[:, None] * columns + offs_n[None, :]
    grad_ptrs, row_ptrs = grad_ptr + offsets, row_ptr + offsets
    row_scale_ptrs, token_scale_ptrs = row_scale_ptr + offs_t, token_scale_ptr + offs_t
    word = gl.full([PARTS, BLOCK_N], 0, gl.int32, layout)
    words = _draw_words(seed_ptr, index, offs_part, pid_n * BLOCK_N, word, 0)
    if STOCHASTIC:
        rounding_words = _draw_words(seed_ptr, index, offs_part, pid_n * BLOCK_N, word, 1)

    pairs = ()
    sums = gl.full([PARTS, BLOCK_N], 0, gl.float32, layout)
    for start in gl.static_range(0, 32, AHEAD):
        grads = ()
        row_scales = ()
        token_scales = ()
        for t in gl.static_range(start, start + AHEAD):
            mask_t = offs_t + t < tokens
            grads += (_load(grad_ptrs + t * columns, mask_t[:, None] & mask_n[None, :], EVEN),)
            row_scales += (_load(row_scale_ptrs + t, mask_t, EVEN)[:, None],)
            token_scales += (_load(token_scale_ptrs + t, mask_t, EVEN)[:, None],)
        for q in gl.static_range(start // 4, (start + AHEAD) // 4):
            a = ()
            for t in gl.static_range(4 * q, 4 * q + 4):
                grad = grads[t - start].to(gl.float32)
                if sums_ptr is not None:
                    sums += grad
                # No clamp: the conversion to FP8 saturates in hardware and keeps NaN.
                row = (grad * row_scales[t - start]).to(FORMAT)
                if EVEN:
                    gl.store(row_ptrs + t * columns, row)
                else:
                    gl.store(row_ptrs + t * columns, row, mask=(offs_t + t < tokens)[:, None] & mask_n[None, :])
                a += (grad * token_scales[t - start],)
            if APPROXIMATE:
                first, second, nibble = _mvue24_approximate(a[0], a[1], a[2], a[3], _uniform(words, q))
            else:
                first, second, nibble = _mvue24_exact(a[0], a[1], a[2], a[3], _uniform(words, q))
            if STOCHASTIC:
                u_first, u_second = _rounding_uniforms(rounding_words, q)
                first, second = _round(first, u_first, FORMAT), _round(second, u_second, FORMAT)
            pairs += (_pack(first, second, FORMAT),)
            word |= nibble << 4 * q

    if sums_ptr is not None:
        # As the threads hold them: to add up the parts they would meet in shared memory, with more registers than 168.
        parts_t = gl.num_programs(0) // column_tiles * PARTS
        store_tile(sums_ptr, sums, pid_t * PARTS, pid_n * BLOCK_N, parts_t, columns, EVEN, layout)
    even = gl.join(gl.join(pairs[0], pairs[4]), gl.join(pairs[2], pairs[6]))
    odd = gl.join(gl.join(pairs[1], pairs[5]), gl.join(pairs[3], pairs[7]))
    values = gl.reshape(gl.permute(gl.join(even, odd), [1, 0, 2, 3, 4]), [BLOCK_N, PARTS * 8])
    values_layout: gl.constexpr = row_layout([BLOCK_N, PARTS * 8], 1, 8, gl.num_warps())
    store_tile(values_ptr, values, pid_n * BLOCK_N, pid_t * (PARTS * 8), columns, values_stride, EVEN, values_layout)
    if not EVEN:
        named = mask_n[None, :]
        if table_ptr is not None:
            named &= expert >= 0
        word = gl.where(named, word, _PAD_WORD)
    # Row r, part p of 16 rows and four parts: word p // 2 of lane 4 * (r % 8) + 2 * (p % 2) + r // 8.
    word = gl.reshape(word, [PARTS // 4, 2, 2, BLOCK_N // 16, 2, 8])
    word = gl.reshape(gl.permute(word, [0, 3, 5, 2, 4, 1]), [PARTS // 4, BLOCK_N * 4])
    blocks_t = gl.num_programs(0) // column_tiles * (PARTS // 4)
    words_layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, gl.num_warps()], [1, 0])
    store_tile(
        metadata_ptr, word, pid_t * (PARTS // 4), pid_n * (BLOCK_N * 4), blocks_t, metadata_stride, EVEN, words_layout
    )


@planned
def launch_cast_mvue(
    grad: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, index: int, approximate: bool, stochastic: bool,
    row: Tensor, values: Tensor, metadata: Tensor, sums: Tensor | None = None,
) -> LaunchPlan:  # fmt: skip
    """Cast and prune ``grad`` into the buffers, all of which are written in full.

    Args:
        grad: ``[T, N]`` contiguous, bf16, fp16 or fp32.
        row_scale, token_scale: fp32 ``[T]``.
        seed: int64 ``[1]``.
        index: 0 <= index < 2**31, distinguishes the linears that share a seed.
        approximate: which of the two estimators.
        stochastic: whether what it keeps is rounded up or down at random, or to nearest.
        row: e4m3 or e5m2 ``[T, N]``.
        values: of the same dtype, ``[N, padded(T) / 2]``.
        metadata: int32 ``[padded(T) / 128, padded(N) / 16, 32, 2]``.
        sums: fp32 ``[padded(T) / 32, N]``, or None.

    Raises:
        ValueError: a tensor has another shape, dtype, layout or device, or index is out of range.
    """
    tokens, columns = grad.shape if grad.dim() == 2 else (0, 0)
    _check(grad, row_scale, token_scale, seed, index, row, values, metadata, tokens)
    if sums is not None:
        check_buffer("sums", sums, sums_shape(tokens, columns), torch.float32, grad.device)
    if grad.numel() == 0:
        return NOTHING
    even = tokens % _BLOCK_T == 0 and columns % _BLOCK_N == 0
    tensors = (grad, row_scale, token_scale, seed, index, row, values.view(torch.int16), metadata, sums, None)
    cast = _plan(tensors, tokens, approximate, stochastic, even)

    def run(
        grad: int, row_scale: int, token_scale: int, seed: int, index: int, row: int, values: int, metadata: int,
        sums: int | None = None,
    ) -> None:  # fmt: skip
        # Unlike all else, it differs between calls of one plan.
        _check_index(index)
        cast(grad, row_scale, token_scale, seed, index, row, values, metadata, sums, None)

    return run


@planned
def launch_grouped_cast_mvue(
    grad: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, index: int, offsets: Tensor, approximate: bool,
    stochastic: bool, row: Tensor, values: Tensor, metadata: Tensor,
) -> LaunchPlan:  # fmt: skip
    """``launch_cast_mvue`` of tokens that lie sorted by expert.

    Args:
        offsets: int32 or int64 ``[E]``, where the tokens of each expert end.
        row: rows beyond the last offset are left as they are.
        values, metadata: of ``[N, grouped_columns]``, written in full.
    """
    tokens = grad.shape[0]
    total = grouped_columns(tokens, len(offsets))
    _check(grad, row_scale, token_scale, seed, index, row, values, metadata, total)
    if grad.numel() == 0:
        return UncachedPlan(lambda: (values.view(torch.uint8).zero_(), metadata.fill_(PAD_WORD)))
    new_table, table, find_blocks = plan_expert_blocks(offsets, tokens, _BLOCK_T)
    tensors = (grad, row_scale, token_scale, seed, index, row, values.view(torch.int16), metadata, None, table)
    cast = _plan(tensors, total, approximate, stochastic, even=False)

    def run(grad: int, row_scale: int, token_scale: int, seed: int, index: int, offsets: int, *results: int) -> None:
        _check_index(index)
        table = new_table()
        find_blocks(offsets, table.data_ptr())
        cast(grad, row_scale, token_scale, seed, index, *results, None, table.data_ptr())

    return run


def _plan(
    tensors: tuple[Tensor | int | None, ...], total: int, approximate: bool, stochastic: bool, even: bool
) -> LaunchPlan:
    """Over ``total`` tokens, padding between experts included."""
    grad, *_, values, metadata, _, _ = tensors
    assert isinstance(grad, Tensor)
    assert isinstance(values, Tensor)
    assert isinstance(metadata, Tensor)
    tokens, columns = grad.shape
    # Without fusion of multiplications and additions, which would round once where the definition rounds twice.
    return plan_kernel(
        _cast_mvue_kernel,
        (triton.cdiv(total, _BLOCK_T) * triton.cdiv(columns, _BLOCK_N),),
        tensors,
        (tokens, values.stride(0), metadata.stride(0)),
        columns=columns, APPROXIMATE=approximate, STOCHASTIC=stochastic, EVEN=even,
        PARTS=_PARTS, BLOCK_N=_BLOCK_N, AHEAD=_AHEAD, num_warps=_PARTS, maxnreg=_REGISTERS, enable_fp_fusion=False,
    )  # fmt: skip


def _check(
    grad: Tensor, row_scale: Tensor, token_scale: Tensor, seed: Tensor, index: int, row: Tensor, values: Tensor,
    metadata: Tensor, total: int,
) -> None:  # fmt: skip
    if grad.dim() != 2 or grad.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not grad.is_contiguous():
        raise ValueError(
            f"grad is {grad.dtype} {tuple(grad.shape)} with strides {grad.stride()}; "
            "allowed is bf16, fp16 or fp32 [T, N], contiguous"
        )
    _check_index(index)
    tokens, columns = grad.shape
    check_buffer("row_scale", row_scale, (tokens,), torch.float32, grad.device)
    check_buffer("token_scale", token_scale, (tokens,), torch.float32, grad.device)
    check_buffer("seed", seed, (1,), torch.int64, grad.device)
    check_fp8("row", row)
    check_buffer("row", row, (tokens, columns), row.dtype, grad.device)
    check_buffer("values", values, values_shape(columns, total), row.dtype, grad.device)
    check_buffer("metadata", metadata, metadata_shape(columns, total), torch.int32, grad.device)


def _check_index(index: int) -> None:
    if not 0 <= index < 2**31:
        raise ValueError(f"index is {index}; allowed is 0 <= index < 2**31")
