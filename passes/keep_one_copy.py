"""KEEP ONE COPY: of a weight in FP8 fprop's copy is kept alone, and each backward makes the other one of it."""

from collections.abc import Sequence
from dataclasses import replace

from sparse_compile.kernels.formats import PAD
from sparse_compile.passes.decide import Plan


def keep_one_copy(plans: Sequence[Plan]) -> list[Plan]:
    """The plans, with a projection that keeps one copy where there is one for the weight's shape; not of experts."""
    return [_with_one_copy(plan) for plan in plans]


def _with_one_copy(plan: Plan) -> Plan:
    one_copy, site = plan.recipe.projection.one_copy, plan.site
    if one_copy is None or site.experts is not None or site.out_features % PAD or site.in_features % PAD:
        return plan
    return replace(plan, recipe=replace(plan.recipe, projection=one_copy))
