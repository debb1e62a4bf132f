"""Fake tensors."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["FakeTensor", "FakeTensorMode"]


def backend_fake_mode(inputs: Sequence[Any]) -> Any:
    """The FakeTensorMode in which AOTAutograd will trace; not the one of the nodes' ``example_value``."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode(inputs)


@contextmanager
def symbolic(mode: FakeTensorMode) -> Iterator[None]:
    """Run operations on fake tensors as dynamo does, so that sizes stay symbols in those made of others, too."""
    with mode, enable_python_dispatcher():
        yield


def fake_inputs(arguments: Sequence[Any]) -> list[Any]:
    """What stands for a call's arguments when a graph is compiled outside of dynamo: their sizes are fixed."""
    mode = FakeTensorMode()
    return [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]


def is_fake(value: Any) -> bool:
    """Whether an example value stands for an ordinary tensor.

    Tensors of other classes, such as DTensor, hold fake tensors; so do those that torch.func's transforms wrap.
    """
    return isinstance(value, FakeTensor)
