"""Measuring: checked and interleaved candidates, medians and spread, and where the numbers come from."""

import argparse
import datetime
import fcntl
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TextIO, TypeVar

import torch
import triton
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
# Four times the L2 cache of an H200: inputs of this size in all are read from memory each time that their turn comes.
_FOOTPRINT = 4 * 50 * 2**20
_NUMBERS = re.compile(r"\[\n[-+.\deE,\s]+\]")  # a list of them takes one line, not one each

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")
Run = dict[str, Any]  # a training run: how it was made, and what it gave
# What a part of a program returns: its results and its table.
Report = tuple[dict[str, Any], str]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of one candidate over all rounds."""

    median: float
    low: float  # 10th percentile
    high: float  # 90th percentile
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Something to time, once it is right.

    ``prepare`` returns one call for each set of inputs.  ``check`` gets what each call returned, in the same order, and
    raises if anything is wrong.
    """

    prepare: Callable[[], Sequence[Callable[[], Any]]]
    check: Callable[[Sequence[Any]], None]


class WrongResultError(Exception):
    """A candidate computed something else than it should."""


def require_close(actual: Tensor, expected: Tensor) -> None:
    """Raise unless each element is right to a twentieth of itself and a tenth of the RMS of all.

    That is more than what fp8 tensor cores lose in a sum of 2**14 products, and less than any mistake.
    """
    error = (actual.float() - expected).abs_()
    limit = expected.abs().mul_(0.05).add_(0.1 * expected.square().mean().sqrt())
    # Not "error > limit": NaN must count.
    wrong = error.numel() - int((error <= limit).sum())
    if wrong:
        raise WrongResultError(f"{wrong} of {error.numel()} elements are wrong, by up to {float(error.max()):g}")


def side_by_side(run: Callable[..., R], wanted: Iterable[Sequence[Any]], jobs: int) -> Iterator[R]:
    """What ``run`` returns for each sequence of arguments, as it ends; ``jobs`` at a time, each in its own process.

    Each process sees one GPU, of several the next in turn.  An error is printed when it comes, and the first is raised
    when all have ended.
    """
    spawned = get_context("spawn")
    with (
        TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            jobs, mp_context=spawned, max_tasks_per_child=1, initializer=_choose_gpu,
            initargs=(spawned.Value("i", 0), _gpus(), folder),
        ) as pool,
    ):  # fmt: skip
        errors = []
        started = {pool.submit(run, *arguments): arguments for arguments in wanted}
        for future in as_completed(started):
            error = future.exception()
            if error is None:
                yield future.result()
            else:
                print(f"{started[future]} failed: {error!r}", file=sys.stderr, flush=True)
                errors.append(error)
    if errors:
        raise errors[0]


def _gpus() -> list[str]:
    """Of this process, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(index) for index in range(torch.cuda.device_count())]


def _choose_gpu(started: "Synchronized[int]", gpus: Sequence[str], folder: str) -> None:
    """In a new process, before it has seen any GPU."""
    global _turn
    with started.get_lock():
        if gpus:
            gpu = os.environ["CUDA_VISIBLE_DEVICES"] = gpus[started.value % len(gpus)]
            _turn = open(Path(folder, gpu), "w")  # noqa: SIM115 - for as long as the process lives
        started.value += 1


# What the processes of ``side_by_side`` lock that have the same GPU; none in others.
_turn: TextIO | None = None


def take_gpu() -> None:
    """Wait until the other processes of ``side_by_side`` that have taken this GPU have ended.

    They may compile side by side.  But two that train get slices of it by turns, and each is several times slower.
    """
    if _turn is not None:
        fcntl.flock(_turn, fcntl.LOCK_EX)


def latest(old: Sequence[Run], new: Sequence[Run], fields: Sequence[str]) -> list[Run]:
    """The new runs in place of old ones that have the same in all of the fields."""
    runs = {tuple(run[field] for field in fields): run for run in (*old, *new)}
    return list(runs.values())


def brief(error: str) -> str:
    """What of an error fits into a line: the JSON file holds all of it."""
    return error.splitlines()[0][:200]


def set_count(size: int) -> int:
    """How many sets of inputs, of ``size`` bytes each, take turns so that none is found in the L2 cache."""
    return max(2, -(-_FOOTPRINT // size))


def measure(candidates: Mapping[K, Candidate], calls: int, rounds: int) -> dict[K, Timing | str]:
    """GPU time of one call of each candidate, or the message of the error that kept it from being timed.

    Each candidate becomes a CUDA graph of ``calls`` calls, so that no host time is measured.  What the graph computes
    is checked before any is timed.
    """
    results: dict[K, Timing | str] = {}
    prepared, replays = {}, {}
    for name, candidate in candidates.items():
        try:
            # Kept until the end: a graph does not own what it reads.
            prepared[name] = candidate.prepare()
            graph, outputs = capture(prepared[name], calls)
            graph.replay()
            candidate.check(outputs)
            replays[name] = graph.replay
        except Exception as error:  # noqa: BLE001 - whatever a library raises is its result
            results[name] = f"{type(error).__name__}: {error}"
    return results | interleave(replays, rounds, calls=calls)


def capture(calls: Sequence[Callable[[], Any]], count: int) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A CUDA graph of ``count`` calls, the given ones in turn, and what each returned last.

    The current stream must not be the default stream.
    """
    for call in calls:
        call()  # compiles and loads what cannot be compiled and loaded in a capture
    torch.cuda.synchronize()
    outputs: list[Any] = [None] * len(calls)
    graph = torch.cuda.CUDAGraph()
    # Relaxed: libraries ask the driver questions while they plan.
    graph.capture_begin(capture_error_mode="relaxed")
    try:
        for index in range(count):
            outputs[index % len(calls)] = calls[index % len(calls)]()
    except Exception:
        with suppress(RuntimeError):  # the capture is broken, too, but the news is by what
            graph.capture_end()
        raise
    graph.capture_end()
    return graph, outputs


