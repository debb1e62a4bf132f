"""RECOMPUTE: what a policy of selective activation checkpointing says of ``aten.mm`` holds for the rewritten linears.

What it says of ``aten._grouped_mm`` holds for those of experts.

Such a policy is asked for each operation whether its result is saved or computed again in backward.  Users name the
operations of dense linears there, and know nothing of those that stand in their place.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch

from sparse_compile.kernels import grouped_ops, ops
from sparse_compile.passes.decide import Plan
from sparse_compile.torch_internals.graph import CHECKPOINT_CONTEXTS

# By what a linear multiplies with, what a dense one does.
_ASKED_FOR: dict[Any, Any] = {
    **dict.fromkeys((ops.sparse_mm, ops.scaled_mm), torch.ops.aten.mm.default),
    **dict.fromkeys((grouped_ops.grouped_sparse_mm, grouped_ops.grouped_scaled_mm), torch.ops.aten._grouped_mm.default),
}


def follow_checkpoint_policy(plans: Iterable[Plan]) -> None:
    """Let the policies around the planned linears take their GEMMs for ``aten.mm``."""
    for body in {plan.site.region.graph_module for plan in plans if plan.site.region.calls}:
        contexts = body.meta.get(CHECKPOINT_CONTEXTS)
        if contexts is not None:
            body.meta[CHECKPOINT_CONTEXTS] = _translated(contexts)


def _translated(make: Callable[..., Iterable[Any]]) -> Callable[..., Iterable[Any]]:
    @wraps(make)
    def contexts(*arguments: Any, **named: Any) -> Iterable[Any]:
        made = make(*arguments, **named)
        for context in made:
            # Contexts of other kinds have no policy.
            if hasattr(context, "policy_fn"):
                context.policy_fn = _asked_for_mm(context.policy_fn)
        return made

    return contexts


def _asked_for_mm(policy: Callable[..., Any]) -> Callable[..., Any]:
    def ask(context: Any, op: Any, *arguments: Any, **named: Any) -> Any:
        return policy(context, _ASKED_FOR.get(op, op), *arguments, **named)

    return ask
