"""The best transposable mask of each 4 x 4 tile, for the kernel that prunes (see ``reference_transposable``)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparse_compile.kernels.tiles import join_columns_transposed, join_rows, split_rows


@gluon.constexpr_function
def _bits(first, second):
    """The mask of two rows, of which each keeps a pair of columns."""
    nibbles = (0b0011, 0b0101, 0b1001, 0b0110, 0b1010, 0b1100)
    return nibbles[first] | nibbles[second] << 4


@gluon.jit
def _pairs(b0, b1, b2, b3):
    return b0 + b1, b0 + b2, b0 + b3, b1 + b2, b1 + b3, b2 + b3


@gluon.jit
def _better(total, mask, other, other_mask):
    """The larger sum with its mask, of equal ones the first."""
    better = other > total
    return gl.where(better, other, total), gl.where(better, other_mask, mask)


@gluon.jit
def _best_of_two(first, second, P: gl.constexpr, Q: gl.constexpr):
    return _better(first[P] + second[Q], _bits(P, Q), first[Q] + second[P], _bits(Q, P))


@gluon.jit
def _best_of_complements(first, second):
    total, mask = _better(first[0] + second[5], _bits(0, 5), first[1] + second[4], _bits(1, 4))
    total, mask = _better(total, mask, first[2] + second[3], _bits(2, 3))
    total, mask = _better(total, mask, first[3] + second[2], _bits(3, 2))
    total, mask = _better(total, mask, first[4] + second[1], _bits(4, 1))
    return _better(total, mask, first[5] + second[0], _bits(5, 0))


@gluon.jit
def search(b0, b1, b2, b3):
    """The mask of each tile, int32 ``[R / 4, C]``, from the magnitudes of columns 0, 1, 2 and 3, ``[R, C]`` each."""
    b00, b10, b20, b30 = split_rows(b0)
    b01, b11, b21, b31 = split_rows(b1)
    b02, b12, b22, b32 = split_rows(b2)
    b03, b13, b23, b33 = split_rows(b3)
    row0, row1 = _pairs(b00, b01, b02, b03), _pairs(b10, b11, b12, b13)
    row2, row3 = _pairs(b20, b21, b22, b23), _pairs(b30, b31, b32, b33)
    total, mask = _better(
        (row0[0] + row1[0]) + (row2[5] + row3[5]), _bits(0, 0) | _bits(5, 5) << 8,
        (row0[1] + row1[1]) + (row2[4] + row3[4]), _bits(1, 1) | _bits(4, 4) << 8,
    )  # fmt: skip
    for p in gl.static_range(2, 6):
        total, mask = _better(
            total, mask, (row0[p] + row1[p]) + (row2[5 - p] + row3[5 - p]), _bits(p, p) | _bits(5 - p, 5 - p) << 8
        )
    for p in gl.static_range(0, 5):
        for q in gl.static_range(p + 1, 6):
            if p + q != 5:
                upper, upper_mask = _best_of_two(row0, row1, p, q)
                lower, lower_mask = _best_of_two(row2, row3, 5 - p, 5 - q)
                total, mask = _better(total, mask, upper + lower, upper_mask | lower_mask << 8)
    upper, upper_mask = _best_of_complements(row0, row1)
    lower, lower_mask = _best_of_complements(row2, row3)
    total, mask = _better(total, mask, upper + lower, upper_mask | lower_mask << 8)
    return mask


@gluon.jit
def index_rows(mask):
    """The index, as of ``store_compressed``, of each group of four columns of a row: [R / 4, C] -> [R, C]."""
    return join_rows(mask >> 1 & 7, mask >> 5 & 7, mask >> 9 & 7, mask >> 13 & 7)


@gluon.jit
def _index_column(mask, column: gl.constexpr):
    return (mask >> column + 4 & 1) | (mask >> column + 7 & 2) | (mask >> column + 10 & 4)


@gluon.jit
def index_columns(mask):
    """The index of each group of four rows of a column: [R / 4, C] -> [4 * C, R / 4]."""
    return join_columns_transposed(
        _index_column(mask, 0), _index_column(mask, 1), _index_column(mask, 2), _index_column(mask, 3)
    )
