"""Which decays are accepted, by flip rates (T-SR-STE, Hu et al., ICML 2024, arXiv 2404.01847).

    r_t = ||m(w_t) xor m(w_{t-1})||_1 / D        mu = r'_t / r_t

m(w_t) is the mask of all weights that are pruned, D the number of their elements, r' the rate of a run that is pruned
and decays what the mask drops, r that of the same script trained dense, whose masks are virtual.  Both are means over
the last half of the steps.  A decay is accepted if mu lies in [0.60, 0.95].
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from tabulate import tabulate

from sparse_compile.reporting.model import precise

# The paper's range as others report it; its own text was not at hand.
LOWEST, HIGHEST = 0.60, 0.95
_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of the script.

    Attributes:
        decay: None for the dense run.
        elements: of each weight that is or would be pruned, by its name.
        flips: mask bits of it that changed in each step.
        stopped: whether the script was stopped; otherwise it ended by itself.
    """

    decay: float | None
    elements: Mapping[str, int]
    flips: Mapping[str, Sequence[int]]
    stopped: bool = True

    @property
    def name(self) -> str:
        return "dense" if self.decay is None else f"decay {self.decay:g}"

    def rates(self) -> list[float]:
        """r_t of the steps that all weights have made."""
        elements = sum(self.elements.values())
        return [sum(flips) / elements for flips in zip(*self.flips.values(), strict=False)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecayTable:
    """A dense run, and one for each decay so far.

    Raises:
        ValueError: there is no weight or no step, weights differ between runs, or no mask moves in the dense run.
    """

    recipe: str
    dense: Run
    runs: tuple[Run, ...] = ()

    def __post_init__(self) -> None:
        for run in self.runs:
            if run.elements != self.dense.elements:
                differing = sorted(dict(run.elements.items() ^ self.dense.elements.items()))
                raise ValueError(
                    f"the runs prune different weights: {', '.join(differing)} of {self.dense.name} and "
                    f"{run.name}; the script must build the same model each time"
                )
        if not self.dense.elements:
            raise ValueError("no weight is pruned, so there is no mask")
        if self.steps < 2:
            raise ValueError(f"a run has {self.steps} optimizer steps; at least 2 are needed")
        if self.mean(self.dense) == 0:
            raise ValueError(
                f"no mask changes in the dense run in {self._which_steps}; the learning rate may still be too small: "
                "raise --steps"
            )

    @property
    def steps(self) -> int:
        """That all runs have made."""
        return min(len(run.rates()) for run in (self.dense, *self.runs))

    def mean(self, run: Run) -> float:
        """Its flip rate over the last half of the steps."""
        rates = run.rates()[self.steps // 2 : self.steps]
        return sum(rates) / len(rates)

    def mu(self, run: Run) -> float:
        return self.mean(run) / self.mean(self.dense)

    def accepted(self) -> list[Run]:
        return [run for run in self.runs if LOWEST <= self.mu(run) <= HIGHEST]

    def recommended(self) -> float | None:
        """Of the accepted decays the one whose mu is nearest to the middle of what is accepted; None without any."""
        middle = (LOWEST + HIGHEST) / 2
        best = min(self.accepted(), key=lambda run: abs(self.mu(run) - middle), default=None)
        return None if best is None else best.decay

    def advice(self) -> str:
        """What to do now."""
        decay = self.recommended()
        if decay is not None:
            return (
                f"recommended: {decay:g}; its mu is the closest to {(LOWEST + HIGHEST) / 2:g}, the middle of the "
                "accepted range\n"
                f'    options={{"sste.recipe": "{self.recipe}", "sste.decay": {decay:g}}}'
            )
        above = [run.decay or 0.0 for run in self.runs if self.mu(run) > HIGHEST]
        below = [run.decay or 0.0 for run in self.runs if self.mu(run) < LOWEST]
        if not below:
            where = f"all are too weak: try larger ones than {max(above):g}"
        elif not above:
            where = f"all are too strong: try smaller ones than {min(below):g}"
        else:
            first, last = sorted((max(above), min(below)))
            where = f"try some between {first:g} and {last:g}"
        return f"no decay is accepted; {where} with --decays"

    def notes(self) -> list[str]:
        """What a reader must know of the numbers."""
        early = [run for run in (self.dense, *self.runs) if not run.stopped]
        weights = "1 weight" if len(self.dense.elements) == 1 else f"{len(self.dense.elements)} weights"
        notes = [f"flip rates are means over {self._which_steps}, of {weights}"]
        if early:
            notes.append(f"the script ended before its last step in: {', '.join(run.name for run in early)}")
        return notes

    @property
    def _which_steps(self) -> str:
        return f"optimizer steps {self.steps // 2 + 1} to {self.steps}"

    def lines(self) -> list[tuple[str, str, str, str]]:
        """Of the table: decay, flip rate, mu, and whether it is accepted."""
        lines = [("dense", precise(self.mean(self.dense)), "", "")]
        for run in self.runs:
            mu = self.mu(run)
            verdict = "too weak" if mu > HIGHEST else "too strong" if mu < LOWEST else "accepted"
            lines.append((f"{run.decay:g}", precise(self.mean(run)), f"{mu:.3f}", verdict))
        return lines

    def __str__(self) -> str:
        headers = ("decay", "flip rate", "mu", f"in [{LOWEST:.2f}, {HIGHEST:.2f}]")
        table = tabulate(self.lines(), headers=headers, disable_numparse=True, colalign=("right",) * 3 + ("left",))
        return "\n".join([f"recipe {self.recipe}", table, "", *self.notes(), "", self.advice()])

    def to_dict(self) -> dict[str, Any]:
        runs = [
            asdict(run) | {"flip_rates": run.rates(), "mean": self.mean(run), "mu": self.mu(run)}
            for run in (self.dense, *self.runs)
        ]
        accepted = [run.decay for run in self.accepted()]
        return {
            "version": _VERSION, "recipe": self.recipe, "steps": self.steps, "runs": runs, "accepted": accepted,
            "recommended": self.recommended(),
        }  # fmt: skip


def check_decays(decays: Sequence[float]) -> None:
    """What everyone asks who is given a grid.

    Raises:
        ValueError: it is empty, holds one twice, or something else than positive, finite numbers.
    """
    if not decays or not all(isfinite(decay) and decay > 0 for decay in decays) or len(set(decays)) < len(decays):
        listed = ", ".join(f"{decay:g}" for decay in decays)
        raise ValueError(f"the decays are {listed or 'none'}; allowed are positive, finite numbers, each once")
