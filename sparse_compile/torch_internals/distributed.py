"""The processes of a job, and what each holds of a sharded tensor."""

import sys
from typing import Any, cast

import torch


def several_processes() -> bool:
    """Whether others train the same model."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def shared_store() -> Any | None:
    """The store through which the processes of a job found each other; None where there is one process."""
    if not several_processes():
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def first_local(tensor: Any) -> int:
    """Where in the first dimension of a DTensor the shard of this process begins; 0 for any other tensor."""
    if local_tensor(tensor) is tensor:
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0])


def local_tensor(tensor: Any) -> torch.Tensor:
    """The shard of a DTensor that this process holds; any other tensor itself."""
    module = sys.modules.get("torch.distributed.tensor")
    sharded = module is not None and isinstance(tensor, module.DTensor)
    return cast(torch.Tensor, tensor.to_local() if sharded else tensor)
