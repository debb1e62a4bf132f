"""``python -m sparse_compile run SCRIPT``, or without ``run``: runs a script through this backend."""

import argparse
from pathlib import Path

from sparse_compile.launcher.arguments import add_script, read_script
from sparse_compile.reporting.report_file import check_file

_DESCRIPTION = (
    'Run a script. Its calls of torch.compile and Module.compile use the backend "sste" if they name no backend or '
    '"inductor".'
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "run",
        help="run a training script with the backend; this is the default command",
        description=_DESCRIPTION,
        allow_abbrev=False,
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report to FILE: .txt, .json or .html")
    add_script(parser)
    parser.set_defaults(parser=parser, execute=launch)


def launch(args: argparse.Namespace) -> None:
    """Run the script in this process, which becomes the script's."""
    script = read_script(args)
    options = dict(script.options)
    try:
        if args.report is not None:
            check_file(args.report)
        if options:
            from sparse_compile.options import read_options

            read_options(None, options)
    except ValueError as error:
        args.parser.error(str(error))
    if "sste.report" in options:
        options["sste.report"] = Path(options["sste.report"]).absolute()  # the script may change the folder

    from sparse_compile.launcher.run_script import run

    run(
        script.name, script.arguments, module=script.module, auto=script.auto, options=options, report_file=args.report
    )  # fmt: skip
