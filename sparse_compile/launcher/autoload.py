"""``SPARSE_COMPILE=1 python train.py``: PyTorch calls ``autoload`` at the end of ``import torch``.

It is called in every process that imports torch where this package is installed, so it does nothing unless asked to,
and what is wrong with a variable is said, never raised: the import would fail.
PyTorch is not quite imported yet, so nothing here may import ``torch._dynamo``.
"""

import os
import sys
from pathlib import Path

from sparse_compile.reporting.report_file import check_file

VARIABLE = "SPARSE_COMPILE"
REPORT_VARIABLE = "SPARSE_COMPILE_REPORT"


def autoload() -> None:
    """Route torch.compile to this backend if the environment says so, and write the report where it says.

    The report alone may be asked for, of a script that uses the backend itself.  A variable with a value that is not
    allowed counts as one that is not set.
    """
    auto, report_file = _asked(), _report_file()
    if auto is not None:
        from sparse_compile.launcher.route_compile import route

        route(auto=auto, report_file=report_file, launched=False)
    elif report_file is not None:
        from sparse_compile.reporting.process_report import recorded, write_to

        write_to(report_file, when=lambda: recorded() > 0)


def _asked() -> bool | None:
    """Whether models that are not compiled are compiled as well; None to leave torch.compile as it is."""
    asked = os.environ.get(VARIABLE)
    if asked not in (None, "1", "auto"):
        _warn(
            f"{VARIABLE} is {asked!r}; allowed are 1, by which torch.compile uses backend 'sste', and auto, by which "
            "models that are not compiled are compiled as well; unset it to run without, as this process does"
        )
        return None
    return None if asked is None else asked == "auto"


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
    """Not by ``warnings``, which may be told to raise."""
    if sys.stderr is not None:  # as it is in processes without one
        sys.stderr.write(f"sparse_compile: {text}\n")
