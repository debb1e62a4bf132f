"""DECIDE: which linears are rewritten, in which recipe, and why the others are not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn import Parameter

from sparse_compile.owners import ParameterOwners
from sparse_compile.passes.find import LinearSite, Reason, Rejection
from sparse_compile.passes.roles import Role
from sparse_compile.recipe import FP8, Recipe
from sparse_compile.report import Row
from sparse_compile.torch_internals import example_value, is_fake, real_parameter

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
    """A linear that will be rewritten, the arithmetic it gets, and whether the user named it."""

    site: LinearSite
    recipe: Recipe
    named: bool = False
    price: Price | None = None  # where it was measured

    def row(self) -> Row:
        site = self.site
        return Row(
            module=site.name,
            role=site.role.value,
            shape=site.shape,
            decision=self.recipe.short_str(),
            reason="",
            dense_us=self.price.dense if self.price else None,
            rewritten_us=self.price.rewritten if self.price else None,
        )


def decide(
    sites: Sequence[LinearSite],
    recipe: Recipe,
    targets: str,
    owners: ParameterOwners,
    *,
    head: bool = False,
    is_pruned: Callable[[Parameter], bool] = lambda _: False,
) -> tuple[list[Plan], list[Rejection]]:
    """A plan or a rejection for each site.

    Args:
        recipe: what the targeted linears get; the other linears get dense FP8.
        targets: ``"ffn"``, ``"all"``, or a glob of module names.
        owners: what modules hold, to tell shared weights and the head.
        head: whether the vocabulary head gets dense FP8, too.
        is_pruned: whether a weight has been pruned in training: then it goes on, frozen or not.

    Raises:
        ValueError: a linear that the glob names can't be rewritten.
    """
    plans: list[Plan] = []
    rejections: list[Rejection] = []
    for site in sites:
        named = targets not in ("ffn", "all") and fnmatchcase(site.name, targets)
        refusal = _cannot(site, owners, is_pruned) or (None if named else _should_not(site, owners, head))
        if refusal is None:
            everywhere = targets == "all" and not _is_head(site, owners)
            targeted = named or everywhere or (targets == "ffn" and site.role is Role.FFN)
            plans.append(Plan(site=site, recipe=recipe if targeted else FP8, named=named))
        elif named:
            raise ValueError(
                f"options={{'sste.targets': {targets!r}}} names {site.name!r}, which can't be rewritten: "
                f"{refusal.reason.value}: {refusal.detail}. Choose a pattern that leaves it out."
            )
        else:
            rejections.append(refusal)
    return plans, rejections


def _cannot(site: LinearSite, owners: ParameterOwners, is_pruned: Callable[[Parameter], bool]) -> Rejection | None:
    """What rules a rewrite out, whoever asks for it."""
    weight, x = example_value(site.weight), example_value(site.input)
    for name, value in (("weight", weight), ("input", x)):
        if not is_fake(value):
            return site.reject(Reason.NOT_PLAIN, f"{name} is {_describe(value)}")
    if weight.ndim != 2:
        return site.reject(Reason.NOT_2D, f"it has shape {tuple(weight.shape)}; only [N, K] is a linear's")
    for name, value in (("weight", weight), ("input", x)):
        if value.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            return site.reject(Reason.DTYPE, f"{name} is {value.dtype}; allowed are {allowed}".replace("torch.", ""))
    if site.out_features % FEATURES_MULTIPLE or site.in_features % FEATURES_MULTIPLE:
        return site.reject(
            Reason.SHAPE,
            f"in_features {site.in_features} and out_features {site.out_features} must be multiples of "
            f"{FEATURES_MULTIPLE}",
        )
    parameter = real_parameter(site.weight)
    if not (weight.requires_grad or (parameter is not None and is_pruned(parameter))):
        return site.reject(Reason.FROZEN, "requires_grad is False, and it was never trained pruned")
    if site.weight_uses > 1:
        return site.reject(Reason.TIED, f"{site.weight_uses} operations of this graph read it")
    holders = owners.holders(parameter) if parameter is not None else ()
    if len(holders) > 1:
        return site.reject(Reason.TIED, f"held by {', '.join(holders)}")
    return None


def _describe(value: Any) -> str:
    """What an example value is that stands for no ordinary tensor."""
    if type(value) is torch.Tensor:
        return "inside a transform of torch.func, such as vmap or grad"
    return f"a {type(value).__name__}"


def _should_not(site: LinearSite, owners: ParameterOwners, head: bool) -> Rejection | None:
    """What is left dense unless the user names it."""
    if not head and _is_head(site, owners):
        why = "its output goes to the loss"
        if site.role is Role.LAST:
            why = "its output leaves the graph and it has an embedding's shape"
        return site.reject(Reason.HEAD, f"{why}; 'sste.head' or its name in 'sste.targets' rewrites it")
    if min(site.in_features, site.out_features) < MIN_FEATURES:
        return site.reject(Reason.TOO_SMALL, f"fewer than {MIN_FEATURES} features; name it to rewrite it")
    return None


def _is_head(site: LinearSite, owners: ParameterOwners) -> bool:
    return site.role is Role.HEAD or (
        site.role is Role.LAST and owners.has_embedding(site.out_features, site.in_features)
    )
