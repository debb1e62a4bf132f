"""What a report says about the health of pruned weights: samples, and from when on one should look closer."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """A pruned weight at one optimizer step; see ``sparse_compile.health``.

    Shares are numbers from 0 to 1.

    Attributes:
        step: the optimizer steps that the weight has made.
        flips: share of the bits of its mask that changed since the sample before; None at the first.
        zeros: share of zeros in the pruned weight; a half, and what ties and underflow add.
        underflow: share of the elements kept by the mask that are zero in FP8.
        saturated: share of the kept elements that have the largest magnitude of FP8.
        noise: error of the weight's gradient by MVUE and FP8, over the gradient without them; root mean squares.
        grad_underflow: share of the elements of its output's gradient that are zero in FP8, and were not before.
            This and ``noise`` are None where no gradient was seen: none came since it was asked for, CUDA graphs run
            in the process, dgrad does not run in FP8, by which a gradient's weight is known, or the weight is that of
            experts.
        beta: the scale of S-STE, of experts the median; None where the recipe has none.
        beta_source: ``"fitted"``, ``"prior"`` (the weight was not representative when training began),
            ``"checkpoint"``, ``"told"``, or ``"of a 2:4 weight"``.
        nonfinite: whether it holds NaN or infinity.
    """

    step: int
    flips: float | None
    zeros: float
    underflow: float
    saturated: float
    noise: float | None = None
    grad_underflow: float | None = None
    beta: float | None = None
    beta_source: str = ""
    nonfinite: bool = False

    @property
    def unusual_beta(self) -> bool:
        """Whether the scale is not what real distributions give: 1.25 to 2, or 1 for a 2:4 weight."""
        return self.beta is not None and self.beta != 1.0 and not 1.25 <= self.beta <= 2.0


# What is plotted, a share above which one should look closer, by rule of thumb, and what it says.
HEALTH_LIMITS = {
    "flips": (
        0.05,
        "Mask bits that changed since the previous sample. Masks change while the learning rate is high and settle as "
        "it falls. A rate that stays high means that weights keep being pruned and restored.",
    ),
    "underflow": (
        0.01,
        "Kept elements that become zero in FP8: they are too small next to the weight's largest element, or tie with "
        "pruned elements. A weight with a few very large elements loses many.",
    ),
    "saturated": (
        0.001,
        "Kept elements at FP8's largest magnitude. The scale follows the largest element, so there should be few.",
    ),
    "noise": (
        1.0,
        "The change that sampling (MVUE) and FP8 make to a weight's gradient, relative to the gradient. Sampling is "
        "unbiased: like the noise of small batches, it averages out over steps. Above 100 %, the gradient of a step is "
        "mostly noise. Larger batches help; recipe 'fp8' does not sample.",
    ),
    "grad_underflow": (
        0.01,
        "Elements of a linear's output gradient that become zero in FP8, in dgrad: they are too small next to the "
        "largest element of their token.",
    ),
}


def over_time(health: Mapping[str, Sequence[Health]], quantity: str) -> list[tuple[int, float, float]]:
    """``(step, median, largest)`` over the weights, of a quantity of ``Health``."""
    values: dict[int, list[float]] = {}
    for samples in health.values():
        for sample in samples:
            value = getattr(sample, quantity)
            if value is not None:
                values.setdefault(sample.step, []).append(value)
    return [(step, statistics.median(found), max(found)) for step, found in sorted(values.items())]
