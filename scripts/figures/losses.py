"""Losses and right answers: bench_quality and emulate_recipes."""

from collections.abc import Callable, Mapping
from statistics import mean, stdev
from typing import Any

from figures.results import FigureError, as_percent, as_table, listed, only_row, section_of

BF16, TORCHAO = "bf16", "torchao tensorwise"
DENSE = "dense"  # as bench_quality's rates call it
RATE_SETTINGS = {"gpt2": "GPT-2 small, AdamW", "modern": "Tuned GPT, Muon"}
# Of bench_quality's recipes and tasks, in the order of their tables.
ARMS = {
    "bf16": "dense, bf16",
    "fp8": '`"fp8"`',
    "s-ste x 1.7, ffn-up": '`"s-ste"`, `sste.beta=1.7`, `sste.targets="ffn-up"`',
    "s-ste x 1.7": '`"s-ste"`, `sste.beta=1.7`',
    "s-ste": '`"s-ste"` (default)',
    "s-ste, bf16": '`"s-ste-bf16"`',
    "ste": '`"ste"`',
    "sr-ste": '`"sr-ste"`',
    "t-sr-ste": '`"t-sr-ste"`',
}
_NUMERALS = ("no", "one", "two", "three", "four", "five", "six")


def _runs(arm: str, part: str = "recipes") -> dict[int, Mapping[str, Any]]:
    """The runs of an arm by seed."""
    runs = section_of("bench_quality", part, "H100")["runs"]
    found = {run["seed"]: run for run in runs if run["arm"] == arm}
    if not found:
        raise FigureError(f"{part} has no arm {arm!r}; there are {listed(sorted({run['arm'] for run in runs}))}")
    return found


def gaps_to_bf16(arm: str) -> list[float]:
    """For each seed, the validation loss over that of bf16 with the same batches, as a share."""
    dense = _runs(BF16)
    return [run["validation_loss"] / dense[seed]["validation_loss"] - 1 for seed, run in sorted(_runs(arm).items())]


def measured_arms() -> list[str]:
    """The recipes that were trained beside bf16, in the order of tables."""
    trained = {run["arm"] for run in section_of("bench_quality", "recipes", "H100")["runs"]}
    return [arm for arm in ARMS if arm in trained - {BF16}]


def loss_over_bf16(arm: str) -> str:
    """Validation loss over bf16's, the mean of the seeds: GPT-2-small shape, 50 million tokens."""
    return as_percent(mean(gaps_to_bf16(arm)))


def seeds(arm: str) -> str:
    """How many seeds ``loss_over_bf16`` is the mean of."""
    count = len(_runs(arm))
    return f"{_NUMERALS[count]} seed{'s' * (count > 1)}"


def loss_table() -> str:
    """Recipes against bf16: validation losses, and how far they are apart."""
    rows = []
    for arm in (BF16, *measured_arms()):
        runs = sorted(_runs(arm).items())
        over, each = "", ", ".join(as_percent(gap) for gap in gaps_to_bf16(arm))
        if arm != BF16:
            over = f"**{loss_over_bf16(arm)}**" + (f" ({each})" if len(runs) > 1 else "")
        losses = ", ".join(f"{run['validation_loss']:.4f}" for _, run in runs)
        speed = runs[0][1]["tokens_per_second"]
        rows.append((ARMS[arm], losses, over, f"{speed:,.0f}" if speed else "not measured"))
    return as_table(("recipe", "validation loss of each seed", "over bf16, mean (each seed)", "tokens a second"), rows)


def torchao_over_fp8() -> str:
    """Validation loss of torchao's tensorwise FP8 over that of the recipe "fp8", the mean of the seeds."""
    ours, theirs = (_runs(arm, "recipes beside torchao") for arm in ("fp8", TORCHAO))
    return as_percent(mean(theirs[seed]["validation_loss"] / ours[seed]["validation_loss"] - 1 for seed in ours))


