"""``python -m sparse_compile options``: the table of the backend's options, which docs/options.md has as well."""

import argparse
import shutil
import sys
from textwrap import fill

_HEADERS = ("option", "default", "allowed", "meaning")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "options",
        help="list the options of the backend",
        description='List the options of torch.compile(model, backend="sste", options={NAME: value}) and of --option '
        "NAME=VALUE.",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.set_defaults(execute=show_options)


def show_options(args: argparse.Namespace) -> None:
    sys.stdout.write((as_markdown() if args.markdown else as_text()) + "\n")


def as_markdown() -> str:
    from sparse_compile.options import option_rows

    lines = [_HEADERS, ("---",) * len(_HEADERS), *option_rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_text() -> str:
    """As wide as the terminal."""
    from tabulate import tabulate

    from sparse_compile.options import option_rows

    rows = [[cell.replace("`", "") for cell in row] for row in option_rows()]
    widths = [max(len(row[0]) for row in rows), 16, 26]
    gaps = 2 * len(widths)
    widths.append(max(shutil.get_terminal_size().columns - sum(widths) - gaps, 30))
    wrapped = [
        [fill(cell, width, break_on_hyphens=False) for cell, width in zip(row, widths, strict=True)] for row in rows
    ]
    return tabulate(wrapped, headers=_HEADERS, disable_numparse=True)
