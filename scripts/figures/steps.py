"""Training steps: bench_step and bench_distributed."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from figures.results import FigureError, as_day, as_table, content_of, only_row, section_of

# How pages call the models of bench_step.
MODELS = {
    "llama-8b": "Llama-3-8B shape, 4 layers, 4 x 4096 tokens",
    "qwen-7b": "Qwen2.5-7B shape, 3 layers, vocabulary 152,064, 2 x 4096 tokens",
    "llama-1b": "Llama-3.2-1B shape, 8 layers, 8 x 2048 tokens",
    "gpt2-small": "GPT-2 small, 16 x 1024 tokens",
    "llama-350m": "Llama shape of 350 million parameters, 16 x 1024 tokens",
    "gpt-1280": "GPT of width 1280 with Muon, 4 microbatches of 16 x 2048 tokens",
    "vit-large": "ViT-L/16, 128 images of 224 x 224",
    "mixtral": "Mixtral shape, 2 layers, 4 x 4096 tokens",
    "experts-mixtral": "8 experts, top 2, 4096 to 14336 features (Mixtral), 16,384 tokens",
    "experts-olmoe": "64 experts, top 8, 2048 to 1024 features (OLMoE), 16,384 tokens",
    "experts-qwen3-30b-a3b": "128 experts, top 8, 2048 to 768 features (Qwen3-30B-A3B), 16,384 tokens",
}
VARIANTS = {
    "llama-8b-checkpointed": "Llama-3-8B shape, activation checkpointing",
    "llama-8b-microbatches": "Llama-3-8B shape, four microbatches an optimizer step",
}
SHORT_MODELS = {
    "llama-8b": "Llama-3-8B",
    "qwen-7b": "Qwen2.5-7B",
    "llama-1b": "Llama-3.2-1B",
    "gpt2-small": "GPT-2 small",
    "llama-350m": "Llama, 350M",
    "gpt-1280": "GPT, width 1280",
    "vit-large": "ViT-L/16",
    "mixtral": "Mixtral",
}
# What the table of models has a row of also while it has no results.
ASKED_FOR = ("vit-large", "mixtral")
# And its candidates.
BF16, TORCHAO, SSTE = "bf16", "torchao tensorwise", "sste"
TORCHAO_HEAD = f"{TORCHAO}, head in fp8"
SSTE_DENSE_HEAD = "sste, head dense"
# What the words of a kind are called, which bench_step composes of them.
WORDS = {
    "transposable": '`"s-ste-transposable"`',
    "dense fp8": '`"fp8"`',
    "fp8 and mvue": '`"fp8-mvue"`',
    "ffn-up": '`sste.targets="ffn-up"`',
    "all linears": '`sste.targets="all"`',
    "head dense": '`sste.head="dense"`',
    "head's backward in fp8": '`sste.head="fp8-backward"`',
    "small memory": '`sste.memory="small"`',
}
BASES = {
    BF16: "torch.compile, bf16",
    "bf16 reduce-overhead": '`mode="reduce-overhead"`, bf16',
    TORCHAO: "torchao float8, tensorwise",
    TORCHAO_HEAD: "torchao float8, tensorwise, the head, too",
    SSTE: "**sste, defaults**",
    "sste reduce-overhead": 'sste, `mode="reduce-overhead"`',
}


def _options(kind: str) -> str:
    """The options of a kind of ours, as a page says them."""
    words = kind.split(", ")[1:]
    if unknown := set(words) - WORDS.keys():
        raise FigureError(f"scripts/figures/steps.py has no name for {sorted(unknown)} of the kind {kind!r}")
    return ", ".join(WORDS[word] for word in words)


def _name_of(kind: str) -> str:
    return BASES[kind] if kind in BASES else f"sste, {_options(kind)}"


def _step(model: str, kind: str, device: str) -> Mapping[str, Any]:
    return only_row(section_of("bench_step", f"step {model}", device)["rows"], f"the step of {model}", kind=kind)


def speed(model: str, kind: str, device: str) -> str:
    """How many times as fast as torch.compile in bf16, which ran beside it."""
    return f"{_step(model, kind, device)['speedup']:.2f}x"


def memory(model: str, kind: str, device: str) -> str:
    """Peak memory of a training step."""
    return f"{_step(model, kind, device)['peak_gib']:.1f} GiB"


def predicted_over_measured(model: str, kind: str, device: str) -> str:
    """How much too slow the prediction of a step is."""
    return f"{100 * (_step(model, kind, device)['predicted_over_measured'] - 1):.0f} %"


def _measured_steps() -> list[tuple[str, str, Mapping[str, Any]]]:
    """Model, device and results of each section of training steps, in the order of MODELS, then by date."""
    found, names = [], [*MODELS, *VARIANTS]
    for title, section in content_of("bench_step").items():
        part, _, device = title.rpartition(", ")
        if part.startswith("step "):
            found.append((part.removeprefix("step "), device, section))

    def order(step: tuple[str, str, Mapping[str, Any]]) -> tuple[int, str]:
        if step[0] not in names:
            raise FigureError(
                f"bench_step measured {step[0]!r}, which scripts/figures/steps.py does not name in MODELS"
            )
        return names.index(step[0]), step[2]["provenance"]["date"]

    return sorted(found, key=order)


def _short_device(device: str) -> str:
    """``H100`` of ``NVIDIA H100 80GB HBM3``."""
    return device.removeprefix("NVIDIA ").partition(" ")[0]


def compared_steps() -> list[tuple[str, str, Mapping[str, float]]]:
    """Model, device and speeds over bf16 by candidate, where both torchao and sste were measured beside bf16."""
    found: list[tuple[str, str, Mapping[str, float]]] = []
    for model, device, section in _measured_steps():
        speeds = {row["kind"]: row["speedup"] for row in section["rows"]}
        if model in MODELS and {TORCHAO, SSTE} <= speeds.keys():
            found.append((model, _short_device(device), {**speeds, TORCHAO: _of_torchao(speeds)}))
    return found


def _of_torchao(speeds: Mapping[str, float]) -> float:
    """With its head in FP8 or without, whichever is faster."""
    return max(speeds[kind] for kind in (TORCHAO, TORCHAO_HEAD) if kind in speeds)


def _compared(section: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Of one model: bf16, torchao, the defaults, and the fastest options if these are others."""
    found = {row["kind"]: row for row in section["rows"]}
    speeds = {kind: row["speedup"] for kind, row in found.items()}
    best = max((row for kind, row in found.items() if kind.startswith(SSTE)), key=lambda row: row["speedup"])
    name = _name_of(best["kind"]).removeprefix("sste, ")
    return (
        f"{found[BF16]['ms']['median']:.1f} ms",
        f"{_of_torchao(speeds):.2f}x" if TORCHAO in speeds else "not measured",
        f"**{found[SSTE]['speedup']:.2f}x**" if SSTE in found else "not measured",
        "the defaults" if best["kind"] == SSTE else f"{best['speedup']:.2f}x, {name}",
    )


