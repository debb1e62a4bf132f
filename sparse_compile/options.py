"""What the user may say: ``torch.compile(model, backend="sste", mode=..., options={"sste.recipe": ...})``.

The fields of ``UserOptions`` declare each option once: ``read_options`` checks them, the launcher's ``--option`` parses
them, and ``python -m sparse_compile options`` and docs/options.md list them.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from sparse_compile.option_kinds import (
    FACTOR,
    INTERVAL,
    NUMBER,
    PLAN_FILE,
    REPORT_FILE,
    STEPS,
    STEPS_OR_SHARE,
    SWITCH,
    Kind,
    choice,
    choice_or,
    listed,
    name_or_glob,
    nearest,
)
from sparse_compile.passes.roles import TARGETS
from sparse_compile.recipe import (
    HEAD,
    MVUE,
    RECIPES,
    SR_STE,
    SSTE,
    T_SR_STE,
    Recipe,
)
from sparse_compile.torch_internals.inductor import inductor_option_names, inductor_patches
from sparse_compile.weights.schedule import Schedule

T = TypeVar("T")
PREFIX = "sste."
_RETIRED = {"s-ste-boosted": "'sste.recipe': 's-ste', 'sste.beta': 1.7"}
# A row of activations is cast in one reading where its registers allow it: Inductor tries, and takes the faster way.
_INDUCTOR_DEFAULTS = {"triton.multi_kernel": 1}


class Executor(Enum):
    """What runs the rewritten graph."""

    INDUCTOR = "inductor"  # generated code
    EAGER = "eager"  # the traced operators one by one: starts at once, for tests and machines without a compiler


def _option(kind: Kind[T], meaning: str, default: T) -> T:
    """A field of ``UserOptions``: the values that are allowed, and one line for the table, in Markdown."""
    shown = f'`"{default}"`' if isinstance(default, str) else f"`{default}`"
    return field(default=default, metadata={"kind": kind, "meaning": meaning, "default": shown})


def _optional(kind: Kind[T], meaning: str, default: str) -> T | None:
    """A field that is None if the option is not given; ``default`` says in words what holds then."""
    return field(default=None, metadata={"kind": kind, "meaning": meaning, "default": default})


@dataclass(frozen=True, kw_only=True, slots=True)
class UserOptions:
    """The options as the user gives them, ``sste.`` and the name of the field; None if not given."""

    recipe: str | Recipe = _option(  # noqa: RUF009, it is a field
        choice_or(RECIPES, Recipe, _RETIRED),
        "how the linears that `sste.targets` selects are pruned, and the precision of their GEMMs",
        SSTE.name,
    )
    mvue: str | None = _optional(
        choice(MVUE),
        'estimator that samples the output gradient to 2:4 for wgrad; `"off"` runs wgrad in dense FP8',
        "the recipe's",
    )
    beta: float | None = _optional(
        FACTOR,
        "factor applied to β, the fitted scale of S-STE weights, when training begins; for training from scratch only. "
        'With `sste.targets="all"`, FFNs alone get it',
        "`1`",
    )
    decay: float | None = _optional(
        NUMBER,
        f'masked decay of `"{SR_STE.name}"` and `"{T_SR_STE.name}"`; the command `tune-decay` finds a good value',
        f"`{SR_STE.decay:g}`",
    )
    refresh: int | None = _optional(
        INTERVAL,
        f'optimizer steps between two mask searches of `"{T_SR_STE.name}"`',
        f"`{T_SR_STE.refresh}`",
    )
    warmup: int | float | None = _optional(
        STEPS_OR_SHARE, "optimizer steps at the start that run in dense FP8, without pruning", "`0`"
    )
    tail: int | float | None = _optional(
        STEPS_OR_SHARE,
        "optimizer steps at the end that run in dense FP8, without pruning",
        '`0`; a sixth for `"ste-dense-tail"`',
    )
    total_steps: int | None = _optional(
        STEPS, "optimizer steps in the whole run; required if a tail or a share is given", "none"
    )
    targets: str = _option(
        name_or_glob(TARGETS),
        "linears that use the recipe; the others use dense FP8. "
        '`"ffn-up"` selects only the up and gate projections of FFNs',
        "ffn",
    )
    head: str | Recipe = _option(  # noqa: RUF009, it is a field
        choice_or(HEAD, Recipe),
        "precision of the vocabulary head; a head with a tied weight stays dense. "
        '`"fp8-backward"` runs only the backward GEMMs in FP8, so the logits do not change',
        "fp8",
    )
    frozen: str = _option(
        choice(["dense", "sparse"]),
        '`"sparse"` also rewrites linears whose frozen weight is 2:4, as `finalize` leaves it',
        "dense",
    )
    when: str = _option(
        choice(["faster", "always"]),
        '`"faster"` rewrites a linear if measured times predict a speedup, and nothing on devices without kernels; '
        '`"always"` rewrites every linear that it can, and emulates missing kernels',
        "faster",
    )
    memory: str = _option(
        choice(["fast", "small"]),
        '`"fast"` keeps FP8 copies of activations, and two of small weights, for backward; `"small"` remakes them',
        "fast",
    )
    rotary_tables: str = _option(
        choice(["kept", "inlined"]),
        '`"kept"` computes the sines and cosines of rotary embeddings once; `"inlined"` computes them in each kernel '
        "that reads them, as Inductor does. Independent of sparsity and FP8",
        "kept",
    )
    executor: str = _option(
        choice(each.value for each in Executor),
        '`"inductor"` generates code; `"eager"` runs the traced operators one by one and needs no compiler',
        Executor.INDUCTOR.value,
    )
    tune: bool = _option(
        SWITCH,
        "`True` times every configuration of each new 2:4 GEMM at compile time, and keeps the fastest",
        False,
    )
    plan: Path | None = _optional(  # noqa: RUF009, it is a field
        PLAN_FILE, "JSON report of an earlier run, whose choices are used again; nothing is measured", "none"
    )
    report: Path | None = _optional(  # noqa: RUF009, it is a field
        REPORT_FILE, "file that the report is written to when the process ends", "stderr"
    )
    report_measure: bool = _option(SWITCH, "`True` times each graph and its dense baseline at the first call", False)
    health: int = _option(STEPS, "optimizer steps between two health samples of the pruned weights", 0)


_FIELDS: Mapping[str, "Field[Any]"] = {PREFIX + option.name: option for option in fields(UserOptions)}


def option_rows() -> list[tuple[str, str, str, str]]:
    """Name, default, allowed values and meaning of each option, in Markdown."""
    return [
        (f"`{name}`", option.metadata["default"], option.metadata["kind"].as_markdown(), option.metadata["meaning"])
        for name, option in _FIELDS.items()
    ]


def parse_option(name: str, text: str) -> object:
    """The value of an option that is given as text on a command line, by the option's kind.

    Raises:
        ValueError: an unknown name, or text that stands for no value that is allowed.
    """
    kind = _kind(name)
    value = kind.parse(text)
    kind.check(name, value, given=text)
    return value


def _kind(name: str) -> Kind[Any]:
    if name not in _FIELDS:
        raise ValueError(f"unknown option {name!r}; {nearest(name, _FIELDS)}allowed are {listed(_FIELDS)}")
    kind: Kind[Any] = _FIELDS[name].metadata["kind"]
    return kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of one compilation.

    Attributes:
        recipe: arithmetic of the targeted linears; the others get dense FP8.
        schedule: the optimizer steps in which the recipe prunes; None for all.
        targets: ``"ffn"``, ``"ffn-up"``, ``"all"``, or a glob of module names such as ``"*.mlp.*"``.
        head: what the vocabulary head gets; None leaves it dense.
        frozen: whether frozen weights that are 2:4 are treated as if they were trained.
        measure: whether only what measured times predict to be faster is rewritten, and nothing without kernels.
        recompute: whether backward makes FP8 copies of activations and weights, where forward could keep them.
        keep_rotary_tables: whether tables of sines and cosines that are broadcast get memory of their own.
        executor: what runs the rewritten graph.
        tune: whether the 2:4 GEMMs are timed, those that no earlier run has timed, while the graph is compiled.
        plan: the report whose choices are made again.
        report: the file that the report is written to when the process ends.
        report_measure: whether each graph and its dense baseline are timed at its first call.
        health: optimizer steps between two samples of the pruned weights' health; 0 takes none.
        inductor: configuration handed on to Inductor, from ``mode`` and the options without our prefix.
    """

    recipe: Recipe
    schedule: Schedule | None
    targets: str
    head: Recipe | None
    frozen: bool
    measure: bool
    recompute: bool
    keep_rotary_tables: bool
    executor: Executor
    tune: bool
    plan: Path | None
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
    inductors = {name: value for name, value in given.items() if not name.startswith(PREFIX)}
    ours = {name: _kind(name).check(name, value, given=value) for name, value in given.items() if name not in inductors}
    inductor_names = inductor_option_names() if inductors else set()
    for name in inductors:
        if name.replace("-", "_") not in inductor_names:
            hint = nearest(name, [*inductor_names, *_FIELDS])
            raise ValueError(
                f"unknown option {name!r}; {hint}allowed are the options of sparse_compile (python -m sparse_compile "
                "options) and of Inductor"
            )
    user = UserOptions(**{_FIELDS[name].name: value for name, value in ours.items()})
    recipe = _recipe(user)
    return Options(
        recipe=recipe,
        schedule=_schedule(user, recipe),
        targets=user.targets,
        head=_head(user.head),
        frozen=user.frozen == "sparse",
        measure=user.when == "faster",
        recompute=user.memory == "small",
        keep_rotary_tables=user.rotary_tables == "kept",
        executor=Executor(user.executor),
        tune=user.tune,
        plan=_plan(user),
        report=user.report,
        report_measure=user.report_measure,
        health=user.health,
        inductor={**_INDUCTOR_DEFAULTS, **inductor_patches(mode, inductors)},
    )


