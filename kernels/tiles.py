"""Tiles of a matrix that a kernel reads once and stores in FP8, as it lies and transposed.

A thread holds blocks of whole 4 x 4 elements.  It casts four neighbours of a row into the bytes of an int32, a "word",
the first lowest; it transposes 4 x 4 bytes in registers, and only words cross the threads, through shared memory, where
a store needs another layout than the load.  So every access to memory is wide, and no byte is moved on its own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _cast_asm(dtype):
    # PTX names the upper half first.
    name = "e5m2" if dtype == gl.float8e5 else "e4m3"
    return f"""{{
.reg .b16 low, high;
cvt.rn.satfinite.{name}x2.f32 low, $2, $1;
cvt.rn.satfinite.{name}x2.f32 high, $4, $3;
mov.b32 $0, {{low, high}};
}}"""


@gluon.constexpr_function
def row_layout(shape, rows, columns, warps):
    """Layout of a tile of a row-major matrix: at most ``rows`` times ``columns`` neighbours a thread."""
    lanes = min(32, shape[1] // columns)
    rows = min(rows, shape[0] * lanes // (32 * warps))
    return gl.BlockedLayout([rows, columns], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.constexpr_function
def column_layout(shape, rows, columns, warps):
    """Layout of a tile of a column-major matrix: ``rows`` times at most ``columns`` neighbours a thread."""
    lanes = min(32, shape[0] // rows)
    columns = min(columns, shape[1] * lanes // (32 * warps))
    return gl.BlockedLayout([rows, columns], [lanes, 32 // lanes], [1, warps], [0, 1])


@gluon.jit
def load_tile(
    ptr, row, column, rows, columns, stride_row, stride_column,
    BLOCK_R: gl.constexpr, BLOCK_C: gl.constexpr, EVEN: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The tile at (row, column) of a matrix [rows, columns], zero outside it; EVEN: it lies inside.

    [BLOCK_R, BLOCK_C]
    """
    offs_r = row + gl.arange(0, BLOCK_R, gl.SliceLayout(1, LAYOUT))
    offs_c = column + gl.arange(0, BLOCK_C, gl.SliceLayout(0, LAYOUT))
    pointers = ptr + offs_r.to(gl.int64)[:, None] * stride_row + offs_c.to(gl.int64)[None, :] * stride_column
    if EVEN:
        tile = gl.load(pointers)
    else:
        tile = gl.load(pointers, mask=(offs_r < rows)[:, None] & (offs_c < columns)[None, :], other=0)
    return tile


@gluon.jit
def store_tile(ptr, tile, row, column, rows, columns, EVEN: gl.constexpr, LAYOUT: gl.constexpr):
    """Store ``tile``, from registers in LAYOUT, at (row, column) of a row-major matrix [rows, columns]."""
    offs_r = row + gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    offs_c = column + gl.arange(0, tile.shape[1], gl.SliceLayout(0, LAYOUT))
    pointers = ptr + offs_r.to(gl.int64)[:, None] * columns + offs_c[None, :]
    tile = gl.convert_layout(tile, LAYOUT)
    if EVEN:
        gl.store(pointers, tile)
    else:
        gl.store(pointers, tile, mask=(offs_r < rows)[:, None] & (offs_c < columns)[None, :])


@gluon.jit
def store_strided(
    ptr, tile, row, column, rows, columns, stride_row, stride_column, EVEN: gl.constexpr, LAYOUT: gl.constexpr
):
    """Store ``tile``, from registers in LAYOUT, at (row, column) of a matrix [rows, columns] of any strides."""
    offs_r = row + gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    offs_c = column + gl.arange(0, tile.shape[1], gl.SliceLayout(0, LAYOUT))
    pointers = ptr + offs_r.to(gl.int64)[:, None] * stride_row + offs_c.to(gl.int64)[None, :] * stride_column
    tile = gl.convert_layout(tile, LAYOUT)
    if EVEN:
        gl.store(pointers, tile)
    else:
        gl.store(pointers, tile, mask=(offs_r < rows)[:, None] & (offs_c < columns)[None, :])


