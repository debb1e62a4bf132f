"""CHOOSE: how each product of a planned linear runs, by measured time; what would be slower than dense stays dense.

So does everything on a device without kernels, where the eager definitions are many times slower.

Prices are sums of measured components (``kernels.timing.linear_costs``), and of bytes where Inductor fuses an operation
into a neighbour: how much of it remains cannot be measured on its own.
"""

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial
from math import prod
from statistics import mean

from torch.fx import Node

from sparse_compile.from_json import from_json
from sparse_compile.kernels import grouped_ops, ops
from sparse_compile.kernels.timing.components import LinearShape
from sparse_compile.kernels.timing.linear_costs import ShapeKey, component_times
from sparse_compile.passes.agreement import agreed
from sparse_compile.passes.decide import Plan, Price
from sparse_compile.passes.sites import LinearSite, Reason, Rejection
from sparse_compile.recipe import Gemm, GradFormat, Recipe
from sparse_compile.reporting.model import Choice
from sparse_compile.torch_internals.graph import example_value
from sparse_compile.torch_internals.sizes import hint

# Microseconds of components by name, for each linear that it is asked about.
ComponentTimer = Callable[[Mapping[ShapeKey, Collection[str]]], Mapping[ShapeKey, Mapping[str, float]]]
# Answers a question, asked for a number of tokens; by itself, or by what the last argument returns.
Agreement = Callable[[str, int, Callable[[], str]], str]

_DENSE_COMPONENTS = ("dense fprop", "dense dgrad", "dense wgrad")
_DENSE = (Gemm.DENSE, Gemm.BF16)
# A linear is rewritten if it is faster by this share of its dense time: what measurements and prices may be off by.
_MARGIN = 0.05
# Bytes an element, of what Inductor generates: fitted to the profiles of a Llama and of a GPT-2 step.
_INPUT_BYTES = 1.0  # written by the kernel that makes the input
_GRADIENT_BYTES = 1.0  # the maximum of each token is found on the way, or in another reading
_TRANSPOSE_BYTES = 4.0  # the fp32 copy of the gradient that a sampled dgrad reads; not fitted
_PRODUCT_BYTES = 2.0  # the scale of each token is applied by the reader, or in another pass


warned: set[str] = set()  # of which devices


def leave_without_kernels(plans: Sequence[Plan]) -> tuple[list[Plan], list[Rejection]]:
    """The plans whose devices have kernels, and a rejection for each other one, whoever named it; warns once of each.

    A weight that was trained pruned is emulated: dense products would compute another function.
    """
    kept: list[Plan] = []
    rejections: list[Rejection] = []
    for plan in plans:
        device = example_value(plan.site.weight).device
        missing = for_all = ops.missing_kernels(device)
        if missing is None and plan.site.experts is not None:
            missing = _not_for_experts(plan)
        if missing is None or (plan.recipe.projection.prunes and plan.pruned):
            kept.append(plan)
            continue
        rejections.append(plan.site.reject(Reason.NO_KERNELS, missing, "'sste.when': 'always' emulates the kernels"))
        if missing not in warned:
            warned.add(missing)
            who = "they run" if for_all is None else "the model runs"
            warnings.warn(
                f"sparse_compile: {missing}: {who} dense; 'sste.when': 'always' emulates the kernels", stacklevel=2
            )
    return kept, rejections


def _not_for_experts(plan: Plan) -> str | None:
    """Why the kernels of experts can't run a plan; None where they can."""
    features = (plan.site.in_features, plan.site.out_features)
    if any(size % grouped_ops.FEATURES_MULTIPLE for size in features):
        return f"no kernels for experts whose features are no multiples of {grouped_ops.FEATURES_MULTIPLE}"
    dense_fp8 = any(gemm.is_dense_fp8 for gemm in (plan.recipe.dgrad, plan.recipe.wgrad))
    if plan.recipe.grad_format is not GradFormat.E4M3 and dense_fp8:
        return "no kernels for experts with dense products of e5m2"  # PyTorch's take e4m3 alone
    return "no kernels for experts without FP8" if plan.recipe.is_bf16 else None


def for_all_processes(question: str, tokens: int, answer: Callable[[], str]) -> str:
    """What the first process of the job answered, whatever its number of tokens was."""
    del tokens
    return agreed(question, answer)


