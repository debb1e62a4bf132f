"""One run of ``tune-decay``, in a process of its own.

    python -m sparse_compile.decay_search.run REQUEST SCRIPT ARGUMENTS

REQUEST is JSON, see ``main``; the result is written to its ``file``: ``weights`` as ``FlipCounts.by_weight`` returns
them, and whether the script was ``stopped``.  Where the script fails, nothing is written.
"""

import json
import random
import sys
from pathlib import Path

import torch

from sparse_compile.decay_search.flip_counter import Enough, FlipCounts
from sparse_compile.launcher.run_script import run
from sparse_compile.reporting.process_report import report


def main() -> None:
    request, script, *arguments = sys.argv[1:]
    asked = json.loads(request)
    # Scripts that set no seed train the same model in all runs.
    random.seed(0)
    torch.manual_seed(0)
    seen, destined = FlipCounts(asked["steps"]), report()
    stopped = False
    try:
        run(
            script,
            arguments,
            module=asked["module"],
            auto=asked["auto"],
            options=asked["options"],
            overrides=asked["overrides"],
        )
    except Enough:
        stopped = True
    except SystemExit as ended:
        if ended.code:
            raise
    weights = seen.by_weight()
    if not weights:
        sys.stderr.write(f"{destined}\n")  # why nothing is pruned
    Path(asked["file"]).write_text(json.dumps({"weights": weights, "stopped": stopped}), encoding="utf-8")


if __name__ == "__main__":
    main()
