"""Groups of four neighbours of a row, as a thread holds them: in fp32, and which of them are kept.

Shared by the kernels that read a weight.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparse_compile.kernels.tiles import permute_bytes, split_columns

_NAN = gl.constexpr(tl.PropagateNan.ALL)
# The two bf16 of a word as fp32.  In assembly, because LLVM would turn the later |x| into integer instructions.
_WIDEN_ASM = gl.constexpr("""
shl.b32 $0, $2, 16;
and.b32 $1, $2, 0xffff0000;
""")


@gluon.jit
def minimum(x, y):
    return gl.minimum(x, y, propagate_nan=_NAN)


@gluon.jit
def maximum(x, y):
    return gl.maximum(x, y, propagate_nan=_NAN)


@gluon.jit
def magnitude(x):
    """|x|.  In assembly, where it costs nothing: Triton's own would be an integer instruction."""
    return gl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def bits(x):
    """fp32 as int32; magnitudes are ordered like their bits, with NaN above infinity."""
    return x.to(gl.int32, bitcast=True)


@gluon.jit
def pair(x, y):
    """16-bit floats as the halves of a word, ``x`` the lower one."""
    return x.to(gl.uint16, bitcast=True).to(gl.int32) | y.to(gl.uint16, bitcast=True).to(gl.int32) << 16


@gluon.jit
def _widen(pair):
    """The two bf16 of ``pair`` as fp32."""
    return gl.inline_asm_elementwise(_WIDEN_ASM, "=&f,=f,r", [pair], (gl.float32, gl.float32), True, 1)


@gluon.jit
def groups(w):
    """Elements 0, 1, 2 and 3 of each four columns as fp32, and their highest bytes as a word."""
    x0, x1, x2, x3 = split_columns(w)
    if w.dtype == gl.float32:
        high01, high23 = permute_bytes(bits(x0), bits(x1), 0x7632), permute_bytes(bits(x2), bits(x3), 0x7632)
    else:
        high01, high23 = pair(x0, x1), pair(x2, x3)
        if w.dtype == gl.bfloat16:
            x0, x1 = _widen(high01)
            x2, x3 = _widen(high23)
        else:
            x0, x1, x2, x3 = x0.to(gl.float32), x1.to(gl.float32), x2.to(gl.float32), x3.to(gl.float32)
    return x0, x1, x2, x3, permute_bytes(high01, high23, 0x7531)


@gluon.jit
def _majority(a, b, c):
    return (a & b) | (c & (a | b))


@gluon.jit
def keep_top2(b0, b1, b2, b3):
    """Which two of four magnitudes are the largest, of equal ones the first; NaN is larger than infinity."""
    m0, m1, m2, m3 = bits(b0), bits(b1), bits(b2), bits(b3)
    # Kept is what loses against one other at most.
    keep0 = _majority(m0 >= m1, m0 >= m2, m0 >= m3)
    keep1 = _majority(m1 > m0, m1 >= m2, m1 >= m3)
    keep2 = _majority(m2 > m0, m2 > m1, m2 >= m3)
    keep3 = _majority(m3 > m0, m3 > m1, m3 > m2)
    return keep0, keep1, keep2, keep3


@gluon.jit
def _is_positive(x):
    """1.0 or 0.0, which it is for NaN.  By the units that multiply: these kernels wait for those that compare."""
    return gl.inline_asm_elementwise("mul.sat.f32 $0, $1, 0f7F800000;", "=f,f", [x], gl.float32, True, 1)


@gluon.jit
def index_of_positive(x1, x2, x3):
    """Which of the elements 1, 2 and 3 of a group are kept, those above zero: fp32, see ``store_compressed``."""
    return _is_positive(x1) + 2.0 * _is_positive(x2) + 4.0 * _is_positive(x3)


@gluon.jit
def second_smallest(b0, b1, b2, b3):
    """NaN if one of them is."""
    low, high = maximum(minimum(b0, b1), minimum(b2, b3)), minimum(maximum(b0, b1), maximum(b2, b3))
    return minimum(low, high)


@gluon.jit
def project(b0, b1, b2, b3, HARD: gl.constexpr):
    """What pruning leaves of four magnitudes, not above zero for none; the largest; the index of what is kept."""
    largest = maximum(maximum(b0, b1), maximum(b2, b3))
    if HARD:
        kept0, kept1, kept2, kept3 = keep_top2(b0, b1, b2, b3)
        m0, m1 = gl.where(kept0, b0, 0.0), gl.where(kept1, b1, 0.0)
        m2, m3 = gl.where(kept2, b2, 0.0), gl.where(kept3, b3, 0.0)
        index = gl.where(kept1, 1, 0) | gl.where(kept2, 2, 0) | gl.where(kept3, 4, 0)
    else:
        t = second_smallest(b0, b1, b2, b3)
        m0, m1, m2, m3, largest = b0 - t, b1 - t, b2 - t, b3 - t, largest - t
        # Kept is what exceeds t, never more than two of four, and the lowest of the others.
        index = index_of_positive(m1, m2, m3)
    return m0, m1, m2, m3, largest, index


@gluon.jit
def reduce_amax(amax):
    """int32, the bits of the largest magnitude of the tile.  Unsigned, NaN of either sign is the largest."""
    magnitudes = amax.to(gl.uint32, bitcast=True)
    largest = gl.max(gl.reshape(magnitudes, [magnitudes.shape[0] * magnitudes.shape[1]]), 0)
    return largest.to(gl.int32, bitcast=True) & 0x7FFFFFFF
