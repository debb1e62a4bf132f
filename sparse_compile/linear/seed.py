"""The randomness of gradient estimators."""

from threading import Lock

import torch
from torch import Tensor

from sparse_compile.torch_internals.tensors import is_shared

_END = 2**62


def new_seed(device: torch.device) -> Tensor:
    """A random 62-bit integer, ``[1]``, of the default generator, as dropout's."""
    return torch.randint(_END, (1,), device=device)


class SeedSource:
    """Draws the seeds of a compiled graph, as ``new_seed`` does, into memory that it uses again.

    What a backward has saved must lie where it lay when Inductor recorded the backward's CUDA graph, or it records
    another one, in each step.  So a seed is drawn into the first buffer that no backward holds: in training always the
    same, and of several forwards before their backwards each has its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = Lock()
        # Of each stream: what another one has queued may still have to read its seed.
        self._buffers: dict[int, list[Tensor]] = {}

    def draw(self) -> Tensor:
        """A random 62-bit integer, ``[1]``, that no later draw changes."""
        stream = torch.cuda.current_stream(self._device).stream_id if self._device.type == "cuda" else 0
        with self._lock:
            buffers = self._buffers.setdefault(stream, [])
            free = next((buffer for buffer in buffers if not is_shared(buffer)), None)
            if free is None:
                with torch.inference_mode(False):
                    free = torch.empty(1, dtype=torch.int64, device=self._device)
                buffers.append(free)
            return free.random_(_END).detach()
