"""The S-STE scale of a weight: fitted where the weight is representative, a prior where it is not.

beta = <W, S(W)> / <S(W), S(W)> is frozen when training begins, so it must hold for what the weight will become.  It is
1 for a 2:4 weight, 1.3 for heavy tails, 1.48 for normal weights, 1.75 for uniform ones.  Where the magnitudes of a
group are nearly equal, S(W) is what is left by rounding, and the fit says nothing: 16,000 after one step of Adam from
zero, where the weight then grows and the scale stays.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.kernels.reference import soft_threshold24

PRIOR = 1.48  # of normal weights
LARGEST = 2.0  # above what real distributions give
SMALLEST = 1.25  # below it outliers decide the fit: the mean over groups is taken instead
# Share of a group's energy that beta * S(W) holds: 0.74 of normal weights, 0.61 of uniform ones, 0.5 of weights of
# three magnitudes, less where magnitudes are nearly equal.
_LEAST_ENERGY = 0.55
# Share of groups of which S(W) holds next to nothing, since their smallest three magnitudes are equal.
_MOST_LOST = 0.2
_LOST = 1e-4
# A weight that began with the prior is fitted in its first pruned steps, or not at all: later the fit grows to 2.5 or
# 3, as S-STE gathers small elements near the threshold.  The change must be small.
WINDOW = 10
_LARGEST_CHANGE = 0.2


@dataclass(frozen=True, slots=True)
class Fit:
    """What the elements of a weight say about its scale.

    Attributes:
        value: the scale; the prior where the weight is not representative.
        representative: whether it was fitted.
        is_24: whether S(W) = W, and not zero everywhere: then the scale is 1.
    """

    value: float
    representative: bool
    is_24: bool = False

    def may_replace_prior(self) -> bool:
        return self.representative and not self.is_24 and abs(self.value / PRIOR - 1) <= _LARGEST_CHANGE


def fit_beta(matrix: Tensor) -> Fit | None:
    """The scale of ``matrix [N, K]``; None if it holds NaN or infinite values."""
    w = matrix.detach().double()
    s = soft_threshold24(w)
    ws, ss = (w * s).sum(), s.square().sum()
    groups = [(a * b).reshape(-1, 4).sum(1) for a, b in ((w, w), (w, s), (s, s))]
    used = groups[0] > 0
    energy, projected, squared = (group[used] for group in groups)
    # Groups of any size count alike here, so outliers do not decide.
    products, squares = (projected / energy).mean(), (squared / energy).mean()
    lost = (squared < _LOST * energy).double().mean()
    # One wait for the device.
    ws, ss, products, squares, lost, equal = torch.stack([ws, ss, products, squares, lost, (s == w).all()]).tolist()
    if ws == 0:
        return Fit(PRIOR, representative=False)
    if not (abs(ws) < float("inf") and abs(ss) < float("inf")):
        return None
    if equal:
        return Fit(1.0, representative=True, is_24=True)
    if lost > _MOST_LOST or products**2 / squares < _LEAST_ENERGY:
        return Fit(PRIOR, representative=False)
    fitted, typical = ws / ss, products / squares
    value = fitted if fitted >= SMALLEST else typical
    return Fit(value, representative=True) if value <= LARGEST else Fit(PRIOR, representative=False)
