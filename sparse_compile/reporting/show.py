"""``python -m sparse_compile report FILE.json``: shows a saved report, as text or as HTML."""

import argparse
import sys
from pathlib import Path

from sparse_compile.reporting.report import Report
from sparse_compile.reporting.report_file import check_file


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report", help="show a report that was saved as JSON", description="Show a report that was saved as JSON."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the report, as JSON")
    parser.add_argument(
        "--html", type=Path, metavar="OUT", help="write the report to OUT as a single HTML file instead of printing it"
    )
    parser.set_defaults(parser=parser, execute=show)


def show(args: argparse.Namespace) -> None:
    """Print the report, or write it as HTML."""
    try:
        report = Report.from_json(args.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        args.parser.error(f"{args.file}: {error}")
    if args.html is None:
        sys.stdout.write(f"{report}\n")
        return
    try:
        check_file(args.html, [".html"])
    except ValueError as error:
        args.parser.error(str(error))
    report.to_html(args.html)
