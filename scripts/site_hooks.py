"""Files of the repository that the site shows besides docs/.  Pages link to them as on GitHub, by ``../PATH``."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
FOLDER = "repository"  # of the site, where these files lie as in the repository
PATTERNS = ("DESIGN.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/results/*.md", "examples/*.py")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them, outside of the navigation."""
    for path in sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern)):
        name = f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
        level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, content=path.read_text(), inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links lead to them, and theirs to pages."""
    if page.file.src_uri.startswith(f"{FOLDER}/"):
        return markdown.replace("](README.md", "](../index.md").replace("](docs/", "](../")
    return re.sub(r"\]\(\.\./", f"]({FOLDER}/", markdown)
