"""Fill in the figures of README.md and docs/ from benchmarks/results/*.json.

    python scripts/render_docs.py            rewrites the pages and the charts
    python scripts/render_docs.py --check    prints what would change; the exit status is 1 if anything would

A figure stands in a page as plain text, between comments that say what it is, an expression of the functions in
``scripts/figures/``:

    <!-- = speed('llama-8b', 'sste', 'H200') -->1.58x<!-- / -->

A table stands on lines of its own, with an empty line around it:

    <!-- = speed_table() -->

    | model | ...

    <!-- / -->

A figure that is no measurement, as a threshold of the code, says where it comes from, ``given:`` and a reason:

    <!-- given: the smallest gain that passes/choose.py accepts -->5 %<!-- / -->
"""

import argparse
import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import charts
from figures import code, kernels, losses, provenance, steps
from figures.results import FigureError

ROOT = Path(__file__).parents[1]
CHARTS = ROOT / "docs" / "charts"
END = "<!-- / -->"
_MARKED = re.compile(rf"<!-- (=|given:) (.*?) -->(.*?){re.escape(END)}", re.DOTALL)
_MARK = re.compile(rf"<!-- (?:=|given:).*?-->|{re.escape(END)}", re.DOTALL)
# What pages may call: the functions that return text.
ACCESSORS: Mapping[str, Callable[..., str]] = {
    name: value
    for module in (provenance, steps, losses, kernels, code)
    for name, value in vars(module).items()
    if inspect.isfunction(value) and value.__module__ == module.__name__
    if not name.startswith("_") and inspect.signature(value).return_annotation is str
}


class PageError(Exception):
    """A page has a marker that cannot be read."""


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(text: str) -> str:
    """The text of a page with its figures.

    Raises:
        PageError: a marker has no end, has an expression that fails, or stands where Markdown would not see a comment.
    """
    marks = _MARK.findall(text)
    if marks[1::2] != [END] * (len(marks) // 2) or len(marks) % 2 or END in marks[::2]:
        raise PageError(f"each marker needs its {END}, and none may stand in another one: {marks}")

    def filled(found: re.Match[str]) -> str:
        kind, what, inside = found.groups()
        alone = not text[: found.start()].rpartition("\n")[2].strip()
        if alone != inside.startswith("\n\n"):
            raise PageError(
                f"the marker of {what!r} must stand inside of a line, or alone on one with empty lines around its "
                f"table: Markdown takes a comment at the beginning of a line for a block"
            )
        if kind == "given:":
            return found[0]
        shown = _value(what)
        return f"<!-- = {what} -->" + (f"\n\n{shown}\n\n" if alone else shown) + END

    return _MARKED.sub(filled, text)


def _value(expression: str) -> str:
    """What an expression of a page says.  Pages are part of the project, as this script is."""
    try:
        value = eval(expression, {"__builtins__": {}}, dict(ACCESSORS))
    except (FigureError, KeyError, NameError, SyntaxError, TypeError) as error:
        raise PageError(
            f"{expression!r} fails: {type(error).__name__}: {error}; allowed are calls of these functions in "
            f"scripts/figures: {', '.join(sorted(ACCESSORS))}"
        ) from error
    if not isinstance(value, str):
        raise PageError(f"{expression!r} is {value!r}; allowed is what gives text")
    return value


def unmarked(text: str) -> str:
    """The text of a page without its marked figures and its comments."""
    return re.sub(r"<!--.*?-->", "", _MARKED.sub("", text), flags=re.DOTALL)


def outputs() -> Iterator[tuple[Path, str]]:
    """Each file that is made, and what it must hold."""
    for page in pages():
        try:
            yield page, rendered(page.read_text())
        except PageError as error:
            raise PageError(f"{page.relative_to(ROOT)}: {error}") from error
    for name, (chart, theme) in charts.CHARTS.items():
        yield CHARTS / name, chart(theme)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a file is not up to date")
    check = parser.parse_args().check
    changed = False
    for path, wanted in list(outputs()):  # all, before any is written: one may have an error
        found = path.read_text() if path.exists() else ""
        if found != wanted:
            changed = True
            name = str(path.relative_to(ROOT))
            if check:
                old, new = found.splitlines(keepends=True), wanted.splitlines(keepends=True)
                sys.stdout.writelines(difflib.unified_diff(old, new, name, f"{name}, from the results"))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(wanted)
                print(name)
    if check and changed:
        raise SystemExit("The pages differ from benchmarks/results; python scripts/render_docs.py rewrites them.")


if __name__ == "__main__":
    try:
        main()
    except PageError as error:
        raise SystemExit(f"render_docs.py: {error}") from error
