"""KEEP ONE COPY: of a weight in FP8 fprop's copy is kept alone, and each backward makes the other one of it."""

from collections.abc import Sequence
from dataclasses import replace

from sparse_compile.kernels.formats import PAD
from sparse_compile.passes.decide import Plan

# Elements.  To make the other copy of a smaller weight takes little but the launch of a kernel, which the products of
# small weights would feel; those of larger ones take a hundred times as long.
LARGE = 2**23


def keep_one_copy(plans: Sequence[Plan], *, of_small_weights: bool) -> list[Plan]:
    """The plans, with a projection that keeps one copy where there is one for the weight's shape; not of experts.

    Args:
        of_small_weights: else two are kept of those with fewer than ``LARGE`` elements.
    """
    return [_with_one_copy(plan) if of_small_weights or _is_large(plan) else plan for plan in plans]


def _is_large(plan: Plan) -> bool:
    return plan.site.out_features * plan.site.in_features >= LARGE


def _with_one_copy(plan: Plan) -> Plan:
    one_copy, site = plan.recipe.projection.one_copy, plan.site
    if one_copy is None or site.experts is not None or site.out_features % PAD or site.in_features % PAD:
        return plan
    return replace(plan, recipe=replace(plan.recipe, projection=one_copy))
