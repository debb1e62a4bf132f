"""Where a graph comes from: the function that dynamo traced, why the graph ends, which dimensions may change."""

import ast
import linecache
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

from torch import SymInt, Tensor
from torch.fx import GraphModule

from sparse_compile.torch_internals.dynamo import compile_id, graph_end
from sparse_compile.torch_internals.graph import example_value, parameter_name, user_frames
from sparse_compile.torch_internals.sizes import hint


def origin(graph_module: GraphModule, modules: Iterable[str]) -> dict[str, Any]:
    """The fields of ``GraphReport`` that say so.

    Args:
        modules: names of the graph's linears.
    """
    ends, ends_at, advice = graph_end(graph_module)
    traced = (user_frames(node) for node in graph_module.graph.nodes if node.op.startswith("call_"))
    file, line, function, _ = next((frames[0] for frames in traced if frames), ("", 0, "", ""))
    return {
        "id": compile_id(graph_module),
        "origin": _qualified_name(file, line) or function,
        "origin_at": f"{file}:{line}" if file else "",
        "modules": _common(modules),
        "ends": ends,
        "ends_at": ends_at,
        "hint": advice,
        "dynamic": tuple(_dynamic(graph_module)),
    }


def _qualified_name(file: str, line: int) -> str:
    """``SmallGPT.forward`` for a line inside of it; empty where the source is not to be had."""
    try:
        tree: ast.AST | None = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ""
    names: list[str] = []
    while tree is not None:
        tree = next((child for child in ast.walk(tree) if child is not tree and _holds(child, line)), None)
        if isinstance(tree, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names.append(tree.name)
    return ".".join(names)


def _holds(node: ast.AST, line: int) -> bool:
    if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return False
    return node.lineno <= line <= (node.end_lineno or node.lineno)


def _common(modules: Iterable[str]) -> str:
    """The innermost module around all of them."""
    parents = (name.split(".")[:-1] for name in modules)
    levels = takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    return ".".join(names[0] for names in levels)


def _dynamic(graph_module: GraphModule) -> Iterable[str]:
    for node in graph_module.graph.find_nodes(op="placeholder"):
        value = example_value(node)
        if isinstance(value, Tensor):
            for dimension, size in enumerate(value.shape):
                if isinstance(size, SymInt):
                    traced = hint(size)
                    known = "depends on data" if traced is None else f"{traced} when traced"
                    yield f"{parameter_name(node)}.size({dimension}) = {size} ({known})"
