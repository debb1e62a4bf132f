"""The arguments of commands that run a script through the backend."""

import os
from argparse import PARSER, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_compile.launcher.autoload import VARIABLE


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """A script to run.

    Attributes:
        name: path of a file, or name of a module.
        arguments: its own, as they were given.
        module: whether ``name`` is that of a module.
        auto: whether models that the script does not compile are compiled as well.
        options: those of the backend, parsed and each allowed on its own.
    """

    name: str
    arguments: Sequence[str]
    module: bool
    auto: bool
    options: Mapping[str, Any]


def add_script(parser: ArgumentParser) -> None:
    """Let a parser read ``[--auto] [--option NAME=VALUE] [-m] SCRIPT ARGUMENTS``.

    The parser must not allow abbreviations: it would look for them among the arguments of the script, too.
    """
    parser.add_argument("--auto", action="store_true", help="compile the model if the script does not")
    parser.add_argument(
        "--option",
        dest="options",
        action="append",
        type=_option,
        default=[],
        metavar="NAME=VALUE",
        help="set a backend option for every compilation, such as sste.recipe=fp8; can be repeated; "
        '"python -m sparse_compile options" lists the options',
    )
    parser.add_argument("-m", dest="module", action="store_true", help="run SCRIPT as a module, like python -m")
    # PARSER takes all that is left, as subcommands do; REMAINDER would drop a "--" among it.
    parser.add_argument("script", nargs=PARSER, metavar="SCRIPT", help="the script, followed by its own arguments")


def read_script(args: Namespace) -> Script:
    """The script to run; ends with the error of ``args.parser`` if it cannot be run."""
    name, *arguments = args.script[1:] if args.script[0] == "--" else args.script
    if not args.module and not Path(name).is_file():
        args.parser.error(
            f'there is no file {name!r}; to run a module, use -m {name}; "python -m sparse_compile --help" lists the '
            "commands"
        )
    if VARIABLE in os.environ:
        args.parser.error(
            f"{VARIABLE} is set and already enables the backend; unset it, or run the script without this launcher"
        )
    try:
        options = _parsed(args.options)
    except ValueError as error:
        args.parser.error(str(error))
    return Script(name=name, arguments=arguments, module=args.module, auto=args.auto, options=options)


def _option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.startswith("sste."):
        raise ArgumentTypeError(f"{text!r} is not of the form sste.NAME=VALUE")
    return name, value


def _parsed(options: Sequence[tuple[str, str]]) -> dict[str, Any]:
    if not options:
        return {}
    from sparse_compile.options import parse_option  # imports torch

    return {name: parse_option(name, value) for name, value in options}
