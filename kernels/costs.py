"""What a linear costs: the times of its products, and of the ops around them, measured and kept on disk.

A piece is one product or op.  Each is timed on its own, on random operands, the first time that it is asked for.
"""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3, metadata_shape, padded, values_shape
from sparse_compile.kernels.measured import keep, kept, median_microseconds, path_of, round_up
from sparse_compile.kernels.selfcheck import undisturbed

logger = logging.getLogger(__name__)

# Beyond this, times grow with the number of tokens, and operands need not be as large.
_MAX_TOKENS = 16384
_TARGET_MICROSECONDS = 3000.0  # of a graph: its launch is nothing against that
_MAX_LAUNCHES = 50
# Long enough that the median is at the clock that the power limit allows, as in a step, and not at the highest one.
_ROUNDS = 20
# Of a 2:4 operand: eight legal pairs of positions.
_METADATA_WORD = 0x4C9E8D44


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    """A linear ``[tokens, in_features] -> out_features``.

    Args:
        dtype: of its activations.
        weight_dtype: of its weight and the gradient of that.
        transposed: whether the weight is stored ``[in_features, out_features]``.
    """

    tokens: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    transposed: bool

    def __str__(self) -> str:
        form = " transposed" * self.transposed
        text = f"{self.tokens}x{self.in_features}x{self.out_features} {self.dtype} {self.weight_dtype}{form}"
        return text.replace("torch.", "")


def piece_times(shape: LinearShape, device: torch.device, pieces: Iterable[str]) -> dict[str, float]:
    """Microseconds of each piece, measured where that was not done before.

    Args:
        device: a GPU with kernels.
        pieces: names among ``PIECES``.

    Raises:
        ValueError: what is kept on disk is something else.
        OSError: what was measured can't be kept.
        RuntimeError: a CUDA graph is being captured.
    """
    measured_shape = replace(shape, tokens=min(round_up(shape.tokens), _MAX_TOKENS))
    path = path_of("linear", measured_shape, device)
    times = _read(kept(path), path)
    missing = [piece for piece in dict.fromkeys(pieces) if piece not in times]
    if missing:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a linear {shape} is compiled while a CUDA graph is captured, and its products must be timed before "
                'that: run one step with the same shapes before the capture, or compile with "sste.when": "always"'
            )
        start = perf_counter()
        with undisturbed(device), torch.cuda.device(device):
            times |= {piece: _measure(PIECES[piece](measured_shape, _Operands(device))) for piece in missing}
        logger.info("measured %s of a linear %s in %.1f s", missing, measured_shape, perf_counter() - start)
        keep(path, times)
    growth = shape.tokens / measured_shape.tokens
    return {piece: times[piece] * (1.0 if piece in _OF_THE_WEIGHT else growth) for piece in pieces}


