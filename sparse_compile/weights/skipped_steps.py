"""Steps that a fused optimizer skips in its kernel, because its gradient scaler found infinite gradients.

The host does not see them: asking would wait for the device.  So they are counted there, by one addition a step, and
read only where a record must know, see ``WeightRecord.step``.
"""

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_compile.torch_internals.autocast import plain_arithmetic


class SkipCount:
    """How many steps were skipped up to some step; the device is waited for once."""

    __slots__ = ("_read", "tensor")

    def __init__(self, tensor: Tensor, read: int | None = None) -> None:
        self.tensor = tensor  # int64, a scalar
        self._read = read

    def read(self) -> int:
        if self._read is None:
            self._read = int(self.tensor)
        return self._read


class SkippedSteps:
    """Of one optimizer: the counts before and after its last step."""

    __slots__ = ("before", "now")

    def __init__(self, device: torch.device) -> None:
        self.before = self.now = SkipCount(torch.zeros((), dtype=torch.int64, device=device), 0)

    def add(self, found_inf: Tensor) -> None:
        """A step was made, or skipped if gradients were infinite."""
        self.before, self.now = self.now, SkipCount(self.now.tensor + (found_inf.to(self.now.tensor.device) > 0))

    def skipped_last(self) -> bool:
        return self.now.read() > self.before.read()


def add_step(optimizer: Optimizer, known: SkippedSteps | None) -> SkippedSteps | None:
    """The count after a step of an optimizer; None where nothing but the step itself decides whether it is made.

    Args:
        known: of earlier steps.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    # A step that is captured as a CUDA graph cannot be asked: it is counted as ever.
    if not isinstance(found_inf, Tensor) or (found_inf.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    with plain_arithmetic():
        skipped = SkippedSteps(found_inf.device) if known is None else known
        skipped.add(found_inf)
    return skipped
