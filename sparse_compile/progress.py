"""What takes long shows how far it is: in a terminal, after two seconds."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from threading import Timer
from time import monotonic
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 2.0  # seconds


def tracked(items: Sequence[T], doing: str) -> Iterator[T]:
    """The items, one by one; how many are done is shown by tqdm where it is installed, else a line each two seconds.

    Args:
        doing: what is done to them: "measuring linears".
    """
    if not sys.stderr.isatty():
        yield from items
    elif find_spec("tqdm") is not None:
        from tqdm import tqdm

        yield from tqdm(items, f"sparse_compile: {doing}", delay=_PATIENCE, leave=False)
    else:
        yield from _in_lines(items, doing)


def _in_lines(items: Sequence[T], doing: str) -> Iterator[T]:
    shown = monotonic()
    for done, item in enumerate(items):
        if monotonic() - shown >= _PATIENCE:
            _say(f"{doing}: {done} of {len(items)}")
            shown = monotonic()
        yield item


@contextmanager
def announced(doing: str) -> Iterator[None]:
    """One action: a line says what is done if it takes long."""
    timer = Timer(_PATIENCE, _say, (f"{doing} ...",))
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(text: str) -> None:
    sys.stderr.write(f"sparse_compile: {text}\n")
    sys.stderr.flush()
