"""The figures of README.md and docs/, by name, from benchmarks/results/*.json.

Each function below that returns text and has no underscore may be named in a marker of a page (``render_docs.py``).
``device`` is a part of a device's name, such as ``"H200"``.  What is asked for and is not in the results is a
``FigureError``, which lists what there is.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import cache
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

# How pages call the models and the candidates of bench_step.  A model without results is "not measured" in tables.
MODELS = {
    "llama-8b": "Llama-3-8B shape, 4 layers, 4 x 4096 tokens",
    "qwen-7b": "Qwen2.5-7B shape, 3 layers, vocabulary 152,064, 2 x 4096 tokens",
    "llama-1b": "Llama-3.2-1B shape, 8 layers, 8 x 2048 tokens",
    "gpt2-small": "GPT-2 small, 16 x 1024 tokens",
    "vit-l": "ViT-L",
    "moe": "mixture of experts",
    "llama-8b-checkpointed": "Llama-3-8B shape, activation checkpointing",
    "llama-8b-microbatches": "Llama-3-8B shape, four microbatches an optimizer step",
}
SHORT_MODELS = {
    "llama-8b": "Llama-3-8B",
    "qwen-7b": "Qwen2.5-7B",
    "llama-1b": "Llama-3.2-1B",
    "gpt2-small": "GPT-2 small",
}
BF16, TORCHAO, SSTE = "bf16", "torchao tensorwise", "sste"
KINDS = {
    BF16: "torch.compile, bf16",
    "bf16 reduce-overhead": '`mode="reduce-overhead"`, bf16',
    TORCHAO: "torchao float8, tensorwise",
    SSTE: "**sste, defaults**",
    "sste reduce-overhead": 'sste, `mode="reduce-overhead"`',
    "sste, ffn-up": 'sste, `sste.targets="ffn-up"`',
    "sste, head in fp8": 'sste, `sste.head="fp8"`',
    "sste, head's backward in fp8": 'sste, `sste.head="fp8-backward"`',
    "sste, transposable, all linears": 'sste, `"s-ste-transposable"`, `sste.targets="all"`',
    "sste, transposable, all linears, head in fp8": 'sste, the same with `sste.head="fp8"`',
}
# Of bench_quality's recipes and tasks, in the order of their tables.
ARMS = {
    "bf16": "dense, bf16",
    "fp8": '`"fp8"`',
    "s-ste-boosted, ffn-up": '`"s-ste-boosted"`, `sste.targets="ffn-up"`',
    "s-ste-boosted": '`"s-ste-boosted"`',
    "s-ste": '`"s-ste"` (default)',
    "s-ste, bf16": '`"s-ste-bf16"`',
    "ste": '`"ste"`',
    "sr-ste": '`"sr-ste"`',
    "t-sr-ste": '`"t-sr-ste"`',
}
_NUMERALS = ("no", "one", "two", "three", "four", "five", "six")


class FigureError(Exception):
    """A page asks for what the results do not hold."""


# Where figures come from ----------------------------------------------------------------------------------------------


@cache
def _file(program: str) -> Mapping[str, Any]:
    path = RESULTS / f"{program}.json"
    if not path.exists():
        raise FigureError(f"there are no results of {program!r}; there are {_names(sorted(RESULTS.glob('*.json')))}")
    content: Mapping[str, Any] = json.loads(path.read_text())
    return content


def _names(found: Iterable[Any]) -> str:
    return ", ".join(repr(one.stem if isinstance(one, Path) else one) for one in found)


def _section(program: str, part: str, device: str) -> Mapping[str, Any]:
    """The results of one part of a program on a device."""
    of_part = {title: section for title, section in _file(program).items() if title.rpartition(", ")[0] == part}
    found = [section for title, section in of_part.items() if device in title.rpartition(", ")[2]]
    if len(found) != 1:
        raise FigureError(
            f"{program} has {len(found)} results of part {part!r} on a device named {device!r}; "
            f"allowed is what names one of {_names(_file(program))}"
        )
    section: Mapping[str, Any] = found[0]
    return section


def _one(rows: Sequence[Mapping[str, Any]], what: str, **fields: Any) -> Mapping[str, Any]:
    """The only row that has these values in these fields."""
    found = [row for row in rows if all(row.get(name) == value for name, value in fields.items())]
    if len(found) != 1:
        known = sorted({str(tuple(row.get(name) for name in fields)) for row in rows})
        raise FigureError(
            f"{what} has {len(found)} rows of {fields}; ({', '.join(fields)}) is one of {', '.join(known)}"
        )
    return found[0]


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|" for line in lines)


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:+.{digits}f} %"


def _day(written: str) -> str:
    day = date.fromisoformat(written)
    return f"{day.day} {day:%B %Y}"


def measured(program: str, part: str, device: str) -> str:
    """Device, day and versions of a measurement."""
    found = _section(program, part, device)["provenance"]
    return f"{found['device']}, {_day(found['date'])}, torch {found['torch']}, triton {found['triton']}"


def measured_on(program: str, part: str, device: str) -> str:
    """The day of a measurement."""
    return _day(_section(program, part, device)["provenance"]["date"])


def printed(program: str, part: str, device: str) -> str:
    """The table that a program printed."""
    return "\n".join(_section(program, part, device)["table"])


# Training steps: bench_step, bench_distributed ------------------------------------------------------------------------


def _step(model: str, kind: str, device: str) -> Mapping[str, Any]:
    return _one(_section("bench_step", f"step {model}", device)["rows"], f"the step of {model}", kind=kind)


def speed(model: str, kind: str, device: str) -> str:
    """How many times as fast as torch.compile in bf16, which ran beside it."""
    return f"{_step(model, kind, device)['speedup']:.2f}x"


def step_time(model: str, kind: str, device: str) -> str:
    """Milliseconds of a training step, the median."""
    return f"{_step(model, kind, device)['ms']['median']:.1f} ms"


def memory(model: str, kind: str, device: str) -> str:
    """Peak memory of a training step."""
    return f"{_step(model, kind, device)['peak_gib']:.1f} GiB"


def memory_over_bf16(model: str, kind: str, device: str) -> str:
    """Peak memory of a training step, less that of bf16."""
    return f"{_step(model, kind, device)['peak_gib'] - _step(model, BF16, device)['peak_gib']:+.1f} GiB"


def predicted_over_measured(model: str, kind: str, device: str) -> str:
    """How much too slow the prediction of a step is."""
    return f"{100 * (_step(model, kind, device)['predicted_over_measured'] - 1):.0f} %"


def _measured_steps() -> list[tuple[str, str, Mapping[str, Any]]]:
    """Model, device and results of each section of training steps, in the order of MODELS, then by date."""
    found = []
    for title, section in _file("bench_step").items():
        part, _, device = title.rpartition(", ")
        if part.startswith("step "):
            found.append((part.removeprefix("step "), device, section))

    def order(step: tuple[str, str, Mapping[str, Any]]) -> tuple[int, str]:
        if step[0] not in MODELS:
            raise FigureError(f"bench_step measured {step[0]!r}, which scripts/figures.py does not name in MODELS")
        return [*MODELS].index(step[0]), step[2]["provenance"]["date"]

    return sorted(found, key=order)


def short_device(device: str) -> str:
    """ "NVIDIA H100 80GB HBM3" becomes "H100"."""
    return device.removeprefix("NVIDIA ").partition(" ")[0]


def compared_steps() -> list[tuple[str, str, Mapping[str, float]]]:
    """Model, device and speeds over bf16 by candidate, where both torchao and sste were measured beside bf16."""
    found: list[tuple[str, str, Mapping[str, float]]] = []
    for model, device, section in _measured_steps():
        speeds = {row["kind"]: row["speedup"] for row in section["rows"]}
        if {TORCHAO, SSTE} <= speeds.keys():
            found.append((model, short_device(device), speeds))
    return found


def speed_table() -> str:
    """Models by device: a step in bf16, and the speeds of torchao, the defaults and the fastest options."""
    rows, seen = [], set()
    for model, device, section in _measured_steps():
        found = {row["kind"]: row for row in section["rows"]}
        best = max((row for kind, row in found.items() if kind.startswith(SSTE)), key=lambda row: row["speedup"])
        torchao = f"{found[TORCHAO]['speedup']:.2f}x" if TORCHAO in found else "not measured"
        fastest = "the defaults"
        if best["kind"] != SSTE:
            fastest = f"{best['speedup']:.2f}x, {KINDS[best['kind']].removeprefix('sste, ')}"
            if best["kind"] == "sste, transposable, all linears, head in fp8":
                fastest = f'{best["speedup"]:.2f}x, `"s-ste-transposable"`, all linears, `sste.head="fp8"`'
        row = [f"{found[BF16]['ms']['median']:.1f} ms", torchao, f"**{found[SSTE]['speedup']:.2f}x**", fastest]
        rows.append((MODELS[model], short_device(device), *row))
        seen.add(model)
    rows += [(MODELS[model], "", *["not measured"] * 4) for model in ("vit-l", "moe") if model not in seen]
    return _table(("model", "GPU", "bf16", "torchao", "sste", "fastest options measured"), rows)


def step_table(device: str) -> str:
    """Every candidate of every model that was measured on a device."""
    rows = []
    for model, on, section in _measured_steps():
        if device in on:
            rows.append((f"**{MODELS[model]}**", "", "", ""))
            rows += [
                (
                    KINDS[row["kind"]],
                    f"{row['ms']['median']:.1f} ms",
                    f"{row['speedup']:.2f}x",
                    f"{row['peak_gib']:.1f} GiB",
                )
                for row in section["rows"]
            ]
    if not rows:
        raise FigureError(f"no steps were measured on a device named {device!r}")
    return _table(("step", "time", "over bf16", "peak memory"), rows)


def steps_measured(device: str) -> str:
    """Where and when the rows of ``step_table`` were measured."""
    found = [section["provenance"] for _, on, section in _measured_steps() if device in on]
    days = sorted({entry["date"] for entry in found})
    versions = sorted({f"torch {entry['torch']}, triton {entry['triton']}" for entry in found})
    between = _day(days[0]) if len(days) == 1 else f"{_day(days[0])} to {_day(days[-1])}"
    return f"{found[0]['device']}, {between}, {'; '.join(versions)}"


def first_step(kind: str, cached: bool, device: str = "H100") -> str:
    """Of four layers of the Llama-3-8B shape: the first step, compilation included, with empty or filled caches."""
    row = _one(_section("bench_step", "compile llama-8b", device)["rows"], "compile", kind=kind)
    return f"{row['warm_s' if cached else 'cold_s']:.0f} s"


def _kernel_times(kind: str, device: str) -> dict[str, float]:
    kernels = _section("bench_step", "profile llama-8b", device)["models"]["llama-8b"][kind]
    ordered = sorted(kernels, key=lambda kernel: str(kernel["category"]))
    return {
        name: sum(kernel["ms"] for kernel in of) for name, of in groupby(ordered, lambda kernel: kernel["category"])
    }


def overhead(device: str = "H100") -> str:
    """Share of the sste step of four layers of the Llama-3-8B shape that is no GEMM and not in the bf16 step."""
    rest = {
        kind: sum(ms for category, ms in _kernel_times(kind, device).items() if "GEMM" not in category)
        for kind in (BF16, SSTE)
    }
    return f"{100 * (rest[SSTE] - rest[BF16]) / sum(_kernel_times(SSTE, device).values()):.1f} %"


def distributed_table(device: str = "H100", processes: int = 2) -> str:
    """Training steps with DDP and FSDP2."""
    rows = _section("bench_distributed", f"{processes} processes", device)["rows"]
    return _table(
        ("", "torch.compile, bf16", "sste"),
        [
            (
                parallelism,
                *(
                    f"{row['ms']['median']:.1f} ms, {row['peak_gib']:.1f} GiB"
                    + (f", **{row['speedup']:.2f}x**" if row["kind"] == SSTE else "")
                    for row in of
                ),
            )
            for parallelism, of in groupby(rows, lambda row: row["parallelism"])
        ],
    )


# Losses: bench_quality, emulate_recipes -------------------------------------------------------------------------------


def _runs(arm: str, part: str = "recipes") -> dict[int, Mapping[str, Any]]:
    """The runs of an arm by seed."""
    runs = _section("bench_quality", part, "H100")["runs"]
    found = {run["seed"]: run for run in runs if run["arm"] == arm}
    if not found:
        raise FigureError(f"{part} has no arm {arm!r}; there are {_names(sorted({run['arm'] for run in runs}))}")
    return found


def gaps_to_bf16(arm: str) -> list[float]:
    """For each seed, the validation loss over that of bf16 with the same batches, as a share."""
    dense = _runs(BF16)
    return [run["validation_loss"] / dense[seed]["validation_loss"] - 1 for seed, run in sorted(_runs(arm).items())]


def measured_arms() -> list[str]:
    """The recipes that were trained beside bf16, in the order of tables."""
    trained = {run["arm"] for run in _section("bench_quality", "recipes", "H100")["runs"]}
    return [arm for arm in ARMS if arm in trained - {BF16}]


def loss_over_bf16(arm: str) -> str:
    """Validation loss over bf16's, the mean of the seeds: GPT-2-small shape, 50 million tokens."""
    return _percent(mean(gaps_to_bf16(arm)))


