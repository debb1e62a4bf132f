"""Source files that the Python installation holds, as tokens of a byte-pair encoding that is trained on them."""

import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HELD_OUT = 50  # one file of so many is held out
_TRAINED_ON = 30_000_000  # characters, for the encoding
_BATCH = 256  # files that are encoded together
_PIECE = 100_000  # bytes of another text that one thread encodes


def tokens(vocabulary: int, at_least: int | None) -> tuple[Tensor, Tensor]:
    """Training and held-out tokens, int32, of files in an order that is shuffled once and for all.

    Files are taken until there are tokens enough, and all where ``at_least`` is None.  The tokens are kept in the
    folder of temporary files.

    Raises:
        SystemExit: the installation holds less text.
    """
    kept = _kept(vocabulary, f"{at_least or 'all'}.pt")
    if not kept.exists():
        torch.save(_encoded(vocabulary, at_least), kept)
    train, validation = torch.load(kept)
    return train, validation


def tokens_of(file: Path, vocabulary: int) -> Tensor:
    """Tokens, int32, of another text, in the encoding of the Python sources; kept like these."""
    text = file.read_bytes()
    kept = _kept(vocabulary, f"{file.name}-{zlib.crc32(text):08x}.pt")
    if not kept.exists():
        pieces = [text[start : start + _PIECE].decode(errors="replace") for start in range(0, len(text), _PIECE)]
        encoded = _encoding(vocabulary, texts).encode_batch(pieces)
        torch.save(torch.tensor([token for piece in encoded for token in piece.ids], dtype=torch.int32), kept)
    found: Tensor = torch.load(kept)
    return found


def _kept(vocabulary: int, name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"python-source-{vocabulary}-{name}"


def _encoding(vocabulary: int, make_texts: Callable[[], list[str]]) -> "Tokenizer":
    """Made of the first texts, and kept."""
    from tokenizers import ByteLevelBPETokenizer, Tokenizer

    kept = _kept(vocabulary, "encoding.json")
    if not kept.exists():
        encoding = ByteLevelBPETokenizer()
        encoding.train_from_iterator(_first(make_texts(), _TRAINED_ON), vocab_size=vocabulary, show_progress=False)
        encoding.save(str(kept))
    return Tokenizer.from_file(str(kept))


def _encoded(vocabulary: int, at_least: int | None) -> tuple[Tensor, Tensor]:
    found = texts()
    encoding = _encoding(vocabulary, lambda: found)
    parts: dict[bool, list[np.ndarray]] = {True: [], False: []}
    count = 0
    for start in range(0, len(found), _BATCH):
        for offset, encoded in enumerate(encoding.encode_batch(found[start : start + _BATCH])):
            held_out = (start + offset) % _HELD_OUT == 0
            parts[held_out].append(np.array(encoded.ids, dtype=np.int32))
            count += 0 if held_out else len(encoded.ids)
        if at_least is not None and count >= at_least:
            break
    if at_least is not None and count < at_least:
        raise SystemExit(f"the Python sources installed here have {count:,} tokens; asked for were {at_least:,}")
    train, validation = (torch.from_numpy(np.concatenate(parts[held_out])) for held_out in (False, True))
    return train, validation


def texts() -> list[str]:
    """Files of the standard library and of the installed packages, without duplicates."""
    names = sysconfig.get_paths()
    files = sorted(
        {path.resolve() for key in ("stdlib", "purelib", "platlib") for path in Path(names[key]).rglob("*.py")}
    )
    unique = dict.fromkeys(text for file in files if (text := file.read_text(errors="replace")).strip())
    found = list(unique)
    return [found[index] for index in np.random.default_rng(0).permutation(len(found))]


def _first(texts: list[str], characters: int) -> Iterator[str]:
    """Whole files, up to so many characters."""
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text
