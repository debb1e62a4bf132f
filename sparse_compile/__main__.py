"""``python -m sparse_compile train.py ...``: see ``launch``; ``python -m sparse_compile report FILE``: see ``view``."""

import argparse
import sys
from pathlib import Path

from sparse_compile.launch import run
from sparse_compile.report import check_format
from sparse_compile.view import view


def main() -> None:
    if sys.argv[1:2] == ["report"]:
        return view(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m sparse_compile",
        description='Run a script whose torch.compile calls, where they name no backend or "inductor", use "sste".',
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report there: FILE.txt, .json or .html")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module, as for python -m")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()
    if not args.module and not Path(args.script).is_file():
        parser.error(f"there is no file {args.script!r}; for a module, say -m {args.script}")
    if args.report is not None:
        if not args.report.parent.is_dir():
            parser.error(f"there is no folder {str(args.report.parent)!r} for the report")
        try:
            check_format(args.report)
        except ValueError as error:
            parser.error(str(error))
    return run(args.script, args.arguments, module=args.module, report_file=args.report)


if __name__ == "__main__":
    main()
