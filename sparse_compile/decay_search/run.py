"""One run of ``tune-decay``, in a process of its own.

    python -m sparse_compile.decay_search.run FILE REQUEST SCRIPT ARGUMENTS

REQUEST is JSON; a ``Result`` is written to FILE.  If the script fails, nothing is written.
"""

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from sparse_compile.decay_search.flip_counter import Enough, FlipCounts
from sparse_compile.decay_search.run_files import Request, Result
from sparse_compile.from_json import from_json
from sparse_compile.launcher.run_script import run
from sparse_compile.reporting.process_report import report


def main() -> None:
    file, asked, script, *arguments = sys.argv[1:]
    request = from_json(Request, asked)
    # Scripts that set no seed train the same model in all runs.
    random.seed(0)
    torch.manual_seed(0)
    seen, destined = FlipCounts(request.steps), report()
    stopped = False
    try:
        run(
            script,
            arguments,
            module=request.module,
            auto=request.auto,
            options=request.options,
            overrides=request.overrides,
        )
    except Enough:
        stopped = True
    except SystemExit as ended:
        if ended.code:
            raise
    weights = seen.by_weight()
    if not weights:
        sys.stderr.write(f"{destined}\n")  # why nothing is pruned
    result = Result(weights=weights, stopped=stopped)
    Path(file).write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
