"""The report of this process: what is added to it, and where it goes when the process ends.

Imports no torch: ``autoload`` comes here while PyTorch is being imported.
"""

import atexit
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.util import Finalize
from pathlib import Path

from sparse_compile.reporting.health import Health
from sparse_compile.reporting.model import GraphReport
from sparse_compile.reporting.report import Report

_MAX_SAMPLES = 512  # of a weight

_report = Report()
_files: dict[Path, Callable[[], bool]] = {}  # and whether there is something to say
_destined = False  # to a file, to nowhere, or to the program that asked for it: not to stderr
_rank: int | None = None


def report() -> Report:
    """The report of this process.

    Returns:
        All graphs compiled so far.  It grows with the process.  A program that asks for it is not shown it again on
        stderr when the process ends.
    """
    global _destined
    _destined = True
    return _report


def report_so_far() -> Report:
    """The same, for those who add to it."""
    return _report


def record(graph: GraphReport) -> None:
    """Add a graph; from the first one on, the report is written when the process ends, to stderr if not to a file."""
    import torch

    if not (_report.graphs or _destined):
        _at_end(_write_to_stderr)
    _report.torch = torch.__version__
    if torch.cuda.is_initialized():
        _report.device = torch.cuda.get_device_name()
    _note_rank()
    _report.graphs.append(graph)


def recorded() -> int:
    """How many graphs were compiled so far."""
    return len(_report.graphs)


def record_health(name: str, sample: Health) -> None:
    """Add a sample of a weight; of many, every other of the older ones is forgotten."""
    samples = _report.health.setdefault(name, [])
    samples.append(sample)
    if len(samples) > _MAX_SAMPLES:
        del samples[1:-1:2]


def write_to(path: Path | None, when: Callable[[], bool] = lambda: True) -> None:
    """Write the report to a file when the process ends, see ``Report.write``; instead of to stderr.

    Of the processes of a group of torch.distributed, or that torchrun started, the one of rank 0 writes.  Others that
    multiprocessing started write a file each, whose name holds that of the process: ``report-SpawnProcess-1.json``.

    Args:
        path: None to write it nowhere.
        when: asked at the end whether there is something to say.
    """
    global _destined
    _destined = True
    if path is not None:
        if not _files:
            _at_end(_write_to_files)
        _files.setdefault(path.absolute(), when)  # the script may go to another folder


def _at_end(write: Callable[[], None]) -> None:
    """Call it when the process ends; forked processes of multiprocessing end without what atexit knows."""
    if multiprocessing.parent_process() is None:
        atexit.register(write)
    else:
        Finalize(None, write, exitpriority=0)


def _write_to_files() -> None:
    _note_rank()
    for path, when in _files.items():
        if not _rank and when():
            own = _own(path)
            try:
                _report.write(own)
            except (OSError, ValueError) as error:  # the disk is full, or the folder is gone
                sys.stderr.write(f"sparse_compile: {own} was not written: {error}\n\n{_report}\n")


def _write_to_stderr() -> None:
    _note_rank()
    if not (_rank or _destined):
        sys.stderr.write(f"\n{_report}\n")


def _own(path: Path) -> Path:
    """The file of this process."""
    if _rank is None and multiprocessing.parent_process() is not None:
        return path.with_stem(f"{path.stem}-{multiprocessing.current_process().name}")
    return path


def _note_rank() -> None:
    """Keep the rank of this process, as long as it can be told: its group may be gone when the process ends."""
    global _rank
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        _rank = distributed.get_rank()
    elif _rank is None and os.environ.get("RANK", "").isdecimal():  # others may mean something else by it
        _rank = int(os.environ["RANK"])
