"""The products and ops that make a linear, each a component that is timed on its own, and random operands of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3, allows_fast_accum, metadata_shape, padded, unscaled_dtype, values_shape
from sparse_compile.kernels.timing import expert_costs

# Of a 2:4 operand: eight legal pairs of positions.
_METADATA_WORD = 0x4C9E8D44


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearShape:
    """A linear ``[tokens, in_features] -> out_features``.

    Args:
        dtype: of its activations.
        weight_dtype: of its weight and the gradient of that.
        transposed: whether the weight is stored ``[in_features, out_features]``.
        grad_dtype: FP8 of the gradient of its output, where that is in FP8.
        experts: whose matrices its weight holds; None for one matrix.
        skewed: whether few experts have most tokens, or all as many.
    """

    tokens: int
    in_features: int
    out_features: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    transposed: bool
    grad_dtype: torch.dtype = E4M3
    experts: int | None = None
    skewed: bool = False

    def __str__(self) -> str:
        form = " transposed" * self.transposed
        if self.grad_dtype != E4M3:
            form += f" {self.grad_dtype} gradients"
        if self.experts is not None:
            form += f" {self.experts} experts" + " skewed" * self.skewed
        text = f"{self.tokens}x{self.in_features}x{self.out_features} {self.dtype} {self.weight_dtype}{form}"
        return text.replace("torch.", "")


class RandomOperands:
    """Makes random operands: how fast a GPU may run depends on its data.

    Attributes:
        nbytes: of all that it has made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes = 0
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype) -> Tensor:
        drawn = torch.randn(shape, device=self.device, dtype=torch.float32, generator=self._generator)
        return self._counted(drawn.to(dtype))

    def fp8(self, *shape: int, dtype: torch.dtype = E4M3) -> Tensor:
        drawn = torch.randn(shape, device=self.device, dtype=torch.bfloat16, generator=self._generator)
        return self._counted((drawn * 80).clamp_(-448, 448).to(dtype))

    def ones(self, size: int, value: float = 1.0) -> Tensor:
        return self._counted(torch.full((size,), value, device=self.device, dtype=torch.float32))

    def sparse(self, rows: int, columns: int, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
        """``values`` and ``metadata`` of a 2:4 operand."""
        metadata = torch.full(metadata_shape(rows, columns), _METADATA_WORD, device=self.device, dtype=torch.int32)
        return self.fp8(*values_shape(rows, columns), dtype=dtype), metadata

    def seed(self) -> Tensor:
        return torch.zeros(1, device=self.device, dtype=torch.int64)

    def weight(self, shape: "LinearShape") -> Tensor:
        """``[out_features, in_features]``, as it is stored, in its dtype."""
        return self.weight_in(shape, shape.weight_dtype)

    def weight_in(self, shape: "LinearShape", dtype: torch.dtype) -> Tensor:
        """The same in any dtype; of experts ``[E, out_features, in_features]``."""
        stack = () if shape.experts is None else (shape.experts,)
        if shape.transposed:
            return self.normal(*stack, shape.in_features, shape.out_features, dtype=dtype).mT
        return self.normal(*stack, shape.out_features, shape.in_features, dtype=dtype)

    def gradient(self, shape: "LinearShape") -> tuple[Tensor, Tensor, Tensor]:
        """Of the output, and two scales for each token."""
        gradient = self.normal(shape.tokens, shape.out_features, dtype=shape.dtype)
        return gradient, self.ones(shape.tokens, 40.0), self.ones(shape.tokens, 20.0)

    def _counted(self, operand: Tensor) -> Tensor:
        self.nbytes += operand.nbytes
        return operand


def _hp_fprop(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    x, w = make.normal(s.tokens, s.in_features, dtype=s.dtype), make.weight_in(s, s.dtype)
    return partial(torch.mm, x, w.t())


def _hp_dgrad(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    g, w = make.normal(s.tokens, s.out_features, dtype=s.dtype), make.weight_in(s, s.dtype)
    return partial(torch.mm, g, w)


def _hp_wgrad(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    x, g = (make.normal(s.tokens, size, dtype=s.dtype) for size in (s.in_features, s.out_features))
    return partial(torch.mm, x.t(), g) if s.transposed else partial(torch.mm, g.t(), x)


def _fp8_fprop(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    a, b = make.fp8(s.tokens, s.in_features), make.fp8(s.out_features, s.in_features)
    return _scaled_mm(a, b, s.dtype, allows_fast_accum(s.in_features), make)


def _fp8_dgrad(s: LinearShape, make: RandomOperands, accurate: bool) -> Callable[[], object]:
    a, b = make.fp8(s.tokens, s.out_features, dtype=s.grad_dtype), make.fp8(s.in_features, s.out_features)
    return _scaled_mm(a, b, s.dtype, allows_fast_accum(s.out_features) and not accurate, make)


def _fp8_wgrad(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    tokens = padded(s.tokens)
    grad_t, x_t = make.fp8(s.out_features, tokens, dtype=s.grad_dtype), make.fp8(s.in_features, tokens)
    a, b = (x_t, grad_t) if s.transposed else (grad_t, x_t)
    return _scaled_mm(a, b, s.weight_dtype, False, make)


def _scaled_mm(
    a: Tensor, b: Tensor, dtype: torch.dtype, use_fast_accum: bool, make: RandomOperands
) -> Callable[[], object]:
    return partial(ops.scaled_mm, a, b, make.ones(1, 2.0**-12), unscaled_dtype(dtype), use_fast_accum)


def _sparse_fprop(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    return _weight_mm(s.out_features, s.in_features, E4M3, s, make)


def _sparse_dgrad(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    return _weight_mm(s.in_features, s.out_features, s.grad_dtype, s, make)


def _weight_mm(
    rows: int, columns: int, dtype: torch.dtype, s: LinearShape, make: RandomOperands
) -> Callable[[], object]:
    """A weight that is 2:4, times what has a scale for each token, in ``dtype``."""
    operands = (*make.sparse(rows, columns), make.fp8(s.tokens, columns, dtype=dtype))
    return partial(ops.sparse_mm, *operands, make.ones(1, 2.0**-12), make.ones(s.tokens), s.dtype, True, True)


def _sampled_dgrad(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    sampled = make.sparse(padded(s.tokens), s.out_features, s.grad_dtype)
    operands = (*sampled, make.fp8(s.in_features, s.out_features))
    return partial(ops.sparse_mm, *operands, make.ones(1, 2.0**-12), None, unscaled_dtype(s.dtype), False, True)


def _sparse_bf16_fprop(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    rows, columns = s.out_features, s.in_features
    metadata = torch.full(
        metadata_shape(rows, columns, torch.bfloat16), _METADATA_WORD, device=make.device, dtype=torch.int32
    )
    values = make.normal(*values_shape(rows, columns), dtype=torch.bfloat16)
    x = make.normal(s.tokens, columns, dtype=torch.bfloat16)
    return partial(ops.sparse_mm, values, metadata, x, make.ones(1), None, s.dtype, True, True)


def _bf16_dgrad(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    return _hp_dgrad(replace(s, dtype=torch.bfloat16, transposed=False), make)


def _bf16_wgrad(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    return _hp_wgrad(replace(s, dtype=torch.bfloat16), make)


def _sparse_wgrad(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    tokens = padded(s.tokens)
    operands = (*make.sparse(s.out_features, tokens, s.grad_dtype), make.fp8(s.in_features, tokens))
    return partial(ops.sparse_mm, *operands, make.ones(1, 2.0**-12), None, s.weight_dtype, s.transposed, False)


def _transpose_tokens(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    return partial(ops.transpose_tokens, make.fp8(s.tokens, s.in_features))


def _transpose_pruned(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    return partial(ops.transpose_pruned, *make.sparse(s.out_features, s.in_features))


def _transpose_weight(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    return partial(ops.transpose_tokens, make.fp8(s.out_features, s.in_features))


def _cast_transpose(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    return partial(ops.cast_transpose, *make.gradient(s), s.grad_dtype)


def _cast_mvue(s: LinearShape, make: RandomOperands, approximate: bool, stochastic: bool) -> Callable[[], object]:
    return partial(ops.cast_mvue, *make.gradient(s), make.seed(), 0, approximate, stochastic, s.grad_dtype)


def _cast_mvue_for_dgrad(
    s: LinearShape, make: RandomOperands, approximate: bool, stochastic: bool
) -> Callable[[], object]:
    """Of the transpose in fp32, without the transposing copy."""
    transposed = replace(s, tokens=s.out_features, out_features=padded(s.tokens), dtype=torch.float32)
    return _cast_mvue(transposed, make, approximate, stochastic)


def _add_masked_decay(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    grad, weight = (make.weight(s) for _ in range(2))
    return partial(ops.add_masked_decay_, grad, weight, make.ones(1, 2e-4))


def _copy(s: LinearShape, make: RandomOperands) -> Callable[[], object]:
    source = make.normal(s.tokens, s.out_features, dtype=s.dtype)
    return partial(torch.empty_like(source).copy_, source)


# Returns a call that runs a component of a linear.
Maker = Callable[[LinearShape, RandomOperands], Callable[[], Any]]


class Component(NamedTuple):
    """What is timed on its own.

    Attributes:
        of_weight: whether it takes as long, whatever the number of tokens.
        of_library: whether it runs no kernel of ours, which would have to be compiled.
        of_experts: makes it for a linear of experts; None where these have none.
    """

    make: Maker
    of_weight: bool = False
    of_library: bool = False
    of_experts: Maker | None = None


COMPONENTS: dict[str, Component] = {}


def add_component(
    name: str,
    make: Maker,
    of_experts: Maker | None = None,
    *,
    of_weight: bool = False,
    of_library: bool = False,
) -> None:
    """Let ``component_times`` measure something.  Its name is that of its time on disk."""
    COMPONENTS[name] = Component(make, of_weight, of_library, of_experts)


add_component("dense fprop", _hp_fprop, expert_costs.dense_fprop, of_library=True)
add_component("dense dgrad", _hp_dgrad, expert_costs.dense_dgrad, of_library=True)
add_component("dense wgrad", _hp_wgrad, expert_costs.dense_wgrad, of_library=True)
add_component("fp8 fprop", _fp8_fprop, expert_costs.fp8_fprop, of_library=True)
for _name, _accurate in (("fp8", False), ("fp8_accurate", True)):
    add_component(
        f"{_name} dgrad",
        partial(_fp8_dgrad, accurate=_accurate),
        partial(expert_costs.fp8_dgrad, accurate=_accurate),
        of_library=True,
    )
add_component("fp8 wgrad", _fp8_wgrad, expert_costs.fp8_wgrad, of_library=True)
add_component("copy", _copy, _copy, of_library=True)  # of grad_output: reads it and writes as much
add_component("sparse24 fprop", _sparse_fprop, expert_costs.sparse_fprop)
add_component("sparse24 dgrad", _sparse_dgrad, expert_costs.sparse_dgrad)
add_component("sparse24 wgrad", _sparse_wgrad, expert_costs.sparse_wgrad)
add_component("mvue24 dgrad", _sampled_dgrad)
add_component("sparse24_bf16 fprop", _sparse_bf16_fprop)
add_component("bf16 dgrad", _bf16_dgrad)
add_component("bf16 wgrad", _bf16_wgrad)
add_component("transpose_tokens", _transpose_tokens, expert_costs.transpose_tokens)
add_component("transpose_pruned", _transpose_pruned, of_weight=True)
add_component("transpose_weight", _transpose_weight, of_weight=True)
add_component("cast_transpose", _cast_transpose, expert_costs.cast_transpose)
add_component("add_masked_decay", _add_masked_decay, expert_costs.add_masked_decay, of_weight=True)
for _approximate, _estimator in ((False, "exact"), (True, "approximate")):
    for _stochastic, _rounding in ((False, "nearest"), (True, "stochastic")):
        add_component(
            f"cast_mvue {_estimator} {_rounding}",
            partial(_cast_mvue, approximate=_approximate, stochastic=_stochastic),
            partial(expert_costs.cast_mvue, approximate=_approximate, stochastic=_stochastic),
        )
        add_component(
            f"cast_mvue for dgrad {_estimator} {_rounding}",
            partial(_cast_mvue_for_dgrad, approximate=_approximate, stochastic=_stochastic),
        )
