"""The same time for every arm: what the speed of pruned training is worth in loss."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import fair_runs
import torch
from harness import Run, latest
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_gpt

_SHORT = 50  # steps that are enough to know the speed
_VALIDATIONS = 20  # of a run
_FEW_BATCHES = 16  # of each


class Curve:
    """Validation loss over the seconds that the steps took, without compilation and without the validations."""

    def __init__(self, text: Tensor, context: int, steps: int, device: torch.device) -> None:
        self.points: list[tuple[float, float]] = []
        self._text, self._context, self._device = text, context, device
        self._steps, self._interval = steps, max(1, steps // _VALIDATIONS)
        self._untimed = max(1, steps // 10)  # compile, and are taken to be as fast as the others
        self._paused = 0.0

    def __call__(self, step: int, model: Callable[[Tensor, Tensor], Tensor], config: train_gpt.TrainConfig) -> None:
        done = step + 1
        if done == self._untimed:
            self._start = self._now()
        if done <= self._untimed or (done % self._interval and done != self._steps):
            return
        now = self._now()
        seconds = (now - self._start - self._paused) * done / (done - self._untimed)
        few = replace(config, validation_batches=_FEW_BATCHES)
        self.points.append((seconds, train_gpt.validation_loss(model, self._text, few, self._context, self._device)))
        self._paused += self._now() - now

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def train_for_as_long(
    setting: str, arms: Sequence[tuple[str, float, float]], seconds: float, device: torch.device
) -> Iterator[Run]:
    """A run of each arm, factor and learning rate, of as many steps as take so long by the speed of a short one."""
    chosen = fair_runs.SETTINGS[setting]
    data = chosen.text(0)
    for arm, factor, rate in arms:
        short = fair_runs.train(setting, arm, factor, rate, 0, _SHORT, data, device)
        steps = int(seconds * short["tokens_per_second"] / chosen.tokens_a_step)
        curve = Curve(data[1], chosen.shape.context, steps, device)
        run = fair_runs.train(setting, arm, factor, rate, 0, steps, data, device, curve)
        yield {**run, "seconds_given": seconds, "curve": curve.points}


def merged(old: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """The new runs in place of old ones of the same setting, arm, factor, rate and time."""
    return latest(old, new, ("setting", "arm", "factor", "learning_rate", "seconds_given"))


def table(runs: Sequence[Run]) -> str:
    """Losses after about the same time."""
    rows = [
        (run["setting"], run["arm"], run["factor"], run["learning_rate"], run["steps"],
         run["steps"] * run["tokens_a_step"] / 1e6, run["curve"][-1][0], run["validation_loss"])
        for run in runs
    ]  # fmt: skip
    headers = ("setting", "arm", "factor", "rate", "steps", "million tokens", "seconds", "validation loss")
    return tabulate(rows, headers=headers, floatfmt=("", "", "g", "g", "", ".1f", ".1f", ".4f"), tablefmt="github")
