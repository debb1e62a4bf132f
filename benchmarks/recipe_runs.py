"""Training runs that differ by their recipe alone: a GPT-2-small shape, the same tokens in the same order."""

import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from harness import Run, latest, side_by_side
from source_text import tokens
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_gpt

import sparse_compile  # noqa: F401 - registers the backend where it is not installed
from sparse_compile.options import read_options
from sparse_compile.recipe import SSTE, Gemm, GradFormat, Rounding

DENSE = "bf16"
TORCHAO = "torchao tensorwise"
VOCABULARY = 8192
# Options of the backend, from the number of optimizer steps.
ARMS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "s-ste": lambda steps: {"sste.recipe": "s-ste"},
    "s-ste, no MVUE": lambda steps: {"sste.recipe": "s-ste", "sste.mvue": "off"},
    "s-ste, approximate MVUE": lambda steps: {"sste.recipe": "s-ste", "sste.mvue": "approximate"},
    "s-ste, 2:4 dgrad": lambda steps: {"sste.recipe": replace(SSTE, dgrad=Gemm.MVUE24)},
    "s-ste, e5m2 gradients": lambda steps: {"sste.recipe": replace(SSTE, grad_format=GradFormat.E5M2)},
    "s-ste, stochastic rounding": lambda steps: {"sste.recipe": replace(SSTE, rounding=Rounding.STOCHASTIC)},
    "s-ste, bf16": lambda steps: {"sste.recipe": "s-ste-bf16"},
    "s-ste, dense tail": lambda steps: {"sste.recipe": "s-ste", "sste.tail": 1 / 6, "sste.total_steps": steps},
    "s-ste, dense half": lambda steps: {"sste.recipe": "s-ste", "sste.tail": 1 / 2, "sste.total_steps": steps},
    "s-ste x 1.7": lambda steps: {"sste.recipe": "s-ste", "sste.beta": 1.7},
    "s-ste x 1.7, ffn-up": lambda steps: {"sste.recipe": "s-ste", "sste.beta": 1.7, "sste.targets": "ffn-up"},
    "s-ste x 1.7, no MVUE": lambda steps: {"sste.recipe": "s-ste", "sste.beta": 1.7, "sste.mvue": "off"},
    "ste": lambda steps: {"sste.recipe": "ste"},
    "ste, no MVUE": lambda steps: {"sste.recipe": "ste", "sste.mvue": "off"},
    "ste-dense-tail": lambda steps: {"sste.recipe": "ste-dense-tail", "sste.total_steps": steps},
    "ste, dense half": lambda steps: {"sste.recipe": "ste", "sste.tail": 1 / 2, "sste.total_steps": steps},
    "sr-ste": lambda steps: {"sste.recipe": "sr-ste"},
    "t-sr-ste": lambda steps: {"sste.recipe": "t-sr-ste"},
    "t-sr-ste, dense tail": lambda steps: {"sste.recipe": "t-sr-ste", "sste.tail": 1 / 6, "sste.total_steps": steps},
    "fp8": lambda steps: {"sste.recipe": "fp8"},
}
_WINDOW = 100  # steps whose losses are averaged
_SHORT = 50  # steps that are enough to know the speed


