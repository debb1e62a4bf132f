"""Runs a script in which ``torch.compile`` means this backend, so that the script itself stays as it is."""

import runpy
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from sparse_compile.report import write_to

# What a script says that asks for no particular backend.
_DEFAULTS = (None, "inductor")


def run(script: str, arguments: Sequence[str], *, module: bool = False, report_file: Path | None = None) -> None:
    """Run a script as ``python script arguments...`` would, or a module as ``python -m``, through this backend.

    Args:
        report_file: where the report is written when the process ends; of several processes that torchrun started, by
            the first.
    """
    torch.compile = _routed(torch.compile)
    if report_file is not None:
        write_to(report_file)
    sys.argv = [script, *arguments]
    if module:
        # As with python -m, the current folder comes first among the paths already.
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


def _routed(compile: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with backend "sste" where its caller names none, or "inductor"; other names stay."""

    @wraps(compile)
    def routed(model: Any = None, **named: Any) -> Any:
        if named.get("backend") in _DEFAULTS:
            named["backend"] = "sste"
        return compile(model, **named)

    return routed
