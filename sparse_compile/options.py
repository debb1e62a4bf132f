"""What the user may say: ``torch.compile(model, backend="sste", mode=..., options={"sste.recipe": ...})``."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any

from sparse_compile.passes.roles import TARGETS
from sparse_compile.recipe import MVUE, RECIPES, SSTE, Gemm, GradFormat, Recipe, Rounding
from sparse_compile.reporting.report_file import check_file
from sparse_compile.torch_internals.inductor import inductor_option_names, inductor_patches
from sparse_compile.weights.schedule import Schedule

# A row of activations is cast in one reading where its registers allow it: Inductor tries, and takes the faster way.
_INDUCTOR_DEFAULTS = {"triton.multi_kernel": 1}
_NAMES = (
    "sste.recipe", "sste.mvue", "sste.rounding", "sste.dgrad", "sste.grad_format", "sste.beta", "sste.decay",
    "sste.refresh", "sste.warmup", "sste.tail", "sste.total_steps", "sste.targets", "sste.head", "sste.frozen",
    "sste.when", "sste.memory", "sste.executor", "sste.tune", "sste.report", "sste.report_measure", "sste.health",
)  # fmt: skip


class Executor(Enum):
    """What runs the rewritten graph."""

    INDUCTOR = "inductor"  # generated code
    EAGER = "eager"  # the traced operators one by one: starts at once, for tests and machines without a compiler


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of one compilation.

    Attributes:
        recipe: arithmetic of the targeted linears; the others get dense FP8.
        schedule: the optimizer steps in which the recipe prunes; None for all.
        targets: ``"ffn"``, ``"ffn-up"``, ``"all"``, or a glob of module names such as ``"*.mlp.*"``.
        head: whether the vocabulary head gets dense FP8.
        frozen: whether frozen weights that are 2:4 are treated as if they were trained.
        measure: whether only what measured times predict to be faster is rewritten, and nothing without kernels.
        recompute: whether backward makes FP8 copies of activations again, where forward could keep them.
        executor: what runs the rewritten graph.
        tune: whether the 2:4 GEMMs are timed, those that no earlier run has timed, while the graph is compiled.
        report: the file that the report is written to when the process ends.
        report_measure: whether each graph and its dense twin are timed at its first call.
        health: optimizer steps between two samples of the pruned weights' health; 0 takes none.
        inductor: configuration handed on to Inductor, from ``mode`` and the options without our prefix.
    """

    recipe: Recipe
    schedule: Schedule | None
    targets: str
    head: bool
    frozen: bool
    measure: bool
    recompute: bool
    executor: Executor
    tune: bool
    report: Path | None
    report_measure: bool
    health: int
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
        raise ValueError(f"option 'sste.targets' is {targets!r}; allowed are {_listed(TARGETS)} or a glob")
    recipe = _recipe(ours)
    return Options(
        recipe=recipe,
        schedule=_schedule(ours, recipe),
        targets=targets,
        head=_choice(ours, "sste.head", "dense", ["dense", "fp8"]) == "fp8",
        frozen=_choice(ours, "sste.frozen", "dense", ["dense", "sparse"]) == "sparse",
        measure=_choice(ours, "sste.when", "faster", ["faster", "always"]) == "faster",
        recompute=_choice(ours, "sste.memory", "fast", ["fast", "small"]) == "small",
        executor=Executor(_choice(ours, "sste.executor", "inductor", [executor.value for executor in Executor])),
        tune=_switch(ours, "sste.tune"),
        report=_report_file(ours),
        report_measure=_switch(ours, "sste.report_measure"),
        health=_steps(ours, "sste.health"),
        inductor={**_INDUCTOR_DEFAULTS, **inductor_patches(mode, inductors)},
    )


