"""``SPARSE_COMPILE=1 python train.py``: PyTorch calls ``autoload`` at the end of ``import torch``.

It is called in every process that imports torch where this package is installed, so it does nothing unless asked to.
PyTorch is not quite imported yet, so nothing here may import ``torch._dynamo``.
"""

import os
from pathlib import Path

from sparse_compile.report import check_file

VARIABLE = "SPARSE_COMPILE"
REPORT_VARIABLE = "SPARSE_COMPILE_REPORT"


def autoload() -> None:
    """Route torch.compile to this backend if the environment says so.

    Raises:
        ValueError: a value of a variable that is not allowed.
    """
    asked, report = os.environ.get(VARIABLE), os.environ.get(REPORT_VARIABLE)
    if asked is None:
        if report is not None:
            raise ValueError(f"{REPORT_VARIABLE} is {report!r}, but {VARIABLE} is not set; set it to 1 or auto")
        return
    if asked not in ("1", "auto"):
        raise ValueError(
            f"{VARIABLE} is {asked!r}; allowed are 1, by which torch.compile uses backend 'sste', and auto, by which "
            "models that are not compiled are compiled as well; unset it to run without"
        )
    if report is not None:
        try:
            check_file(Path(report))
        except ValueError as error:
            raise ValueError(f"{REPORT_VARIABLE}: {error}") from error

    from sparse_compile.route import route

    route(auto=asked == "auto", report_file=None if report is None else Path(report), launched=False)
