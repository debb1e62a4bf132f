"""Arms compared each at its own best learning rate and scale, in two settings.

A factor of S-STE's beta acts like a learning rate, and so does a factor of the FFN's weights in a dense model.  So
dense training has one, too, and every arm is tried at several rates, a factor of two apart, before arms are compared.
"""

import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import recipe_runs
import torch
import torch.nn.functional as F
from emulate_recipes import TRIALS, PrunedLinear, Trial
from harness import Run, latest, side_by_side, take_gpu
from llama_1b import Llama
from modern_gpt import ModernGPT, MuonAndAdamW
from moe_gpt import MoEGPT
from source_text import tokens, tokens_of
from tabulate import tabulate
from torch import Tensor, nn

from sparse_compile.recipe import FP8, FP8_BACKWARD, Gemm, GradFormat, Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_gpt

# Called after each step with its number, what is called in each, and how the run is configured.
OnStep = Callable[[int, Callable[[Tensor, Tensor], Tensor], train_gpt.TrainConfig], None]
DENSE = "dense"
_COMPILED = 3  # steps in which all is compiled, and CUDA graphs are captured
FIELDS = ("setting", "arm", "factor", "learning_rate", "seed", "steps", "text")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model and its optimizer.

    Args:
        batch: windows of a step.
        rates: learning rates around the best one of dense training.
        windows_of: tokens that every run draws its windows from, however few it reads: else a short run would see each
            of them more than once.  None: of all the text that is there.
    """

    make_model: Callable[[train_gpt.GPTConfig], nn.Module]
    make_optimizer: Callable[[nn.Module, train_gpt.TrainConfig], Any]
    shape: train_gpt.GPTConfig
    batch: int
    rates: tuple[float, ...]
    windows_of: int | None = 50_000_000

    @property
    def tokens_a_step(self) -> int:
        return self.batch * self.shape.context

    def text(self, at_least: int) -> tuple[Tensor, Tensor]:
        """Training and held-out tokens of a run that reads so many."""
        return tokens(self.shape.vocabulary, None if self.windows_of is None else max(at_least, self.windows_of))


_SMALL = replace(train_gpt.PRESETS["gpt2-small"][0], vocabulary=recipe_runs.VOCABULARY)
SETTINGS: Mapping[str, Setting] = {
    "gpt2": Setting(
        make_model=train_gpt.GPT, make_optimizer=train_gpt.optimizer_of, shape=_SMALL, batch=16,
        rates=(1.5e-4, 3e-4, 6e-4, 1.2e-3),
    ),
    "modern": Setting(
        make_model=ModernGPT, make_optimizer=MuonAndAdamW, shape=_SMALL, batch=16, rates=(1.5e-3, 3e-3, 6e-3, 1.2e-2)
    ),
    # Mixture of experts.
    "moe": Setting(
        make_model=MoEGPT, make_optimizer=train_gpt.optimizer_of, shape=replace(_SMALL, layers=6), batch=16,
        rates=(3e-4, 6e-4, 1.2e-3),
    ),
    # What a head in FP8 costs, of a small vocabulary, GPT-2's and Qwen's.
    **{
        f"vocabulary {vocabulary}": Setting(
            make_model=ModernGPT, make_optimizer=MuonAndAdamW, shape=replace(_SMALL, layers=4, vocabulary=vocabulary),
            batch=16, rates=(1.5e-3, 3e-3, 6e-3), windows_of=16_000_000,
        )
        for vocabulary in (8192, 50304, 152064)
    },
    # That of Llama-3.2-1B.
    "llama-1b": Setting(
        make_model=Llama, make_optimizer=train_gpt.optimizer_of,
        shape=train_gpt.GPTConfig(layers=16, heads=32, width=2048, context=2048, vocabulary=32000, tied=False),
        batch=8, rates=(1.5e-4, 3e-4, 6e-4, 1.2e-3), windows_of=None,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How a model trains.

    Args:
        options: of the backend, but the factor and the length of the run; the head is dense unless they name it.  None
            trains in bf16 without the backend.
        emulated: how the weights of FFNs are pruned in bf16, without the backend: with it ``options`` is None.
        factors: of beta, or of the FFN's weights in a dense model.
    """

    options: Mapping[str, Any] | None = field(default_factory=dict)
    emulated: Trial | None = None
    factors: tuple[float, ...] = (1.0,)

    def options_of(self, factor: float, steps: int) -> dict[str, Any]:
        """All options of a run of so many steps."""
        options = {"sste.head": "dense", **(self.options or {})}
        if factor != 1.0:
            options["sste.beta"] = factor
        if "sste.tail" in options:
            options["sste.total_steps"] = steps
        return options


