"""PHASE: what is planned to be pruned, and whose weight is in a dense phase of its schedule, runs dense."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from sparse_compile.passes.decide import Plan
from sparse_compile.recipe import FP8


def phase(plans: Sequence[Plan], when: object, is_pruned_now: Callable[[Plan], bool]) -> list[Plan]:
    """The plans, with dense FP8 where the weight is not pruned now.

    Args:
        when: the dense phases, for the report.
        is_pruned_now: asked of plans that prune.
    """
    scheduled = []
    for plan in plans:
        pruned = not plan.recipe.projection.prunes or is_pruned_now(plan)
        scheduled.append(plan if pruned else replace(plan, recipe=FP8, advice=f"{when}, by its schedule"))
    return scheduled