def speed_table() -> str:
    """A line a model: a step in bf16, and the speeds of torchao, the defaults and the fastest options.

    Of the day that the defaults were measured last, or anything was if they were not.
    """
    rows: list[tuple[str, ...]] = []
    for model, name in MODELS.items():
        of_model = [(device, section) for of, device, section in _measured_steps() if of == model]
        with_defaults = [found for found in of_model if any(row["kind"] == SSTE for row in found[1]["rows"])]
        measured = (with_defaults or of_model)[-1:]
        rows += [(name, _short_device(device), *_compared(section)) for device, section in measured]
        if not measured and model in ASKED_FOR:
            rows.append((name, "", *["not measured"] * 4))
    return as_table(("model", "GPU", "bf16", "torchao", "sste", "fastest options measured"), rows)


def step_table(device: str) -> str:
    """Every candidate of every model that was measured on a device."""
    rows = []
    for model, on, section in _measured_steps():
        if device in on:
            rows.append((f"**{(MODELS | VARIANTS)[model]}**", "", "", ""))
            rows += [
                (
                    _name_of(row["kind"]),
                    f"{row['ms']['median']:.1f} ms",
                    f"{row['speedup']:.2f}x",
                    f"{row['peak_gib']:.1f} GiB",
                )
                for row in section["rows"]
            ]
    if not rows:
        raise FigureError(f"no steps were measured on a device named {device!r}")
    return as_table(("step", "time", "over bf16", "peak memory"), rows)


