"""How recipes learn, emulated: pruned weights and straight-through gradients, everything else dense and in fp32.

    python benchmarks/emulate_recipes.py --seeds 1 2 3 --jobs 2

Without FP8 and MVUE a small GPT trains in a minute on one core of a CPU.  So there can be seeds enough to tell recipes
apart, and things to vary that are no options of the backend.  What FP8 and MVUE add is told by some trials that train
through the backend, by the eager definitions of its kernels.  Runs are added to those that the results hold.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_gpt
from harness import RESULTS, Run, earlier, side_by_side, write
from recipe_search import compared, merged

import sparse_compile  # noqa: F401 - registers the backend where it is not installed
from sparse_compile.kernels.reference import soft_threshold24
from sparse_compile.projections.base import Projection
from sparse_compile.projections.groups_of_four import SOFT, TOP2
from sparse_compile.projections.identity import IDENTITY
from sparse_compile.projections.transposable import SOFT_TRANSPOSABLE, SoftTransposable
from sparse_compile.recipe import SSTE, GradFormat, Rounding
from sparse_compile.weights.projection import project
from sparse_compile.weights.schedule import Schedule

SHAPE = train_gpt.GPTConfig(layers=3, heads=4, width=96, context=64)
STEPS, BATCH = 1600, 16
DENSE = "dense"


class _OneAfterTheOther(SoftTransposable):
    """The soft threshold along in_features, then of what is left along out_features."""

    def project(self, weight: Tensor, masks: Tensor | None) -> Tensor:
        return soft_threshold24(soft_threshold24(weight).t()).t()


ONE_AFTER_THE_OTHER = _OneAfterTheOther("one-after-the-other24")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to train.

    Args:
        projection: what the FFN's weights become; in dense phases nothing.
        warmup, tail: shares of the steps, the first and the last ones, that are dense.
        beta: the S-STE scale; None for the one that follows from each weight at its first use.
        beta_of: which linears of an FFN have that scale; the others their own.
        layers: which linears of an FFN are pruned.
        across: whether the weight is pruned transposed: groups of four run along out_features, or do so first.
        weight_decay: of all matrices.
        grad: what the gradients of pruned weights are multiplied with, before they are clipped.
        backend: options of the backend to train through, besides which nothing else counts; None for the emulation.
        gain: what weights without beta are multiplied with, as beta multiplies those that have one.
    """

    projection: Projection = IDENTITY
    warmup: float = 0.0
    tail: float = 0.0
    beta: float | None = None
    beta_of: tuple[str, ...] = ("up", "down")
    layers: tuple[str, ...] = ("up", "down")
    across: bool = False
    weight_decay: float = 0.1
    grad: float = 1.0
    gain: float = 1.0
    backend: Mapping[str, Any] | None = None