def choose(
    plans: Sequence[Plan],
    clock: ComponentTimer = component_times,
    agree: Agreement = for_all_processes,
    *,
    training: bool = True,
) -> tuple[list[Plan], list[Rejection]]:
    """The fastest variant of each plan, with its price; a rejection where dense products are faster.

    Plans stay as they are where nothing can be measured: without kernels, or where the number of tokens depends on
    data.  A linear that the user named, or whose weight was trained pruned, is priced, and rewritten whatever it costs.

    Args:
        agree: lets the processes that train a model together choose the same, or what an earlier run chose.
        training: price forward, backward and the casts of the weight; otherwise forward alone.
    """
    inputs = Counter(plan.site.input for plan in plans)
    asked = [_questions(plan) for plan in plans]
    components: dict[ShapeKey, dict[str, None]] = {}  # a set that keeps its order
    for plan, questions in zip(plans, asked, strict=True):
        for question in questions:
            components.setdefault(question, {}).update(dict.fromkeys(_needed(plan.recipe, training)))
    # Asked when the first answer is needed: processes that find the others' choices measure nothing.
    times = cache(lambda: clock(components))

    priced: list[tuple[Plan, Choice | None]] = []
    for plan, questions in zip(plans, asked, strict=True):
        if not questions:
            priced.append((plan, None))
            continue
        (shape, _), sharing = questions[0], inputs[plan.site.input]
        answer = partial(_find, plan, questions, sharing, times, training)
        told = agree(_agreed_on(plan, shape, sharing, training), shape.tokens, answer)
        priced.append((plan, from_json(Choice, told)))

    gains: dict[Node, float] = defaultdict(float)  # of each weight, whose linears are rewritten together or not at all
    for plan, fastest in priced:
        if fastest is not None:
            gains[plan.site.weight] += gain(fastest)
    chosen: list[Plan] = []
    rejections: list[Rejection] = []
    for plan, fastest in priced:
        if fastest is None:
            chosen.append(plan)
            continue
        (recipe,) = (variant for variant in plan.recipe.variants() if variant.full_name == fastest.variant)
        if plan.named or plan.pruned or gains[plan.site.weight] >= 0:
            price = Price(dense=fastest.dense, rewritten=fastest.rewritten)
            chosen.append(replace(plan, recipe=recipe, price=price))
        else:
            call = "a step" if training else "a call"
            detail = (
                f"{call} would take {fastest.rewritten:.0f} us in {recipe.short_str()}, {fastest.dense:.0f} us dense"
            )
            advice = "more tokens in a call may change that; 'sste.when': 'always' rewrites it anyway"
            rejections.append(replace(plan.site.reject(Reason.SLOWER, detail, advice), dense_us=fastest.dense))
    return chosen, rejections


def gain(choice: Choice) -> float:
    """Microseconds by which a linear is faster than it must be to be rewritten."""
    return choice.dense * (1 - _MARGIN) - choice.rewritten


def _agreed_on(plan: Plan, shape: LinearShape, sharing: int, training: bool) -> str:
    """What must be chosen alike: not for each number of tokens, which may differ between processes."""
    uses = f"{plan.site.forwards} forwards, dgrad {_needs_dgrad(plan.site)}, input shared by {sharing}"
    return f"{plan.recipe.full_name} of {plan.site.name} {replace(shape, tokens=0)}, {uses}, training {training}"


def _find(
    plan: Plan,
    questions: Sequence[ShapeKey],
    sharing: int,
    times: Callable[[], Mapping[ShapeKey, Mapping[str, float]]],
    training: bool,
) -> str:
    """The fastest variant, in JSON.

    Args:
        questions: what was measured of it; a time is the mean of all.
        sharing: linears that read the same input, whose cast they share.
    """
    (shape, _), answers = questions[0], [times()[question] for question in questions]
    measured = {component: mean(answer[component] for answer in answers) for component in answers[0]}
    prices = {}
    if training:
        dense = _dense_microseconds(plan.site, measured)
        for recipe in plan.recipe.variants():
            needed = {component: measured[component] for component in _components(recipe)}
            prices[recipe.full_name] = _microseconds(plan.site, shape, recipe, needed, sharing)
    else:
        # Variants differ in backward alone.
        dense = measured["dense fprop"]
        prices[plan.recipe.full_name] = _forward(shape, plan.recipe, measured, sharing)
    variant = min(prices, key=prices.__getitem__)
    return json.dumps(asdict(Choice(variant=variant, rewritten=prices[variant], dense=dense)))


def _questions(plan: Plan) -> tuple[ShapeKey, ...]:
    """What is measured of a linear: of experts an even routing and a skewed one; nothing where nothing can be."""
    site = plan.site
    tokens, device = hint(prod(example_value(site.input).shape[:-1])), example_value(site.weight).device
    if not tokens or ops.emulation_reason(device) is not None:
        return ()
    shape = LinearShape(
        tokens=tokens,
        in_features=site.in_features,
        out_features=site.out_features,
        dtype=example_value(site.node).dtype,
        weight_dtype=example_value(site.weight).dtype,
        transposed=site.transposed,
        grad_dtype=plan.recipe.grad_format.dtype,
        experts=site.experts,
    )
    return ((shape, device),) if site.experts is None else ((shape, device), (replace(shape, skewed=True), device))


