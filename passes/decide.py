"""DECIDE: which linears are rewritten, in which recipe, and why the others are not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.fx import Node
from torch.nn import Parameter

from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.passes.roles import TARGETS, Role
from sparse_compile.passes.sites import LinearSite, Reason, Rejection
from sparse_compile.projections.base import Projection
from sparse_compile.projections.identity import IDENTITY
from sparse_compile.recipe import Gemm, Recipe
from sparse_compile.torch_internals.fake import is_fake
from sparse_compile.torch_internals.graph import example_value, real_parameter

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# fp8 GEMMs need every dimension of both operands in whole 16-byte rows.
FEATURES_MULTIPLE = 16
# Below this a GEMM is one tile at most, and its casts cost more than it does.
MIN_FEATURES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """Predicted microseconds of a linear in a step, without and with the rewrite."""

    dense: float
    rewritten: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A linear that will be rewritten, and the arithmetic it gets."""

    site: LinearSite
    recipe: Recipe
    named: bool = False  # by the user
    pruned: bool = False  # whether its weight was trained pruned: dense products would compute another function
    price: Price | None = None  # where it was measured
    shadow_projection: Projection = IDENTITY  # what prunes its weight in another phase than this dense one
    advice: str = ""  # how it could gain more


def decide(
    sites: Sequence[LinearSite],
    recipe: Recipe,
    targets: str,
    owners: ParameterOwners,
    *,
    head: Recipe | None = None,
    is_pruned: Callable[[Parameter], bool] = lambda _: False,
    is_24: Callable[[Parameter, int], bool] = lambda *_: False,
    goes_on: bool = True,
) -> tuple[list[Plan], list[Rejection]]:
    """A plan or a rejection for each site.

    Args:
        recipe: what the targeted linears get; the other linears get dense FP8.
        targets: ``"ffn"``, ``"ffn-up"``, ``"all"``, or a glob of module names.
        owners: what modules hold, to tell shared weights and the head.
        head: what the vocabulary head gets; None leaves it dense.
        is_pruned: whether a weight has been pruned in training: then it goes on, frozen or not.
        is_24: whether a frozen weight that was not is 2:4 along a dimension, that of in_features: then pruning changes
            nothing, and it is treated as if it were trained.
        goes_on: whether what was trained pruned is so whatever part it plays in this graph.

    Raises:
        ValueError: a linear that the glob names can't be rewritten, or a weight that has been pruned in training is
            written to before the linear reads it.
    """
    plans: list[Plan] = []
    rejections: list[Rejection] = []
    dense_head = head is None and not recipe.is_bf16  # which has no FP8 for it anyway
    for site in sites:
        named = targets not in TARGETS and any(fnmatchcase(name, targets) for name in (site.name, site.path))
        pruned = (parameter := real_parameter(site.weight)) is not None and is_pruned(parameter)
        wanted = named or (pruned and goes_on and recipe.projection.prunes)
        is_head = _is_head(site, owners)
        refusal = _cannot(site, owners, pruned, is_24)
        if refusal is None and not wanted:
            refusal = _should_not(site, is_head, dense_head)
        if refusal is None:
            everywhere = targets == "all" and not is_head
            targeted = wanted or everywhere or site.role in TARGETS.get(targets, ())
            chosen = recipe if targeted else (is_head and head) or recipe.unpruned()
            if is_head:
                chosen = chosen.for_head()
            if everywhere and site.role not in TARGETS["ffn"]:
                # A larger scale is for FFNs: attention projections lose by it.
                chosen = replace(chosen, beta_factor=1.0)
            if site.experts is not None and chosen.dgrad is Gemm.MVUE24:
                # A draw along out_features is not defined for experts: their dgrad is the more precise one.
                chosen = replace(chosen, dgrad=Gemm.FP8)
            if recipe.is_bf16 and not targeted:
                detail = f"recipe {recipe.name!r} has no FP8 for it"
                advice = "" if is_head else f"for 2:4, which costs loss, {_names(site, targets)}"
                rejections.append(site.reject(Reason.NOT_A_TARGET, detail, advice))
                continue
            could_be_sparse = recipe.projection.prunes and not targeted and not is_head
            advice = f"dense FP8; for 2:4, which costs loss, {_names(site, targets)}" if could_be_sparse else ""
            stays_pruned = pruned and chosen.projection.prunes
            if site.writers and not stays_pruned:
                rejections.append(_written_to(site))
                continue
            if site.writers:
                raise ValueError(
                    f"{site.name!r} was trained pruned, and {', '.join(site.writers)} writes to its weight in the "
                    "compiled function, before the linear reads it. Weights are pruned before it runs, "
                    "so the linear would compute with it as it was. Write to weights outside of what is compiled, for "
                    "instance after optimizer.step(), or in a function under torch.compiler.disable."
                )
            plans.append(Plan(site=site, recipe=chosen, named=named, pruned=stays_pruned, advice=advice))
        elif named:
            raise ValueError(
                f"options={{'sste.targets': {targets!r}}} names {site.name!r}, which can't be rewritten: "
                f"{refusal.reason.value}: {refusal.detail}. Choose a pattern that leaves it out, or {refusal.advice}."
            )
        else:
            rejections.append(refusal)
    return alike(plans, rejections)


