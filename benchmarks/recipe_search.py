"""Why pruned training trails dense training, and what closes the gap: many short runs of a small GPT.

A trial differs from the plain run of its recipe in one thing.  Several run side by side, so no speed is measured.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import recipe_runs
import torch
from harness import Run, latest, side_by_side
from source_text import tokens
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_gpt

from sparse_compile.weights.registry import record_of

DENSE = "bf16"
SHAPE = train_gpt.GPTConfig(layers=6, heads=6, width=384, context=512, vocabulary=recipe_runs.VOCABULARY)
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to train.

    Args:
        options: of the backend, but ``sste.total_steps``; None trains dense, in bf16.
        weight_decay: of all matrices.
        grad: what the gradients of the FFN's weights are multiplied with, before they are clipped.
        beta: the S-STE scale of all pruned weights, instead of the one that follows from each.
    """

    options: Mapping[str, Any] | None = field(default_factory=dict)
    weight_decay: float = 0.1
    grad: float = 1.0
    beta: float | None = None


def _recipe(name: str, **options: Any) -> dict[str, Any]:
    return {"sste.recipe": name, **{f"sste.{option}": value for option, value in options.items()}}


STE, SSTE = _recipe("ste"), _recipe("s-ste")
TRIALS: Mapping[str, Trial] = {
    DENSE: Trial(options=None),
    "fp8": Trial(options=_recipe("fp8")),
    "s-ste": Trial(options=SSTE),
    "ste": Trial(options=STE),
    # Where the loss is lost: the estimator, the precision, the layers.
    "ste, no MVUE": Trial(options=_recipe("ste", mvue="off")),
    "s-ste, no MVUE": Trial(options=_recipe("s-ste", mvue="off")),
    "s-ste, bf16": Trial(options=_recipe("s-ste-bf16")),
    "s-ste, ffn.up alone": Trial(options=_recipe("s-ste", targets="*.ffn.up")),
    "s-ste, ffn.down alone": Trial(options=_recipe("s-ste", targets="*.ffn.down")),
    "s-ste, not the last block": Trial(options=_recipe("s-ste", targets="blocks.[0-4].ffn.*")),
    "s-ste, not the first block": Trial(options=_recipe("s-ste", targets="blocks.[1-5].ffn.*")),
    # What S-STE adds to its definition.
    "s-ste, gradient x beta": Trial(options=SSTE, grad=1.484),
    "s-ste, beta 1": Trial(options=SSTE, beta=1.0),
    "s-ste, beta 2": Trial(options=SSTE, beta=2.0),
    "bf16, no weight decay": Trial(options=None, weight_decay=0.0),
    "s-ste, no weight decay": Trial(options=SSTE, weight_decay=0.0),
    "ste, no weight decay": Trial(options=STE, weight_decay=0.0),
    # Phases.
    "s-ste, tail 1/6": Trial(options=_recipe("s-ste", tail=1 / 6)),
    "s-ste, tail 1/3": Trial(options=_recipe("s-ste", tail=1 / 3)),
    "s-ste, warm-up 1/6": Trial(options=_recipe("s-ste", warmup=1 / 6)),
    "ste, warm-up 1/6": Trial(options=_recipe("ste", warmup=1 / 6)),
    "ste, warm-up 1/3": Trial(options=_recipe("ste", warmup=1 / 3)),
    "ste, tail 1/6": Trial(options=_recipe("ste", tail=1 / 6)),
    "ste, tail 1/4": Trial(options=_recipe("ste", tail=1 / 4)),
    "ste, tail 1/3": Trial(options=_recipe("ste", tail=1 / 3)),
    "ste, tail 1/2": Trial(options=_recipe("ste", tail=1 / 2)),
    "ste, warm-up 1/6, tail 1/6": Trial(options=_recipe("ste", warmup=1 / 6, tail=1 / 6)),
    "ste, tail 1/3, no MVUE": Trial(options=_recipe("ste", tail=1 / 3, mvue="off")),
    # The other recipes.
    "sr-ste": Trial(options=_recipe("sr-ste")),
    "sr-ste, decay 2e-5": Trial(options=_recipe("sr-ste", decay=2e-5)),
    "sr-ste, tail 1/3": Trial(options=_recipe("sr-ste", tail=1 / 3)),
    "t-sr-ste": Trial(options=_recipe("t-sr-ste")),
    "t-sr-ste, tail 1/3": Trial(options=_recipe("t-sr-ste", tail=1 / 3)),
}