def seeds(arm: str) -> str:
    """How many seeds ``loss_over_bf16`` is the mean of."""
    count = len(_runs(arm))
    return f"{_NUMERALS[count]} seed{'s' * (count > 1)}"


def loss_table() -> str:
    """Recipes against bf16: validation losses, and how far they are apart."""
    rows = []
    for arm in (BF16, *measured_arms()):
        runs = sorted(_runs(arm).items())
        over, each = "", ", ".join(_percent(gap) for gap in gaps_to_bf16(arm))
        if arm != BF16:
            over = f"**{loss_over_bf16(arm)}**" + (f" ({each})" if len(runs) > 1 else "")
        losses = ", ".join(f"{run['validation_loss']:.4f}" for _, run in runs)
        speed = runs[0][1]["tokens_per_second"]
        rows.append((ARMS[arm], losses, over, f"{speed:,.0f}" if speed else "not measured"))
    return _table(("recipe", "validation loss of each seed", "over bf16, mean (each seed)", "tokens a second"), rows)


def torchao_over_fp8() -> str:
    """Validation loss of torchao's tensorwise FP8 over that of the recipe "fp8", the mean of the seeds."""
    ours, theirs = (_runs(arm, "recipes beside torchao") for arm in ("fp8", TORCHAO))
    return _percent(mean(theirs[seed]["validation_loss"] / ours[seed]["validation_loss"] - 1 for seed in ours))


