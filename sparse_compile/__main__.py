"""``python -m sparse_compile``: ``train.py ...`` (``launch``), and ``report``, ``check`` and ``tune-decay``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sparse_compile.launcher.arguments import add_script, check_script
from sparse_compile.reporting.report_file import check_file
from sparse_compile.reporting.show import view

_DESCRIPTION = 'Run a script whose torch.compile calls, where they name no backend or "inductor", use "sste".'


def main() -> None:
    if sys.argv[1:2] == ["report"]:
        return view(sys.argv[2:])
    if sys.argv[1:2] == ["check"]:
        from sparse_compile.export.check import check

        return check(sys.argv[2:])
    if sys.argv[1:2] == ["tune-decay"]:
        from sparse_compile.decay_search.command import tune_decay

        return tune_decay(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m sparse_compile", description=_DESCRIPTION)
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report there: FILE.txt, .json or .html")
    add_script(parser)
    args = parser.parse_args()
    check_script(parser, args)
    if args.report is not None:
        try:
            check_file(args.report)
        except ValueError as error:
            parser.error(str(error))
    options: dict[str, Any] = dict(args.options)
    if options:
        from sparse_compile.options import read_options

        try:
            read_options(None, options)
        except ValueError as error:
            parser.error(str(error))
    if "sste.report" in options:
        options["sste.report"] = Path(options["sste.report"]).absolute()  # the script may go to another folder

    from sparse_compile.launcher.run_script import run

    return run(
        args.script, args.arguments, module=args.module, auto=args.auto, options=options, report_file=args.report
    )  # fmt: skip


if __name__ == "__main__":
    main()