def _trials() -> Iterator[tuple[str, Trial]]:
    yield DENSE, Trial()
    yield "dense, no weight decay", Trial(weight_decay=0.0)
    for name, projection in (("ste", TOP2), ("s-ste", SOFT)):
        yield name, Trial(projection=projection)
        for share, tail in (("1/6", 1 / 6), ("1/3", 1 / 3), ("1/2", 1 / 2)):
            yield f"{name}, tail {share}", Trial(projection=projection, tail=tail)
        yield f"{name}, warm-up 1/6", Trial(projection=projection, warmup=1 / 6)
        yield f"{name}, ffn.up alone", Trial(projection=projection, layers=("up",))
        yield f"{name}, ffn.down alone", Trial(projection=projection, layers=("down",))
        yield f"{name}, no weight decay", Trial(projection=projection, weight_decay=0.0)
    for beta in (1.0, 1.25, 2.0, 2.5, 3.0, 4.0):
        yield f"s-ste, beta {beta:g}", Trial(projection=SOFT, beta=beta)
    yield "s-ste, beta 2.5, tail 1/6", Trial(projection=SOFT, beta=2.5, tail=1 / 6)
    yield "s-ste, beta 2.5, tail 1/2", Trial(projection=SOFT, beta=2.5, tail=1 / 2)
    yield "s-ste, beta 2.5, warm-up 1/6", Trial(projection=SOFT, beta=2.5, warmup=1 / 6)
    yield "s-ste, beta 2.5, ffn.up alone", Trial(projection=SOFT, beta=2.5, layers=("up",))
    yield "s-ste, beta 2.5, ffn.down alone", Trial(projection=SOFT, beta=2.5, layers=("down",))
    for name, layers in (("", ("up", "down")), (", ffn.up alone", ("up",)), (", ffn.down alone", ("down",))):
        across = Trial(projection=SOFT, beta=2.5, layers=layers, across=True)
        yield f"s-ste, beta 2.5{name}, along out_features", across
    for factor, betas in (("", (None, None)), (", 1.7 x beta", (2.69, 2.97)), (", 2.3 x beta", (3.63, 4.02))):
        yield f"s-ste both ways{factor}", Trial(projection=ONE_AFTER_THE_OTHER, beta=betas[0])
        yield (
            f"s-ste both ways{factor}, out_features first",
            Trial(projection=ONE_AFTER_THE_OTHER, beta=betas[0], across=True),
        )
        yield f"s-ste both ways{factor}, larger threshold", Trial(projection=SOFT_TRANSPOSABLE, beta=betas[1])
    yield "s-ste, beta 2.5 of ffn.up", Trial(projection=SOFT, beta=2.5, beta_of=("up",))
    yield "ste, kept x 1.5", Trial(projection=TOP2, gain=1.5)
    # Is it the scale alone?
    for gain in (1.5, 2.0):
        yield f"dense, FFN's weights x {gain:g}", Trial(gain=gain)
    yield "s-ste, gradient x 1.484", Trial(projection=SOFT, grad=1.484)
    # All of the arithmetic.
    for name, options in (
        ("fp8", {"sste.recipe": "fp8"}),
        ("fp8-mvue", {"sste.recipe": "fp8-mvue"}),
        ("s-ste x 1.7", {"sste.beta": 1.7}),
        ("s-ste x 1.7, no MVUE", {"sste.beta": 1.7, "sste.mvue": "off"}),
        (
            "s-ste x 1.7, stochastic rounding",
            {"sste.beta": 1.7, "sste.recipe": replace(SSTE, rounding=Rounding.STOCHASTIC)},
        ),
        (
            "s-ste x 1.7, e5m2 gradients",
            {"sste.beta": 1.7, "sste.recipe": replace(SSTE, grad_format=GradFormat.E5M2)},
        ),
        ("s-ste x 1.7, ffn-up", {"sste.beta": 1.7, "sste.targets": "ffn-up"}),
    ):
        yield f"{name}, by the backend", Trial(backend=options)


TRIALS: Mapping[str, Trial] = dict(_trials())


class PrunedLinear(nn.Linear):
    """A linear whose weight is pruned while ``prunes``; the gradient goes straight through."""

    projection: Projection
    beta: float | None
    gain: float
    across: bool
    prunes: bool

    def become(self, trial: Trial, name: str) -> None:
        self.projection, self.gain, self.across, self.prunes = trial.projection, trial.gain, trial.across, False
        self.beta = trial.beta if name.endswith(trial.beta_of) else None
        if trial.grad != 1.0:
            self.weight.register_hook(lambda grad: grad * trial.grad if self.prunes else grad)

    def fitted_beta(self) -> float:
        """Of least squares; where the weight is zero all over, of normal weights."""
        exact = self.weight.detach().double()
        exact = exact if exact.any() else torch.randn_like(exact)
        exact = exact.t() if self.across else exact
        kept = self.projection.project(exact, None)
        return float((exact * kept).sum() / kept.square().sum())

    def projected(self) -> Tensor:
        if not self.projection.prunes:
            return self.weight.detach() * self.gain
        matrix = self.weight.t() if self.across else self.weight
        if self.projection.has_beta and self.beta is None:
            self.beta = self.fitted_beta()
        pruned = project(matrix, self.projection, self.beta, None)
        pruned = pruned.t() if self.across else pruned
        return pruned if self.projection.has_beta else pruned * self.gain

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + (self.projected() - self.weight).detach() if self.prunes else self.weight
        return F.linear(x, weight, self.bias)


