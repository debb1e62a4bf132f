"""``python -m sparse_compile report FILE.json``: a report that was written before, as text or as HTML."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_compile.reporting.report import Report
from sparse_compile.reporting.report_file import check_file


def view(arguments: Sequence[str]) -> None:
    """Print a report, or write it as HTML."""
    parser = argparse.ArgumentParser(
        prog="python -m sparse_compile report", description="Show a report that was written as JSON."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the report, as JSON")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write it there as one HTML file, and print nothing")
    args = parser.parse_args(arguments)
    try:
        report = Report.from_json(args.file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"{args.file}: {error}")
    if args.html is None:
        sys.stdout.write(f"{report}\n")
    else:
        try:
            check_file(args.html, [".html"])
        except ValueError as error:
            parser.error(str(error))
        report.to_html(args.html)