def _recipe(user: UserOptions) -> Recipe:
    recipe = user.recipe if isinstance(user.recipe, Recipe) else RECIPES[user.recipe]
    if user.mvue is not None:
        if recipe.estimator is None:
            raise ValueError(f"recipe {recipe.name!r} samples no gradients, so 'sste.mvue' has no effect; remove it")
        recipe = recipe.with_estimator(MVUE[user.mvue])
    if user.beta is not None:
        if not recipe.projection.has_beta:
            with_beta = listed(name for name, other in RECIPES.items() if other.projection.has_beta)
            raise ValueError(f"recipe {recipe.name!r} has no beta; option 'sste.beta' is for {with_beta}")
        recipe = replace(recipe, beta_factor=user.beta)
    if user.decay is not None:
        if not recipe.decay:
            with_decay = listed(name for name, other in RECIPES.items() if other.decay)
            raise ValueError(f"recipe {recipe.name!r} has no decay; option 'sste.decay' is for {with_decay}")
        recipe = replace(recipe, decay=user.decay)
    if user.refresh is not None:
        if not recipe.refresh:
            raise ValueError(f"recipe {recipe.name!r} keeps no masks; option 'sste.refresh' is for 't-sr-ste'")
        recipe = replace(recipe, refresh=user.refresh)
    return recipe


