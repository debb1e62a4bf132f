"""Every arithmetic that a graph may name."""

from collections.abc import Iterator
from dataclasses import replace

from sparse_compile.recipe import (
    FP8,
    MVUE,
    RECIPES,
    SSTE,
    SSTE_APPROXIMATE,
    T_SR_STE,
    Gemm,
    GradFormat,
    Recipe,
    Rounding,
)


def with_sampled_dgrad(recipe: Recipe) -> Recipe:
    """With a dgrad that is 2:4 by its estimator."""
    return replace(recipe, dgrad=Gemm.MVUE24)


def _chosen() -> Iterator[Recipe]:
    for recipe in RECIPES.values():
        yield recipe
        if recipe.estimator is not None:
            for estimator in MVUE.values():
                chosen = recipe.with_estimator(estimator)
                yield chosen
                if chosen.estimator is not None and chosen.projection.prunes and chosen.dgrad is Gemm.FP8:
                    yield with_sampled_dgrad(chosen)
    for recipe in (FP8, SSTE):
        yield recipe.for_head()
    # One of each form: how gradients are cast depends on nothing else.
    for recipe in (SSTE, with_sampled_dgrad(SSTE), T_SR_STE, FP8):
        yield replace(recipe, grad_format=GradFormat.E5M2)
    for recipe in (SSTE, with_sampled_dgrad(SSTE_APPROXIMATE)):
        for grad_format in GradFormat:
            yield replace(recipe, rounding=Rounding.STOCHASTIC, grad_format=grad_format)


VARIANTS = {variant.full_name: variant for recipe in _chosen() for variant in recipe.variants()}
