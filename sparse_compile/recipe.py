"""What is computed: a recipe names the arithmetic of a linear's three GEMMs and of its weight."""

import re
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

from sparse_compile.kernels.formats import E4M3, E5M2
from sparse_compile.projections.base import Projection, projection_of
from sparse_compile.projections.groups_of_four import SOFT, TOP2
from sparse_compile.projections.groups_of_four_bf16 import SOFT_BF16, TOP2_BF16
from sparse_compile.projections.identity import IDENTITY, IDENTITY_BACKWARD
from sparse_compile.projections.transposable import SOFT_TRANSPOSABLE, TRANSPOSABLE


class Gemm(Enum):
    """How one of the three products runs.

    Attributes:
        DENSE: unchanged, in the dtype of the activations.
        FP8: dense, both operands in FP8.
        FP8_ACCURATE: of dgrad: the same, with sums as exact as in FP32, as those of every wgrad are.
        SPARSE24: in FP8, one operand 2:4: the weight in fprop and dgrad, grad_output in wgrad.
        MVUE24: of dgrad, an experiment: in FP8, grad_output is sampled to 2:4 along out_features.
        BF16: dense, in bf16, beside a weight that is pruned in bf16.
        SPARSE24_BF16: of fprop: in bf16, the weight 2:4.
    """

    DENSE = "dense"
    FP8 = "fp8"
    FP8_ACCURATE = "fp8_accurate"
    SPARSE24 = "sparse24"
    MVUE24 = "mvue24"
    BF16 = "bf16"
    SPARSE24_BF16 = "sparse24_bf16"

    def __str__(self) -> str:
        """For people; ``value`` is for keys."""
        return _SHOWN.get(self, self.value)

    @property
    def is_dense_fp8(self) -> bool:
        """Whether both operands are dense and in FP8."""
        return self in (Gemm.FP8, Gemm.FP8_ACCURATE)


_SHOWN = {
    Gemm.FP8_ACCURATE: "fp8", Gemm.SPARSE24: "2:4 fp8", Gemm.MVUE24: "2:4 fp8 mvue", Gemm.SPARSE24_BF16: "2:4 bf16"
}  # fmt: skip


class Estimator(Enum):
    """How grad_output is made 2:4: along tokens for wgrad, along out_features for a dgrad that is so by sampling.

    Both keep two of each four elements at random, such that their mean is the gradient (MVUE, Chmiel et al., ICLR 2023,
    arXiv 2203.10991).

    Attributes:
        EXACT_MVUE: with the least variance.
        APPROXIMATE_MVUE: as the training code of the S-STE authors does, with probabilities that come near to it.
    """

    EXACT_MVUE = "exact"
    APPROXIMATE_MVUE = "approximate"


class GradFormat(Enum):
    """The FP8 of grad_output; that of inputs and weights is e4m3.

    Attributes:
        E4M3: up to 448.
        E5M2: up to 57344, with one bit less in the mantissa; for vocabulary heads, elsewhere an experiment.
    """

    E4M3 = "e4m3"
    E5M2 = "e5m2"

    @property
    def dtype(self) -> torch.dtype:
        """PyTorch's."""
        return E5M2 if self is GradFormat.E5M2 else E4M3


