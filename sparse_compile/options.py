"""What the user may say: ``torch.compile(model, backend="sste", mode=..., options={"sste.recipe": ...})``."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any

from sparse_compile.recipe import RECIPES, SSTE, Recipe
from sparse_compile.torch_internals import inductor_option_names, inductor_patches

_PREFIX = "sste."


class Executor(Enum):
    """What runs the rewritten graph."""

    INDUCTOR = "inductor"  # generated code
    EAGER = "eager"  # the traced operators one by one: starts at once, for tests and machines without a compiler


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of one compilation.

    Attributes:
        recipe: arithmetic of the targeted linears; the others get dense FP8.
        targets: ``"ffn"``, ``"all"``, or a glob of module names such as ``"*.mlp.*"``.
        executor: what runs the rewritten graph.
        inductor: configuration handed on to Inductor, from ``mode`` and the options without our prefix.
    """

    recipe: Recipe
    targets: str
    executor: Executor
    inductor: Mapping[str, Any]


def read_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Split and check the arguments of torch.compile.

    Raises:
        ValueError: an unknown name or value, with the nearest one that exists.
    """
    ours: dict[str, Any] = {}
    inductors: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if name.startswith(_PREFIX):
            ours[name.removeprefix(_PREFIX)] = value
        else:
            inductors[name] = value
    known = [_PREFIX + name for name in ("recipe", "targets", "executor")]
    for name in ours:
        if _PREFIX + name not in known:
            raise ValueError(f"unknown option {_PREFIX + name!r}; {_suggest(_PREFIX + name, known)}")
    names = inductor_option_names() if inductors else set()
    for name in inductors:
        if name.replace("-", "_") not in names:
            nearest = _suggest(name, [*names, *known], few=True)
            raise ValueError(f"unknown option {name!r}: neither ours nor Inductor's; {nearest}")
    targets = ours.get("targets", "ffn")
    if not isinstance(targets, str) or not targets:
        raise ValueError(f"option 'sste.targets' is {targets!r}; allowed are 'ffn', 'all' or a glob of module names")
    return Options(
        recipe=RECIPES[_choice("recipe", ours.get("recipe", SSTE.name), RECIPES)],
        targets=targets,
        executor=Executor(_choice("executor", ours.get("executor", "inductor"), [e.value for e in Executor])),
        inductor=inductor_patches(mode, inductors),
    )


def _choice(option: str, value: Any, allowed: Iterable[str]) -> str:
    names = list(allowed)
    if value not in names:
        raise ValueError(f"option 'sste.{option}' is {value!r}; {_suggest(str(value), names)}")
    return str(value)


def _suggest(given: str, allowed: Iterable[str], *, few: bool = False) -> str:
    names = sorted(allowed)
    close = get_close_matches(given, names, n=3)
    nearest = f"did you mean {close[0]!r}? " if close else ""
    return nearest + ("" if few else f"allowed are {', '.join(repr(name) for name in names)}")
