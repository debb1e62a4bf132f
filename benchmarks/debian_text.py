"""A text of another domain than Python sources to validate on: Debian's documentation of Linux and of Python.

    python benchmarks/debian_text.py OUT.txt [PACKAGE...]

On Debian: it downloads the packages by apt-get, unpacks them in a temporary folder, and writes what their pages say.
"""

import argparse
import gzip
import html.parser
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("linux-doc", "python3-doc", "debian-policy")
_SUFFIXES = (".html", ".txt", ".rst")
_MOST = 10_000_000  # characters of a package


class _Words(html.parser.HTMLParser):
    """What a page says, without its markup, scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style") and self._hidden > 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def words(name: str, text: str) -> str:
    """What a file says: of HTML without its markup; without blank lines."""
    if name.endswith(".html"):
        page = _Words()
        page.feed(text)
        text = "".join(page.parts)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines() if line.strip())


def documents(folder: Path) -> Iterator[str]:
    """Of all files below a folder that hold text, each once, in the order of their paths."""
    seen = set()
    for path in sorted(folder.rglob("*")):
        name = path.name.removesuffix(".gz")
        if not (path.is_file() and not path.is_symlink() and name.endswith(_SUFFIXES)):
            continue
        opened = gzip.open if path.name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8", errors="replace") as file:
            text = words(name, file.read())
        if text and text not in seen:
            seen.add(text)
            yield text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("packages", nargs="*", default=PACKAGES, help=f"default: {' '.join(PACKAGES)}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # Packages without pages of their own name the one that has them.
        depended = subprocess.run(
            ["apt-cache", "depends", "--important", *args.packages], check=True, capture_output=True, text=True
        ).stdout
        named = {line.split()[-1] for line in depended.splitlines() if "-doc" in line.split()[-1]}
        wanted = sorted({*args.packages, *named})
        subprocess.run(["apt-get", "-qq", "download", *wanted], cwd=folder, check=True)
        written = 0
        with args.out.open("w", encoding="utf-8") as out:
            for package in sorted(Path(folder).glob("*.deb")):
                unpacked = package.with_suffix("")
                subprocess.run(["dpkg", "-x", package, unpacked], check=True)
                room = _MOST
                for text in documents(unpacked):
                    room -= out.write(text[:room])
                written += _MOST - room
    print(f"{args.out}: {written:,} characters")


if __name__ == "__main__":
    main()
