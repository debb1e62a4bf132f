"""The files that benchmarks wrote, and how their numbers are written."""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


class FigureError(Exception):
    """A page asks for what the results do not hold."""


@cache
def content_of(program: str) -> Mapping[str, Any]:
    path = RESULTS / f"{program}.json"
    if not path.exists():
        raise FigureError(f"there are no results of {program!r}; there are {listed(sorted(RESULTS.glob('*.json')))}")
    content: Mapping[str, Any] = json.loads(path.read_text())
    return content


def listed(found: Iterable[Any]) -> str:
    return ", ".join(repr(one.stem if isinstance(one, Path) else one) for one in found)


def section_of(program: str, part: str, device: str) -> Mapping[str, Any]:
    """The results of one part of a program on a device."""
    of_part = {title: section for title, section in content_of(program).items() if title.rpartition(", ")[0] == part}
    found = [section for title, section in of_part.items() if device in title.rpartition(", ")[2]]
    if len(found) != 1:
        raise FigureError(
            f"{program} has {len(found)} results of part {part!r} on a device named {device!r}; "
            f"allowed is what names one of {listed(content_of(program))}"
        )
    section: Mapping[str, Any] = found[0]
    return section


def only_row(rows: Sequence[Mapping[str, Any]], what: str, **fields: Any) -> Mapping[str, Any]:
    """The only row that has these values in these fields."""
    found = [row for row in rows if all(row.get(name) == value for name, value in fields.items())]
    if len(found) != 1:
        known = sorted({str(tuple(row.get(name) for name in fields)) for row in rows})
        raise FigureError(
            f"{what} has {len(found)} rows of {fields}; ({', '.join(fields)}) is one of {', '.join(known)}"
        )
    return found[0]


def as_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def as_percent(share: float, digits: int = 1) -> str:
    text = f"{100 * share:+.{digits}f} %"
    return text if any(digit in text for digit in "123456789") else text[1:]


def as_day(written: str) -> str:
    day = date.fromisoformat(written)
    return f"{day.day} {day:%B %Y}"
