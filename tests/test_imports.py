"""How the files of the package may import each other and PyTorch, read from their sources."""

import ast
import os
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import sparse_compile
from sparse_compile.torch_internals.private_names import PRIVATE_NAMES

# Files and sub-packages from top to bottom: each imports only what is in lines below its own.
# sparse_compile/__init__.py, which gives names of all of them lazily, is exempt; nothing imports it.
LAYERS = (
    ("__main__",),
    ("decay_search", "doctor"),
    ("backend", "launcher"),
    ("pipeline", "variants"),
    ("options",),
    ("passes", "runtime"),
    ("measuring", "export", "option_kinds"),
    ("linear", "weights", "reporting"),
    ("recipe", "testing"),
    ("projections",),
    ("kernels",),
    ("torch_internals", "errors", "from_json", "printable", "progress"),
)
FOLDER = Path(sparse_compile.__file__).parent


def sources() -> dict[str, ast.Module]:
    """By the name of a module, its source.  ``passes`` and ``kernels`` are linked folders."""
    files = [Path(folder, file) for folder, _, names in os.walk(FOLDER, followlinks=True) for file in names]
    files = [file.relative_to(FOLDER.parent) for file in files if file.suffix == ".py"]
    return {
        ".".join(file.with_suffix("").parts).removesuffix(".__init__"): ast.parse((FOLDER.parent / file).read_text())
        for file in files
    }


def imports(node: ast.AST) -> Iterator[str]:
    """What is imported, ``package.module.name``, within functions too, but not for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        else:
            yield from imports(child)


SOURCES = sources()


def module_of(name: str) -> str:
    """The module of the package that is imported with a name."""
    return name if name in SOURCES else name.rpartition(".")[0]


GRAPH = {
    module: {module_of(name) for name in imports(tree) if name.split(".")[0] == "sparse_compile"}
    for module, tree in SOURCES.items()
    if module != "sparse_compile"
}


def unit(module: str) -> str:
    """The file or sub-package that a module is in."""
    return module.split(".")[1]


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter(GRAPH).prepare()


def test_imports_point_one_way():
    depth = {name: index for index, names in enumerate(LAYERS) for name in names}
    assert set(depth) == set(map(unit, GRAPH))
    against = [
        f"{module} imports {imported}"
        for module, names in GRAPH.items()
        for imported in names
        if imported == "sparse_compile"
        or (unit(imported) != unit(module) and depth[unit(imported)] <= depth[unit(module)])
    ]
    assert against == []


def private_imports(module: str) -> set[str]:
    names = (name for name in imports(SOURCES[module]) if name.split(".")[0] == "torch")
    return {name for name in names if any(part.startswith("_") for part in name.split("."))}


def test_private_names_of_pytorch_are_imported_in_one_place_and_listed():
    listed = {f"{module}.{name}" for module, name in PRIVATE_NAMES}
    for module in GRAPH:
        private = private_imports(module)
        if unit(module) == "torch_internals":
            private = {name for name in private if not any(f"{known}.".startswith(f"{name}.") for known in listed)}
        assert private == set(), module
