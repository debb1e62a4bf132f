"""Parameters that FSDP2 manages: their shards, their gathered form, and when its memory is freed."""

import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, cast
from weakref import WeakSet

import torch

from sparse_compile.torch_internals.heap import instances_of

_sharders: "WeakSet[Any]" = WeakSet()


def sharded_parameter(weight: torch.Tensor) -> torch.Tensor | None:
    """The parameter that FSDP2 keeps in shards: of its gathered form, or that itself; None if FSDP2 manages neither."""
    sharder = _sharder(weight)
    return None if sharder is None else cast(torch.Tensor, sharder.sharded_param)


def call_when_freed(weight: torch.Tensor, call: Callable[[], None]) -> None:
    """Let FSDP2 make a call each time that it has freed the memory of a gathered weight, which it must manage."""
    sharder = _sharder(weight)
    assert sharder is not None
    free = sharder.free_unsharded_param

    def free_and_call() -> None:
        free()
        call()

    sharder.free_unsharded_param = free_and_call


def _sharder(weight: torch.Tensor) -> Any | None:
    """What of FSDP2 manages a weight, in shards or gathered; the gathered form itself knows nothing of it."""
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param")
    # Libraries import FSDP without using it; its use makes a class for each class of modules.
    if module is None or not torch.distributed.fsdp.FSDPModule.__subclasses__():
        return None
    _know_sharders(module.FSDPParam)
    return _manager_of(weight, _sharders)


@cache
def _know_sharders(kind: type) -> None:
    """Those that are alive, by one walk over the heap, and those that are made from now on."""
    initialise = kind.__init__  # type: ignore[misc]

    def initialise_and_know(sharder: Any, *args: Any, **kwargs: Any) -> None:
        initialise(sharder, *args, **kwargs)
        _sharders.add(sharder)

    kind.__init__ = initialise_and_know  # type: ignore[misc]
    _sharders.update(instances_of(kind))
    for module in instances_of(torch.distributed.fsdp.FSDPModule):
        state = module._get_fsdp_state()
        # PyTorch 2.11 has one group.
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            _sharders.update(group.fsdp_params if group is not None else ())


def _manager_of(weight: torch.Tensor, sharders: Iterable[Any]) -> Any | None:
    for sharder in sharders:
        if weight is sharder.sharded_param or weight is getattr(sharder, "_unsharded_param", None):
            return sharder
    return None
