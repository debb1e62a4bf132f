"""``python -m sparse_compile``: ``train.py ...`` (``launch``), ``report FILE`` (``view``) and ``check PATH``."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from sparse_compile.autoload import VARIABLE
from sparse_compile.report import check_file
from sparse_compile.view import view

_DESCRIPTION = 'Run a script whose torch.compile calls, where they name no backend or "inductor", use "sste".'


def main() -> None:
    if sys.argv[1:2] == ["report"]:
        return view(sys.argv[2:])
    if sys.argv[1:2] == ["check"]:
        from sparse_compile.check import check

        return check(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m sparse_compile", description=_DESCRIPTION)
    parser.add_argument("--auto", action="store_true", help="compile the models of a script that compiles none itself")
    parser.add_argument(
        "--option",
        dest="options",
        action="append",
        type=_option,
        default=[],
        metavar="NAME=VALUE",
        help="an option of the backend for every compilation, as sste.report_measure=true; may be repeated",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report there: FILE.txt, .json or .html")
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module, as for python -m")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()
    if not args.module and not Path(args.script).is_file():
        parser.error(f"there is no file {args.script!r}; for a module, say -m {args.script}")
    if args.report is not None:
        try:
            check_file(args.report)
        except ValueError as error:
            parser.error(str(error))
    if VARIABLE in os.environ:
        parser.error(f"{VARIABLE} is set, which does without this launcher; unset it, or run the script by itself")
    options: dict[str, Any] = dict(args.options)
    if options:
        from sparse_compile.options import read_options

        try:
            read_options(None, options)
        except ValueError as error:
            parser.error(str(error))
    if "sste.report" in options:
        options["sste.report"] = Path(options["sste.report"]).absolute()  # the script may go to another folder

    from sparse_compile.launch import run

    return run(
        args.script, args.arguments, module=args.module, auto=args.auto, options=options, report_file=args.report
    )  # fmt: skip


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("sste."):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form sste.NAME=VALUE")
    if value.isdecimal():
        return name, int(value)
    return name, {"true": True, "false": False}.get(value.lower(), value)


if __name__ == "__main__":
    main()