# Of those with a name the option has, gradients are in e5m2, and so they are where only some products are in FP8.
_E5M2 = replace(FP8, grad_format=GradFormat.E5M2)
_HEADS: Mapping[str, str | Recipe] = {
    "fp8": "fp8",
    "fp8-backward": "fp8-backward",
    "fp8 fprop": replace(FP8, name="fp8-fprop", dgrad=Gemm.DENSE, wgrad=Gemm.DENSE),
    "fp8 fprop, dgrad": replace(_E5M2, name="fp8-fprop-dgrad", wgrad=Gemm.DENSE),
    "fp8 dgrad": replace(FP8_BACKWARD, name="fp8-dgrad", wgrad=Gemm.DENSE, grad_format=GradFormat.E5M2),
    "fp8, e4m3 gradients": FP8,
    "fp8-backward, e4m3 gradients": FP8_BACKWARD,
}


def _arms() -> Iterator[tuple[str, Arm]]:
    yield DENSE, Arm(options=None, factors=(1.0, 1.25, 1.5))
    yield "fp8", Arm(options={"sste.recipe": "fp8"})
    for name, targets in (("", "ffn"), (", all", "all")):
        mvue = {"sste.recipe": "fp8-mvue", "sste.targets": targets}
        yield f"fp8-mvue{name}", Arm(options=mvue)
        yield f"fp8-mvue{name}, head fp8", Arm(options=mvue | {"sste.head": "fp8"})
    for name, head in _HEADS.items():
        yield f"fp8, head {name}", Arm(options={"sste.recipe": "fp8", "sste.head": head})
    # The second factor keeps the norm of normal weights.
    for recipe, factors in (("s-ste", (1.0, 1.16, 1.7, 2.3)), ("s-ste-transposable", (1.0, 1.25, 1.7, 2.3))):
        for name, options in (
            ("", {}),
            (", no MVUE", {"sste.mvue": "off"}),
            (", ffn-up", {"sste.targets": "ffn-up"}),
            (", ffn.down", {"sste.targets": "*.ffn.down"}),
            (", head fp8", {"sste.head": "fp8"}),
            (", head fp8, e4m3 gradients", {"sste.head": FP8}),
            (", last quarter dense", {"sste.tail": 0.25}),
            (", last half dense", {"sste.tail": 0.5}),
            (", ffn-up, last quarter dense", {"sste.targets": "ffn-up", "sste.tail": 0.25}),
            (", all", {"sste.targets": "all"}),
            (", all, head fp8", {"sste.targets": "all", "sste.head": "fp8"}),
            (", all, head fp8-backward", {"sste.targets": "all", "sste.head": "fp8-backward"}),
        ):
            yield f"{recipe}{name}", Arm(options={"sste.recipe": recipe, **options}, factors=factors)
    yield "t-sr-ste", Arm(options={"sste.recipe": "t-sr-ste"})
    for form in (
        "s-ste",
        "s-ste both ways",
        "s-ste both ways, out_features first",
        "s-ste both ways, larger threshold",
    ):
        yield f"{form}, emulated", Arm(options=None, emulated=TRIALS[form], factors=(1.0, 1.7))


ARMS: Mapping[str, Arm] = dict(_arms())


