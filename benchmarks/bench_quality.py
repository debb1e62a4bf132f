"""Losses of training runs of a GPT-2-small shape on Python sources.

    python benchmarks/bench_quality.py loss       do the kernels train as their definitions do?  300 steps, byte by byte
    python benchmarks/bench_quality.py head       what does a vocabulary head in FP8 cost?  65,536 tokens, three seeds
    python benchmarks/bench_quality.py recipes    each recipe against dense training, by tokens of a byte-pair encoding
    python benchmarks/bench_quality.py clock      the same time for each arm, and validation loss over it
    python benchmarks/bench_quality.py rates      each arm at its own best learning rate and scale, in two settings
    python benchmarks/bench_quality.py search     why pruned training trails, in many short runs of a small model
    python benchmarks/bench_quality.py tasks      each recipe on handwritten digits, and on naming the package of
                                                  source; also without a GPU

``recipes`` trains what ``--arms``, ``--seeds`` and ``--tokens`` say, and adds it to the runs that the results hold;
so do ``tasks`` with ``--arms``, ``search`` with ``--trials``, and ``rates`` with ``--settings`` and ``--rated``.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import fair_runs
import recipe_runs
import recipe_search
import task_runs
import timed_runs
import train_gpt
from harness import RESULTS, Report, Run, earlier, keep_parts, write

import sparse_compile
from sparse_compile.kernels import ops

DEVICE = torch.device("cuda")
STEPS = 300
TOLERANCE = 0.01


def loss_part() -> Report:
    """Losses of the same training run, once through the kernels and once through their eager definitions."""
    model_config, config = train_gpt.PRESETS["gpt2-small"]
    config = replace(config, steps=STEPS, batch=8)
    data = train_gpt.corpus()
    runs = {}
    for name in ("kernels", "reference"):
        with ops.force_reference() if name == "reference" else nullcontext():
            sste_step = partial(train_gpt.sste_step, device=DEVICE, recipe="s-ste", when="always")
            runs[name] = train_gpt.train(name, model_config, config, data, DEVICE, sste_step)
    difference = runs["kernels"].training_loss - runs["reference"].training_loss
    validation = runs["kernels"].validation_loss - runs["reference"].validation_loss
    marks = train_gpt.milestones(STEPS)
    rows = [(f"loss at step {mark + 1}", *(run.losses[mark] for run in runs.values())) for mark in marks]
    rows.append(("training loss, last tenth", *(run.training_loss for run in runs.values())))
    rows.append(("validation loss", *(run.validation_loss for run in runs.values())))
    rows = [(name, kernels, reference, kernels - reference) for name, kernels, reference in rows]
    headers = ("", "kernels", "reference", "difference")
    table = tabulate(rows, headers=headers, floatfmt=("", ".4f", ".4f", "+.4f"), tablefmt="github")
    executions = [graph.execution for graph in sparse_compile.report().graphs]
    failed = [] if any(execution == "kernels" for execution in executions) else [f"no kernels ran: {executions}"]
    # Not "difference > tolerance": NaN must fail.
    if not max(abs(difference), abs(validation)) <= TOLERANCE:
        failed.append(f"losses differ by more than {TOLERANCE}: {difference}, {validation}")
    results = {
        "model": asdict(model_config),
        "training": asdict(config),
        "difference": {"training": difference, "validation": validation},
        "runs": {name: asdict(run) for name, run in runs.items()},
        "failed": failed,
    }
    return results, table


SEEDS = range(3)
DENSE = "bf16"
COMPILATIONS: Mapping[str, dict[str, Any]] = {
    DENSE: {},
    "sste": {"sste.head": "dense"},
    "sste, head in fp8": {"sste.head": "fp8"},
}


def head_part() -> Report:
    """Losses of an untied model with its head in bf16 and in FP8, beside those of the dense model."""
    shape, config = train_gpt.PRESETS["gpt2-small"]
    shape = replace(shape, vocabulary=2**16, tied=False)
    config = replace(config, steps=STEPS, batch=8)
    train, held_out = train_gpt.corpus()
    data = (_pairs(train), _pairs(held_out))
    runs: dict[str, list[train_gpt.TrainResult]] = {name: [] for name in COMPILATIONS}
    for seed in SEEDS:
        for name, of_name in runs.items():
            seeded = replace(config, seed=seed)
            of_name.append(train_gpt.train(f"{name}, {seed}", shape, seeded, data, DEVICE, partial(_step, name)))
    losses = {name: [run.validation_loss for run in of_name] for name, of_name in runs.items()}
    rows = []
    for name, of_name in losses.items():
        gaps = [loss - dense for loss, dense in zip(of_name, losses[DENSE], strict=True)]
        speed = mean(run.tokens_per_second for run in runs[name])
        rows.append((name, *of_name, mean(gaps), stdev(gaps), speed))
    headers = ("validation loss", *(f"seed {seed}" for seed in SEEDS), f"over {DENSE}", "+-", "tokens a second")
    formats = ("", *[".4f"] * len(SEEDS), "+.4f", ".4f", ",.0f")
    table = tabulate(rows, headers=headers, floatfmt=formats, tablefmt="github")
    results = {
        "model": asdict(shape),
        "training": asdict(config),
        "runs": {name: [asdict(run) for run in of_name] for name, of_name in runs.items()},
        # NaN must fail, too.
        "failed": [name for name, of_name in losses.items() if not max(of_name) < math.log(shape.vocabulary)],
    }
    return results, table


def _pairs(text: Tensor) -> Tensor:
    """Two bytes a token: a vocabulary as large as those of language models."""
    return text[: len(text) // 2 * 2].view(-1, 2).int() @ torch.tensor([256, 1], dtype=torch.int32)


def _step(name: str, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    if name == DENSE:
        return torch.compile(model)
    # Always: what is compared is how the arithmetic learns, whether or not it is faster for this model.
    options = {"sste.when": "always", **COMPILATIONS[name]}
    return torch.compile(model, backend="sste", options=options)


def recipes_part(
    arms: Sequence[str], seeds: Sequence[int], at_least: int, jobs: int, timed: Sequence[str], folder: Path
) -> Report:
    """Runs of each arm and seed, beside those that the results hold already, and the speeds of the arms ``timed``.

    Raises:
        SystemExit: one of these has no run and gets none; nothing was trained.
    """
    old = _runs_in(folder, "recipes")
    unknown = sorted({*timed} - {*arms, *(run["arm"] for run in old)})
    if unknown:
        raise SystemExit(f"--speeds names {unknown}, of which there is no run; name them in --arms, too")
    new = recipe_runs.train_arms(arms, seeds, at_least, DEVICE, jobs)
    results, table = _kept("recipes", old, new, recipe_runs.merged, recipe_runs.table, folder)
    if timed:
        with_speed = recipe_runs.measure_speeds(results["runs"], timed, at_least, DEVICE)
        return _kept("recipes", results["runs"], with_speed, recipe_runs.merged, recipe_runs.table, folder)
    return results, table


def clock_part(
    settings: Sequence[str], arms: Sequence[str], factors: Sequence[float], rates: Sequence[float], seconds: float,
    folder: Path,
) -> Report:  # fmt: skip
    """Losses after the same time, seed 0, beside those that the results hold already."""
    chosen = {setting: rates or fair_runs.SETTINGS[setting].rates[1:2] for setting in settings}
    new = (
        run
        for setting, of_setting in chosen.items()
        for run in timed_runs.train_for_as_long(
            setting, list(product(arms, factors or [1.0], of_setting)), seconds, DEVICE
        )
    )
    return _kept("clock", _runs_in(folder, "clock"), new, timed_runs.merged, timed_runs.table, folder)


def search_part(
    trials: Sequence[str], rates: Sequence[float], seeds: Sequence[int], at_least: int, jobs: int, folder: Path
) -> Report:
    """Losses of each trial, learning rate and seed, beside those that the results hold already."""
    new = recipe_search.run_trials(trials, rates, seeds, at_least, str(DEVICE), jobs)
    return _kept("search", _runs_in(folder, "search"), new, recipe_search.merged, recipe_search.table, folder)


def rates_part(
    settings: Sequence[str], arms: Sequence[str], factors: Sequence[float], rates: Sequence[float],
    seeds: Sequence[int], at_least: int, other: Path | None, jobs: int, folder: Path,
) -> Report:  # fmt: skip
    """Losses of each arm, factor and learning rate, beside those that the results hold already."""
    new = fair_runs.train_all(settings, arms, factors, rates, seeds, at_least, other, str(DEVICE), jobs)
    return _kept("rates", _runs_in(folder, "rates"), new, fair_runs.merged, fair_runs.table, folder)


def _runs_in(folder: Path, part: str) -> list[Run]:
    """The runs of earlier calls, on a device of this kind."""
    runs: list[Run] = earlier("bench_quality", part, folder).get("runs", [])
    return runs


def _kept(
    part: str,
    old: Sequence[Run],
    new: Iterable[Run],
    merged: Callable[[Sequence[Run], Sequence[Run]], list[Run]],
    table: Callable[[Sequence[Run]], str],
    folder: Path,
) -> Report:
    """All runs.  Each is written as soon as it has ended: a program that is stopped loses one run, not all."""
    runs = list(old)
    for run in new:
        runs = merged(runs, [run])
        write("bench_quality", part, {"runs": runs}, table(runs), folder)
    failed = [f"{run.get('arm', run.get('trial'))}, {run['seed']}" for run in runs if not _has_learned(run)]
    return {"runs": runs, "failed": failed}, table(runs)


def _has_learned(run: Run) -> bool:
    """Whether it does better than who guesses any token, or the same class always.  Not if its loss is NaN."""
    if "accuracy" in run:
        return bool(run["accuracy"] > 0.5)  # one of the packages has 44 % of the pieces
    return bool(run["validation_loss"] < math.log(recipe_runs.VOCABULARY))


def tasks_part(arms: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], jobs: int, folder: Path) -> Report:
    """Test losses and accuracies of small classifications, beside those that the results hold already."""
    device = DEVICE if torch.cuda.is_available() else torch.device("cpu")
    new = task_runs.train_tasks([arm for arm in arms if arm != recipe_runs.TORCHAO], tasks, seeds, device, jobs)
    return _kept("tasks", _runs_in(folder, "tasks"), new, task_runs.merged, task_runs.table, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["loss", "head", "recipes", "clock", "rates", "search", "tasks"])
    every = [recipe_runs.DENSE, recipe_runs.TORCHAO, *recipe_runs.ARMS]
    parser.add_argument(
        "--arms", nargs="*", choices=every, default=every, metavar="ARM",
        help=f"of recipes and tasks: {'; '.join(every)}",
    )  # fmt: skip
    parser.add_argument(
        "--trials", nargs="+", choices=recipe_search.TRIALS, default=[*recipe_search.TRIALS], metavar="TRIAL",
        help=f"of search: {'; '.join(recipe_search.TRIALS)}",
    )  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=task_runs.TASKS, default=[*task_runs.TASKS])
    parser.add_argument(
        "--settings", nargs="+", choices=fair_runs.SETTINGS, default=["gpt2", "modern"], help="of rates and clock"
    )  # fmt: skip
    parser.add_argument("--other-text", type=Path, metavar="FILE", help="of rates: a second text to validate on")
    parser.add_argument("--seconds", type=float, default=240.0, help="of training in each run of clock")
    parser.add_argument(
        "--rated", nargs="+", choices=fair_runs.ARMS, default=[*fair_runs.ARMS], metavar="ARM",
        help=f"arms of rates and clock: {'; '.join(fair_runs.ARMS)}",
    )  # fmt: skip
    parser.add_argument(
        "--factors", nargs="+", type=float, default=[], help="of rates (default: those of each arm) and clock (1)"
    )
    parser.add_argument(
        "--learning-rates", nargs="+", type=float, default=[],
        help="of search (default: 1e-3 2e-3), rates (default: those of each setting) and clock (default: the second)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=4, help="runs of recipes, rates, search and tasks side by side, on all GPUs"
    )
    parser.add_argument(
        "--speeds", nargs="+", choices=every, default=[], metavar="ARM", help="arms to time alone, after all runs"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=50_000_000, help="that each run reads (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    parts = {
        "loss": loss_part,
        "head": head_part,
        "recipes": partial(recipes_part, args.arms, args.seeds, args.tokens, args.jobs, args.speeds, args.out),
        "clock": partial(
            clock_part, args.settings, args.rated, args.factors, args.learning_rates, args.seconds, args.out
        ),
        "rates": partial(
            rates_part,
            args.settings,
            args.rated,
            args.factors,
            args.learning_rates,
            args.seeds,
            args.tokens,
            args.other_text,
            args.jobs,
            args.out,
        ),
        "search": partial(
            search_part, args.trials, args.learning_rates or [1e-3, 2e-3], args.seeds, args.tokens, args.jobs, args.out
        ),
        "tasks": partial(tasks_part, args.arms, args.tasks, args.seeds, args.jobs, args.out),
    }
    keep_parts("bench_quality", {part: parts[part] for part in args.parts}, args.out)


if __name__ == "__main__":
    main()
