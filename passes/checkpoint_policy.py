"""RECOMPUTE: what a policy of selective activation checkpointing says of ``aten.mm`` holds for the rewritten linears.

Such a policy is asked for each operation whether its result is saved or computed again in backward.  Users name the
operations of dense linears there, and know nothing of those that stand in their place.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch

from sparse_compile.kernels import ops
from sparse_compile.passes.decide import Plan
from sparse_compile.torch_internals.graph import CHECKPOINT_CONTEXTS


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
        named_op = torch.ops.aten.mm.default if op in (ops.sparse_mm, ops.scaled_mm) else op
        return policy(context, named_op, *arguments, **named)

    return ask
