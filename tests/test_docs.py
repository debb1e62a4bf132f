"""README.md and docs/: figures are those of the results, links lead somewhere, and the public API is described."""

import enum
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import sparse_compile

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness

import render_docs
from figures.code import zoo
from figures.steps import distributed_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
# A number with a unit: of time, speed, memory, rate, or a share.  "4 x 4096" is a shape.
UNITS = "ms|us|µs|s|%|per cent|GiB|MiB|GB|MB|GB/s|TB/s|TFLOP/s|W|times"
MEASURED = re.compile(rf"(?<![\w.,])[-+]?\d[\d.,]*\s?(?:(?:{UNITS})(?!\w)|x(?!\s?\d|\w))")


def test_figures_are_those_of_the_results() -> None:
    """``python scripts/render_docs.py`` writes them."""
    wrong = [str(path.relative_to(ROOT)) for path, wanted in render_docs.outputs() if path.read_text() != wanted]
    assert wrong == []


@pytest.mark.parametrize("page", render_docs.pages(), ids=lambda page: page.name)
def test_no_figure_is_written_by_hand(page: Path) -> None:
    assert MEASURED.findall(prose(page.read_text())) == [], "mark it: scripts/render_docs.py says how"


def prose(page: str) -> str:
    """What of a page is neither a marked figure nor code, the target of a link or a picture."""
    code = r"```[\s\S]*?```|^    (?! *[-*]).*$|`[^`]*`"
    return re.sub(rf"{code}|\]\([^)]*\)|<img[^>]*>", "", render_docs.unmarked(page), flags=re.MULTILINE)


def test_prose_is_what_is_read() -> None:
    page = (
        "4 ms `5 ms`\n\n    6 ms\n\n[7 ms](8 ms) <img alt='9 ms'>\n```sh\n10 ms\n```\n"
        "11 ms <!-- given: x -->12 ms<!-- / -->"
    )
    assert MEASURED.findall(prose(page)) == ["4 ms", "7 ms", "11 ms"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("takes 3 ms", True),
        ("1.58x as fast", True),
        ("1.5 x as fast", True),
        ("+1.9 % more", True),
        ("saves 40% of", True),
        ("18.4 GiB", True),
        ("1,894 TFLOP/s", True),
        ("3.5 times as long", True),
        ("4 x 4096 tokens", False),
        ("a 768x3072 weight", False),
        ("768 features, 2 GPUs, torch 2.11.0", False),
        ("50 million tokens", False),
    ],
)
def test_what_a_figure_is(text: str, found: bool) -> None:
    assert bool(MEASURED.search(text)) is found


def test_each_function_for_pages_is_used_by_one() -> None:
    pages = "".join(page.read_text() for page in render_docs.pages())
    assert render_docs.ACCESSORS.keys() == set(re.findall(r"<!-- = (\w+)\(", pages))


def test_marks_are_filled_in() -> None:
    shown = zoo("architectures")
    page = "of <!-- = zoo('architectures') -->9<!-- / --> and <!-- given: a rule -->5 %<!-- / -->"
    wanted = page.replace("9", shown)
    assert render_docs.rendered(page) == render_docs.rendered(wanted) == wanted
    assert render_docs.unmarked(page) == "of  and "
    table = "a\n\n<!-- = distributed_table() -->\n\nold\n\n<!-- / -->\n\nb"
    assert render_docs.rendered(table) == table.replace("old", distributed_table())


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("a <!-- = zoo('models') -->1<!-- / -->", "the zoo has no 'models'; there are 'architectures', 'name'"),
        ("a <!-- = zo('linears') -->1<!-- / -->", r"NameError: name 'zo' is not defined; allowed are calls of .* zoo"),
        ("a <!-- = 3 -->1<!-- / -->", "'3' is 3; allowed is what gives text"),
        ("a <!-- = zoo('linears' -->1<!-- / -->", "SyntaxError"),
        ("a <!-- = zoo('linears') -->1", "each marker needs its <!-- / -->"),
        ("a <!-- = zoo('linears') -->1\n<!-- = zoo('ffn') -->2<!-- / -->", "none may stand in another one"),
        ("<!-- = zoo('linears') -->1<!-- / --> linears", "must stand inside of a line, or alone on one"),
        ("a <!-- = zoo_measured() -->\n\n1\n\n<!-- / -->", "must stand inside of a line, or alone on one"),
    ],
)
def test_wrong_marks_are_explained(page: str, message: str) -> None:
    with pytest.raises(render_docs.PageError, match=message):
        render_docs.rendered(page)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("speed('llama-9b', 'sste', 'H200')", "0 results of part 'step llama-9b' on a device named 'H200'; allowed is"),
        ("speed('llama-8b', 'sste', 'H')", "2 results of part 'step llama-8b' on a device named 'H'"),
        ("speed('llama-8b', 'sst', 'H200')", r"0 rows of {'kind': 'sst'}; \(kind\) is one of \('bf16',\)"),
        ("loss_over_bf16('boosted')", "no arm 'boosted'; there are 'bf16', 'fp8', 's-ste'"),
        ("emulated('boosted')", "no trial 'boosted' at 0.003; there are 'dense'"),
        ("head_loss('sste')", "no run 'sste'; there are 'sste, 0'"),
        ("best_of_rates('gpt2', 'ste')", "no runs of 'ste' in the setting 'gpt2'"),
        ("step_table('A100')", "no steps were measured on a device named 'A100'"),
        ("printed('bench_none', 'step', 'H200')", "no results of 'bench_none'; there are 'bench_distributed'"),
    ],
)
def test_what_the_results_do_not_hold_is_an_error(expression: str, message: str) -> None:
    with pytest.raises(render_docs.PageError, match=message):
        render_docs.rendered(f"a <!-- = {expression} -->1<!-- / -->")