def kernels_loss(run: str, field: str) -> str:
    """Losses of 300 steps through the kernels or their definitions ("reference")."""
    found = section_of("bench_quality", "loss", "H100")["runs"][run]
    last = found["losses"][-len(found["losses"]) // 10 :]
    return f"{found['validation_loss'] if field == 'validation' else mean(last):.4f}"


def head_loss(run: str) -> str:
    """Validation loss of a run of bench_quality's part about the vocabulary head."""
    runs = section_of("bench_quality", "head", "H100")["runs"]
    if run not in runs:
        raise FigureError(f"the part 'head' has no run {run!r}; there are {listed(runs)}")
    return f"{runs[run]['validation_loss']:.3f}"


def timed(arm: str, field: str) -> str:
    """Of bench_quality's part "clock", a wide model: "loss", "seconds" or "tokens" of a run."""
    run = only_row(section_of("bench_quality", "clock, a wide model", "H100")["runs"], "clock", arm=arm)
    texts: dict[str, Callable[[], str]] = {
        "loss": lambda: f"{run['validation_loss']:.3f}",
        "seconds": lambda: f"{run['training_seconds']:.1f} s",
        "tokens": lambda: f"{run['steps'] * run['tokens_a_step'] / 1e6:.1f} million tokens",
    }
    return texts[field]()


def timed_tokens() -> str:
    """How many times as many tokens "s-ste" saw, with 1.7 times beta, in the same time."""
    runs = section_of("bench_quality", "clock, a wide model", "H100")["runs"]
    steps = [only_row(runs, "clock", arm=arm)["steps"] for arm in ("s-ste x 1.7", BF16)]
    return f"{steps[0] / steps[1]:.1f} times"


def task_table() -> str:
    """Right answers of two small classifications, by recipe."""
    runs = section_of("bench_quality", "tasks", "H100")["runs"]
    tasks = sorted({run["task"] for run in runs})
    rows = []
    for arm, name in ARMS.items():
        cells = []
        for task in tasks:
            found = [run["accuracy"] for run in runs if (run["arm"], run["task"]) == (arm, task)]
            if found:
                cells.append(f"{100 * mean(found):.1f} % ({', '.join(f'{100 * one:.1f}' for one in found)})")
        if cells:
            rows.append((name, *cells))
    return as_table(("right answers, mean (each seed)", *tasks), rows)


def searched(trial: str, rate: float) -> str:
    """Loss over dense of a run of bench_quality's part "search": a GPT of 14 million parameters."""
    runs = section_of("bench_quality", "search", "H100")["runs"]
    found, dense = (only_row(runs, "search", trial=name, learning_rate=rate) for name in (trial, BF16))
    return as_percent(found["validation_loss"] / dense["validation_loss"] - 1)


def best_of_rates(setting: str, arm: str) -> str:
    """Loss over dense, each at the best learning rate and factor that were tried: short runs of one seed."""
    losses = {name: _losses_of(setting, name).values() for name in (arm, DENSE)}
    return as_percent(min(losses[arm]) / min(losses[DENSE]) - 1)


def over_dense(setting: str, arm: str, part: str = "finals") -> str:
    """Loss over dense in the long runs, each at one learning rate and factor: the mean of the seeds that both have."""
    return as_percent(mean(_gaps_to_dense(setting, arm, part)))


def over_dense_of(setting: str, arm: str, part: str = "finals") -> str:
    """The same, and the number of seeds."""
    return f"{over_dense(setting, arm, part)} ({len(_gaps_to_dense(setting, arm, part))})"


def head_cost(vocabulary: int, head: str = "fp8") -> str:
    """Loss with the head in FP8 over that with the head dense: the mean of the seeds, its error, and their number."""
    gaps = _head_gaps(vocabulary, head)
    error = f" ± {100 * stdev(gaps) / len(gaps) ** 0.5:.2f}" if len(gaps) > 1 else ""
    return f"{as_percent(mean(gaps), 2).removesuffix(' %')}{error} % ({len(gaps)})"


def head_pairs() -> str:
    """The largest gaps, below and above, of a run with its head in FP8 to that of the same seed with it dense."""
    gaps = [gap for vocabulary in (8192, 50304, 152064) for gap in _head_gaps(vocabulary, "fp8")]
    return f"{as_percent(min(gaps))} to {as_percent(max(gaps))}"


def _head_gaps(vocabulary: int, head: str) -> list[float]:
    """Of each seed that has both."""
    setting, part = f"vocabulary {vocabulary}", "heads by vocabulary"
    in_fp8, dense = (_by_seed(setting, arm, part) for arm in (f"fp8, head {head}", "fp8"))
    gaps = [loss / dense[seed] - 1 for seed, loss in in_fp8.items() if seed in dense]
    if not gaps:
        raise FigureError(f"{part} has no runs of {head!r} with a vocabulary of {vocabulary}")
    return gaps


def seeds_apart(setting: str) -> str:
    """How far the seeds of dense training are apart in the long runs."""
    losses = _by_seed(setting, DENSE, "finals").values()
    return f"{100 * (max(losses) / min(losses) - 1):.1f} %"


def training_gap(setting: str, arm: str, part: int) -> str:
    """Training loss over dense, the same batches, in a twentieth of the steps, counted from 0."""
    curves = {
        run["arm"]: run["curve"]
        for run in section_of("bench_quality", "finals", "H200")["runs"]
        if run["setting"] == setting and run["seed"] == 1
    }
    return as_percent(curves[arm][part] / curves[DENSE][part] - 1)


def head_error(dgrad: str) -> str:
    """Of the head's dgrad: its error that all tokens share, over the mean gradient."""
    row = only_row(section_of("bench_quality", "heads with fast sums", "H200")["errors"], "errors", dgrad=dgrad)
    return f"{100 * row['mean_error_over_mean_gradient']:.0f} %"


def _gaps_to_dense(setting: str, arm: str, part: str) -> list[float]:
    losses, dense = (_by_seed(setting, name, part) for name in (arm, DENSE))
    gaps = [loss / dense[seed] - 1 for seed, loss in losses.items() if seed in dense]
    if not gaps:
        raise FigureError(f"{part} has no runs of {arm!r} with a seed of {DENSE!r} in the setting {setting!r}")
    return gaps


def _by_seed(setting: str, arm: str, part: str) -> dict[int, float]:
    return {
        run["seed"]: run["validation_loss"]
        for run in section_of("bench_quality", part, "H200")["runs"]
        if (run["setting"], run["arm"]) == (setting, arm)
    }


def rate_loss(setting: str, arm: str, factor: float) -> str:
    """Loss at the best learning rate of those that were tried with this factor."""
    losses = [loss for (tried, _), loss in _losses_of(setting, arm).items() if tried == factor]
    if not losses:
        raise FigureError(f"rates has no runs of {arm!r} with a factor of {factor:g} in the setting {setting!r}")
    return f"{min(losses):.3f}"


def rate_curves(setting: str) -> dict[tuple[str, float], dict[float, float]]:
    """Losses by learning rate, of each arm and factor that were tried at three rates at least."""
    found = {}
    for arm in (DENSE, "s-ste", "s-ste-transposable"):
        of_arm = _losses_of(setting, arm)
        for factor in sorted({factor for factor, _ in of_arm}):
            curve = {rate: loss for (tried, rate), loss in of_arm.items() if tried == factor}
            if len(curve) >= 3:
                found[arm, factor] = curve
    return found


def _losses_of(setting: str, arm: str) -> dict[tuple[float, float], float]:
    """By factor and learning rate."""
    losses = {
        (run["factor"], run["learning_rate"]): run["validation_loss"]
        for run in section_of("bench_quality", "rates", "H200")["runs"]
        if (run["setting"], run["arm"]) == (setting, arm)
    }
    if not losses:
        raise FigureError(f"rates has no runs of {arm!r} in the setting {setting!r}")
    return losses


def emulated(trial: str, rate: float = 0.003) -> str:
    """Loss over dense, the mean of the seeds, and their number: a GPT of 0.4 million parameters on a CPU."""
    runs = section_of("emulate_recipes", "emulated", "CPU")["runs"]
    losses = {(run["trial"], run["learning_rate"], run["seed"]): run["validation_loss"] for run in runs}
    pairs = [
        loss / losses["dense", rate, seed] - 1
        for (name, at, seed), loss in losses.items()
        if (name, at) == (trial, rate) and ("dense", rate, seed) in losses
    ]
    if not pairs:
        raise FigureError(f"no trial {trial!r} at {rate}; there are {listed(sorted({name for name, _, _ in losses}))}")
    return f"{as_percent(mean(pairs))} ({len(pairs)})"