class Rounding(Enum):
    """How what the estimator keeps becomes FP8.

    Attributes:
        NEAREST: to the nearest value of the format.
        STOCHASTIC: up or down at random, so that the mean is the estimate's; an experiment.
    """

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """The arithmetic of one linear, ``output = input @ weight.T``.

    fprop is 2:4 exactly where the weight is projected, wgrad exactly where an estimator prunes grad_output.  dgrad
    contracts over out_features, so it is 2:4 where the weight is so along these, too, or, as an experiment, where the
    estimator of wgrad prunes another copy of grad_output along them.  It reads the projected weight where there is one,
    which exists in FP8 or, for all three products, in bf16.

    Attributes:
        name: a word; that of the recipe that it is, or is made of, where that is among ``RECIPES``.
        projection: what the weight becomes before its cast.
        fprop, dgrad, wgrad: how the products run.
        estimator: what prunes grad_output for wgrad; None if wgrad is dense.
        grad_format: the FP8 of grad_output; those of ``RECIPES`` have the default.
        rounding: of what the estimator keeps; no named recipe has another than the default.
        decay: masked decay: ``decay * (1 - mask) * W`` is added to the gradient.
        refresh: optimizer steps between two searches for transposable masks; 0 without them.
        beta_factor: times the beta that is the best fit of a weight that is not 2:4 yet; where all linears are targets,
            of the weights of FFNs.
        tail: share of the optimizer steps, the last ones, in which it is dense.

    Raises:
        ValueError: the parts do not go together.
    """

    name: str
    projection: Projection
    fprop: Gemm
    dgrad: Gemm
    wgrad: Gemm
    estimator: Estimator | None
    grad_format: GradFormat = GradFormat.E4M3
    rounding: Rounding = Rounding.NEAREST
    decay: float = 0.0
    refresh: int = 0
    beta_factor: float = 1.0
    tail: float = 0.0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"the name of a recipe is {self.name!r}; allowed are letters, digits, '-', '_' and '.'")
        if (self.fprop in (Gemm.SPARSE24, Gemm.SPARSE24_BF16)) != self.projection.prunes:
            raise ValueError(f"recipe {self.name!r}: fprop is 2:4 if and only if the weight is projected")
        if Gemm.FP8_ACCURATE in (self.fprop, self.wgrad):
            raise ValueError(f"recipe {self.name!r}: FP8_ACCURATE is for dgrad; the sums of wgrad always are so")
        if (self.wgrad is Gemm.SPARSE24) != (self.estimator is not None):
            raise ValueError(f"recipe {self.name!r}: wgrad is 2:4 if and only if an estimator is named")
        if len({self.is_bf16, self.dgrad is Gemm.BF16, self.wgrad is Gemm.BF16}) > 1:
            raise ValueError(f"recipe {self.name!r}: all three products must be in bf16, or none")
        if self.projection.prunes and self.is_bf16 != self.projection.is_bf16:
            raise ValueError(
                f"recipe {self.name!r}: its products and projection {self.projection} have different dtypes"
            )
        if self.fprop is Gemm.DENSE and (self.projection.prunes or self.dgrad is Gemm.DENSE):
            raise ValueError(
                f"recipe {self.name!r}: fprop must be 2:4 or dense fp8, or dense where dgrad is dense fp8 and the "
                "weight is not projected"
            )
        if (self.dgrad is Gemm.SPARSE24) != self.projection.prunes_both_ways:
            raise ValueError(f"recipe {self.name!r}: dgrad is 2:4 if and only if the weight is 2:4 both ways")
        if self.dgrad is Gemm.MVUE24 and not (self.projection.prunes and self.estimator):
            raise ValueError(f"recipe {self.name!r}: a sampled dgrad needs a pruned weight and a sampled wgrad")
        if self.dgrad is Gemm.DENSE and self.projection.prunes:
            raise ValueError(
                f"recipe {self.name!r}: dgrad must be dense fp8, or dense where the weight is not projected"
            )
        if self.grad_format is not GradFormat.E4M3 and not self.has_fp8_gradients:
            raise ValueError(f"recipe {self.name!r}: grad_format needs a product that reads gradients in FP8")
        if self.rounding is not Rounding.NEAREST and self.estimator is None:
            raise ValueError(f"recipe {self.name!r}: rounding needs an estimator")
        if self.decay and not self.projection.is_hard:
            raise ValueError(f"recipe {self.name!r}: a decay needs a mask, which only hard pruning has")
        if self.beta_factor != 1.0 and not self.projection.has_beta:
            raise ValueError(f"recipe {self.name!r}: beta_factor needs a projection that has a beta")
        if self.projection.keeps_masks != (self.refresh > 0):
            raise ValueError(f"recipe {self.name!r}: refresh must be above 0 if and only if the masks are transposable")

    @property
    def is_bf16(self) -> bool:
        """Whether it computes without FP8."""
        return self.fprop is Gemm.SPARSE24_BF16

    @property
    def has_fp8_gradients(self) -> bool:
        """Whether a product reads grad_output in FP8."""
        return not {self.dgrad, self.wgrad} <= {Gemm.DENSE, Gemm.BF16}

    @property
    def full_name(self) -> str:
        """What a graph calls its arithmetic: the name, and what was chosen otherwise, ``s-ste/grad_format=E5M2``.

        Without what graphs do not compute: decay, refresh, the factor of beta, the tail.  The name of a recipe of the
        user's own says nothing, so all that it computes follows.
        """
        original = RECIPES.get(self.name)
        changes = (
            f"{field}={_written(getattr(self, field))}"
            for field in ("projection", *_CHOICES)
            if original is None or getattr(self, field) is not getattr(original, field)
        )
        return "/".join((self.name, *changes))

    def with_estimator(self, estimator: Estimator | None) -> "Recipe":
        """This recipe with another estimator.  Only of recipes that have one.

        Args:
            estimator: None for a wgrad in dense FP8.

        Returns:
            A recipe that is the same in all else.
        """
        if estimator is None:
            return next(v for v in self.variants() if (v.dgrad, v.wgrad) == (self.dgrad, Gemm.FP8))
        return replace(self, estimator=estimator)

    def unpruned(self) -> "Recipe":
        """What linears get that are none of its targets, and its own in a dense phase.

        Returns:
            Dense FP8, with this recipe's format of gradients.
        """
        return replace(FP8, grad_format=self.grad_format)

    def for_head(self) -> "Recipe":
        """What a vocabulary head gets in its place.

        Its grad_output is what a softmax leaves: one large element in a row and thousands of small ones of the other
        sign.  Where rows of the weight share a direction, which the head of a trained model has, these cancel, and
        sums of 14 bits cut the small ones: an error that is the same for all tokens (docs/recipes.md).

        Returns:
            The same with an accurate dgrad, if dgrad is dense FP8.
        """
        return replace(self, dgrad=Gemm.FP8_ACCURATE) if self.dgrad is Gemm.FP8 else self

    def short_str(self) -> str:
        """Its products, and what else differs from the default, in a few characters.

        Returns:
            What the report shows, as ``s-ste (2:4 fp8, fp8, 2:4 fp8)``.
        """
        parts = [f"{self.fprop}, {self.dgrad}, {self.wgrad}"]
        if self.grad_format is not GradFormat.E4M3:
            parts.append(f"{self.grad_format.value} gradients")
        if self.rounding is not Rounding.NEAREST:
            parts.append(f"{self.rounding.value} rounding")
        return f"{self.name} ({'; '.join(parts)})"

    def variants(self) -> tuple["Recipe", ...]:
        """This recipe, and those that differ from it by more precise backward products, of the same weight.

        A dense dgrad saves the cast of grad_output only if wgrad is dense, too.

        Returns:
            What ``sste.when="faster"`` chooses from.
        """
        if self.is_bf16:
            return (self,)
        dgrad = Gemm.FP8 if self.dgrad is Gemm.MVUE24 else self.dgrad
        backward = [(dgrad, self.wgrad), (dgrad, Gemm.FP8), (dgrad, Gemm.DENSE)]
        if not self.projection.prunes and self.fprop is not Gemm.DENSE:
            backward.append((Gemm.DENSE, Gemm.DENSE))
        others = (
            replace(
                self,
                projection=self.projection if dgrad is not Gemm.DENSE else self.projection.one_copy or self.projection,
                dgrad=dgrad,
                wgrad=wgrad,
                estimator=self.estimator if wgrad is self.wgrad else None,
                rounding=self.rounding if wgrad is self.wgrad else Rounding.NEAREST,
                grad_format=GradFormat.E4M3 if dgrad is Gemm.DENSE else self.grad_format,
            )
            for dgrad, wgrad in dict.fromkeys(backward)
            if (dgrad, wgrad) != (self.dgrad, self.wgrad)
        )
        return (self, *others)


