"""What the command line says of a script that is run through the backend."""

import argparse
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from sparse_compile.launcher.autoload import VARIABLE


def add_script(parser: ArgumentParser) -> None:
    """Let a parser read ``[--auto] [--option NAME=VALUE] [-m] SCRIPT ARGUMENTS``."""
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
    parser.add_argument("-m", dest="module", action="store_true", help="SCRIPT is a module, as for python -m")
    parser.add_argument("script", metavar="SCRIPT")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="of the script")


def check_script(parser: ArgumentParser, args: Namespace) -> None:
    """End with the parser's error where the script cannot be run."""
    if not args.module and not Path(args.script).is_file():
        parser.error(f"there is no file {args.script!r}; for a module, say -m {args.script}")
    if VARIABLE in os.environ:
        parser.error(f"{VARIABLE} is set, which does without this launcher; unset it, or run the script by itself")


def _option(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("sste."):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form sste.NAME=VALUE")
    if value.isdecimal():
        return name, int(value)
    return name, {"true": True, "false": False}.get(value.lower(), value)
