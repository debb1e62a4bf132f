"""The zoo of architectures, and what the package says of itself."""

from figures.results import FigureError, as_day, content_of, listed


def zoo(field: str) -> str:
    """A count over the architectures of the zoo."""
    architectures = content_of("zoo")["architectures"]
    if field == "architectures":
        return str(len(architectures))
    if field not in architectures[0]:
        raise FigureError(f"the zoo has no {field!r}; there are {listed(['architectures', *architectures[0]])}")
    return str(sum(found[field] for found in architectures))


def zoo_cosine(field: str) -> str:
    """The lowest cosine of gradients over the architectures, rounded down."""
    return f"{int(100 * min(found[field] for found in content_of('zoo')['architectures'])) / 100:.2f}"


def zoo_measured() -> str:
    """When and with which versions the zoo ran."""
    found = content_of("zoo")
    return (
        f"{as_day(found['date'])}, torch {found['torch']}, transformers {found['transformers']}, timm {found['timm']}"
    )


def options_table() -> str:
    """The options of the backend, as ``python -m sparse_compile options --markdown`` prints them."""
    from sparse_compile.launcher.option_table import as_markdown

    return as_markdown()