def _head(given: str | Recipe) -> Recipe | None:
    if not isinstance(given, Recipe):
        return HEAD[given]
    if given.projection.prunes:
        raise ValueError(
            f"option 'sste.head' is the recipe {given.name!r}, which prunes; allowed are recipes that do not prune. To "
            "prune the head, name it in 'sste.targets'"
        )
    return given


def _plan(user: UserOptions) -> Path | None:
    if user.plan is not None and user.when == "always":
        raise ValueError(
            "'sste.plan' has no effect with 'sste.when': 'always', which rewrites all that it can; remove one of them"
        )
    return user.plan


def _schedule(user: UserOptions, recipe: Recipe) -> Schedule | None:
    values = {"sste.warmup": user.warmup, "sste.tail": user.tail, "sste.total_steps": user.total_steps}
    given = [name for name, value in values.items() if value is not None]
    if given and not recipe.projection.prunes:
        raise ValueError(f"recipe {recipe.name!r} does not prune weights, so {listed(given)} has no effect; remove it")
    total = user.total_steps or 0
    warmup = _span("sste.warmup", user.warmup, 0, total)
    tail = _span("sste.tail", user.tail, recipe.tail, total)
    if tail and not total:
        raise ValueError(
            f"recipe {recipe.name!r} ends with dense steps (sste.tail), so it needs the length of the run: set option "
            "'sste.total_steps' to the number of optimizer steps of the whole run"
        )
    if total and not (warmup or tail):
        raise ValueError(
            "option 'sste.total_steps' has no effect alone; set 'sste.warmup' or 'sste.tail' as well, or remove it"
        )
    if total and warmup + tail >= total:
        raise ValueError(
            f"'sste.warmup' and 'sste.tail' make {warmup} + {tail} of {total} optimizer steps dense, which leaves none "
            "to prune in; shorten one of them"
        )
    return Schedule(begin=warmup, end=total - tail if tail else None) if warmup or tail else None


def _span(name: str, given: int | float | None, default: float, total: int) -> int:
    """Optimizer steps, given as such or as a share of all."""
    span = default if given is None else given
    if isinstance(span, int):
        return span
    if span and not total:
        # The tail of a recipe says so in its own words.
        if given is not None:
            raise ValueError(f"option {name!r} is {given!r}, a share of the run: set 'sste.total_steps' as well")
        return 1
    return round(span * total)