def _needed(recipe: Recipe, training: bool) -> list[str]:
    """The components that price a recipe's variants and dense products."""
    if not training:
        return ["dense fprop", f"{recipe.fprop.value} fprop", "copy"]
    return [*_DENSE_COMPONENTS, *(component for variant in recipe.variants() for component in _components(variant))]


def _components(recipe: Recipe) -> list[str]:
    """What runs for a recipe, besides what Inductor fuses, and a copy to know the speed of memory."""
    components = [f"{recipe.fprop.value} fprop", f"{recipe.dgrad.value} dgrad", f"{recipe.wgrad.value} wgrad", "copy"]
    components += _ops_around(recipe)
    if recipe.wgrad not in _DENSE:
        components.append("transpose_tokens")
    if recipe.dgrad is Gemm.MVUE24:
        components.append(_sampled(recipe, "cast_mvue for dgrad"))
    components += _before_dgrad(recipe)
    return components


def _before_dgrad(recipe: Recipe) -> list[str]:
    """What makes the copy of the weight that dgrad reads, where none is kept."""
    component = recipe.projection.dgrad_component
    return [component] if component is not None and recipe.dgrad is not Gemm.DENSE else []


def _ops_around(recipe: Recipe) -> list[str]:
    """Whose times count once, whatever linears share."""
    around = [recipe.projection.cost_key]
    if recipe.decay:
        around.append("add_masked_decay")
    if recipe.wgrad is Gemm.FP8:
        around.append("cast_transpose")
    if recipe.estimator is not None:
        around.append(_sampled(recipe, "cast_mvue"))
    return around


def _sampled(recipe: Recipe, op: str) -> str:
    """The component of an op of a recipe with an estimator."""
    assert recipe.estimator is not None
    return f"{op} {recipe.estimator.value} {recipe.rounding.value}"


def _dense_microseconds(site: LinearSite, times: Mapping[str, float]) -> float:
    return times["dense fprop"] * site.forwards + times["dense dgrad"] * _needs_dgrad(site) + times["dense wgrad"]


def _microseconds(site: LinearSite, shape: LinearShape, recipe: Recipe, times: dict[str, float], sharing: int) -> float:
    """Of one forward and backward, and of what happens to the weight after an optimizer step.

    Args:
        sharing: linears that read the same input, whose cast they share.
    """
    inputs, outputs = shape.tokens * shape.in_features, shape.tokens * shape.out_features
    byte = _byte(shape, times)
    total = _forward(shape, recipe, times, sharing) * site.forwards
    total += sum(times[component] for component in _ops_around(recipe))
    total += times[f"{recipe.wgrad.value} wgrad"] + times.get("transpose_tokens", 0.0) / sharing
    if _needs_dgrad(site):
        total += times[f"{recipe.dgrad.value} dgrad"] + sum(times[component] for component in _before_dgrad(recipe))
        if recipe.dgrad.is_dense_fp8 or recipe.dgrad is Gemm.MVUE24:
            total += inputs * _PRODUCT_BYTES * byte
        if recipe.dgrad is Gemm.MVUE24:
            total += times[_sampled(recipe, "cast_mvue for dgrad")]
            total += outputs * (shape.dtype.itemsize + _TRANSPOSE_BYTES) * byte
    casts_gradient = recipe.dgrad.is_dense_fp8 or recipe.dgrad is Gemm.SPARSE24
    if casts_gradient or recipe.wgrad not in _DENSE:
        total += outputs * _GRADIENT_BYTES * byte
    if casts_gradient and recipe.wgrad is Gemm.DENSE:
        total += outputs * _INPUT_BYTES * byte  # the cast, which is no op then
    return total


def _forward(shape: LinearShape, recipe: Recipe, times: Mapping[str, float], sharing: int) -> float:
    byte = _byte(shape, times)
    time = times[f"{recipe.fprop.value} fprop"]
    if not recipe.is_bf16:
        time += shape.tokens * shape.in_features * _INPUT_BYTES * byte / sharing
    if recipe.fprop is Gemm.FP8:
        time += shape.tokens * shape.out_features * _PRODUCT_BYTES * byte
    return time


def _byte(shape: LinearShape, times: Mapping[str, float]) -> float:
    """Of memory traffic, by a copy of the output."""
    return times["copy"] / (2 * shape.tokens * shape.out_features * shape.dtype.itemsize)


def _needs_dgrad(site: LinearSite) -> bool:
    return bool(example_value(site.input).requires_grad)
