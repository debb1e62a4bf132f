"""``SPARSE_COMPILE=1 python train.py``: PyTorch calls ``autoload`` at the end of ``import torch``.

Where this package is installed, every process that imports torch calls it.  So it does nothing unless a variable is
set, but for what takes milliseconds, and it reports a wrong value on stderr instead of raising, which would make the
import fail.  PyTorch is not fully imported yet, so nothing here may import ``torch._dynamo``.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

from sparse_compile.reporting.report_file import check_file

VARIABLE = "SPARSE_COMPILE"
REPORT_VARIABLE = "SPARSE_COMPILE_REPORT"


def autoload() -> None:
    """Route torch.compile to this backend if ``SPARSE_COMPILE`` is set, and write the report if its file is set.

    The report's file alone is for a script that uses the backend itself.  A value that is not allowed is ignored.
    """
    register_cache_artifacts()
    auto, report_file = _auto(), _report_file()
    if auto is not None:
        from sparse_compile.launcher.route_compile import route

        route(auto=auto, report_file=report_file, launched=False)
    elif report_file is not None:
        from sparse_compile.reporting.process_report import recorded, write_to

        write_to(report_file, when=lambda: recorded() > 0)


def register_cache_artifacts() -> None:
    """Register what ``torch.compiler.load_cache_artifacts`` may find of ours; a script may call it first of all."""
    for module in ("kernel_artifacts", "timing.gpu_times"):
        try:
            import_module(f"sparse_compile.kernels.{module}")
        except Exception as error:  # noqa: BLE001 - whatever it is, torch must be imported
            _warn(f"torch.compiler.save_cache_artifacts will save nothing of it: {error!r}")


def _auto() -> bool | None:
    """Whether to compile models that the script does not compile; None to leave torch.compile as it is."""
    value = os.environ.get(VARIABLE)
    if value not in (None, "1", "auto"):
        _warn(
            f"{VARIABLE} is {value!r}; allowed are 1 (torch.compile uses backend 'sste') and auto (models that the "
            "script does not compile are compiled, too); it is ignored in this process"
        )
        return None
    return None if value is None else value == "auto"


def _report_file() -> Path | None:
    report = os.environ.get(REPORT_VARIABLE)
    if report is None:
        return None
    try:
        check_file(Path(report))
    except ValueError as error:
        _warn(f"{REPORT_VARIABLE}: {error}; this process writes its report to stderr")
        return None
    return Path(report)


def _warn(text: str) -> None:
    """On stderr, not with ``warnings``, which may be set to raise."""
    if sys.stderr is not None:  # some processes have none
        sys.stderr.write(f"sparse_compile: {text}\n")
