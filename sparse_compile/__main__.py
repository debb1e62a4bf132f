"""``python -m sparse_compile train.py ...``: see ``launch``."""

import argparse
import os
from pathlib import Path

from sparse_compile.autoload import VARIABLE

_DESCRIPTION = 'Run a script whose torch.compile calls, where they name no backend or "inductor", use "sste".'


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sparse_compile", description=_DESCRIPTION)
    parser.add_argument("--auto", action="store_true", help="compile the models of a script that compiles none itself")
    parser.add_argument(
        "--option",
        dest="options",
        action="append",
        type=_option,
        default=[],
        metavar="NAME=VALUE",
        help="an option of the backend for every compilation, as sste.recipe=fp8; may be repeated",
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
    if VARIABLE in os.environ:
        parser.error(f"{VARIABLE} is set, which does without this launcher; unset it, or run the script by itself")
    options = dict(args.options)
    if options:
        from sparse_compile.options import read_options

        try:
            read_options(None, options)
        except ValueError as error:
            parser.error(str(error))

    from sparse_compile.launch import run

    run(
        args.script, args.arguments, module=args.module, auto=args.auto, options=options, report_file=args.report
    )  # fmt: skip


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("sste."):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form sste.NAME=VALUE")
    return name, {"True": True, "False": False}.get(value, value)


if __name__ == "__main__":
    main()
