"""Measuring: interleaved candidates, medians and spread, and where the numbers come from."""

import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    described = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        # A copy of the sources without their history is told its commit.
        "commit": described.stdout.strip() or os.environ.get("GIT_COMMIT", "unknown"),
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write(name: str, part: str, results: Mapping[str, Any], table: str, folder: Path = RESULTS) -> None:
    """Add one part's results, their provenance and their table to ``<name>.json``, and all tables to ``<name>.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    parts = json.loads(path.read_text()) if path.exists() else {}
    parts[part] = {"provenance": provenance(), "table": table.splitlines(), **results}
    path.write_text(json.dumps(parts, indent=1) + "\n")
    sections = [
        f"## {title}\n\n{', '.join(f'{key} {value}' for key, value in content['provenance'].items())}\n\n"
        + "\n".join(content["table"])
        for title, content in parts.items()
    ]
    (folder / f"{name}.md").write_text(f"# {name}\n\n" + "\n\n".join(sections) + "\n")
