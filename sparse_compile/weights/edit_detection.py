"""Edits of weights that neither version counters nor optimizer steps show, such as ``weight.data.copy_(average)``.

A sample of each weight is compared with what it was.  One comparison serves all weights of a graph; its result is
waited for.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparse_compile.weights.operand_set import STALE, OperandSet
from sparse_compile.weights.record import WeightRecord

# Rows, and columns of each, that a sample takes at most.
_SAMPLED = 32


def take_samples(weights: Sequence[Tensor]) -> list[Tensor]:
    """Some elements of each weight ``[N, K]``, copied, ``[n, k]`` with n and k up to 32; of ``[E, N, K]``, of each."""
    samples: dict[int, Tensor] = {}
    for indices in _alike(weights):
        views = [_view(weights[index]) for index in indices]
        parts = torch.cat(views).split([len(view) for view in views])
        samples.update(zip(indices, parts, strict=True))
    return [samples[index] for index in range(len(weights))]


def find_edited(weights: Sequence[Tensor], samples: Sequence[Tensor]) -> list[int]:
    """The indices of the weights whose sampled elements have changed since ``take_samples``."""
    edited = []
    for indices in _alike(weights):
        before = [samples[index] for index in indices]
        now = take_samples([weights[index] for index in indices])
        if not torch.equal(torch.cat(before), torch.cat(now)):
            edited += [index for index, old, new in zip(indices, before, now, strict=True) if not torch.equal(old, new)]
    return edited


def is_edited(weight: Tensor, record: WeightRecord, kept: OperandSet) -> bool:
    """Whether something else than a step changed the weight: since its last step, or since its operands were made."""
    if kept.version == STALE:
        return True  # as the user said
    # Tensors made under inference_mode have no version.
    now = -1 if weight.is_inference() else weight._version, weight.data_ptr()
    if record.steps != kept.steps:
        return record.stepped_to is not None and record.stepped_to != now
    if kept.sample is None or kept.version is None or kept.version[1:] != now:
        return True
    return bool(find_edited([weight], [kept.sample]))


def _view(weight: Tensor) -> Tensor:
    # One operation, where slices would be three.
    (*experts, rows, columns), (*expert, row, column) = weight.shape, weight.stride()
    down, across = -(-rows // _SAMPLED), -(-columns // _SAMPLED)
    size, stride = (-(-rows // down), -(-columns // across)), (row * down, column * across)
    return weight.as_strided((*experts, *size), (*expert, *stride)).reshape(-1, size[1])


def _alike(weights: Sequence[Tensor]) -> Iterable[list[int]]:
    """Indices of the weights that one kernel can read together."""
    groups = defaultdict(list)
    for index, weight in enumerate(weights):
        groups[weight.device, weight.dtype, weight.shape[-1]].append(index)
    return groups.values()
