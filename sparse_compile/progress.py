"""What takes long shows how far it is: in a terminal, after two seconds."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_PATIENCE = 2.0  # seconds


def tracked(items: Sequence[T], doing: str) -> Iterable[T]:
    """The items, one by one; a bar shows how many are done.

    Args:
        doing: what is done to them: "measuring linears".
    """
    # disable=None: without a terminal, nothing is shown.
    return tqdm(items, f"sparse_compile: {doing}", delay=_PATIENCE, leave=False, disable=None)


@contextmanager
def announced(doing: str) -> Iterator[None]:
    """One action, of which no part can be counted: a line says what is done if it takes long."""
    timer = Timer(_PATIENCE, _announce, (doing,))
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _announce(doing: str) -> None:
    sys.stderr.write(f"sparse_compile: {doing} ...\n")
    sys.stderr.flush()