SSTE = Recipe(
    name="s-ste",
    projection=SOFT,
    fprop=Gemm.SPARSE24,
    dgrad=Gemm.FP8,
    wgrad=Gemm.SPARSE24,
    estimator=Estimator.EXACT_MVUE,
)
SSTE_APPROXIMATE = replace(SSTE, name="s-ste-approximate", estimator=Estimator.APPROXIMATE_MVUE)
SSTE_TRANSPOSABLE = replace(SSTE, name="s-ste-transposable", projection=SOFT_TRANSPOSABLE, dgrad=Gemm.SPARSE24)
STE = replace(SSTE, name="ste", projection=TOP2)
SR_STE = replace(STE, name="sr-ste", decay=2e-4)
T_SR_STE = replace(SR_STE, name="t-sr-ste", projection=TRANSPOSABLE, dgrad=Gemm.SPARSE24, refresh=40)
STE_DENSE_TAIL = replace(STE, name="ste-dense-tail", tail=1 / 6)
FP8 = Recipe(name="fp8", projection=IDENTITY, fprop=Gemm.FP8, dgrad=Gemm.FP8, wgrad=Gemm.FP8, estimator=None)
FP8_MVUE = replace(FP8, name="fp8-mvue", wgrad=Gemm.SPARSE24, estimator=Estimator.EXACT_MVUE)
FP8_BACKWARD = replace(FP8, name="fp8-backward", fprop=Gemm.DENSE, projection=IDENTITY_BACKWARD)

