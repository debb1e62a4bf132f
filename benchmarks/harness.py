"""Measuring: interleaved candidates, medians and spread, and where the numbers come from."""

import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one candidate over all rounds."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    rounds: int


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, Timing]:
    """GPU time of each candidate, taking turns so that clocks and temperature are the same for all."""
    for _ in range(warmup):
        for run in candidates.values():
            run()
    events = {name: [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(rounds)] for name in candidates}
    torch.cuda.synchronize()
    for index in range(rounds):
        for name, run in candidates.items():
            start, end = events[name][index]
            start.record()
            run()
            end.record()
    torch.cuda.synchronize()
    return {name: _timing([start.elapsed_time(end) for start, end in pairs]) for name, pairs in events.items()}


def _timing(times: list[float]) -> Timing:
    cuts = statistics.quantiles(times, n=10)
    return Timing(median=statistics.median(times), low=cuts[0], high=cuts[-1], rounds=len(times))


def provenance() -> dict[str, str]:
    """Date, device, versions, commit and command of a measurement."""
    folder = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """Results and their provenance as ``<name>.json``."""
    folder.mkdir(parents=True, exist_ok=True)

    def plain(value: object) -> object:
        return asdict(value)  # type: ignore[call-overload]

    text = json.dumps({"provenance": provenance(), **results}, indent=1, default=plain)
    (folder / f"{name}.json").write_text(text + "\n")