@gluon.jit
def split_columns(tile):
    """[R, 4 * C] -> columns 0, 1, 2 and 3 of each four, [R, C] each."""
    even, odd = gl.split(gl.reshape(tile, [tile.shape[0], tile.shape[1] // 4, 2, 2]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return x0, x1, x2, x3


@gluon.jit
def join_columns(x0, x1, x2, x3):
    """The inverse of ``split_columns``."""
    even, odd = gl.join(x0, x2), gl.join(x1, x3)
    return gl.reshape(gl.join(even, odd), [x0.shape[0], 4 * x0.shape[1]])


@gluon.jit
def split_rows(tile):
    """[4 * R, C] -> rows 0, 1, 2 and 3 of each four, [R, C] each."""
    groups = gl.reshape(tile, [tile.shape[0] // 4, 2, 2, tile.shape[1]])
    even, odd = gl.split(gl.permute(groups, [0, 3, 1, 2]))
    x0, x2 = gl.split(even)
    x1, x3 = gl.split(odd)
    return x0, x1, x2, x3


@gluon.jit
def join_rows(x0, x1, x2, x3):
    """The inverse of ``split_rows``."""
    groups = gl.permute(gl.join(gl.join(x0, x2), gl.join(x1, x3)), [0, 2, 3, 1])  # [R, 2, 2, C]
    return gl.reshape(groups, [4 * x0.shape[0], x0.shape[1]])


@gluon.jit
def join_columns_transposed(x0, x1, x2, x3):
    """Columns 0, 1, 2 and 3 of each four, [R, C] each, as rows: [4 * C, R]."""
    return join_rows(gl.permute(x0, [1, 0]), gl.permute(x1, [1, 0]), gl.permute(x2, [1, 0]), gl.permute(x3, [1, 0]))


@gluon.jit
def with_layout_of(x, y):
    """``x``, held by the threads as ``y`` is."""
    return gl.convert_layout(x, y.type.layout)


@gluon.jit
def word_ptr(ptr):
    return ptr.to(gl.pointer_type(gl.int32), bitcast=True)


# By index: the positions of the two that a group keeps, a byte ``first | second << 4``, and its nibble of metadata.
_POSITIONS = gl.constexpr((0x21201010, 0x32323130))
_METADATA = gl.constexpr((0x09080404, 0x0E0E0D0C))


@gluon.jit
def join_indices(indices, BITS: gl.constexpr):
    """Two neighbours in one, the second so many bits higher: [R, 2 * C] -> [R, C]."""
    first, second = gl.split(gl.reshape(indices, [indices.shape[0], indices.shape[1] // 2, 2]))
    return second * (1 << BITS) + first


@gluon.jit
def _selector(indices):
    """At most four indices of four bits, fp32 or int32, as ``permute_bytes`` takes them."""
    if indices.dtype == gl.float32:
        # What is added to 2^23 stands in the low bits of the sum.
        selector = (indices + 8388608.0).to(gl.int32, bitcast=True)
    else:
        selector = indices
    return selector


@gluon.jit
def kept_positions(indices):
    """The positions that groups keep, a byte ``first | second << 4`` each."""
    return permute_bytes(_POSITIONS[0], _POSITIONS[1], _selector(indices))


@gluon.jit
def store_metadata(
    indices, metadata_ptr, row, column, rows, columns, stride_row, stride_column, EVEN: gl.constexpr
):  # fmt: skip
    """Store, at (row, column) of an int32 matrix [rows, columns] of any strides, metadata of pairs in its order.

    Args:
        indices: of a pair each, as ``join_indices`` joins them: [R, C], at least 8 a thread.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [1, gl.num_warps()], [1, 0])
    words_layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [1, gl.num_warps()], [1, 0])
    # Looked up when a thread holds neighbours: two pairs at once.
    both = join_indices(gl.convert_layout(indices, layout), 8)
    nibbles = permute_bytes(_METADATA[0], _METADATA[1], _selector(both))
    nibbles |= nibbles >> 4
    low, high = gl.split(gl.reshape(nibbles, [indices.shape[0], indices.shape[1] // 4, 2]))
    store_strided(
        metadata_ptr, permute_bytes(low, high, 0x6420), row, column, rows, columns, stride_row, stride_column, EVEN,
        words_layout,
    )  # fmt: skip


@gluon.jit
def store_compressed(
    words, index, values_ptr, metadata_ptr, row, column, rows, columns, EVEN: gl.constexpr, LAYOUT: gl.constexpr
):
    """Store two of each four columns, and where they stood, of the tile at (row, column) of a matrix [rows, columns].

    Args:
        words: [R, C / 4], of four columns each, C 64 or a multiple of 128.
        index: which two of a word are kept, fp32 or int32: 1, 2 and 4 for the elements 1, 2 and 3, in sum.  Of fewer
            than two, element 0 is one, or the first two are kept, as of padding.
        LAYOUT: of the values, words [R, C / 8].
    """
    R: gl.constexpr = words.shape[0]
    C: gl.constexpr = words.shape[1] * 4
    words_a, words_b = gl.split(gl.reshape(words, [R, C // 8, 2]))
    pairs = join_indices(index, 4)
    values = permute_bytes(words_a, words_b, kept_positions(pairs) + 0x4400)  # the second group's bytes are 4 to 7
    blocks_c, blocks_r = gl.cdiv(columns, 128), gl.cdiv(rows, 128)
    store_tile(word_ptr(values_ptr), values, row, column // 8, rows, blocks_c * 16, EVEN, LAYOUT)
    if C == 64:
        # Half a block: every other word.  r // 16, r // 8 % 2, r % 8, p % 2
        blocks = gl.permute(gl.reshape(pairs, [R // 16, 2, 8, 2, 4]), [0, 2, 3, 1, 4])
        store_metadata(
            gl.reshape(blocks, [1, R * 8]), metadata_ptr + column // 64 % 2, column // 128, row * 2, blocks_c,
            blocks_r * 256, blocks_r * 512, 2, EVEN,
        )  # fmt: skip
    else:
        # r // 16, r // 8 % 2, r % 8, block, p // 2, p % 2
        blocks = gl.permute(gl.reshape(pairs, [R // 16, 2, 8, C // 128, 2, 2, 4]), [3, 0, 2, 5, 1, 4, 6])
        store_metadata(
            gl.reshape(blocks, [C // 128, R * 16]), metadata_ptr, column // 128, row * 4, blocks_c, blocks_r * 512,
            blocks_r * 512, 1, EVEN,
        )  # fmt: skip


@gluon.jit
def load_metadata(metadata_ptr, row, column, rows, columns, R: gl.constexpr, C: gl.constexpr, EVEN: gl.constexpr):
    """Where what is kept of the tile at (row, column) of a matrix [rows, columns] stood: a pair of groups an int32.

    Two nibbles each, [R, C / 8], C a multiple of 128.
    """
    blocks_c, blocks_r = gl.cdiv(columns, 128), gl.cdiv(rows, 128)
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [1, gl.num_warps()], [1, 0])
    words = load_tile(
        metadata_ptr, column // 128, row * 4, blocks_c, blocks_r * 512, blocks_r * 512, 1, C // 128, R * 4, EVEN, layout
    )
    pairs = gl.join(gl.join(words & 255, words >> 16 & 255), gl.join(words >> 8 & 255, words >> 24 & 255))
    # block, r // 16, r % 8, p % 2, r // 8 % 2, p // 2, p's pairs
    blocks = gl.reshape(pairs, [C // 128, R // 16, 8, 2, 2, 2, 4])
    return gl.reshape(gl.permute(blocks, [1, 4, 2, 0, 5, 3, 6]), [R, C // 8])


@gluon.jit
def cast_words(x0, x1, x2, x3, FORMAT: gl.constexpr = gl.float8e4nv):
    """Four fp32 in FP8: a word.  It saturates, and NaN stays NaN."""
    return gl.inline_asm_elementwise(_cast_asm(FORMAT), "=r,f,f,f,f", [x0, x1, x2, x3], gl.int32, True, 1)


@gluon.jit
def permute_bytes(a, b, selector):
    """PTX ``prmt``: byte i of the result is byte ``selector >> 4 * i & 7`` of the eight of ``a`` and ``b``."""
    return gl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], gl.int32, True, 1)


@gluon.jit
def transpose_words(words):
    """[R, C] words of four columns -> [4 * C, R / 4] words of four rows: the bytes transposed."""
    R: gl.constexpr = words.shape[0]
    C: gl.constexpr = words.shape[1]
    w0, w1, w2, w3 = split_rows(words)
    low01, high01 = permute_bytes(w0, w1, 0x5140), permute_bytes(w0, w1, 0x7362)
    low23, high23 = permute_bytes(w2, w3, 0x5140), permute_bytes(w2, w3, 0x7362)
    t0, t1 = permute_bytes(low01, low23, 0x5410), permute_bytes(low01, low23, 0x7632)
    t2, t3 = permute_bytes(high01, high23, 0x5410), permute_bytes(high01, high23, 0x7632)
    transposed = gl.join(gl.join(t0, t2), gl.join(t1, t3))  # [R / 4, C, 2, 2]
    return gl.reshape(gl.permute(transposed, [1, 2, 3, 0]), [4 * C, R // 4])