SSTE_BF16 = replace(
    SSTE, name="s-ste-bf16", projection=SOFT_BF16, fprop=Gemm.SPARSE24_BF16, dgrad=Gemm.BF16, wgrad=Gemm.BF16,
    estimator=None,
)  # fmt: skip
STE_BF16 = replace(SSTE_BF16, name="ste-bf16", projection=TOP2_BF16)

# By the names that the user may say.
RECIPES = {
    recipe.name: recipe
    for recipe in (
        SSTE, SSTE_TRANSPOSABLE, SSTE_APPROXIMATE, SSTE_BF16, STE, STE_BF16, SR_STE, T_SR_STE,
        STE_DENSE_TAIL, FP8, FP8_MVUE, FP8_BACKWARD,
    )
}  # fmt: skip
# What the user may say of the head.  Most of what a softmax over a large vocabulary leaves lies below e4m3's range.
HEAD = {
    "dense": None,
    "fp8": replace(FP8, grad_format=GradFormat.E5M2),
    "fp8-backward": replace(FP8_BACKWARD, grad_format=GradFormat.E5M2),
}
# What the user may say of the estimator.
MVUE = {"exact": Estimator.EXACT_MVUE, "approximate": Estimator.APPROXIMATE_MVUE, "off": None}

# What a graph computes, besides the projection.
_CHOICES: dict[str, type[Enum]] = {
    "fprop": Gemm, "dgrad": Gemm, "wgrad": Gemm, "estimator": Estimator, "grad_format": GradFormat, "rounding": Rounding
}  # fmt: skip


def _written(value: Projection | Enum | None) -> str:
    if value is None:
        return ""
    return value.key if isinstance(value, Projection) else value.name


def recipe_named(full_name: str) -> Recipe:
    """The arithmetic that a graph calls so; in any process, since graphs are kept on disk.

    What graphs do not compute is that of the recipe of this name, or left out.
    """
    name, *changes = full_name.split("/")
    chosen: dict[str, Any] = {}
    for change in changes:
        field, choice = change.split("=")
        if field == "projection":
            chosen[field] = projection_of(choice)
        else:
            chosen[field] = _CHOICES[field][choice] if choice else None
    if name in RECIPES:
        return replace(RECIPES[name], **chosen)
    return Recipe(name=name, refresh=int(chosen["projection"].keeps_masks), **chosen)
