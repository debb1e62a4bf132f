"""``python -m sparse_compile``: a command and its arguments, or a script and its arguments."""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Container, Sequence

from sparse_compile.decay_search import command as tune_decay
from sparse_compile.doctor import command as doctor
from sparse_compile.export import check_command as check
from sparse_compile.launcher import command as run
from sparse_compile.launcher import option_table as options
from sparse_compile.reporting import show as report

_USAGE = """\
python -m sparse_compile [run] [--report FILE] [--auto] [--option NAME=VALUE] [-m] SCRIPT ...
       python -m sparse_compile COMMAND ..."""
_DESCRIPTION = 'Run a training script with the torch.compile backend "sste", inspect its results, or list the options.'
_EPILOG = """\
"python -m sparse_compile COMMAND --help" explains a command. If the first argument is not a command, "run" is implied.
To run a script that has the name of a command, type "run report" or "./report".
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Each command's module adds its parser, which sets ``execute``: a function of the parsed namespace.  Nothing
    imports torch before that function runs.

    Args:
        arguments: those of the command line if None.
    """
    parser = ArgumentParser(
        prog="python -m sparse_compile", usage=_USAGE, description=_DESCRIPTION, epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )  # fmt: skip
    # Without prog, the prefix of the commands' own usage would be _USAGE.
    commands = parser.add_subparsers(title="commands", metavar="COMMAND ARGUMENTS", required=True, prog=parser.prog)
    for module in (run, report, check, tune_decay, options, doctor):
        module.add_parser(commands)
    given = sys.argv[1:] if arguments is None else arguments
    args = parser.parse_args(_with_command(given, commands.choices))
    args.execute(args)


def _with_command(arguments: Sequence[str], commands: Container[str]) -> list[str]:
    """The arguments, with "run" in front if they name no command.

    The first argument alone decides. So everything after the name of a script is the script's own, and a script may be
    called like a command if its name is not the first argument: ``./report``, ``run report``, ``--auto report``.
    """
    if arguments and (arguments[0] in commands or arguments[0] in ("-h", "--help")):
        return list(arguments)
    return ["run", *arguments]


if __name__ == "__main__":
    main()
