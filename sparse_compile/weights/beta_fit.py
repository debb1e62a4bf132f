"""The S-STE scale of a weight: fitted where the weight is representative, a prior where it is not.

beta = <W, S(W)> / <S(W), S(W)> is frozen when training begins, so it must hold for what the weight will become.  Each
projection knows what it is for real distributions (``BetaLimits``).  Where the magnitudes of a group are nearly equal,
S(W) is what is left by rounding, and the fit says nothing: 16,000 after one step of Adam from zero, where the weight
then grows and the scale stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.projections.base import BetaLimits, Projection

# Share of tiles of which S(W) holds next to nothing, since their magnitudes are equal.
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
        prior: the scale of weights that are not.
        is_24: whether S(W) = W, and not zero everywhere: then the scale is 1.
    """

    value: float
    representative: bool
    prior: float
    is_24: bool = False

    def may_replace_prior(self) -> bool:
        return self.representative and not self.is_24 and abs(self.value / self.prior - 1) <= _LARGEST_CHANGE


def fit_beta(matrix: Tensor, projection: Projection) -> Fit | None:
    """The scale of ``matrix [N, K]`` for a projection that has one; None if it holds NaN or infinite values."""
    (fit,) = fit_betas([matrix], projection)
    return fit


def fit_betas(matrices: Sequence[Tensor], projection: Projection) -> list[Fit | None]:
    """``fit_beta`` of each matrix, with one wait for the device."""
    assert projection.beta_limits is not None
    sums = torch.stack([_sums(matrix, projection) for matrix in matrices]).tolist()
    return [_fit(projection.beta_limits, *of_matrix) for of_matrix in sums]


def _sums(matrix: Tensor, projection: Projection) -> Tensor:
    """What ``_fit`` reads of a matrix, fp64 ``[6]``."""
    w = matrix.detach().double()
    s = projection.project(w, None)
    ws, ss = (w * s).sum(), s.square().sum()
    shape = (-1, projection.rows, w.shape[1] // 4, 4)
    tiles = [(a * b).reshape(shape).sum((1, 3)) for a, b in ((w, w), (w, s), (s, s))]
    used = tiles[0] > 0
    energy, projected, squared = (tile[used] for tile in tiles)
    # Tiles of any size count alike here, so outliers do not decide.
    products, squares = (projected / energy).mean(), (squared / energy).mean()
    lost = (squared < _LOST * energy).double().mean()
    return torch.stack([ws, ss, products, squares, lost, (s == w).all()])


def _fit(
    limits: BetaLimits, ws: float, ss: float, products: float, squares: float, lost: float, equal: float
) -> Fit | None:
    prior = Fit(limits.prior, representative=False, prior=limits.prior)
    if ws == 0:
        return prior
    if not (abs(ws) < float("inf") and abs(ss) < float("inf")):
        return None
    if equal:
        return Fit(1.0, representative=True, prior=limits.prior, is_24=True)
    if lost > _MOST_LOST or products**2 / squares < limits.least_energy:
        return prior
    fitted, typical = ws / ss, products / squares
    value = fitted if fitted >= limits.smallest else typical
    return Fit(value, representative=True, prior=limits.prior) if value <= limits.largest else prior
