"""Weak references to tensors that let go while ``torch.utils.swap_tensors`` swaps what two tensors hold.

That refuses tensors with weak references.  It is how modules convert parameters of DTensors, and others after
``torch.__future__.set_swap_module_params_on_conversion(True)``.  A parameter stays the object that it was, so what is
kept of it stays with it.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Generic, TypeVar
from weakref import WeakSet, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class TensorDict(WeakTensorKeyDictionary):
    """A dictionary by the identity of tensors, which it holds weakly."""

    def __init__(self) -> None:
        super().__init__()
        _dictionaries.add(self)

    def get(self, key: Tensor, default: Any = None) -> Any:
        return super().get(key, default)  # type: ignore[no-untyped-call]

    def pop(self, key: Tensor, *default: Any) -> Any:
        return super().pop(key, *default)  # type: ignore[no-untyped-call]

    __hash__ = object.__hash__
    __eq__ = object.__eq__


class WeakTensor:
    """The one weak reference to a tensor, made by ``weak``.

    Attributes:
        ref: called, it returns the tensor, or None if that is gone.
    """

    __slots__ = ("__weakref__", "ref")

    def __init__(self, tensor: Tensor) -> None:
        self.ref: Callable[[], Tensor | None] = ref(tensor)


def weak(tensor: Tensor) -> WeakTensor:
    """A weak reference to a tensor."""
    known: WeakTensor | None = _references.get(tensor)
    if known is None:
        known = _references[tensor] = WeakTensor(tensor)
    return known


V = TypeVar("V")


class OfTensors(Generic[V]):
    """What is kept of each sequence of tensors, as long as these live.

    Blocks that share a compiled graph call it with tensors of their own, in turn.
    """

    __slots__ = ("_found", "_limit")

    _LEAST = 16

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], tuple[tuple[WeakTensor, ...], V]] = {}
        self._limit = self._LEAST  # from so many on those are looked for whose tensors are gone

    def get(self, tensors: Sequence[Tensor]) -> V | None:
        found = self._found.get(tuple(map(id, tensors)))
        if found is None:
            return None
        references, value = found
        # Where a tensor was, another one may be now.
        same = all(known.ref() is tensor for known, tensor in zip(references, tensors, strict=True))
        return value if same else None

    def put(self, tensors: Sequence[Tensor], value: V) -> None:
        if len(self._found) >= self._limit:
            self._found = {
                ids: kept for ids, kept in self._found.items() if all(known.ref() is not None for known in kept[0])
            }
            self._limit = max(self._LEAST, 2 * len(self._found))
        self._found[tuple(map(id, tensors))] = (tuple(map(weak, tensors)), value)


_dictionaries: WeakSet[TensorDict] = WeakSet()
_references = TensorDict()


def _let_go_while_swapping(swap_tensors: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], None]:
    @wraps(swap_tensors)
    def swap(t1: Tensor, t2: Tensor) -> None:
        kept: list[tuple[TensorDict, Tensor, Any]] = []
        for dictionary in list(_dictionaries):
            for tensor in (t1, t2):
                if tensor in dictionary:
                    kept.append((dictionary, tensor, dictionary[tensor]))
                    del dictionary[tensor]
        references = [(tensor, value) for _, tensor, value in kept if isinstance(value, WeakTensor)]
        for _, reference in references:
            reference.ref = _nothing
        try:
            swap_tensors(t1, t2)
        finally:
            for tensor, reference in references:
                reference.ref = ref(tensor)
            for dictionary, tensor, value in kept:
                dictionary[tensor] = value

    return swap


def _nothing() -> None:
    return None


torch.utils.swap_tensors = _let_go_while_swapping(torch.utils.swap_tensors)
