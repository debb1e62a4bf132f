"""TUNE: the fastest configuration of each 2:4 GEMM that the plans will run."""

from collections.abc import Iterator, Sequence
from math import prod

from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3, padded, unscaled_dtype
from sparse_compile.kernels.sparse_gemm import tuning
from sparse_compile.kernels.sparse_gemm.problem import Problem
from sparse_compile.passes.decide import Plan
from sparse_compile.recipe import Gemm
from sparse_compile.torch_internals.graph import example_value
from sparse_compile.torch_internals.sizes import hint


def autotune(plans: Sequence[Plan]) -> None:
    """Time the GEMMs that run as kernels, except those that were tuned before."""
    for plan in plans:
        device = example_value(plan.site.weight).device
        if ops.emulation_reason(device) is not None:
            continue
        for problem in _problems(plan):
            if tuning.lookup(problem, device) is None:
                tuning.tune(problem, device)


def _problems(plan: Plan) -> Iterator[Problem]:
    """What ``linear`` multiplies; nothing if the number of tokens depends on data, nor of experts."""
    site = plan.site
    if site.experts is not None:
        return
    tokens = hint(prod(example_value(site.input).shape[:-1]))
    if not tokens:
        return
    payload, grad = plan.recipe.projection.dtype, plan.recipe.grad_format.dtype
    if plan.recipe.projection.prunes:
        yield Problem(
            rows=site.out_features,
            columns=tokens,
            contraction=site.in_features,
            dtype=payload,
            dense_dtype=payload,
            out_dtype=example_value(site.node).dtype,
            scaled=not plan.recipe.is_bf16,
            transpose=True,
            use_fast_accum=True,
        )
    if plan.recipe.dgrad is Gemm.SPARSE24:
        yield Problem(
            rows=site.in_features,
            columns=tokens,
            contraction=site.out_features,
            dtype=E4M3,
            dense_dtype=grad,
            out_dtype=example_value(site.input).dtype,
            scaled=True,
            transpose=True,
            use_fast_accum=True,
        )
    if plan.recipe.dgrad is Gemm.MVUE24:
        yield Problem(
            rows=padded(tokens),
            columns=site.in_features,
            contraction=site.out_features,
            dtype=grad,
            dense_dtype=E4M3,
            out_dtype=unscaled_dtype(example_value(site.input).dtype),
            scaled=False,
            transpose=False,
            use_fast_accum=True,
        )
    if plan.recipe.wgrad is Gemm.SPARSE24:
        yield Problem(
            rows=site.out_features,
            columns=site.in_features,
            contraction=padded(tokens),
            dtype=grad,
            dense_dtype=E4M3,
            out_dtype=example_value(site.weight).dtype,
            scaled=False,
            transpose=site.transposed,
            use_fast_accum=False,
        )
