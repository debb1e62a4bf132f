"""All live objects of a class."""

import gc
import sys
from collections.abc import Iterator
from itertools import compress
from types import FrameType, FunctionType, ModuleType
from typing import Any
from weakref import ref

import torch
from torch.nn import Module


def instances_of(kind: type) -> Iterator[Any]:
    """All that are alive, by a walk over the heap; of frozen ones (``gc.freeze``) those that a script can reach."""
    objects = gc.get_objects()
    # type(), because isinstance() would wake lazy proxies that pretend to be of the kind; of few classes many objects.
    types = list(map(type, objects))
    classes = set(types)
    kinds = {found for found in classes if issubclass(found, kind)}
    listed = list(compress(objects, map(kinds.__contains__, types)))  # of a million objects, faster than a loop
    del objects, types
    known = set(map(id, listed))
    yield from listed
    frozen = _frozen_objects(frozen_since=_Listed not in classes)
    yield from (found for found in frozen if issubclass(type(found), kind) and id(found) not in known)


class _Listed:
    """Of its one object, which is no longer listed when the heap was frozen since."""


_listed: _Listed | None = None
_frozen: "list[ref[Any]]" = []


def _frozen_objects(frozen_since: bool) -> list[Any]:
    """Modules and optimizers that the collector does not list, by a walk from the globals and locals of the script."""
    global _listed
    if frozen_since:
        # At the first call it is not known; later the count would be a walk over all that is frozen, for each graph.
        if _listed is not None or gc.get_freeze_count():
            _frozen[:] = [ref(found) for found in _reachable((Module, torch.optim.Optimizer))]
        _listed = _Listed()
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
