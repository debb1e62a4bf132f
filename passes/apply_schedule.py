"""PHASE: what is planned to be pruned, and whose weight is in a dense phase of its schedule, runs dense.

In FP8, as what is no target does; in the dtype of the activations where the recipe has no FP8.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from sparse_compile.passes.decide import Plan
from sparse_compile.passes.sites import Reason, Rejection


def apply_schedule(
    plans: Sequence[Plan], why: str, is_pruned_now: Callable[[Plan], bool]
) -> tuple[list[Plan], list[Rejection]]:
    """The plans, in dense FP8 where the weight is not pruned now, and a rejection where there is none.

    Args:
        why: it is dense, for the report.
        is_pruned_now: asked of plans that prune.
    """
    scheduled: list[Plan] = []
    rejections: list[Rejection] = []
    for plan in plans:
        if not plan.recipe.projection.prunes or is_pruned_now(plan):
            scheduled.append(plan)
        elif plan.recipe.is_bf16:
            advice = "'sste.warmup' and 'sste.tail' set when it is pruned"
            rejections.append(plan.site.reject(Reason.DENSE_PHASE, why, advice))
        else:
            dense, shadow_projection = plan.recipe.unpruned(), plan.recipe.projection
            scheduled.append(replace(plan, recipe=dense, advice=why, shadow_projection=shadow_projection))
    return scheduled, rejections
