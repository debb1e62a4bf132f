"""Whether pruned weights fare well: how their masks change over training, and what FP8 loses of them.

A sample reads the compressed weight alone: two bits of metadata and half a byte of values an element at most; no dense
mask is ever stored.  Kept between samples is the metadata of the last one, an eighth of a byte an element.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_compile.kernels.formats import padded
from sparse_compile.measure import capturing
from sparse_compile.passes.rewrite import WeightSlot
from sparse_compile.report import Health, record_health
from sparse_compile.state import WeightState, optimizer_steps

Listener = Callable[[str, float, int], object]

_MAGNITUDE = 0x7F  # bits of e4m3 without the sign
_LARGEST = 0x7E  # 448


class _Watched:
    """A weight on one device, and the metadata of its last sample there."""

    __slots__ = ("device", "in_features", "last", "name", "out_features", "weight")

    def __init__(self, name: str, slot: WeightSlot, weight: Tensor) -> None:
        self.name = name
        self.weight = ref(weight)
        self.device = slot.device
        self.out_features, self.in_features = slot.out_features, slot.in_features
        self.last: Tensor | None = None

    def is_there(self) -> bool:
        """Whether the weight lives, and was not moved to another device, where it has another state."""
        weight = self.weight()
        return weight is not None and weight.device == self.device


_watched: WeakKeyDictionary[WeightState, _Watched] = WeakKeyDictionary()
_listeners: list[Listener] = []
_every = 0  # optimizer steps


def watch(slot: WeightSlot, weight: Tensor, state: WeightState) -> None:
    """Let samples include a weight."""
    if state not in _watched:
        # A weight that was moved keeps its name.
        taken = {watched.name for watched in _watched.values() if watched.is_there() or watched.weight() is not weight}
        names = (slot.name if number == 1 else f"{slot.name} ({number})" for number in range(1, len(taken) + 2))
        _watched[state] = _Watched(next(name for name in names if name not in taken), slot, weight)


def listen(listener: Listener) -> None:
    """Hand every sample to ``listener(tag, value, step)``."""
    if listener not in _listeners:
        _listeners.append(listener)


def sample_every(steps: int) -> None:
    """Take a sample each so many optimizer steps; of several graphs' wishes, the most frequent."""
    global _every
    _every = min(_every or steps, steps)


def sample() -> dict[str, Health]:
    """One of each weight that has been pruned; also kept for the report, and handed to the listeners."""
    counts = {}
    with torch.no_grad():
        for state, watched in list(_watched.items()):
            if state.operands and watched.is_there():
                values, metadata, *_ = state.operands
                counts[watched] = _counts(values, metadata, watched.last)
                watched.last = metadata.clone()
    # One wait for the device, when all of the work is queued.
    samples = {watched: _health(watched, count.tolist()) for watched, count in counts.items()}
    for watched, taken in samples.items():
        record_health(watched.name, taken)
        for quantity, value in asdict(taken).items():
            if quantity != "step" and value is not None:
                for listener in _listeners:
                    listener(f"sste/{quantity}/{watched.name}", value, taken.step)
    return {watched.name: taken for watched, taken in samples.items()}


def mask_flips(before: Tensor, after: Tensor) -> Tensor:
    """How many bits of the mask differ between two int32 metadata of e4m3 operands; int64, a scalar."""
    masks, ones = _tables(before.device)
    # Two groups of four to a byte: the positions of both kept elements, two bits each.
    differing = masks[_bytes(before)] ^ masks[_bytes(after)]
    return ones[differing.int()].sum()


def _bytes(metadata: Tensor) -> Tensor:
    return metadata.flatten().view(torch.uint8).int()


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """By a byte of metadata: the masks of its two groups as a byte; by a byte: how many of its bits are set."""
    nibble = [1 << (code & 3) | 1 << (code >> 2) for code in range(16)]
    masks = [nibble[code & 15] | nibble[code >> 4] << 4 for code in range(256)]
    ones = [code.bit_count() for code in range(256)]
    return torch.tensor(masks, dtype=torch.uint8, device=device), torch.tensor(ones, device=device)


def _counts(values: Tensor, metadata: Tensor, last: Tensor | None) -> Tensor:
    """int64 ``[3]``: flips, or -1 at the first sample; zeros among the values, padding included; the largest."""
    if values.dtype is torch.bfloat16:
        zero, largest = values == 0, values.isinf()
    else:
        magnitude = values.view(torch.uint8) & _MAGNITUDE
        zero, largest = magnitude == 0, magnitude == _LARGEST
    flips = torch.full((), -1, device=values.device) if last is None else mask_flips(last, metadata)
    return torch.stack([flips, zero.sum(), largest.sum()])


def _health(watched: _Watched, counts: list[int]) -> Health:
    flips, zeros, saturated = counts
    elements = watched.out_features * watched.in_features
    kept = elements // 2
    zeros -= watched.out_features * (padded(watched.in_features) - watched.in_features) // 2
    return Health(
        step=optimizer_steps(),
        flips=None if flips < 0 else flips / elements,
        zeros=(elements - kept + zeros) / elements,
        underflow=zeros / kept,
        saturated=saturated / kept,
    )


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    del optimizer, args, kwargs
    if _every and optimizer_steps() % _every == 0 and not capturing():
        sample()


register_optimizer_step_post_hook(torch.compiler.disable(_after_step))
