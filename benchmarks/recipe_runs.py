"""Training runs that differ by their recipe alone: a GPT-2-small shape, the same tokens in the same order."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from source_text import tokens
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_gpt

import sparse_compile  # noqa: F401 - registers the backend where it is not installed

DENSE = "bf16"
TORCHAO = "torchao tensorwise"
VOCABULARY = 8192
# Options of the backend, from the number of optimizer steps.
ARMS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "s-ste": lambda steps: {"sste.recipe": "s-ste"},
    "s-ste, no MVUE": lambda steps: {"sste.recipe": "s-ste", "sste.mvue": "off"},
    "s-ste, approximate MVUE": lambda steps: {"sste.recipe": "s-ste", "sste.mvue": "approximate"},
    "s-ste, 2:4 dgrad": lambda steps: {"sste.recipe": "s-ste", "sste.dgrad": "mvue"},
    "s-ste, bf16": lambda steps: {"sste.recipe": "s-ste-bf16"},
    "s-ste, dense tail": lambda steps: {"sste.recipe": "s-ste", "sste.tail": 1 / 6, "sste.total_steps": steps},
    "ste": lambda steps: {"sste.recipe": "ste"},
    "ste, no MVUE": lambda steps: {"sste.recipe": "ste", "sste.mvue": "off"},
    "ste-dense-tail": lambda steps: {"sste.recipe": "ste-dense-tail", "sste.total_steps": steps},
    "sr-ste": lambda steps: {"sste.recipe": "sr-ste"},
    "t-sr-ste": lambda steps: {"sste.recipe": "t-sr-ste"},
    "t-sr-ste, dense tail": lambda steps: {"sste.recipe": "t-sr-ste", "sste.tail": 1 / 6, "sste.total_steps": steps},
    "fp8": lambda steps: {"sste.recipe": "fp8"},
}
_WINDOW = 100  # steps whose losses are averaged
Run = dict[str, Any]


def train_arms(arms: Sequence[str], seeds: Sequence[int], at_least: int, device: torch.device) -> list[Run]:
    """One run for each arm and seed, of as many steps as there are tokens asked for."""
    shape, config = train_gpt.PRESETS["gpt2-small"]
    shape = replace(shape, vocabulary=VOCABULARY)
    steps = -(-at_least // (config.batch * shape.context))
    data = tokens(VOCABULARY, at_least)
    print(f"{len(data[0]):,} tokens to train on, {len(data[1]):,} held out, {steps} steps", flush=True)
    runs = []
    for seed in seeds:
        for arm in arms:
            seeded = replace(config, steps=steps, seed=seed, validation_batches=64)
            result = train_gpt.train(
                f"{arm}, {seed}", shape, seeded, data, device, lambda model, arm=arm: _compiled(arm, model, steps)
            )
            runs.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "steps": steps,
                    "vocabulary": VOCABULARY,
                    "training": asdict(seeded),
                    **asdict(result),
                }
            )
            print(
                f"{arm}, seed {seed}: {result.validation_loss:.4f}, {result.tokens_per_second:,.0f} tokens/s",
                flush=True,
            )
    return runs


def _compiled(arm: str, model: nn.Module, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    if arm == DENSE:
        return torch.compile(model)
    if arm == TORCHAO:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name("tensorwise")
        convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name != "head")
        return torch.compile(model)
    # Always: what is compared is how the arithmetic learns, whether or not it is faster for this model.
    return torch.compile(model, backend="sste", options={"sste.when": "always", **ARMS[arm](steps)})


def merged(old: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """The new runs in place of old ones of the same arm, seed and length."""
    runs = {(run["arm"], run["seed"], run["steps"]): run for run in (*old, *new)}
    return [runs[key] for key in sorted(runs, key=lambda key: (key[2], key[0] != DENSE, key[0], key[1]))]


def table(runs: Sequence[Run]) -> str:
    """Losses, and what they cost, against the dense run of the same seed and length."""
    dense = {(run["seed"], run["steps"]): run for run in runs if run["arm"] == DENSE}
    rows = []
    for run in runs:
        base = dense.get((run["seed"], run["steps"]))
        gap = percent = reached = None
        if base is not None:
            gap = run["validation_loss"] - base["validation_loss"]
            percent = 100 * gap / base["validation_loss"]
            reached = seconds_to(run, _smoothed(base)[-1])
        speed = run["tokens_per_second"]
        rows.append((run["arm"], run["seed"], run["steps"], run["validation_loss"], gap, percent, speed, reached))
    headers = (
        "arm", "seed", "steps", "validation loss", f"over {DENSE}", "%", "tokens a second", f"s to {DENSE}'s last loss"
    )  # fmt: skip
    formats = ("", "", "", ".4f", "+.4f", "+.2f", ",.0f", ".1f")
    return tabulate(rows, headers=headers, floatfmt=formats, missingval="-", tablefmt="github")


def seconds_to(run: Run, loss: float) -> float | None:
    """Seconds of training, without compilation, until the mean of the last losses is no higher; None if never."""
    shape, _ = train_gpt.PRESETS["gpt2-small"]
    seconds_a_step = run["training"]["batch"] * shape.context / run["tokens_per_second"]
    for step, value in enumerate(_smoothed(run), start=_WINDOW):
        if value <= loss:
            return step * seconds_a_step
    return None


def _smoothed(run: Run) -> list[float]:
    """Means of the training losses of ``_WINDOW`` steps in a row."""
    losses, window = run["losses"], min(_WINDOW, len(run["losses"]))
    return [mean(losses[start : start + window]) for start in range(len(losses) - window + 1)]
