"""The report's rows of what was decided."""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from torch.fx import Node

from sparse_compile.passes.decide import Plan
from sparse_compile.passes.sites import LinearSite, Reason, Rejection, dtype_name
from sparse_compile.recipe import Gemm
from sparse_compile.reporting.model import CONVOLUTION, DENSE, Row
from sparse_compile.torch_internals.graph import example_value, user_frames
from sparse_compile.torch_internals.sizes import hint


def planned_row(plan: Plan) -> Row:
    """Of a linear that is rewritten."""
    gemms = {"fprop": plan.recipe.fprop, "dgrad": plan.recipe.dgrad, "wgrad": plan.recipe.wgrad}
    precisions = {
        name: plan.site.dtype_name if gemms[name] is Gemm.DENSE else str(gemms[name]) for name in plan.site.products
    }
    row = _linear_row(plan.site, plan.recipe.short_str(), precisions, advice=plan.advice)
    if plan.price is None:
        return row
    return replace(row, dense_us=plan.price.dense, rewritten_us=plan.price.rewritten)


def rejected_row(rejection: Rejection) -> Row:
    """Of a product that stays dense."""
    reason = f"{rejection.reason.value}: {rejection.detail}"
    site = rejection.site
    if site is not None:
        precisions = dict.fromkeys(site.products, site.dtype_name)
        row = _linear_row(site, DENSE, precisions, reason=reason, advice=rejection.advice)
        return replace(row, dense_us=rejection.dense_us, rewritten_us=rejection.dense_us)
    source, code = _written_at(rejection.node)
    return Row(
        module=rejection.name,
        role=rejection.role.value,
        shape=rejection.shape,
        decision=DENSE,
        reason=reason,
        advice=rejection.advice,
        source=source,
        code=code,
        fprop=CONVOLUTION if rejection.reason is Reason.CONVOLUTION else dtype_name(rejection.node),
        dense_flops=rejection.flops,
    )


def _linear_row(
    site: LinearSite, decision: str, precisions: Mapping[str, str], *, reason: str = "", advice: str = ""
) -> Row:
    """Args: precisions: how each of the site's ``products`` runs."""
    source, code = _written_at(site.node)
    return Row(
        module=site.name,
        role=site.role.value,
        shape=site.shape,
        tokens=hint(prod(example_value(site.input).shape[:-1])),
        in_features=site.in_features,
        out_features=site.out_features,
        forwards=site.forwards,
        decision=decision,
        reason=reason,
        advice=advice,
        source=source,
        code=code,
        fprop=precisions.get("fprop", ""),
        dgrad=precisions.get("dgrad", ""),
        wgrad=precisions.get("wgrad", ""),
    )


def _written_at(node: Node) -> tuple[str, str]:
    """``file:line`` of the user's code that calls it, and that line."""
    frames = user_frames(node)
    if not frames:
        return "", ""
    file, line, _, code = frames[-1]
    return f"{file}:{line}", code