def run_trials(
    names: Sequence[str], rates: Sequence[float], seeds: Sequence[int], at_least: int, device: str, jobs: int
) -> Iterator[Run]:
    """One run for each trial, learning rate and seed, ``jobs`` at a time, each in a process of its own.

    Args:
        at_least: tokens that each run reads.
    """
    tokens(recipe_runs.VOCABULARY, at_least)  # made once, for all processes
    wanted = [(name, rate, seed, at_least, device) for seed, rate, name in product(seeds, rates, names)]
    for run in side_by_side(run_trial, wanted, jobs):
        print("{trial}, {learning_rate:g}, seed {seed}: {validation_loss:.4f}".format(**run), flush=True)
        yield run


def run_trial(name: str, rate: float, seed: int, at_least: int, device: str, shape: train_gpt.GPTConfig = SHAPE) -> Run:
    """One run."""
    trial = TRIALS[name]
    steps = -(-at_least // (BATCH * shape.context))
    config = train_gpt.TrainConfig(
        steps=steps, batch=BATCH, learning_rate=rate, weight_decay=trial.weight_decay,
        seed=seed, validation_batches=64,
    )  # fmt: skip
    data = tokens(recipe_runs.VOCABULARY, at_least)

    def compiled(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        if trial.options is None:
            return recipe_runs.compiled_dense(model)
        ffn = [parameter for key, parameter in model.named_parameters() if key.endswith(("up.weight", "down.weight"))]
        for weight in ffn:
            if trial.grad != 1.0:
                weight.register_hook(lambda grad: grad * trial.grad)
            if trial.beta is not None:
                record_of(weight).tell(trial.beta)
        options = dict(trial.options)
        if options.keys() & {"sste.tail", "sste.warmup"}:
            options["sste.total_steps"] = steps
        return recipe_runs.compiled_sste(model, options)

    result = train_gpt.train(f"{name}, {seed}", shape, config, data, torch.device(device), compiled)
    return {
        "trial": name, "learning_rate": rate, "seed": seed, "steps": steps, "training": asdict(config),
        "validation_loss": result.validation_loss, "training_loss": result.training_loss,
    }  # fmt: skip


def table(runs: Sequence[Run]) -> str:
    """Losses against the plain dense run of the same learning rate and seed, means over seeds."""
    rows = []
    for rate, name, losses, pairs in compared(runs, TRIALS, DENSE):
        gaps = [loss - dense for loss, dense in pairs]
        gap = mean(gaps) if gaps else None
        percent = 100 * mean(gaps) / mean(dense for _, dense in pairs) if gaps else None
        spread = max(gaps) - min(gaps) if len(gaps) > 1 else None
        rows.append((f"{rate:g}", name, len(losses), mean(losses), gap, percent, spread))
    headers = (
        "learning rate", "trial", "seeds", "validation loss", f"over {DENSE}", "%", "largest less smallest gap"
    )  # fmt: skip
    formats = ("", "", "", ".4f", "+.4f", "+.2f", ".4f")
    return tabulate(rows, headers=headers, floatfmt=formats, missingval="-", tablefmt="github")


def compared(
    runs: Sequence[Run], trials: Iterable[str], dense: str
) -> Iterator[tuple[float, str, list[float], list[tuple[float, float]]]]:
    """By learning rate and trial: its losses, and pairs of them with that of ``dense`` of the same rate and seed."""
    losses = {(run["trial"], run["learning_rate"], run["seed"]): run["validation_loss"] for run in runs}
    for rate, name in product(sorted({run["learning_rate"] for run in runs}), trials):
        of_trial = {key[2]: loss for key, loss in losses.items() if key[:2] == (name, rate)}
        if of_trial:
            pairs = [(of_trial[s], losses[dense, rate, s]) for s in of_trial if (dense, rate, s) in losses]
            yield rate, name, list(of_trial.values()), pairs


def merged(old: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """The new runs in place of old ones of the same trial, learning rate, seed and length."""
    return latest(old, new, ("trial", "learning_rate", "seed", "steps"))
