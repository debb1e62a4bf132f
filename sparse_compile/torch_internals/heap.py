"""All live objects of a class."""

import gc
import sys
from collections.abc import Iterator
from types import FrameType, FunctionType, ModuleType
from typing import Any
from weakref import ref

import torch
from torch.nn import Module


def instances_of(kind: type) -> Iterator[Any]:
    """All that are alive, by a walk over the heap; of frozen ones (``gc.freeze``) those that a script can reach."""
    listed = _listed(kind)
    known = set(map(id, listed))
    yield from listed
    yield from (found for found in _frozen_objects() if issubclass(type(found), kind) and id(found) not in known)


def _listed(kind: type) -> list[Any]:
    objects = gc.get_objects()
    # type(), because isinstance() would wake lazy proxies that pretend to be of the kind; of few classes many objects.
    kinds = {found for found in set(map(type, objects)) if issubclass(found, kind)}
    return [found for found in objects if type(found) in kinds]


_frozen: "list[ref[Any]]" = []
_frozen_count = 0


def _frozen_objects() -> list[Any]:
    """Modules and optimizers that the collector does not list, by a walk from the globals and locals of the script."""
    global _frozen_count
    count = gc.get_freeze_count()
    if count > _frozen_count:
        _frozen[:] = [ref(found) for found in _reachable((Module, torch.optim.Optimizer))]
    _frozen_count = count
    return [found for known in _frozen if (found := known()) is not None]


def _reachable(kinds: tuple[type, ...]) -> list[Any]:
    """What of some classes the frames of others and the main module hold, directly or through other objects."""
    pending: list[Any] = list(vars(sys.modules["__main__"]).values())
    for frame in sys._current_frames().values():
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_code.co_filename != __file__:
                pending += caller.f_locals.values()
            caller = caller.f_back
    seen: set[int] = set()
    found = []
    while pending:
        held = pending.pop()
        kind = type(held)  # not isinstance(), which asks weak proxies for their class, dead ones, too
        # What belongs to modules of Python, and its classes, is no script's.
        if id(held) in seen or issubclass(kind, (str, bytes, int, float, type, ModuleType, torch.Tensor, FrameType)):
            continue
        seen.add(id(held))
        if kind is FunctionType:
            pending += held.__closure__ or ()
            continue
        if issubclass(kind, kinds):
            found.append(held)
        pending += gc.get_referents(held)
    return found
