"""What is computed: a recipe names the arithmetic of a linear's three GEMMs and of its weight."""

from dataclasses import dataclass, replace
from enum import Enum


class Projection(Enum):
    """What the weight becomes before its e4m3 cast."""

    NONE = "none"
    SSTE = "s-ste"  # beta * S(W), 2:4 along in_features


class Gemm(Enum):
    """How one of the three products runs."""

    FP8 = "fp8"
    SPARSE24 = "2:4 fp8"


class Estimator(Enum):
    """How wgrad's grad_output is made 2:4 along tokens."""

    EXACT_MVUE = "exact mvue"
    APPROXIMATE_MVUE = "approximate mvue"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The arithmetic of one linear, ``output = input @ weight.T``.

    fprop is 2:4 exactly where the weight is projected, wgrad exactly where an estimator prunes grad_output.  dgrad is
    dense in every recipe so far: the weight's groups run along in_features, dgrad contracts over out_features.
    """

    name: str
    projection: Projection
    fprop: Gemm
    dgrad: Gemm
    wgrad: Gemm
    estimator: Estimator | None

    def __post_init__(self) -> None:
        if (self.fprop is Gemm.SPARSE24) != (self.projection is Projection.SSTE):
            raise ValueError(f"recipe {self.name!r}: fprop is 2:4 if and only if the weight is projected")
        if (self.wgrad is Gemm.SPARSE24) != (self.estimator is not None):
            raise ValueError(f"recipe {self.name!r}: wgrad is 2:4 if and only if an estimator is named")
        if self.dgrad is not Gemm.FP8:
            raise ValueError(f"recipe {self.name!r}: dgrad must be dense fp8")

    def short_str(self) -> str:
        """``fprop/dgrad/wgrad`` in a few characters, for the report."""
        return f"{self.name} ({self.fprop.value}, {self.dgrad.value}, {self.wgrad.value})"


SSTE = Recipe(
    name="s-ste",
    projection=Projection.SSTE,
    fprop=Gemm.SPARSE24,
    dgrad=Gemm.FP8,
    wgrad=Gemm.SPARSE24,
    estimator=Estimator.EXACT_MVUE,
)
SSTE_APPROXIMATE = replace(SSTE, name="s-ste-approximate", estimator=Estimator.APPROXIMATE_MVUE)
FP8 = Recipe(name="fp8", projection=Projection.NONE, fprop=Gemm.FP8, dgrad=Gemm.FP8, wgrad=Gemm.FP8, estimator=None)

RECIPES = {recipe.name: recipe for recipe in (SSTE, SSTE_APPROXIMATE, FP8)}
