"""The kinds of values that options have: what is allowed, how text becomes such a value, what the error says."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Generic, TypeVar

from sparse_compile.reporting.report_file import FORMATS, check_file

T = TypeVar("T")
U = TypeVar("U")


class NotAllowed(Exception):
    """Raised by the reader of a kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind(Generic[T]):
    """The values that an option may have.

    Attributes:
        read: checks and converts a value; raises ``NotAllowed``.
        parse: converts text from a command line; returns the text itself where it cannot.
        names: the allowed values that have a name.
        others: what else is allowed, in words.
        retired: names of earlier versions, and what says the same now.
    """

    read: Callable[[object], T]
    parse: Callable[[str], object] = str
    names: Sequence[str] = ()
    others: str = ""
    retired: Mapping[str, str] = field(default_factory=dict)

    def check(self, name: str, value: object, *, given: object) -> T:
        """The value of the option called ``name``, converted.

        Raises:
            ValueError: it is not allowed; the message shows what was ``given``, and the nearest allowed name.
        """
        try:
            return self.read(value)
        except NotAllowed:
            if (instead := self.retired.get(str(given))) is not None:
                raise ValueError(f"option {name!r} is {given!r}, which was retired; say {instead} instead") from None
            hint = nearest(str(given), self.names)
            allowed = " or ".join(part for part in (listed(self.names), self.others) if part)
            verb = "are" if self.names else "is"
            raise ValueError(f"option {name!r} is {given!r}; {hint}allowed {verb} {allowed}") from None

    def as_markdown(self) -> str:
        """What is allowed, for the table of options."""
        named = ", ".join(f'`"{name}"`' for name in self.names)
        return " or ".join(part for part in (named, self.others) if part)


def choice(names: Iterable[str]) -> Kind[str]:
    """One of some names."""
    allowed = tuple(names)

    def read(value: object) -> str:
        if value not in allowed:
            raise NotAllowed
        return str(value)

    return Kind(read=read, names=allowed)


def choice_or(names: Iterable[str], instance_of: type[U], retired: Mapping[str, str] | None = None) -> Kind[str | U]:
    """One of some names, or an object."""
    named = choice(names)

    def read(value: object) -> str | U:
        return value if isinstance(value, instance_of) else named.read(value)

    return Kind(read=read, names=named.names, others=f"a {instance_of.__name__}", retired=retired or {})


def name_or_glob(names: Iterable[str]) -> Kind[str]:
    """One of some names, or a pattern of the names of modules."""

    def read(value: object) -> str:
        if not isinstance(value, str) or not value:
            raise NotAllowed
        return value

    return Kind(read=read, names=tuple(names), others="a glob of module names")


def listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))


def nearest(given: str, names: Iterable[str]) -> str:
    """A suggestion, if a name is close to what was given."""
    close = get_close_matches(given, sorted(names))
    return f"did you mean {close[0]!r}? " if close else ""


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise NotAllowed
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise NotAllowed
    return value


def _number(value: object) -> float:
    """From text too, as scripts take it from their own command lines."""
    if isinstance(value, bool):
        raise NotAllowed
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise NotAllowed from None
    if not (math.isfinite(number) and number >= 0):
        raise NotAllowed
    return number


def _count_or_share(value: object) -> int | float:
    if isinstance(value, int):
        return _count(value)
    share = _number(value)
    if share >= 1:
        raise NotAllowed
    return share


def _above_zero(read: Callable[[object], T]) -> Callable[[object], T]:
    def read_above_zero(value: object) -> T:
        number = read(value)
        if not number:
            raise NotAllowed
        return number

    return read_above_zero


def _report_file(value: object) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, (str, PathLike)):
        raise NotAllowed
    check_file(Path(value))
    return Path(value)


def _plan_file(value: object) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, (str, PathLike)) or not Path(value).is_file():
        raise NotAllowed
    return Path(value)


def _parse_switch(text: str) -> object:
    return {"true": True, "false": False}.get(text.lower(), text)


def _parse_count(text: str) -> object:
    return int(text) if text.isdecimal() else text


def _parse_number(text: str) -> object:
    try:
        return float(text)
    except ValueError:
        return text


def _parse_count_or_share(text: str) -> object:
    return int(text) if text.isdecimal() else _parse_number(text)


SWITCH = Kind(read=_switch, parse=_parse_switch, others="True or False")
STEPS = Kind(read=_count, parse=_parse_count, others="a number of optimizer steps, 0 for none")
INTERVAL = Kind(
    read=_above_zero(_count), parse=_parse_count, others="a number of optimizer steps, 1 for every step"
)  # fmt: skip
NUMBER = Kind(read=_number, parse=_parse_number, others="a finite number, 0 or above")
FACTOR = Kind(read=_above_zero(_number), parse=_parse_number, others="a finite number above 0")
STEPS_OR_SHARE = Kind(
    read=_count_or_share, parse=_parse_count_or_share, others="a number of optimizer steps, or a share below 1.0"
)  # fmt: skip
REPORT_FILE = Kind(read=_report_file, others=f"a file path that ends in {', '.join(FORMATS)}")
PLAN_FILE = Kind(read=_plan_file, others="the path of a report in JSON")
