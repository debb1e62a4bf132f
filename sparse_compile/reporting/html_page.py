"""A page of HTML in one file that needs nothing else: no script, no network.

Python has the numbers, ``templates`` their looks.  All text is escaped, wherever it comes from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from sparse_compile.reporting.text import short


def render(template: str, **values: object) -> str:
    """The page that a template makes of the values."""
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sparse_compile.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["short"] = short
    return environment


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Of a bar.

    Attributes:
        share: of the width that bars may have.
        colour: classes of the style sheet.
    """

    share: float
    colour: str
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """Pieces one after another, a name before them, and a text behind."""

    name: str
    pieces: Sequence[Piece]
    text: str


@dataclass(frozen=True, slots=True)
class Column:
    """Of a table.

    Attributes:
        key: of its cells, in the lines.
        kind: ``"number"``, ``"whole"`` if the cells are never wrapped, or nothing.
    """

    key: str
    header: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Lines of cells by the keys of their columns."""

    columns: Sequence[Column]
    lines: Sequence[Mapping[str, Any]]


def table(columns: Sequence[Column], lines: Sequence[Mapping[str, Any]]) -> Table:
    """Of the first column, and of those that hold something."""
    first, *others = columns
    return Table([first, *(column for column in others if any(line[column.key] for line in lines))], lines)
