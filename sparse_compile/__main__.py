"""``python -m sparse_compile train.py ...``: see ``launch``."""

import argparse
from pathlib import Path

from sparse_compile.launch import run


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_compile",
        description='Run a script whose torch.compile calls, where they name no backend or "inductor", use "sste".',
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report there: FILE.json, or a table")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module, as for python -m")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()
    if not args.module and not Path(args.script).is_file():
        parser.error(f"there is no file {args.script!r}; for a module, say -m {args.script}")
    if args.report is not None and not args.report.parent.is_dir():
        parser.error(f"there is no folder {str(args.report.parent)!r} for the report")
    run(args.script, args.arguments, module=args.module, report_file=args.report)


if __name__ == "__main__":
    main()
