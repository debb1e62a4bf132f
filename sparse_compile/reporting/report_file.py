"""Where a report may be written; asked while PyTorch is being imported, so nothing heavy is imported here."""

import os
from collections.abc import Sequence
from pathlib import Path

FORMATS = (".txt", ".json", ".html")


def check_file(path: Path, formats: Sequence[str] = FORMATS) -> None:
    """What everyone asks who is given a file to write a report to, before there is a report.

    Raises:
        ValueError: its name ends in none of the formats, its folder is not there, or it cannot be written.
    """
    # os.path and os.access answer, where pathlib may raise: of names that are too long, or folders that hide.
    folder = path.parent
    if path.suffix not in formats:
        raise ValueError(f"the report file {str(path)!r} must end in {' or '.join(formats)}")
    if not os.path.isdir(folder):
        raise ValueError(f"there is no folder {str(folder)!r} for the report file {str(path)!r}; create it first")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ValueError(f"the report file {str(path)!r} cannot be written; choose another, or change its permissions")