def train_all(
    settings: Sequence[str], arms: Sequence[str], factors: Sequence[float], rates: Sequence[float],
    seeds: Sequence[int], at_least: int, other: Path | None, device: str, jobs: int,
) -> Iterator[Run]:  # fmt: skip
    """One run for each setting, arm, factor, rate and seed, ``jobs`` at a time, each in a process of its own.

    Args:
        factors, rates: empty for those of the arms and settings.
        at_least: tokens that each run reads.
        other: a file of text whose loss is measured at the end, too.
    """
    for setting in settings:
        # Made once, for all processes.
        SETTINGS[setting].text(at_least)
        if other is not None:
            tokens_of(other, SETTINGS[setting].shape.vocabulary)
    wanted = [
        (setting, arm, factor, rate, seed, at_least, other, device)
        for seed, setting in product(seeds, settings)
        for rate in rates or SETTINGS[setting].rates
        for arm in arms
        for factor in factors or ARMS[arm].factors
    ]
    for run in side_by_side(train_one, wanted, jobs):
        print(
            "{setting}, {arm} x {factor:g}, {learning_rate:g}, seed {seed}: {validation_loss:.4f}".format(**run),
            flush=True,
        )
        yield run


def train_one(
    setting: str, arm: str, factor: float, rate: float, seed: int, at_least: int, other: Path | None, device: str
) -> Run:
    """One run, of as many steps as there are tokens asked for."""
    chosen, losses = SETTINGS[setting], {}
    steps = -(-at_least // chosen.tokens_a_step)
    data = chosen.text(at_least)

    def on_step(step: int, model: Callable[[Tensor, Tensor], Tensor], config: train_gpt.TrainConfig) -> None:
        if other is not None and step == steps - 1:
            text = tokens_of(other, chosen.shape.vocabulary)
            where = (chosen.shape.context, torch.device(device))
            losses["other_loss"] = train_gpt.validation_loss(model, text, config, *where)

    run = train(setting, arm, factor, rate, seed, steps, data, torch.device(device), on_step)
    return {**run, **losses, "other": other.name if other is not None else None}


def train(
    setting: str, arm: str, factor: float, rate: float, seed: int, steps: int, data: tuple[Tensor, Tensor],
    device: torch.device, on_step: OnStep = lambda step, model, config: None,
) -> Run:  # fmt: skip
    """One run of so many steps."""
    chosen = SETTINGS[setting]
    config = train_gpt.TrainConfig(
        steps=steps, batch=chosen.batch, learning_rate=rate, seed=seed, validation_batches=64
    )  # fmt: skip

    def then(step: int, model: Callable[[Tensor, Tensor], Tensor]) -> None:
        if step == _COMPILED:
            take_gpu()
        on_step(step, model, config)

    result = train_gpt.train(
        f"{setting}, {arm} x {factor:g}, {rate:g}, {seed}", chosen.shape, config, data, device,
        lambda model: compiled(model, ARMS[arm], factor, steps), chosen.make_model, chosen.make_optimizer, then,
    )  # fmt: skip
    return {
        "setting": setting, "arm": arm, "factor": factor, "learning_rate": rate, "seed": seed, "steps": steps,
        "tokens_a_step": chosen.tokens_a_step, "text": f"{zlib.crc32(data[0].numpy()):08x}",
        "training": asdict(config), "validation_loss": result.validation_loss, "training_loss": result.training_loss,
        "curve": [round(mean(part), 4) for part in _parts(result.losses)],
        "tokens_per_second": result.tokens_per_second,
    }  # fmt: skip


def _parts(losses: Sequence[float]) -> Iterator[Sequence[float]]:
    """Those of each twentieth of the steps, which are the same batches in every run of a seed."""
    ends = [len(losses) * part // 20 for part in range(21)]
    return (losses[start:end] for start, end in pairwise(ends) if start < end)


def compiled(model: nn.Module, arm: Arm, factor: float, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    ffn = [module for name, module in model.named_modules() if name.endswith(("ffn.up", "ffn.down"))]
    if not ffn and (arm.emulated is not None or (arm.options is None and factor != 1.0)):
        raise ValueError(
            "this model's FFNs have no linears 'ffn.up' and 'ffn.down', which alone can be scaled or emulated"
        )
    if arm.emulated is not None:
        for module in ffn:
            module.__class__ = PrunedLinear
            module.become(arm.emulated, "")
            module.beta, module.prunes = factor * module.fitted_beta(), True
    elif arm.options is None and factor != 1.0:
        for module in ffn:
            module.__class__, module.factor = ScaledLinear, factor
    if arm.options is None:
        return recipe_runs.compiled_dense(model)
    return recipe_runs.compiled_sste(model, arm.options_of(factor, steps))


class ScaledLinear(nn.Linear):
    """A linear that multiplies with a multiple of its weight."""

    factor: float

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.factor, self.bias)


def merged(old: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """The new runs in place of old ones of the same setting, arm, factor, rate, seed, length and text."""
    return sorted(latest(old, new, FIELDS), key=lambda run: [*_compared(run), *_order(run)])


def _compared(run: Run) -> tuple[int, int, str]:
    """What runs share that are compared: the place of their setting, their length and their text."""
    return list(SETTINGS).index(run["setting"]), run["steps"], run["text"]


def _order(run: Run) -> list[Any]:
    return [list(ARMS).index(run["arm"]), run["factor"], run["learning_rate"], run["seed"]]


def table(runs: Sequence[Run]) -> str:
    """Of each arm the rate and factor of the lowest mean loss over seeds, against the best of dense training.

    They are compared on the seeds that both have.  A best rate at the edge of those that were tried is marked: the arm
    may do better.
    """
    rows = []
    for group in sorted(set(map(_compared, runs))):
        of_group = [run for run in runs if _compared(run) == group]
        setting, steps = of_group[0]["setting"], of_group[0]["steps"]
        best = {arm: _best([run for run in of_group if run["arm"] == arm]) for arm in ARMS}
        dense = best[DENSE]
        for arm, found in best.items():
            if found is None:
                continue
            by_seed, factor, rate, edge = found
            both = by_seed.keys() & dense[0].keys() if dense else ()
            percent = 100 * (mean(by_seed[s] for s in both) / mean(dense[0][s] for s in both) - 1) if both else None
            losses = list(by_seed.values())
            others = [
                run["other_loss"] for run in of_group
                if (run["arm"], run["factor"], run["learning_rate"]) == (arm, factor, rate) and "other_loss" in run
            ]  # fmt: skip
            spread = stdev(losses) if len(losses) > 1 else None
            shown = f"{rate:g}{' (edge)' if edge else ''}"
            other = mean(others) if others else None
            rows.append((setting, steps, arm, shown, factor, len(losses), mean(losses), spread, percent, other))
    headers = (
        "setting", "steps", "arm", "best rate", "factor", "seeds", "validation loss", "+-", "% over the best dense",
        "loss on the other text",
    )  # fmt: skip
    formats = ("", "", "", "", "g", "", ".4f", ".4f", "+.2f", ".4f")
    return tabulate(rows, headers=headers, floatfmt=formats, missingval="-", tablefmt="github")


def _best(runs: Sequence[Run]) -> tuple[dict[int, float], float, float, bool] | None:
    """Losses by seed, factor and rate of the lowest mean of the most seeds, and whether the rate is an edge."""
    losses: dict[tuple[float, float], dict[int, float]] = {}
    for run in runs:
        losses.setdefault((run["factor"], run["learning_rate"]), {})[run["seed"]] = run["validation_loss"]
    if not losses:
        return None
    most = max(map(len, losses.values()))
    (factor, rate), found = min(
        ((key, of_key) for key, of_key in losses.items() if len(of_key) == most),
        key=lambda item: mean(item[1].values()),
    )
    rates = [tried for of_factor, tried in losses if of_factor == factor]
    return found, factor, rate, len(rates) > 1 and rate in (min(rates), max(rates))
