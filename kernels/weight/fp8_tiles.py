"""What is made of one tile of a weight in e4m3: pruned and compressed one way or both, or cast as it is.

For ``prune_fp8``, which describes what is computed.  Each function stores its results, and returns the bits of the
largest magnitude of what it has cast.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparse_compile.kernels.tiles import (
    cast_words,
    column_layout,
    join_columns_transposed,
    join_rows,
    load_tile,
    row_layout,
    split_columns,
    split_rows,
    store_compressed,
    store_tile,
    transpose_words,
    with_layout_of,
    word_ptr,
)
from sparse_compile.kernels.weight.groups_of_four import (
    groups,
    index_of_positive,
    magnitude,
    maximum,
    project,
    reduce_amax,
    second_smallest,
)
from sparse_compile.kernels.weight.transposable import index_columns, index_rows, search

# Negative inputs give 0; then the sign bits of the four bytes of $5.
_CAST_POSITIVE_ASM = gl.constexpr("""{
.reg .b16 low, high;
.reg .b32 word;
cvt.rn.satfinite.relu.e4m3x2.f32 low, $2, $1;
cvt.rn.satfinite.relu.e4m3x2.f32 high, $4, $3;
mov.b32 word, {low, high};
lop3.b32 $0, word, $5, 0x80808080, 0xf8;
}""")


@gluon.constexpr_function
def load_layout(shape, warps, column_major):
    """8 neighbours, 16 bytes of bf16, along the contiguous dimension of the weight; whole 4 x 4 elements."""
    return column_layout(shape, 8, 8, warps) if column_major else row_layout(shape, 16, 8, warps)


@gluon.constexpr_function
def _words_layout(shape, words, warps, column_major):
    """As loaded, ``words`` neighbours of a row a thread, or exchanged."""
    return row_layout(shape, 1, 4, warps) if column_major else row_layout(shape, 16, words, warps)


@gluon.constexpr_function
def _transposed_layout(shape, warps, column_major):
    """As loaded, two neighbours of a row a thread, or exchanged."""
    return row_layout(shape, 8, 2, warps) if column_major else row_layout(shape, 1, 4, warps)


@gluon.jit
def _cast_positive_words(x0, x1, x2, x3, signs):
    """e4m3 of ``copysign(max(x, 0), sign)``, four fp32 and the bytes of ``signs`` to a word; NaN stays NaN."""
    return gl.inline_asm_elementwise(_CAST_POSITIVE_ASM, "=r,f,f,f,f,r", [x0, x1, x2, x3, signs], gl.int32, True, 1)


@gluon.jit
def prune_tile(
    w, row, column, values_ptr, metadata_ptr, weight_t_ptr, scale, rows, columns,
    HARD: gl.constexpr, COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Prune, cast and store a tile; the bits of its amax."""
    w0, w1, w2, w3, signs = groups(w)  # [BLOCK_N, BLOCK_K / 4]
    b0, b1, b2, b3 = magnitude(w0), magnitude(w1), magnitude(w2), magnitude(w3)
    m0, m1, m2, m3, amax, index = project(b0, b1, b2, b3, HARD)
    dense = _cast_positive_words(m0 * scale, m1 * scale, m2 * scale, m3 * scale, signs)
    # Rows and columns beyond the weight were loaded as zeros, whose groups name positions 0 and 1: the padding word.
    values_layout: gl.constexpr = _words_layout([dense.shape[0], dense.shape[1] // 2], 1, gl.num_warps(), COLUMN_MAJOR)
    store_compressed(dense, index, values_ptr, metadata_ptr, row, column, rows, columns, EVEN, values_layout)
    _store_transposed(dense, weight_t_ptr, row, column, rows, columns, COLUMN_MAJOR, EVEN)
    return reduce_amax(amax)


@gluon.jit
def _store_transposed(
    words, ptr, row, column, rows, columns, COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr
):  # fmt: skip
    """Store a tile transposed, if there is a buffer for it."""
    if ptr is not None:
        transposed = transpose_words(words)
        layout: gl.constexpr = _transposed_layout(transposed.shape, gl.num_warps(), COLUMN_MAJOR)
        store_tile(word_ptr(ptr), transposed, column, row // 4, columns, rows // 4, EVEN, layout)


@gluon.jit
def _store_both_ways(
    words, index, index_t, values_ptr, metadata_ptr, values_t_ptr, metadata_t_ptr, row, column, rows, columns,
    COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Store a tile compressed along rows and, transposed, along columns, by the index of either."""
    R: gl.constexpr = words.shape[0]
    C: gl.constexpr = words.shape[1] * 4
    values_layout: gl.constexpr = _words_layout([R, C // 8], 1, gl.num_warps(), COLUMN_MAJOR)
    index = with_layout_of(index, words)
    store_compressed(words, index, values_ptr, metadata_ptr, row, column, rows, columns, EVEN, values_layout)
    words_t = transpose_words(words)
    index_t = with_layout_of(index_t, words_t)
    values_t_layout: gl.constexpr = _transposed_layout([C, R // 8], gl.num_warps(), COLUMN_MAJOR)
    store_compressed(
        words_t, index_t, values_t_ptr, metadata_t_ptr, column, row, columns, rows, EVEN, values_t_layout
    )  # fmt: skip


@gluon.jit
def prune_transposable_tile(
    w, row, column, values_ptr, metadata_ptr, values_t_ptr, metadata_t_ptr, masks_ptr, scale, rows, columns, layout,
    SEARCH: gl.constexpr, COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Find or read the masks of a tile, cast and store it both ways; the bits of its amax."""
    BLOCK_N: gl.constexpr = w.shape[0]
    BLOCK_K: gl.constexpr = w.shape[1]
    w0, w1, w2, w3, _ = groups(w)  # [BLOCK_N, BLOCK_K / 4]
    b0, b1, b2, b3 = magnitude(w0), magnitude(w1), magnitude(w2), magnitude(w3)
    masks_layout: gl.constexpr = row_layout([BLOCK_N // 4, BLOCK_K // 4], 1, 4, gl.num_warps())
    if SEARCH:
        mask = search(b0, b1, b2, b3)
        store_tile(
            masks_ptr, mask.to(gl.int16), row // 4, column // 4, rows // 4, columns // 4, EVEN, masks_layout
        )  # fmt: skip
        if not EVEN:
            # Beyond the weight, as where masks are read.
            offs_n = row + gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
            offs_k = column + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))
            inside, _, _, _ = split_columns((offs_n < rows)[:, None] & (offs_k < columns)[None, :])
            inside, _, _, _ = split_rows(inside)
            mask = gl.where(inside, mask, 0)
    else:
        mask = load_tile(
            masks_ptr, row // 4, column // 4, rows // 4, columns // 4, columns // 4, 1, BLOCK_N // 4, BLOCK_K // 4,
            EVEN, masks_layout,
        )  # fmt: skip
        like, _, _, _ = split_rows(b0)
        mask = with_layout_of(mask.to(gl.int32), like)
    words = cast_words(w0 * scale, w1 * scale, w2 * scale, w3 * scale)
    _store_both_ways(
        words, index_rows(mask), index_columns(mask), values_ptr, metadata_ptr, values_t_ptr, metadata_t_ptr,
        row, column, rows, columns, COLUMN_MAJOR, EVEN,
    )  # fmt: skip
    return reduce_amax(maximum(maximum(b0, b1), maximum(b2, b3)))


@gluon.jit
def _threshold_rows(b, t):
    """Magnitudes [R, C] less ``t``, or less the soft threshold of each four rows where that is larger.

    What is left, [R, C], not above zero for none; the largest and the index of what is, [R / 4, C].
    """
    b0, b1, b2, b3 = split_rows(b)
    t0, t1, t2, t3 = split_rows(t)
    along = second_smallest(b0, b1, b2, b3)
    m0, m1, m2, m3 = b0 - maximum(t0, along), b1 - maximum(t1, along), b2 - maximum(t2, along), b3 - maximum(t3, along)
    largest = maximum(maximum(m0, m1), maximum(m2, m3))
    return with_layout_of(join_rows(m0, m1, m2, m3), b), largest, index_of_positive(m1, m2, m3)


@gluon.jit
def prune_soft_transposable_tile(
    w, row, column, values_ptr, metadata_ptr, values_t_ptr, metadata_t_ptr, scale, rows, columns,
    COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """By the larger of the soft thresholds along rows and along columns; cast and stored both ways."""
    w0, w1, w2, w3, signs = groups(w)  # [BLOCK_N, BLOCK_K / 4]
    b0, b1, b2, b3 = magnitude(w0), magnitude(w1), magnitude(w2), magnitude(w3)
    t = second_smallest(b0, b1, b2, b3)
    m0, largest0, index_t0 = _threshold_rows(b0, t)
    m1, largest1, index_t1 = _threshold_rows(b1, t)
    m2, largest2, index_t2 = _threshold_rows(b2, t)
    m3, largest3, index_t3 = _threshold_rows(b3, t)
    words = _cast_positive_words(m0 * scale, m1 * scale, m2 * scale, m3 * scale, signs)
    # What exceeds both thresholds: never more than two of four, either way.  Zeros beyond the weight exceed none, and
    # name positions 0 and 1, as padding does.
    _store_both_ways(
        words, index_of_positive(m1, m2, m3), join_columns_transposed(index_t0, index_t1, index_t2, index_t3),
        values_ptr, metadata_ptr, values_t_ptr, metadata_t_ptr, row, column, rows, columns, COLUMN_MAJOR, EVEN,
    )  # fmt: skip
    # Below zero where a tile keeps nothing.
    return reduce_amax(maximum(maximum(maximum(largest0, largest1), maximum(largest2, largest3)), 0.0))


@gluon.jit
def cast_tile(
    w, row, column, payload_ptr, payload_t_ptr, scale, rows, columns, COLUMN_MAJOR: gl.constexpr, EVEN: gl.constexpr
):
    """Cast and store a tile, as it lies and transposed where there is a buffer for it; the bits of its amax."""
    w0, w1, w2, w3, _ = groups(w)  # [BLOCK_N, BLOCK_K / 4]
    amax = maximum(maximum(magnitude(w0), magnitude(w1)), maximum(magnitude(w2), magnitude(w3)))
    words = cast_words(w0 * scale, w1 * scale, w2 * scale, w3 * scale)
    if payload_ptr is not None:
        words_layout: gl.constexpr = _words_layout(words.shape, 2, gl.num_warps(), COLUMN_MAJOR)
        store_tile(word_ptr(payload_ptr), words, row, column // 4, rows, columns // 4, EVEN, words_layout)
    _store_transposed(words, payload_t_ptr, row, column, rows, columns, COLUMN_MAJOR, EVEN)
    return reduce_amax(amax)
