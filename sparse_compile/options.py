"""What the user may say: ``torch.compile(model, backend="sste", mode=..., options={"sste.recipe": ...})``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any

from sparse_compile.recipe import RECIPES, SSTE, Recipe
from sparse_compile.torch_internals import inductor_option_names, inductor_patches

# A row of activations is cast in one reading where its registers allow it: Inductor tries, and takes the faster way.
_INDUCTOR_DEFAULTS = {"triton.multi_kernel": 1}
_NAMES = ("sste.recipe", "sste.targets", "sste.head", "sste.when", "sste.memory", "sste.executor", "sste.tune")


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
        head: whether the vocabulary head gets dense FP8.
        measure: whether only what measured times predict to be faster is rewritten.
        recompute: whether backward makes FP8 copies of activations again, where forward could keep them.
        executor: what runs the rewritten graph.
        tune: whether the 2:4 GEMMs are timed, those that no earlier run has timed, while the graph is compiled.
        inductor: configuration handed on to Inductor, from ``mode`` and the options without our prefix.
    """

    recipe: Recipe
    targets: str
    head: bool
    measure: bool
    recompute: bool
    executor: Executor
    tune: bool
    inductor: Mapping[str, Any]


def read_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Split and check the arguments of torch.compile.

    Raises:
        ValueError: an unknown name or value, with the nearest one that exists.
    """
    given = dict(options or {})
    ours = {name: value for name, value in given.items() if name.startswith("sste.")}
    inductors = {name: value for name, value in given.items() if name not in ours}
    for name in ours:
        if name not in _NAMES:
            raise ValueError(f"unknown option {name!r}; {_nearest(name, _NAMES)}allowed are {_listed(_NAMES)}")
    inductor_names = inductor_option_names() if inductors else set()
    for name in inductors:
        if name.replace("-", "_") not in inductor_names:
            nearest = _nearest(name, [*inductor_names, *_NAMES])
            raise ValueError(f"unknown option {name!r}: neither ours nor Inductor's; {nearest}")
    targets = ours.get("sste.targets", "ffn")
    if not isinstance(targets, str) or not targets:
        raise ValueError(f"option 'sste.targets' is {targets!r}; allowed are 'ffn', 'all' or a glob of module names")
    tune = ours.get("sste.tune", False)
    if not isinstance(tune, bool):
        raise ValueError(f"option 'sste.tune' is {tune!r}; allowed are True and False")
    return Options(
        recipe=RECIPES[_choice(ours, "sste.recipe", SSTE.name, list(RECIPES))],
        targets=targets,
        head=_choice(ours, "sste.head", "dense", ["dense", "fp8"]) == "fp8",
        measure=_choice(ours, "sste.when", "faster", ["faster", "always"]) == "faster",
        recompute=_choice(ours, "sste.memory", "fast", ["fast", "small"]) == "small",
        executor=Executor(_choice(ours, "sste.executor", "inductor", [executor.value for executor in Executor])),
        tune=tune,
        inductor={**_INDUCTOR_DEFAULTS, **inductor_patches(mode, inductors)},
    )


def _choice(options: Mapping[str, Any], name: str, default: str, allowed: Sequence[str]) -> str:
    value = options.get(name, default)
    if value not in allowed:
        raise ValueError(f"option {name!r} is {value!r}; {_nearest(str(value), allowed)}allowed are {_listed(allowed)}")
    return str(value)


def _nearest(given: str, names: Sequence[str]) -> str:
    close = get_close_matches(given, sorted(names))
    return f"did you mean {close[0]!r}? " if close else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
