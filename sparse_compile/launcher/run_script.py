"""Runs an unchanged script in which ``torch.compile`` uses this backend."""

import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_compile.launcher.route_compile import route


def run(
    script: str,
    arguments: Sequence[str],
    *,
    module: bool = False,
    auto: bool = False,
    options: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    report_file: Path | None = None,
) -> None:
    """Run a script as ``python script arguments...`` would, or a module as ``python -m``, through this backend.

    Args:
        auto: whether to compile models that the script does not compile.
        options: for every compilation; the script's own options take precedence.
        overrides: options that take precedence over the script's own.
        report_file: where to write the report when the process ends, see ``process_report.write_to``.
    """
    route(auto=auto, options=options, overrides=overrides, report_file=report_file, launched=True)
    sys.argv = [script, *arguments]
    if module:
        # As with python -m, the current folder comes first among the paths already.
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")
