"""Time as a device sees it."""

from time import perf_counter
from typing import Any

import torch


def capturing() -> bool:
    """Whether the user captures a CUDA graph, in which nothing may be measured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class DeviceTimer:
    """Marks on the device's time line, and the milliseconds between them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.is_cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.is_cuda:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def is_past(self, mark: Any) -> bool:
        """Whether the device has reached it."""
        return not self.is_cuda or mark.query()

    def between(self, start: Any, end: Any) -> float:
        """Waits for the device to reach the end."""
        if not self.is_cuda:
            return float(end - start) * 1e3
        end.synchronize()
        return float(start.elapsed_time(end))

    def lag(self) -> float | None:
        """Milliseconds for which the device still works on what the host has started: it is waited for.

        None for a host of its own.
        """
        if not self.is_cuda:
            return None
        start = perf_counter()
        self.wait()
        return (perf_counter() - start) * 1e3

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
