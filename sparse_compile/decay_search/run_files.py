"""What ``tune-decay`` tells the process of each run, and what that writes, as JSON."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """How a script runs.

    Attributes:
        steps: of an optimizer, after which it is stopped.
        auto, module, options, overrides: as ``launcher.run_script.run`` takes them.
    """

    steps: int
    auto: bool
    module: bool
    options: Mapping[str, Any]
    overrides: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What a run counted.

    Attributes:
        weights: as ``FlipCounts.by_weight`` returns them.
        stopped: whether the script was stopped; otherwise it ended by itself.
    """

    weights: Mapping[str, tuple[int, list[int]]]
    stopped: bool