def test_the_zoo_is_as_limits_says() -> None:
    architectures = json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text())["architectures"]
    assert min(found["cosine"] for found in architectures) >= 0.99
    assert min(found["lowest_cosine"] for found in architectures) >= 0.96
    partly = [found for found in architectures if found["training_reported"] != found["training_counted"]]
    assert len(partly) == 1
    assert not any(found["faults"] for found in architectures)


@pytest.mark.parametrize("path", [path for path in RESULTS if path.stem != "zoo"], ids=lambda path: path.stem)
def test_results_hold_one_current_run_of_each_benchmark_on_each_device(path: Path) -> None:
    parts = json.loads(path.read_text())
    assert all(title.endswith(f", {part['provenance']['device']}") for title, part in parts.items())
    assert path.with_suffix(".md").read_text() == harness.as_markdown(path.stem, parts)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1500


def test_links_of_the_readme_lead_somewhere() -> None:
    """Those of docs/ are checked by ``mkdocs build --strict``."""
    links = re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", README)
    targets = {link or source for link, source in links}
    local = {target for target in targets if not target.startswith("https://")}
    assert len(local) > 20
    for target in local:
        file, _, anchor = target.partition("#")
        assert (ROOT / file).is_file(), target
        assert not anchor or anchor in anchors(ROOT / file), target


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and MkDocs call them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_versions_of_the_readme_are_those_of_the_package() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in project
    assert '"torch>=2.11,<2.14"' in project
    for page in (README, (ROOT / "docs" / "index.md").read_text()):
        assert "3.10 or newer" in page
        assert "2.11 to 2.13" in page


def test_the_two_commands() -> None:
    assert "\n    bash scripts/train.sh\n" in README
    assert "\n    bash scripts/test.sh\n" in README


def public() -> Iterator[tuple[str, Any]]:
    """What users may import or the page of the API shows, with its public methods."""
    names = {f"sparse_compile.{name}" for name in sparse_compile.__all__}
    names |= set(re.findall(r"^::: (.+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    for name in sorted(names):
        module, _, attribute = name.rpartition(".")
        found = getattr(import_module(module), attribute)
        yield name, found
        if inspect.isclass(found):
            for method in sorted(vars(found).keys() | {n for base in found.__mro__[1:-1] for n in vars(base)}):
                value = inspect.getattr_static(found, method)
                of_package = getattr(
                    getattr(value, "fget", None) or getattr(value, "__func__", value), "__module__", ""
                )
                if (
                    not method.startswith("_")
                    and callable(getattr(value, "__get__", None))
                    and "sparse_compile" in str(of_package)
                ):
                    yield f"{name}.{method}", value


PUBLIC = dict(public())


def test_the_page_of_the_api_shows_all() -> None:
    shown = set(re.findall(r"^::: (.+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    assert {f"sparse_compile.{name}" for name in sparse_compile.__all__} <= shown


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_api_is_described(name: str) -> None:
    """Arguments, attributes and what is returned have an entry in the docstring, errors have one if any is raised."""
    found = PUBLIC[name]
    text = inspect.getdoc(found) or ""
    assert text, "no docstring"
    if isinstance(found, property):
        return
    if inspect.isclass(found):
        members = list(found.__members__) if issubclass(found, enum.Enum) else []
        if is_dataclass(found):
            members = [field for field in found.__dataclass_fields__ if not field.startswith("_")]
        assert [member for member in members if not described(member, text, "Attributes")] == []
        return
    function = getattr(found, "__func__", found)
    parameters = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    assert [parameter for parameter in parameters if not described(parameter, text, "Args")] == []
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert "Returns:" in text
    if re.search(r"^\s+raise ", inspect.getsource(function), re.MULTILINE):
        assert "Raises:" in text


def described(name: str, text: str, section: str) -> bool:
    entries = re.search(rf"^{section}:\n((?:    .*\n?|\n)+)", text, re.MULTILINE)
    names = re.findall(r"^    (\w+(?:, \w+)*):", entries[1], re.MULTILINE) if entries else []
    return name in {one for line in names for one in line.split(", ")}


def test_programs_that_are_named_are_there() -> None:
    """By documents and by scripts, as files of this checkout."""
    documents = [ROOT / ".ci" / "run", *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/*.sh")]
    name = re.compile(r"\b(?:benchmarks|docs|examples|scripts|tests)/[\w/]+\.(?:py|sh)\b")
    named = {(path.name, found) for path in documents for found in name.findall(path.read_text())}
    assert len(named) > 20
    assert [(page, found) for page, found in sorted(named) if not (ROOT / found).is_file()] == []
