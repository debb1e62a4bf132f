"""Memory of tensors, and how autograd counts what is written to it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import cast

import torch


def is_held(tensor: torch.Tensor) -> bool:
    """Whether something besides Python holds the tensor, such as a backward that is still to come."""
    return bool(tensor._use_count() > 1)  # type: ignore[attr-defined]


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether another tensor shares its memory, wherever it is held."""
    storage = tensor.untyped_storage()  # the second holder of the memory
    return bool(torch._C._storage_Use_Count(storage._cdata) > 2)


def versions_kept(tensors: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
    """Writing to the tensors does not count as a change: a backward that saved them goes on."""
    return torch.autograd._unsafe_preserve_version_counter(tuple(tensors))  # type: ignore[attr-defined]


def unsafe_view(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """``tensor.view(shape)`` that autograd takes for a tensor of its own: for one that nobody else reads or writes."""
    return cast(torch.Tensor, torch.ops.aten._unsafe_view.default(tensor, shape))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """What autograd takes the tensor for a view of; any other tensor itself."""
    return tensor if tensor._base is None else tensor._base


def storage_key(tensor: torch.Tensor) -> int:
    """The same for tensors that share memory, fake ones too."""
    return int(tensor.untyped_storage()._cdata)