def train_arms(
    arms: Sequence[str], seeds: Sequence[int], at_least: int, device: torch.device, jobs: int
) -> Iterator[Run]:
    """One run for each arm and seed, of as many steps as there are tokens asked for, ``jobs`` at a time.

    Those that run side by side know no speed, None; ``measure_speeds`` tells it.
    """
    shape, config = _gpt2_small()
    steps = -(-at_least // (config.batch * shape.context))
    data = tokens(VOCABULARY, at_least)  # made once, for all processes
    print(f"{len(data[0]):,} tokens to train on, {len(data[1]):,} held out, {steps} steps", flush=True)
    config = replace(config, steps=steps)
    wanted = [(arm, shape, replace(config, seed=seed), at_least, device) for seed, arm in product(seeds, arms)]
    for run in side_by_side(_train_alone, wanted, jobs):
        yield run if jobs == 1 else {**run, "tokens_per_second": None, "seconds": None, "training_seconds": None}


def measure_speeds(runs: Sequence[Run], arms: Sequence[str], at_least: int, device: torch.device) -> Iterator[Run]:
    """The runs of these arms and of the dense one with the speed of a short run of the arm, alone on this machine.

    Dense phases, which are in dense FP8, are taken to be as fast as bf16.
    """
    shape, config = _gpt2_small()
    data = tokens(VOCABULARY, at_least)
    dense = None
    for arm in dict.fromkeys([DENSE, *arms]):
        short = _train(arm, shape, replace(config, steps=_SHORT), data, device, scheduled_for=2**30)
        dense = dense or short["tokens_per_second"]
        speed = 1 / _seconds_a_token(arm, short["tokens_per_second"], dense)
        for run in runs:
            if run["arm"] == arm:
                seconds = run["steps"] * run["tokens_a_step"] / speed
                yield {**run, "tokens_per_second": speed, "training_seconds": seconds}


def _gpt2_small() -> tuple[train_gpt.GPTConfig, train_gpt.TrainConfig]:
    shape, config = train_gpt.PRESETS["gpt2-small"]
    return replace(shape, vocabulary=VOCABULARY), replace(config, validation_batches=64)


def _train_alone(
    arm: str, shape: train_gpt.GPTConfig, config: train_gpt.TrainConfig, at_least: int, device: torch.device
) -> Run:
    """``_train`` in a process of its own, which reads the tokens itself."""
    return _train(arm, shape, config, tokens(VOCABULARY, at_least), device)


def _seconds_a_token(arm: str, pruned: float, dense: float) -> float:
    """On the average of the arm's phases, from the tokens a second of each."""
    schedule = read_options(None, ARMS[arm](1000)).schedule if arm in ARMS else None
    dense_share = sum(not schedule.prunes_at(step) for step in range(1000)) / 1000 if schedule is not None else 0.0
    return (1 - dense_share) / pruned + dense_share / dense


def _train(
    arm: str,
    shape: train_gpt.GPTConfig,
    config: train_gpt.TrainConfig,
    data: tuple[Tensor, Tensor],
    device: torch.device,
    scheduled_for: int | None = None,
) -> Run:
    """One run; its schedule is that of a run of ``scheduled_for`` steps, by default its own."""
    steps = scheduled_for or config.steps
    name = f"{arm}, seed {config.seed}"
    result = train_gpt.train(name, shape, config, data, device, lambda model: _compiled(arm, model, steps))
    print(f"{name}: {result.validation_loss:.4f}, {result.tokens_per_second:,.0f} tokens/s", flush=True)
    tokens_a_step = config.batch * shape.context
    text = f"{zlib.crc32(data[0].numpy()):08x}"  # tells whether runs of two machines read the same tokens
    return {
        "arm": arm, "seed": config.seed, "steps": config.steps, "vocabulary": shape.vocabulary, "text": text,
        "tokens_a_step": tokens_a_step, "training_seconds": config.steps * tokens_a_step / result.tokens_per_second,
        "training": asdict(config), **asdict(result), "losses": [round(loss, 4) for loss in result.losses],
    }  # fmt: skip


def compiled_dense(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """With CUDA graphs, like every arm: else small models wait for the host, and some recipes more than others."""
    return torch.compile(model, mode="reduce-overhead")


def compiled_sste(model: nn.Module, options: Mapping[str, Any]) -> Callable[[Tensor, Tensor], Tensor]:
    """Always: what is compared is how the arithmetic learns, whether or not it is faster for this model."""
    options = {"sste.when": "always", "sste.head": "dense", "triton.cudagraphs": True, **options}
    return torch.compile(model, backend="sste", options=options)


def _compiled(arm: str, model: nn.Module, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    if arm == DENSE:
        return compiled_dense(model)
    if arm == TORCHAO:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name("tensorwise")
        convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name != "head")
        return compiled_dense(model)
    return compiled_sste(model, ARMS[arm](steps))


def merged(old: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """The new runs in place of old ones of the same arm, seed and length."""
    runs = latest(old, new, ("arm", "seed", "steps"))
    return sorted(runs, key=lambda run: (run["steps"], run["arm"] != DENSE, run["arm"], run["seed"]))


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
    if not run["tokens_per_second"]:
        return None
    seconds_a_step = run["tokens_a_step"] / run["tokens_per_second"]
    for step, value in enumerate(_smoothed(run), start=_WINDOW):
        if value <= loss:
            return step * seconds_a_step
    return None


def _smoothed(run: Run) -> list[float]:
    """Means of the training losses of ``_WINDOW`` steps in a row."""
    losses, window = run["losses"], min(_WINDOW, len(run["losses"]))
    return [mean(losses[start : start + window]) for start in range(len(losses) - window + 1)]