def steps_measured(device: str) -> str:
    """Where and when the rows of ``step_table`` were measured."""
    found = [section["provenance"] for _, on, section in _measured_steps() if device in on]
    days = sorted({entry["date"] for entry in found})
    versions = sorted({f"torch {entry['torch']}, triton {entry['triton']}" for entry in found})
    between = as_day(days[0]) if len(days) == 1 else f"{as_day(days[0])} to {as_day(days[-1])}"
    return f"{found[0]['device']}, {between}, {'; '.join(versions)}"


def first_step(kind: str, cached: bool, device: str = "H200") -> str:
    """Of four layers of the Llama-3-8B shape: the first step, compilation included, with empty or filled caches."""
    row = only_row(section_of("bench_step", "compile llama-8b", device)["rows"], "compile", kind=kind)
    return f"{row['warm_s' if cached else 'cold_s']:.0f} s"


def _kernel_times(kind: str, device: str) -> dict[str, float]:
    kernels = section_of("bench_step", "profile llama-8b", device)["models"]["llama-8b"][kind]
    ordered = sorted(kernels, key=lambda kernel: str(kernel["category"]))
    return {
        name: sum(kernel["ms"] for kernel in of) for name, of in groupby(ordered, lambda kernel: kernel["category"])
    }


def overhead(device: str = "H100") -> str:
    """Share of the sste step of four layers of the Llama-3-8B shape that is no GEMM and not in the bf16 step."""
    rest = {
        kind: sum(ms for category, ms in _kernel_times(kind, device).items() if "GEMM" not in category)
        for kind in (BF16, SSTE_DENSE_HEAD)
    }
    whole = sum(_kernel_times(SSTE_DENSE_HEAD, device).values())
    return f"{100 * (rest[SSTE_DENSE_HEAD] - rest[BF16]) / whole:.1f} %"


def experts_table(device: str = "H200") -> str:
    """Steps of experts alone, each candidate's speed over bf16."""
    kinds = ("sste, dense fp8", SSTE, "sste, transposable")
    rows = []
    for model, on, section in _measured_steps():
        if model.startswith("experts-") and device in on:
            found = {row["kind"]: row for row in section["rows"]}
            speeds = [f"{found[kind]['speedup']:.2f}x" for kind in kinds]
            memory = " / ".join(f"{found[kind]['peak_gib']:.1f}" for kind in (BF16, *kinds))
            name = MODELS[model].removesuffix(", 16,384 tokens")
            rows.append((name, f"{found[BF16]['ms']['median']:.1f} ms", *speeds, f"{memory} GiB"))
    if not rows:
        raise FigureError(f"no steps of experts were measured on a device named {device!r}")
    headers = (
        "experts",
        "bf16",
        '`"fp8"`',
        '`"s-ste"` (default)',
        '`"s-ste-transposable"`',
        "peak memory of these four",
    )
    return as_table(headers, rows)


def titan(field: str, kind: str, flavor: str = "1B", device: str = "H200", gpus: str = "one GPU") -> str:
    """Of torchtitan's trainer: "speed" over inductor, or the "loss" of the last step."""
    rows = section_of("bench_torchtitan", gpus, device)["rows"]
    row, base = (only_row(rows, "torchtitan", flavor=flavor, kind=name) for name in (kind, "inductor"))
    if field == "loss":
        return f"{row['losses'][-1]:.2f}"
    return f"{row['tokens_per_second'] / base['tokens_per_second']:.2f}x"


def fsdp2_speed(processes: int, device: str = "H200") -> str:
    """With FSDP2, over bf16 on as many GPUs."""
    rows = section_of("bench_distributed", "up to 2 processes", device)["rows"]
    row = only_row(rows, "bench_distributed", parallelism="FSDP2", kind=SSTE, processes=processes)
    return f"{row['speedup']:.2f}x"


def fsdp2_host(device: str = "H200") -> str:
    """Host time of a step on two GPUs, of this backend and of bf16."""
    rows = section_of("bench_distributed", "up to 2 processes", device)["rows"]
    sste, bf16 = (
        only_row(rows, "bench_distributed", parallelism="FSDP2", kind=kind, processes=2)["host_ms"]
        for kind in (SSTE, BF16)
    )
    return f"{sste:.0f} ms (bf16 {bf16:.0f} ms)"


def distributed_table(device: str = "H100", processes: int = 2) -> str:
    """Training steps with DDP and FSDP2."""
    rows = section_of("bench_distributed", f"{processes} processes", device)["rows"]
    return as_table(
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