def interleave(
    candidates: Mapping[K, Callable[[], object]], rounds: int, warmup: int = 3, calls: int = 1
) -> dict[K, Timing]:
    """GPU time of each candidate, taking turns so that clocks and temperature are the same for all.

    A run of a candidate is ``calls`` calls; the time is that of one.
    """
    if not candidates:
        return {}
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
    return {name: timing([start.elapsed_time(end) / calls for start, end in pairs]) for name, pairs in events.items()}


def timing(times: Sequence[float]) -> Timing:
    """Median and spread of milliseconds."""
    cuts = statistics.quantiles(times, n=10)
    return Timing(median=statistics.median(times), low=cuts[0], high=cuts[-1], rounds=len(times))


def provenance() -> dict[str, str]:
    """Date, device and its limits, versions, commit and command of a measurement."""
    return {
        "date": datetime.date.today().isoformat(),
        **_device(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        # A copy of the sources without their history is told its commit.
        "commit": os.environ.get("GIT_COMMIT") or _printed_by("git", "describe", "--always", "--dirty") or "unknown",
        "command": "python " + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _device() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"device": "CPU"}
    uuid = str(torch.cuda.get_device_properties().uuid)
    limits = ["nvidia-smi", "--query-gpu=power.limit,clocks.max.sm,driver_version", "--format=csv,noheader"]
    return {
        "device": torch.cuda.get_device_name(),
        "power limit, highest SM clock, driver": _printed_by(*limits, f"--id=GPU-{uuid}") or "unknown",
    }


def _printed_by(*command: str) -> str:
    """What a command prints, nothing if it is not installed or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def earlier(name: str, part: str, folder: Path = RESULTS) -> dict[str, Any]:
    """What an earlier run of this part on a device of this kind gave; nothing if there was none."""
    path = folder / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text()).get(_title(part), {}) if path.exists() else {}
    return found


def _title(part: str) -> str:
    """Of a part's section.  It names the device, so that there is one current run of each benchmark on each device."""
    return f"{part}, {_device()['device']}"


def write(name: str, part: str, results: Mapping[str, Any], table: str, folder: Path = RESULTS) -> None:
    """Put one part's results, their provenance and their table in ``<name>.json``, and all tables in ``<name>.md``.

    They replace those of an earlier run of the part on a device of this kind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    parts = json.loads(path.read_text()) if path.exists() else {}
    parts[_title(part)] = {"provenance": provenance(), "table": table.splitlines(), **results}
    write_parts(name, parts, folder)


def write_parts(name: str, parts: Mapping[str, Any], folder: Path = RESULTS) -> None:
    """The two files of a program, from all of its sections."""
    text = json.dumps(parts, indent=1)
    (folder / f"{name}.json").write_text(_NUMBERS.sub(lambda numbers: " ".join(numbers[0].split()), text) + "\n")
    (folder / f"{name}.md").write_text(as_markdown(name, parts))


def as_markdown(name: str, parts: Mapping[str, Any]) -> str:
    """All tables of a program, each below where it comes from."""
    sections = [
        f"## {title}\n\n{', '.join(f'{key} {value}' for key, value in content['provenance'].items())}\n\n"
        + "\n".join(content["table"])
        for title, content in parts.items()
    ]
    return f"# {name}\n\n" + "\n\n".join(sections) + "\n"


def run_parts(name: str, description: str | None, parts: Mapping[str, Callable[[], Report]]) -> None:
    """The command line of a program of several parts.

    ``results["failed"]`` of a part names what of ours is wrong or did not run; the program then ends with an error.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=parts)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    keep_parts(name, {part: parts[part] for part in args.parts}, args.out)


def keep_parts(name: str, parts: Mapping[str, Callable[[], Report]], folder: Path) -> None:
    """Run the parts, and keep what each gave.

    Raises:
        SystemExit: something is in the ``failed`` of a part.
    """
    print(", ".join(f"{key} {value}" for key, value in provenance().items()), flush=True)
    torch.set_float32_matmul_precision("highest")  # what is checked against is not in TF32
    torch.manual_seed(0)
    failed = []
    # The default stream cannot be captured.
    with torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext():
        for part, run in parts.items():
            results, table = run()
            print(table, flush=True)
            write(name, part, results, table, folder)
            failed += results["failed"]
    if failed:
        raise SystemExit("FAILED:\n" + "\n".join(failed))
