"""Whether a user's Triton kernel is elementwise, as fused activation functions are: told from its source."""

import ast
import textwrap
from typing import Any

# Functions of triton.language that combine elements, by their last names; each of the rest keeps them apart.
_COMBINE = frozenset(
    """argmax argmin associative_scan cumprod cumsum dot dot_scaled gather histogram max min reduce reduce_or softmax
    sort sum topk xor_sum""".split()
)


def is_elementwise(kernel: Any) -> bool:
    """Whether neither it nor a function that it calls reduces, scans, multiplies matrices or adds up in a loop.

    Args:
        kernel: a ``triton.jit`` function, or what wraps one to tune it.
    """
    return _keeps_apart(kernel, set())


def _keeps_apart(kernel: Any, seen: set[int]) -> bool:
    while not hasattr(kernel, "src") and hasattr(kernel, "fn"):
        kernel = kernel.fn
    if not hasattr(kernel, "src"):
        return False
    if id(kernel) in seen:
        return True
    seen.add(id(kernel))
    tree = ast.parse(textwrap.dedent(kernel.src))
    for node in ast.walk(tree):
        if isinstance(node, (ast.For, ast.While)) and any(isinstance(inner, ast.AugAssign) for inner in ast.walk(node)):
            return False
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _COMBINE or name.startswith(("atomic_", "reduce")):
            return False
        called = kernel.fn.__globals__.get(name)
        if hasattr(called, "src") and not _keeps_apart(called, seen):
            return False
    return True