def _read(text: bytes | None, path: object) -> dict[str, float]:
    if text is None:
        return {}
    try:
        return {str(piece): float(time) for piece, time in json.loads(text).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no times of a linear ({error}); remove it") from error


def _measure(call: Callable[[], object]) -> float:
    """Median microseconds of a call, on the current device."""
    call()  # compiles
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    launches = round(_TARGET_MICROSECONDS / max(1.0, start.elapsed_time(end) * 1000))
    launches = max(1, min(_MAX_LAUNCHES, launches))
    return median_microseconds({"": call}, launches, _ROUNDS)[""]


class _Operands:
    """Makes random operands: how fast a GPU may run depends on its data."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32, generator=self._generator).to(dtype)

    def e4m3(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, device=self.device, dtype=torch.bfloat16, generator=self._generator)
        return (drawn * 80).clamp_(-448, 448).to(E4M3)

    def ones(self, size: int, value: float = 1.0) -> Tensor:
        return torch.full((size,), value, device=self.device, dtype=torch.float32)

    def sparse(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """``values`` and ``metadata`` of a 2:4 operand."""
        metadata = torch.full(metadata_shape(rows, columns), _METADATA_WORD, device=self.device, dtype=torch.int32)
        return self.e4m3(*values_shape(rows, columns)), metadata

    def seed(self) -> Tensor:
        return torch.zeros(1, device=self.device, dtype=torch.int64)


def _hp_fprop(s: LinearShape, make: _Operands) -> Callable[[], object]:
    x, w = make.normal(s.tokens, s.in_features, dtype=s.dtype), _weight(s, make)
    return partial(torch.mm, x, w.t())


def _hp_dgrad(s: LinearShape, make: _Operands) -> Callable[[], object]:
    g, w = make.normal(s.tokens, s.out_features, dtype=s.dtype), _weight(s, make)
    return partial(torch.mm, g, w)


def _hp_wgrad(s: LinearShape, make: _Operands) -> Callable[[], object]:
    x, g = (make.normal(s.tokens, size, dtype=s.dtype) for size in (s.in_features, s.out_features))
    return partial(torch.mm, x.t(), g) if s.transposed else partial(torch.mm, g.t(), x)


def _weight(s: LinearShape, make: _Operands) -> Tensor:
    """``[out_features, in_features]``, as it is stored."""
    if s.transposed:
        return make.normal(s.in_features, s.out_features, dtype=s.dtype).t()
    return make.normal(s.out_features, s.in_features, dtype=s.dtype)


def _fp8_fprop(s: LinearShape, make: _Operands) -> Callable[[], object]:
    return _scaled_mm(s.tokens, s.out_features, s.in_features, s.dtype, make)


def _fp8_dgrad(s: LinearShape, make: _Operands) -> Callable[[], object]:
    return _scaled_mm(s.tokens, s.in_features, s.out_features, s.dtype, make)


def _fp8_wgrad(s: LinearShape, make: _Operands) -> Callable[[], object]:
    sizes = (s.in_features, s.out_features) if s.transposed else (s.out_features, s.in_features)
    return _scaled_mm(*sizes, padded(s.tokens), s.weight_dtype, make)


def _scaled_mm(rows: int, columns: int, contraction: int, dtype: torch.dtype, make: _Operands) -> Callable[[], object]:
    out_dtype = torch.bfloat16 if dtype is torch.bfloat16 else torch.float32
    a, b = make.e4m3(rows, contraction), make.e4m3(columns, contraction)
    return partial(ops.scaled_mm, a, b, make.ones(1, 2.0**-12), out_dtype)


def _sparse_fprop(s: LinearShape, make: _Operands) -> Callable[[], object]:
    operands = (*make.sparse(s.out_features, s.in_features), make.e4m3(s.tokens, s.in_features))
    return partial(ops.sparse_mm, *operands, make.ones(1, 2.0**-12), make.ones(s.tokens), s.dtype, True, True)


def _sparse_dgrad(s: LinearShape, make: _Operands) -> Callable[[], object]:
    return _sparse_fprop(replace(s, in_features=s.out_features, out_features=s.in_features), make)


def _sparse_bf16_fprop(s: LinearShape, make: _Operands) -> Callable[[], object]:
    rows, columns = s.out_features, s.in_features
    metadata = torch.full(
        metadata_shape(rows, columns, torch.bfloat16), _METADATA_WORD, device=make.device, dtype=torch.int32
    )
    values = make.normal(*values_shape(rows, columns), dtype=torch.bfloat16)
    x = make.normal(s.tokens, columns, dtype=torch.bfloat16)
    return partial(ops.sparse_mm, values, metadata, x, make.ones(1), None, s.dtype, True, True)


def _bf16_dgrad(s: LinearShape, make: _Operands) -> Callable[[], object]:
    return _hp_dgrad(replace(s, dtype=torch.bfloat16, transposed=False), make)


def _bf16_wgrad(s: LinearShape, make: _Operands) -> Callable[[], object]:
    return _hp_wgrad(replace(s, dtype=torch.bfloat16), make)


def _sparse_wgrad(s: LinearShape, make: _Operands) -> Callable[[], object]:
    tokens = padded(s.tokens)
    operands = (*make.sparse(s.out_features, tokens), make.e4m3(s.in_features, tokens))
    return partial(ops.sparse_mm, *operands, make.ones(1, 2.0**-12), None, s.weight_dtype, s.transposed, False)


def _transpose_tokens(s: LinearShape, make: _Operands) -> Callable[[], object]:
    return partial(ops.transpose_tokens, make.e4m3(s.tokens, s.in_features))


def _cast_transpose(s: LinearShape, make: _Operands) -> Callable[[], object]:
    return partial(ops.cast_transpose, *_gradient(s, make))


def _cast_mvue(s: LinearShape, make: _Operands, approximate: bool) -> Callable[[], object]:
    return partial(ops.cast_mvue, *_gradient(s, make), make.seed(), 0, approximate)


def _gradient(s: LinearShape, make: _Operands) -> tuple[Tensor, Tensor, Tensor]:
    return (
        make.normal(s.tokens, s.out_features, dtype=s.dtype), make.ones(s.tokens, 40.0), make.ones(s.tokens, 20.0)
    )  # fmt: skip


def _prune(s: LinearShape, make: _Operands, hard: bool, bf16: bool = False) -> Callable[[], object]:
    new, prune = ops.new_pruned_weight, ops.prune_weight_
    if bf16:
        new, prune = ops.new_pruned_weight_bf16, ops.prune_weight_bf16_
    buffers = new(s.out_features, s.in_features, make.device)
    return partial(prune, _weight(replace(s, dtype=s.weight_dtype), make), make.ones(1), *buffers, hard)


def _prune_transposable(s: LinearShape, make: _Operands) -> Callable[[], object]:
    """By masks that are there: a search is rare."""
    weight = _weight(replace(s, dtype=s.weight_dtype), make)
    buffers = ops.new_transposable_weight(s.out_features, s.in_features, make.device)
    masks = ops.new_masks(s.out_features, s.in_features, make.device)
    ops.prune_transposable_(weight, *buffers, masks, True)
    return partial(ops.prune_transposable_, weight, *buffers, masks, False)


def _cast_weight(s: LinearShape, make: _Operands) -> Callable[[], object]:
    buffers = ops.new_cast_weight(s.out_features, s.in_features, make.device)
    return partial(ops.cast_weight_, _weight(replace(s, dtype=s.weight_dtype), make), *buffers)


def _add_masked_decay(s: LinearShape, make: _Operands) -> Callable[[], object]:
    grad, weight = (_weight(replace(s, dtype=s.weight_dtype), make) for _ in range(2))
    return partial(ops.add_masked_decay_, grad, weight, make.ones(1, 2e-4))


def _copy(s: LinearShape, make: _Operands) -> Callable[[], object]:
    source = make.normal(s.tokens, s.out_features, dtype=s.dtype)
    return partial(torch.empty_like(source).copy_, source)


PIECES: dict[str, Callable[[LinearShape, _Operands], Callable[[], Any]]] = {
    "hp fprop": _hp_fprop,
    "hp dgrad": _hp_dgrad,
    "hp wgrad": _hp_wgrad,
    "fp8 fprop": _fp8_fprop,
    "fp8 dgrad": _fp8_dgrad,
    "fp8 wgrad": _fp8_wgrad,
    "2:4 fp8 fprop": _sparse_fprop,
    "2:4 bf16 fprop": _sparse_bf16_fprop,
    "bf16 dgrad": _bf16_dgrad,
    "bf16 wgrad": _bf16_wgrad,
    "2:4 fp8 dgrad": _sparse_dgrad,
    "2:4 fp8 wgrad": _sparse_wgrad,
    "transpose_tokens": _transpose_tokens,
    "cast_transpose": _cast_transpose,
    "cast_mvue, exact mvue": partial(_cast_mvue, approximate=False),
    "cast_mvue, approximate mvue": partial(_cast_mvue, approximate=True),
    "prune_weight_": partial(_prune, hard=False),
    "prune_weight_, hard": partial(_prune, hard=True),
    "prune_weight_bf16_": partial(_prune, hard=False, bf16=True),
    "prune_weight_bf16_, hard": partial(_prune, hard=True, bf16=True),
    "prune_transposable_": _prune_transposable,
    "cast_weight_": _cast_weight,
    "add_masked_decay_": _add_masked_decay,
    "copy": _copy,  # of grad_output: reads it and writes as much
}
_OF_THE_WEIGHT = (
    "prune_weight_", "prune_weight_, hard", "prune_weight_bf16_", "prune_weight_bf16_, hard", "cast_weight_",
    "prune_transposable_", "add_masked_decay_",
)  # fmt: skip