def run_trial(name: str, rate: float, seed: int, steps: int = STEPS, shape: train_gpt.GPTConfig = SHAPE) -> Run:
    """One run."""
    torch.set_num_threads(1)
    trial = TRIALS[name]
    config = train_gpt.TrainConfig(
        steps=steps, batch=BATCH, learning_rate=rate, seed=seed, weight_decay=trial.weight_decay, validation_batches=100
    )
    cpu = torch.device("cpu")
    result = train_gpt.train(
        f"{name}, {seed}", shape, config, train_gpt.corpus(), cpu, lambda model: scheduled(model, trial, steps)
    )
    return {
        "trial": name, "learning_rate": rate, "seed": seed, "steps": steps,
        "validation_loss": result.validation_loss, "training_loss": result.training_loss,
    }  # fmt: skip


def scheduled(model: train_gpt.GPT, trial: Trial, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The model, which goes through the phases of the trial as it is called in training."""
    wider = (768 / model.embedding.embedding_dim) ** 0.5  # the initial standard deviation is for 768 features
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("blocks") and parameter.dim() == 2:
                parameter *= wider
    if trial.backend is not None:
        options = {"sste.executor": "eager", "sste.when": "always", "sste.head": "dense", **trial.backend}
        return torch.compile(model, backend="sste", options=options)
    pruned, changes = [], trial.projection.prunes or trial.gain != 1.0
    for name, module in model.named_modules():
        if changes and name.endswith(tuple(f"ffn.{layer}" for layer in trial.layers)):
            module.__class__ = PrunedLinear
            assert isinstance(module, PrunedLinear)
            module.become(trial, name)
            pruned.append(module)
    schedule = Schedule(begin=round(trial.warmup * steps), end=steps - round(trial.tail * steps))
    step = 0

    def call(tokens: Tensor, targets: Tensor) -> Tensor:
        nonlocal step
        for linear in pruned:
            pruned_before = linear.prunes
            linear.prunes = schedule.prunes_at(min(step, steps - 1))  # in evaluation as in the last step
            if pruned_before and not linear.prunes:  # the tail goes on from what it computed with
                linear.weight.data.copy_(linear.projected())
        step += torch.is_grad_enabled()
        loss: Tensor = model(tokens, targets)
        return loss

    return call


def table(runs: Sequence[Run]) -> str:
    """Losses against the plain dense run of the same learning rate and seed."""
    rows = []
    for rate, name, losses, pairs in compared(runs, TRIALS, DENSE):
        percents = [100 * (loss / dense - 1) for loss, dense in pairs]
        gap, spread = mean(percents) if percents else None, stdev(percents) if len(percents) > 1 else None
        rows.append((f"{rate:g}", name, len(losses), mean(losses), gap, spread))
    headers = ("learning rate", "trial", "seeds", "validation loss", f"% over {DENSE}", "standard deviation")
    return tabulate(
        rows, headers=headers, floatfmt=("", "", "", ".4f", "+.2f", ".2f"), missingval="-", tablefmt="github"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", nargs="+", choices=TRIALS, default=[*TRIALS])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    runs: list[Run] = earlier("emulate_recipes", "emulated", args.out).get("runs", [])
    wanted = [(name, rate, seed) for seed, rate, name in product(args.seeds, args.learning_rates, args.trials)]
    for run in side_by_side(run_trial, wanted, args.jobs):
        runs = merged(runs, [run])
        print("{trial}, {learning_rate:g}, seed {seed}: {validation_loss:.4f}".format(**run), flush=True)
        write("emulate_recipes", "emulated", {"runs": runs}, table(runs), args.out)
    print(table(runs))


if __name__ == "__main__":
    main()