def _recipe(options: Mapping[str, Any]) -> Recipe:
    given = options.get("sste.recipe", SSTE.name)
    recipe = given if isinstance(given, Recipe) else RECIPES[_choice(options, "sste.recipe", SSTE.name, list(RECIPES))]
    if "sste.mvue" in options:
        estimator = MVUE[_choice(options, "sste.mvue", "exact", list(MVUE))]
        if recipe.estimator is None:
            raise ValueError(f"recipe {recipe.name!r} samples no gradients, so that 'sste.mvue' would change nothing")
        recipe = recipe.with_estimator(estimator)
    if "sste.dgrad" in options:
        sampled = _choice(options, "sste.dgrad", "dense", ["dense", "mvue"]) == "mvue"
        if recipe.dgrad is Gemm.SPARSE24:
            raise ValueError(f"dgrad of recipe {recipe.name!r} is 2:4 by its masks; leave 'sste.dgrad' out")
        if sampled and recipe.estimator is None:
            raise ValueError(f"option 'sste.dgrad' is 'mvue', {_why_not_sampled(options, recipe)}")
        recipe = recipe.with_sampled_dgrad() if sampled else recipe
    if "sste.grad_format" in options:
        grad_format = _choice(options, "sste.grad_format", "e4m3", [choice.value for choice in GradFormat])
        if not recipe.has_fp8_gradients:
            raise ValueError(f"recipe {recipe.name!r} has no FP8, so that 'sste.grad_format' would change nothing")
        recipe = replace(recipe, grad_format=GradFormat(grad_format))
    if "sste.rounding" in options:
        rounding = _choice(options, "sste.rounding", "nearest", [choice.value for choice in Rounding])
        if recipe.estimator is None:
            why = "'sste.mvue' is 'off'" if "sste.mvue" in options else f"recipe {recipe.name!r} samples no gradients"
            raise ValueError(f"{why}, so that 'sste.rounding', of what MVUE keeps, would change nothing")
        recipe = replace(recipe, rounding=Rounding(rounding))
    if "sste.beta" in options:
        factor = _number(options, "sste.beta", 0.0)
        if factor == 0.0:
            raise ValueError(f"option 'sste.beta' is {options['sste.beta']!r}; allowed is a factor above 0")
        if not recipe.projection.has_beta:
            with_beta = _listed([name for name, other in RECIPES.items() if other.projection.has_beta])
            raise ValueError(f"recipe {recipe.name!r} has no beta; option 'sste.beta' is for {with_beta}")
        recipe = replace(recipe, beta_factor=factor)
    if "sste.decay" in options:
        decay = _number(options, "sste.decay", 0.0)
        if not recipe.decay:
            with_decay = _listed([name for name, other in RECIPES.items() if other.decay])
            raise ValueError(f"recipe {recipe.name!r} has no decay; option 'sste.decay' is for {with_decay}")
        recipe = replace(recipe, decay=decay)
    if "sste.refresh" in options:
        if not recipe.refresh:
            raise ValueError(f"recipe {recipe.name!r} has no masks that are kept; 'sste.refresh' is for 't-sr-ste'")
        refresh = _steps(options, "sste.refresh")
        if refresh == 0:
            raise ValueError("option 'sste.refresh' is 0; allowed is a number of optimizer steps, 1 for every step")
        recipe = replace(recipe, refresh=refresh)
    return recipe


def _why_not_sampled(options: Mapping[str, Any], recipe: Recipe) -> str:
    if "sste.mvue" in options:
        return "but 'sste.mvue' is 'off': its estimator prunes for dgrad, too; say 'exact' or 'approximate'"
    could = _listed([name for name, other in RECIPES.items() if other.estimator and other.dgrad is Gemm.FP8])
    return f"but recipe {recipe.name!r} samples no gradients; it is for {could}"


def _schedule(options: Mapping[str, Any], recipe: Recipe) -> Schedule | None:
    given = [name for name in ("sste.warmup", "sste.tail", "sste.total_steps") if name in options]
    if given and not recipe.projection.prunes:
        raise ValueError(f"recipe {recipe.name!r} prunes nothing, so that {_listed(given)} would change nothing")
    total = _steps(options, "sste.total_steps")
    warmup, tail = _span(options, "sste.warmup", 0, total), _span(options, "sste.tail", recipe.tail, total)
    if tail and not total:
        raise ValueError(
            f"the last steps of recipe {recipe.name!r} are dense (sste.tail), so it must know how many there will be: "
            "give option 'sste.total_steps', the number of optimizer steps of the whole run"
        )
    if total and not (warmup or tail):
        raise ValueError("option 'sste.total_steps' is for a schedule; give 'sste.warmup' or 'sste.tail' as well")
    if total and warmup + tail >= total:
        raise ValueError(f"of {total} optimizer steps {warmup} + {tail} are dense, which leaves none to be pruned")
    return Schedule(begin=warmup, end=total - tail if tail else None) if warmup or tail else None


def _span(options: Mapping[str, Any], name: str, default: float, total: int) -> int:
    """Optimizer steps, given as such or as a share of all."""
    value = options.get(name, default)
    if isinstance(value, int) and not isinstance(value, bool):
        return _steps(options, name)
    share = _number({name: value}, name, 0.0)
    if share >= 1:
        raise ValueError(f"option {name!r} is {value!r}; allowed is a number of optimizer steps, or a share below 1.0")
    if share and not total:
        # The tail of a recipe says so in its own words.
        if name in options:
            raise ValueError(f"option {name!r} is {value!r}, a share of all optimizer steps: give 'sste.total_steps'")
        return 1
    return round(share * total)


def _number(options: Mapping[str, Any], name: str, least: float) -> float:
    """From Python, or from the command line, where all that is no integer is text."""
    value = options[name]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= least):
        raise ValueError(f"option {name!r} is {value!r}; allowed is a finite number from {least:g} on")
    return number


def _choice(options: Mapping[str, Any], name: str, default: str, allowed: Sequence[str]) -> str:
    value = options.get(name, default)
    if value not in allowed:
        raise ValueError(f"option {name!r} is {value!r}; {_nearest(str(value), allowed)}allowed are {_listed(allowed)}")
    return str(value)


def _switch(options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"option {name!r} is {value!r}; allowed are True and False")
    return value


def _steps(options: Mapping[str, Any], name: str) -> int:
    value = options.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"option {name!r} is {value!r}; allowed is a number of optimizer steps, 0 for none")
    return value


def _report_file(options: Mapping[str, Any]) -> Path | None:
    given = options.get("sste.report")
    if given is None:
        return None
    if not isinstance(given, (str, PathLike)):
        raise ValueError(f"option 'sste.report' is {given!r}; allowed is the path of a file")
    check_file(Path(given))
    return Path(given)


def _nearest(given: str, names: Sequence[str]) -> str:
    close = get_close_matches(given, sorted(names))
    return f"did you mean {close[0]!r}? " if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
