"""What the package computes for itself, whatever modes the caller is in."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch


def no_autocast() -> AbstractContextManager[None]:
    """Operations compute in the types of their arguments, on every device."""
    return cast(AbstractContextManager[None], torch._C._DisableAutocast())


@contextmanager
def plain_arithmetic() -> Iterator[None]:
    """Nor are gradients recorded, nor are tensors those of inference mode, which no later backward could save."""
    with torch.inference_mode(False), torch.no_grad(), no_autocast():
        yield
