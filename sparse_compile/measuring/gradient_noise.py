"""What sampling and FP8 do to the gradients of pruned weights, seen in the backward passes of training itself.

While it watches, it sees each product that makes a weight's gradient, and computes up to 256 x 256 of its elements
again, from the gradient before it was pruned.  It draws no random numbers and changes nothing that training reads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.kernels import ops
from sparse_compile.linear.fp8 import DGRAD_DRAWS
from sparse_compile.torch_internals.autocast import plain_arithmetic

_SAMPLED = 256  # rows, and columns, of a weight's gradient
_MAGNITUDE = 0x7F  # bits of either FP8 format without the sign


@dataclass(slots=True)
class _Draw:
    """One gradient that was sampled.

    Attributes:
        columns: int64 ``[n]``, those that are compared.
        scaled: fp32 ``[T, n]``, the gradient as the product reads it where it is not pruned.
        counts: ``[2]``: elements that are not zero, those of them that FP8 makes zero.
        weight: address of the weight that dgrad multiplies the same gradient with.
        squares: ``[2]``: of the error, and of the exact elements.
    """

    columns: Tensor
    scaled: Tensor
    counts: Tensor
    weight: int | None = None
    squares: Tensor | None = None


# Memory is used again, by tensors of other shapes too: of a draw that no product has taken the address is not enough.
_Key = tuple[int, torch.Size]
# A linear in a backward pass: the address of its seed, its index, its out_features.
_Linear = tuple[int, int, int]


def _key(operand: Tensor) -> _Key:
    return operand.data_ptr(), operand.shape


class GradNoise:
    """Sums over the backward passes that it watched, for each weight that a dgrad in FP8 or 2:4 identifies."""

    def __init__(self) -> None:
        self._watching = False
        self._sums: dict[int, Tensor] = {}
        # A product does not say which linear it belongs to: these know by the addresses of its operands.
        self._payloads: dict[_Key, _Draw] = {}
        self._values: dict[_Key, _Draw] = {}
        # A sampled dgrad reads, in place of the payload, what a second call makes of the same gradient.
        self._linears: dict[_Linear, _Key] = {}
        # What was transposed for a dgrad, by its result: the address of what is kept of the weight.
        self._transposed: dict[_Key, int] = {}

    def watch(self, on: bool) -> None:
        """Watch from now on, or no longer."""
        if on != self._watching:
            self._watching = on
            ops.observe(self._see if on else None)
            self._payloads.clear()
            self._values.clear()
            self._linears.clear()
            self._transposed.clear()

    def take(self) -> dict[int, Tensor]:
        """By the address of what dgrad reads of a weight: the ``[4]`` sums since the last time, see ``_Draw``."""
        sums, self._sums = self._sums, {}
        self._transposed.clear()
        return sums

    def _see(self, op: str, call: Any, arguments: tuple[Any, ...]) -> Any:
        result = call(*arguments)
        device = arguments[0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return result
        draw = None
        with plain_arithmetic():
            if op in ("cast_mvue", "cast_mvue_with_sums"):
                grad, _, token_scale, seed, index, *_ = arguments
                if index < DGRAD_DRAWS:
                    self._begin(grad, token_scale, *result[:2])
                    self._linears[seed.data_ptr(), index, grad.shape[1]] = _key(result[0])
                else:
                    self._replace_payload((seed.data_ptr(), index - DGRAD_DRAWS, grad.shape[0]), result[1])
            elif op in ("transpose_pruned", "transpose_tokens"):
                self._transposed[_key(result)] = arguments[0].data_ptr()
            elif op == "scaled_mm":
                draw = self._dgrad(arguments[0], arguments[1])
            elif op == "sparse_mm" and arguments[4] is not None:  # the scale of each token, which wgrad has not
                draw = self._dgrad(arguments[2], arguments[0])
            elif op == "sparse_mm" and _key(arguments[0]) in self._payloads:
                draw = self._dgrad(arguments[0], arguments[2])
            elif op == "sparse_mm":
                draw = self._values.pop(_key(arguments[0]), None)
                if draw is not None:
                    draw.squares = _squares(draw, arguments[2], arguments[3], result, transposed=arguments[6])
            if draw is not None and draw.weight is not None and draw.squares is not None:
                sums = torch.cat([draw.squares, draw.counts])
                self._sums[draw.weight] = self._sums[draw.weight] + sums if draw.weight in self._sums else sums
        return result

    def _dgrad(self, payload: Tensor, weight: Tensor) -> _Draw | None:
        """The draw of which ``payload`` is the other half, told the weight."""
        draw = self._payloads.pop(_key(payload), None)
        if draw is not None:
            draw.weight = self._transposed.pop(_key(weight), weight.data_ptr())
        return draw

    def _replace_payload(self, linear: _Linear, values: Tensor) -> None:
        """dgrad reads ``values`` instead of the cast that came with the draw."""
        payload = self._linears.pop(linear, None)
        if payload is not None and payload in self._payloads:
            self._payloads[_key(values)] = self._payloads.pop(payload)

    def _begin(self, grad: Tensor, token_scale: Tensor, payload: Tensor, values: Tensor) -> None:
        if not grad.numel():
            return
        columns = _spread(grad.shape[1], grad.device)
        chosen = grad[:, columns].float()
        there = chosen != 0
        lost = there & (payload.view(torch.uint8)[:, columns] & _MAGNITUDE == 0)
        draw = _Draw(columns, chosen * token_scale[:, None], torch.stack([there.sum(), lost.sum()]).float())
        self._payloads[_key(payload)] = self._values[_key(values)] = draw


def noise_and_underflow(sums: list[float]) -> tuple[float | None, float | None]:
    """The relative error of a weight's gradient, and the share of the gradient's elements that FP8 made zero.

    None where there is nothing to compare with: zero, or gradients that are not finite.
    """
    error, exact, there, lost = sums
    noise = (error / exact) ** 0.5 if 0 < exact < float("inf") and error < float("inf") else None
    return noise, lost / there if there else None


def _squares(draw: _Draw, x_t: Tensor, scale_inv: Tensor, grad_weight: Tensor, *, transposed: bool) -> Tensor:
    """Of the error of ``grad_weight [N, K]``, and of the exact product; ``x_t``: FP8 ``[K, T]``, padded along T."""
    rows = _spread(x_t.shape[0], x_t.device)
    x = x_t.view(torch.uint8)[rows, : draw.scaled.shape[0]].view(x_t.dtype).float()
    exact = draw.scaled.t() @ x.t() * scale_inv
    matrix = grad_weight.t() if transposed else grad_weight
    error = matrix[draw.columns][:, rows].float() - exact
    return torch.stack([error.square().sum(), exact.square().sum()])


def _spread(size: int, device: torch.device) -> Tensor:
    """Up to ``_SAMPLED`` indices, evenly spread."""
    count = min(size, _SAMPLED)
    return torch.arange(count, device=device) * size // count