def alike(plans: list[Plan], rejections: list[Rejection]) -> tuple[list[Plan], list[Rejection]]:
    """One arithmetic for each weight, whatever parts the linears play that read it: a block that is called twice.

    Where one of them stays dense all do, where one is no target none is pruned, and the least scale is that of all.
    Where one is a head all are as precise as it.
    """
    dense = {rejection.site.weight: rejection for rejection in rejections if rejection.site is not None}
    least: dict[Node, Plan] = {}

    def order(plan: Plan) -> tuple[bool, float, bool, bool]:
        recipe = plan.recipe
        rounded = recipe.fprop is not Gemm.DENSE, recipe.dgrad is not Gemm.FP8_ACCURATE
        return recipe.projection.prunes, recipe.beta_factor, rounded[0], rounded[1]

    for plan in sorted(plans, key=order):
        least.setdefault(plan.site.weight, plan)
    agreed: list[Plan] = []
    for plan in plans:
        if (other := dense.get(plan.site.weight)) is not None:
            detail = f"another linear of this graph reads it and stays dense: {other.reason.value}: {other.detail}"
            rejections.append(plan.site.reject(Reason.TIED, detail, other.advice))
        else:
            other_plan = least[plan.site.weight]
            agreed.append(replace(plan, recipe=other_plan.recipe, advice=other_plan.advice))
    return agreed, rejections


def _names(site: LinearSite, targets: str) -> str:
    """What to say for the site to be targeted."""
    if targets == "all":
        return "name it in 'sste.targets'"
    wider = "ffn" if site.role in TARGETS["ffn"] else "all"
    return f"set 'sste.targets': {wider!r}, or name it there"


