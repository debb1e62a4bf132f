"""Gluon kernels in Triton's interpreter: without layouts, and with a Python definition of each inline assembly.

The interpreter runs Triton, not Gluon, and no assembly.  But a Gluon kernel whose layouts only say which thread holds
what is a Triton kernel, once the layouts are dropped.

The interpreter rounds fp32 to FP8 wrongly.  So torch casts here, in place of the assembly of Gluon kernels, too.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

from sparse_compile.kernels import expert_blocks, reference, tiles
from sparse_compile.kernels.activation import cast_mvue, cast_transpose
from sparse_compile.kernels.formats import E4M3, E5M2
from sparse_compile.kernels.weight import (
    fp8_tiles,
    groups_of_four,
    masked_decay,
    prune_bf16,
    prune_fp8,
    transposable,
    transpose_pruned,
)


def no_layout(*args: Any) -> None:
    return None


class Language:
    """``gl`` without layouts.  Attributes of ``tl`` are looked up late, because the interpreter replaces them."""

    SliceLayout = BlockedLayout = staticmethod(no_layout)

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)

    def arange(self, start: int, end: int, layout: None = None) -> tl.tensor:
        return tl.arange(start, end)

    def full(self, shape: list[int], value: int, dtype: tl.dtype, layout: None = None) -> tl.tensor:
        return tl.full(shape, value, dtype)

    def convert_layout(self, x: tl.tensor, layout: None) -> tl.tensor:
        return x

    def num_warps(self) -> int:
        return 4


def counted(*bounds: Any) -> range:
    """``range``, also of the interpreter's scalars, arrays of one element."""
    return range(*(int(x.handle.data.item()) if isinstance(x, tl.tensor) else int(x) for x in bounds))


def elementwise(function: Callable[..., np.ndarray], dtype: tl.dtype) -> Callable[..., tl.tensor]:
    """A kernel's function of tensors of one shape, computed by ``function`` of arrays."""

    def run(*tensors: Any) -> tl.tensor:
        arrays = np.broadcast_arrays(
            *(x.handle.data if isinstance(x, tl.tensor) else np.int64(tl.core._unwrap_if_constexpr(x)) for x in tensors)
        )
        return tl.tensor(TensorHandle(function(*arrays), dtype), tl.block_type(dtype, list(arrays[0].shape)))

    return run


def fp8_word(*values: np.ndarray, dtype: torch.dtype = torch.float8_e4m3fn) -> np.ndarray:
    """Four fp32 arrays in FP8, as the bytes of an int32."""
    x = torch.from_numpy(np.stack(values, axis=-1).astype(np.float32))
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype).view(torch.int32).squeeze(-1).numpy()


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint32).astype(np.uint64) | b.astype(np.uint32).astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(both)
    for byte in range(4):
        index = selector.astype(np.uint64) >> np.uint64(4 * byte) & np.uint64(7)
        result |= (both >> (index * np.uint64(8)) & np.uint64(0xFF)) << np.uint64(8 * byte)
    return result.astype(np.uint32).view(np.int32)


def interpret(*modules: ModuleType, **assembly: Callable[..., Any]) -> None:
    """Make the Gluon functions of ``modules`` interpreted ones, those named in ``assembly`` the given ones."""
    for module in modules:
        for name, member in list(vars(module).items()):
            if name in assembly:
                setattr(module, name, assembly[name])
            elif isinstance(member, GluonJITFunction):
                function = triton.jit(member.fn)
                # Annotations are strings in what the interpreter makes of a function; it knows tl.constexpr.
                annotations = function.rewrite().__annotations__
                annotations.update(dict.fromkeys(annotations, tl.constexpr))
                setattr(module, name, function)
            elif name.endswith("_layout"):
                setattr(module, name, no_layout)
            elif member is gl:
                setattr(module, name, Language())
        module.tl, module.range = tl, counted


def interpret_kernels() -> None:
    """All kernels of the package, but the GEMMs."""

    def widen(pair: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        low = elementwise(lambda x: (x << 16).astype(np.int32).view(np.float32), tl.float32)(pair)
        return low, elementwise(lambda x: (x & -65536).astype(np.int32).view(np.float32), tl.float32)(pair)

    def cast(x0, x1, x2, x3, dtype=tl.float8e4nv):
        word = partial(fp8_word, dtype=E5M2 if dtype == tl.float8e5 else E4M3)
        return elementwise(word, tl.int32)(x0, x1, x2, x3)

    def cast_positive(x0, x1, x2, x3, signs):
        words = elementwise(lambda *x: fp8_word(*(np.where(y <= 0, np.float32(0), y) for y in x)), tl.int32)(
            x0, x1, x2, x3
        )
        return words | (signs & -2139062144)

    interpret(
        tiles, groups_of_four, transposable, masked_decay, fp8_tiles, prune_fp8, prune_bf16, cast_transpose,
        transpose_pruned, cast_mvue, expert_blocks, cast_words=cast, permute_bytes=elementwise(prmt, tl.int32),
        with_layout_of=lambda x, y: x,
        _widen=widen, _cast_positive_words=cast_positive, magnitude=elementwise(np.abs, tl.float32),
        _is_positive=elementwise(lambda x: (x > 0).astype(np.float32), tl.float32),
        gdc_launch_dependents=lambda: None, gdc_wait=lambda: None,  # one launch after the other
    )  # fmt: skip


def patch_language_once() -> None:
    """The interpreter patches Triton's language for each call of each function, which took half of the time."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)


def round_in_torch() -> None:
    """The interpreter's conversions to FP8, and from fp32 to bf16, corrected."""
    convert = interpreter._convert_float

    def corrected(data, input_dtype, output_dtype, rounding):
        if output_dtype in (tl.float8e4nv, tl.float8e5):
            dtype = E5M2 if output_dtype == tl.float8e5 else E4M3
            return reference.saturating_cast(torch.from_numpy(data), dtype).view(torch.uint8).numpy()
        if output_dtype == tl.bfloat16 and data.dtype == np.float32:
            return torch.from_numpy(data).bfloat16().view(torch.int16).numpy().view(np.uint16)
        return convert(data, input_dtype, output_dtype, rounding)

    interpreter._convert_float = corrected