def kernels_loss(run: str, field: str) -> str:
    """Losses of 300 steps through the kernels or their definitions ("reference")."""
    found = _section("bench_quality", "loss", "H100")["runs"][run]
    last = found["losses"][-len(found["losses"]) // 10 :]
    return f"{found['validation_loss'] if field == 'validation' else mean(last):.4f}"


def head_loss(run: str) -> str:
    """Validation loss of a run of bench_quality's part about the vocabulary head."""
    runs = _section("bench_quality", "head", "H100")["runs"]
    if run not in runs:
        raise FigureError(f"the part 'head' has no run {run!r}; there are {_names(runs)}")
    return f"{runs[run]['validation_loss']:.3f}"


def timed(arm: str, field: str) -> str:
    """Of bench_quality's part "clock", a wide model: "loss", "seconds" or "tokens" of a run."""
    run = _one(_section("bench_quality", "clock, a wide model", "H100")["runs"], "clock", arm=arm)
    texts: dict[str, Callable[[], str]] = {
        "loss": lambda: f"{run['validation_loss']:.3f}",
        "seconds": lambda: f"{run['training_seconds']:.1f} s",
        "tokens": lambda: f"{run['steps'] * run['tokens_a_step'] / 1e6:.1f} million tokens",
    }
    return texts[field]()


def timed_tokens() -> str:
    """How many times as many tokens "s-ste-boosted" saw in the same time."""
    runs = _section("bench_quality", "clock, a wide model", "H100")["runs"]
    steps = [_one(runs, "clock", arm=arm)["steps"] for arm in ("s-ste-boosted", BF16)]
    return f"{steps[0] / steps[1]:.1f} times"


def task_table() -> str:
    """Right answers of two small classifications, by recipe."""
    runs = _section("bench_quality", "tasks", "H100")["runs"]
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
    return _table(("right answers, mean (each seed)", *tasks), rows)


def searched(trial: str, rate: float) -> str:
    """Loss over dense of a run of bench_quality's part "search": a GPT of 14 million parameters."""
    runs = _section("bench_quality", "search", "H100")["runs"]
    found, dense = (_one(runs, "search", trial=name, learning_rate=rate) for name in (trial, BF16))
    return _percent(found["validation_loss"] / dense["validation_loss"] - 1)


def best_of_rates(setting: str, arm: str) -> str:
    """Loss over dense, each at the best learning rate that was tried: 8 million tokens, one seed."""
    runs = _section("bench_quality", "rates, windows drawn from as many tokens as a run reads", "H200")["runs"]
    losses = {
        name: [run["validation_loss"] for run in runs if (run["setting"], run["arm"]) == (setting, name)]
        for name in (arm, "dense")
    }
    if not all(losses.values()):
        raise FigureError(f"rates has no runs of {arm!r} in the setting {setting!r}")
    return _percent(min(losses[arm]) / min(losses["dense"]) - 1)


def emulated(trial: str, rate: float = 0.003) -> str:
    """Loss over dense, the mean of the seeds, and their number: a GPT of 0.4 million parameters on a CPU."""
    runs = _section("emulate_recipes", "emulated", "CPU")["runs"]
    losses = {(run["trial"], run["learning_rate"], run["seed"]): run["validation_loss"] for run in runs}
    pairs = [
        loss / losses["dense", rate, seed] - 1
        for (name, at, seed), loss in losses.items()
        if (name, at) == (trial, rate) and ("dense", rate, seed) in losses
    ]
    if not pairs:
        raise FigureError(f"no trial {trial!r} at {rate}; there are {_names(sorted({name for name, _, _ in losses}))}")
    return f"{_percent(mean(pairs))} ({len(pairs)})"


# Kernels: bench_gemm, bench_kernels, bench_inference ------------------------------------------------------------------


def gemm_ratio(role: str, field: str = "geometric_mean", device: str = "H100") -> str:
    """Speed of our 2:4 GEMM over the best library's, over the shapes: "geometric_mean", "minimum" or "maximum"."""
    section = _section("bench_gemm", "shapes", device)
    if field == "maximum":
        name = "sparse_compile accurate" if role.endswith("accurate") else "sparse_compile"
        problem = role.partition(",")[0]
        ratios = [row["ratio"] for row in section["ratios"] if (row["name"], row["problem"]["name"]) == (name, problem)]
        return f"{max(ratios):.2f}x"
    return f"{_one(section['summary'], 'the summary', role=role)[field]:.2f}x"


def tflops(name: str, device: str = "H100") -> str:
    """Dense-equivalent TFLOP/s at 8192 x 8192 x 8192."""
    return f"{_one(_section('bench_gemm', 'cube', device)['rows'], 'the cube', name=name)['tflops']:,.0f} TFLOP/s"


def copy_rate(op: str, rows: int, columns: int, device: str, part: str = "memory") -> str:
    """Of the rate of a device copy, what an op that is bound by memory reaches."""
    found = _section("bench_kernels", part, device)["rows"]
    row = _one(found, part, op=op, shape=[rows, columns])
    return f"{100 * row.get('share_of_copy', row.get('of_the_copy_rate')):.0f} %"


def copies(op: str, rows: int, columns: int, device: str, part: str) -> str:
    """How many times as long as a copy of as many bytes an op takes."""
    row = _one(_section("bench_kernels", part, device)["rows"], part, op=op, shape=[rows, columns])
    return f"{1 / row['share_of_copy']:.1f} times"


def host_times(device: str = "H100") -> str:
    """What a call of an op takes the host, from the fastest op to the slowest."""
    times = [1e3 * row["host_ms"]["median"] for row in _section("bench_kernels", "host", device)["rows"]]
    return f"{min(times):.0f} to {max(times):.0f} us"


def stochastic_cost(device: str = "H100") -> str:
    """How many times as long casting and sampling a gradient takes with stochastic rounding, over the shapes."""
    rows = _section("bench_kernels", "memory", device)["rows"]
    rate = {(row["op"], tuple(row["shape"])): row["of_the_copy_rate"] for row in rows}
    plain, stochastic = "cast_mvue, exact", "cast_mvue, exact, stochastic"
    ratios = [rate[plain, shape] / value for (op, shape), value in rate.items() if op == stochastic]
    return f"{min(ratios):.2f} to {max(ratios):.2f} times"


def _inference(part: str, device: str) -> dict[int, dict[str, float]]:
    """Microseconds of one product by tokens and candidate."""
    times: dict[int, dict[str, float]] = {}
    for row in _section("bench_inference", part, device)["rows"]:
        best = min(timing["median"] for timing in row["ms"].values())
        times.setdefault(row["problem"]["columns"], {})[row["name"]] = 1e3 * best
    return dict(sorted(times.items()))


def inference_table(part: str, device: str = "H100") -> str:
    """One product by tokens, of a dense and a 2:4 weight in FP8 and bf16."""
    names = {"dense bf16": "dense bf16", "dense fp8": "dense FP8", "sparse_compile": "2:4 FP8"}
    return _table(
        ("tokens", *names.values(), "2:4 FP8 against dense FP8", "against dense bf16"),
        [
            (
                f"{tokens:,}",
                *(f"{of[name]:.0f} us" for name in names),
                *(f"{of[dense] / of['sparse_compile']:.2f}x" for dense in ("dense fp8", "dense bf16")),
            )
            for tokens, of in _inference(part, device).items()
        ],
    )


# What the code says ---------------------------------------------------------------------------------------------------


def zoo(field: str) -> str:
    """A count over the architectures of the zoo."""
    architectures = _file("zoo")["architectures"]
    if field == "architectures":
        return str(len(architectures))
    if field not in architectures[0]:
        raise FigureError(f"the zoo has no {field!r}; there are {_names(['architectures', *architectures[0]])}")
    return str(sum(found[field] for found in architectures))


def zoo_cosine(field: str) -> str:
    """The lowest cosine of gradients over the architectures, rounded down."""
    return f"{int(100 * min(found[field] for found in _file('zoo')['architectures'])) / 100:.2f}"


def zoo_measured() -> str:
    """When and with which versions the zoo ran."""
    found = _file("zoo")
    return f"{_day(found['date'])}, torch {found['torch']}, transformers {found['transformers']}, timm {found['timm']}"


def options_table() -> str:
    """The options of the backend, as ``python -m sparse_compile options --markdown`` prints them."""
    from sparse_compile.launcher.option_table import as_markdown

    return as_markdown()


def beta_factor(recipe: str) -> str:
    """What a recipe multiplies the best fit of beta with."""
    from sparse_compile.recipe import RECIPES

    return f"{RECIPES[recipe].beta_factor:g} times"