def _cannot(
    site: LinearSite, owners: ParameterOwners, pruned: bool, is_24: Callable[[Parameter, int], bool]
) -> Rejection | None:
    """What rules a rewrite out, whoever asks for it."""
    weight, x = example_value(site.weight), example_value(site.input)
    offsets = () if site.offsets is None else (("offsets", example_value(site.offsets)),)
    for name, value in (("weight", weight), ("input", x), *offsets):
        if not is_fake(value):
            return site.reject(Reason.NOT_PLAIN, f"{name} is {_describe(value)}", _make_plain(value))
    for name, value in (("weight", weight), ("input", x)):
        if value.dtype not in DTYPES:
            allowed = ", ".join(str(dtype) for dtype in DTYPES).replace("torch.", "")
            detail = f"{name} is {value.dtype}; allowed are {allowed}".replace("torch.", "")
            return site.reject(Reason.DTYPE, detail, "cast it, or run the model under torch.autocast with bfloat16")
    sizes = {"in_features": site.in_features, "out_features": site.out_features}
    odd = {name: size for name, size in sizes.items() if size % FEATURES_MULTIPLE}
    if odd:
        detail = " and ".join(f"{name} = {size} is not a multiple of {FEATURES_MULTIPLE}" for name, size in odd.items())
        padded = {name: -(-size // FEATURES_MULTIPLE) * FEATURES_MULTIPLE for name, size in odd.items()}
        advice = "pad " + " and ".join(f"{name} to {size}" for name, size in padded.items())
        return site.reject(Reason.SHAPE, detail, advice)
    parameter = real_parameter(site.weight)
    in_features_dim = weight.ndim - (2 if site.transposed else 1)
    if not (weight.requires_grad or pruned or (parameter is not None and is_24(parameter, in_features_dim))):
        detail = "requires_grad is False, and it was never trained pruned"
        advice = "set requires_grad to train it, or 'sste.frozen': 'sparse' if it was finalized"
        return site.reject(Reason.FROZEN, detail, advice)
    # What was trained pruned goes on so, whoever else reads it by now.
    if pruned:
        return None
    if site.writers:
        return _written_to(site)
    untie = "give each use its own parameter, if the model allows"
    if site.other_uses:
        return site.reject(Reason.TIED, f"{', '.join(site.other_uses)} of this graph reads it as well", untie)
    holders = owners.holders(parameter) if parameter is not None else ()
    embedded = parameter is not None and owners.is_embedding(parameter)
    if len(holders) > 1 or embedded:
        return site.reject(Reason.TIED, f"held by {', '.join(holders)}", untie)
    return None


def _written_to(site: LinearSite) -> Rejection:
    """Operands are made of a weight as it is before the graph runs."""
    detail = f"{', '.join(site.writers)} of this graph writes to it, before the linear reads it"
    return site.reject(Reason.TIED, detail, "write to it outside of what is compiled")


def _describe(value: Any) -> str:
    """What an example value is that stands for no ordinary tensor."""
    if type(value) is torch.Tensor:
        return "inside a transform of torch.func, such as vmap or grad"
    return f"a {type(value).__name__}"


def _make_plain(value: Any) -> str:
    """What the user can do about it."""
    if type(value) is torch.Tensor:
        return "call the linear outside of the transform"
    return f"keep the linear free of {type(value).__name__}, for instance by leaving it out of tensor parallelism"


def _should_not(site: LinearSite, is_head: bool, dense_head: bool) -> Rejection | None:
    """What is left dense unless the user names it."""
    advice = "name it in 'sste.targets' to rewrite it anyway"
    if site.experts is not None and site.role is Role.HEAD:
        return site.reject(Reason.HEAD, "several heads in one parameter", advice)
    if site.role is Role.OUTPUT:
        return site.reject(Reason.OUTPUT, "its output goes to a loss that is no cross-entropy over classes", advice)
    if site.role is Role.ROUTER and not is_head:
        return site.reject(Reason.ROUTER, "the largest elements of its output are chosen", advice)
    if site.role is Role.ADAPTER:
        return site.reject(Reason.ADAPTER, "of low rank, next to a frozen linear", advice)
    if min(site.in_features, site.out_features) < MIN_FEATURES:
        return site.reject(Reason.TOO_SMALL, f"fewer than {MIN_FEATURES} features", advice)
    if is_head and dense_head:
        return site.reject(Reason.HEAD, "'sste.head' is 'dense'", "leave 'sste.head' out for dense FP8")
    return None


def _is_head(site: LinearSite, owners: ParameterOwners) -> bool:
    """Experts are none: a vocabulary has one matrix."""
    if site.experts is not None:
        return False
    shape = site.out_features, site.in_features
    # Where tokens are drawn from logits, these are what chooses.
    return site.role is Role.HEAD or (
        site.role in (Role.LAST, Role.ROUTER) and owners.has_embedding(real_parameter(site.weight), *shape)
    )
