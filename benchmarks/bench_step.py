"""Training steps of models: time, memory and compilation, against torch.compile bf16 and torchao float8.

    python benchmarks/bench_step.py step        time and peak memory
    python benchmarks/bench_step.py profile     where the GPU's time goes, by kind of kernel
    python benchmarks/bench_step.py compile     time to the first step, with empty caches and in a second process

``--models`` and ``--kinds`` choose what is measured.  The candidates of a model take turns in one process, in which
several parts may follow each other, except that each compilation has a process and caches of its own.
"""

import argparse
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import RESULTS, Report, interleave, provenance, write
from step_models import BF16, BY_DEFAULT, MODELS, SSTE, compilable, training_step

import sparse_compile
from sparse_compile.kernels import ops

DEVICE = torch.device("cuda")
KINDS = (BF16, "torchao tensorwise", "torchao rowwise", SSTE)
Candidates = tuple[dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]  # the step of each kind, and what is known
STEPS = 3  # in a row, so that a step begins as it does in training: behind another of its own

# Category of a kernel: the first whose pattern is found in its name.
CATEGORIES = (
    ("fused by Inductor", r"^(multi_kernel_)?triton_"),
    ("2:4 GEMM", r"sparse_gemm"),
    ("fp8 GEMM", r"nvjet_\w*qq|e4m3\w*_e4m3|gemm.*e4m3|cutlass.*(e4m3|float_e4m3)"),
    ("bf16 GEMM", r"nvjet|gemm|cutlass.*bf16"),
    ("attention", r"sdpa|flash|fmha|attention"),
    ("casts of their own", r"^_(cast|transpose|speculate|correct)"),
    ("optimizer", r"multi_tensor_apply|[Aa]dam"),
)
OTHER = "other"


def categorise(name: str) -> str:
    return next((category for category, pattern in CATEGORIES if re.search(pattern, name)), OTHER)


def candidates(name: str, kinds: Sequence[str]) -> Candidates:
    """Compiled and warm steps of a model, and each one's first loss, peak memory and host time of a step."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    steps, facts = {}, {}
    for kind in kinds:
        gc.collect()
        before = torch.cuda.memory_allocated()
        step = training_step(MODELS[name], kind, DEVICE)
        compiled = len(sparse_compile.report().graphs)
        loss = float(step())
        expected = facts[kinds[0]]["loss"] if facts else loss
        if MODELS[name].pruning_changes_the_loss and kind.startswith(SSTE):
            # What the definitions of the kernels make of the same graph.
            with ops.force_reference():
                expected = float(step())
        gains = [graph.predicted_gain_ms for graph in sparse_compile.report().graphs[compiled:]]
        for _ in range(3):
            step()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        enqueued = time.perf_counter() - start
        torch.cuda.synchronize()
        facts[kind] = {
            "loss": loss,
            "expected_loss": expected,
            "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30,
            "host_ms": enqueued * 1e3,
            "predicted_gain_ms": sum(gains) * MODELS[name].microbatches if kind.startswith(SSTE) else None,
        }
        steps[kind] = step
        print(f"{name}, {kind}: {facts[kind]}, {(time.perf_counter() - start) * 1e3:.1f} ms", flush=True)
    for kind, fact in facts.items():
        # Not "difference > tolerance": NaN must fail.
        if not abs(fact["loss"] - fact["expected_loss"]) < MODELS[name].tolerance:
            raise SystemExit(
                f"FAILED: the first loss of {name} is {fact['loss']} in {kind}, not {fact['expected_loss']}"
            )
    return steps, facts


def several(step: Callable[[], Any]) -> None:
    for _ in range(STEPS):
        step()


def step_part(name: str, made: Candidates, rounds: int) -> Report:
    """Medians over rounds in which all candidates of a model take turns."""
    steps, facts = made
    rows = []
    runs = {kind: partial(several, step) for kind, step in steps.items()}
    timings = interleave(runs, rounds, warmup=1, calls=STEPS)
    base = next(iter(timings.values())).median
    for kind, timing in timings.items():
        row = {"model": name, "kind": kind, "ms": asdict(timing), "speedup": base / timing.median, **facts[kind]}
        gain = row["predicted_gain_ms"]
        row["predicted_over_measured"] = (base - gain) / timing.median if gain is not None else None
        rows.append(row)
    return {"rows": rows}, step_table(rows)


def step_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        spread = [row["ms"][key] for key in ("median", "low", "high")]
        rest = [row[key] for key in ("speedup", "predicted_over_measured", "peak_gib", "host_ms")]
        lines.append((row["model"], row["kind"], *spread, *rest))
    ratio = f"x {rows[0]['kind']}"
    headers = ("model", "step", "ms", "p10", "p90", ratio, "predicted / measured", "peak GiB", "host ms")
    floats = ("", "", ".1f", ".1f", ".1f", ".3f", ".3f", ".1f", ".1f")
    return tabulate(lines, headers=headers, floatfmt=floats, missingval="-", tablefmt="github")


def profile_part(name: str, made: Candidates, rounds: int) -> Report:
    """GPU time of a step by category of kernel: the mean over as many steps as there are rounds."""
    found = {kind: profile(step, rounds) for kind, step in made[0].items()}
    return {"models": {name: found}}, profile_table(name, found)


def profile(step: Callable[[], Any], rounds: int) -> list[dict[str, Any]]:
    """The kernels of a step: name, category, calls, ms; the slowest first."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(rounds):
            step()
        torch.cuda.synchronize()
    kernels = [
        {
            "kernel": event.key,
            "category": categorise(event.key),
            "calls": event.count / rounds,
            "ms": event.device_time_total / 1e3 / rounds,
        }
        for event in profiler.key_averages()
        if event.device_time_total > 0
    ]
    return sorted(kernels, key=lambda kernel: -kernel["ms"])


def profile_table(name: str, found: dict[str, list[dict[str, Any]]]) -> str:
    sums: dict[str, dict[str, float]] = {kind: defaultdict(float) for kind in found}
    for kind, kernels in found.items():
        for kernel in kernels:
            sums[kind][kernel["category"]] += kernel["ms"]
    categories = [*(category for category, _ in CATEGORIES), OTHER]
    lines: list[tuple[Any, ...]] = [
        (category, *(sums[kind].get(category) for kind in found)) for category in categories
    ]
    lines.append(("all", *(sum(totals.values()) for totals in sums.values())))
    table = tabulate(lines, headers=(f"{name}, ms a step", *found), floatfmt=".2f", missingval="-", tablefmt="github")
    if not {BF16, SSTE} <= found.keys():
        return table
    return f"{table}\n\nNeither a GEMM nor in the bf16 step: {overhead(sums[BF16], sums[SSTE]):.1%} of the sste step."


def overhead(bf16: dict[str, float], sste: dict[str, float]) -> float:
    """Share of the step that is neither a GEMM nor in the bf16 step already."""

    def rest(totals: dict[str, float]) -> float:
        return sum(ms for category, ms in totals.items() if "GEMM" not in category)

    return (rest(sste) - rest(bf16)) / sum(sste.values())


def compile_part(name: str, kinds: Sequence[str]) -> Report:
    """Seconds of the first step: with empty caches, and in a second process that finds them filled."""
    rows = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            cold, warm = (_first_step(name, kind, folder) for _ in range(2))
        rows.append({"model": name, "kind": kind, "cold_s": cold, "warm_s": warm})
        print(f"{name}, {kind}: first step {cold:.1f} s, in a second process {warm:.1f} s", flush=True)
    return {"rows": rows}, compile_table(rows)


def _first_step(name: str, kind: str, folder: str) -> float:
    """Seconds of the first step in a new process whose caches lie in ``folder``."""
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "SPARSE_COMPILE_CACHE_DIR": f"{folder}/sparse_compile",
    }
    command = [sys.executable, __file__, "first", "--models", name, "--kinds", kind]
    done = subprocess.run(command, env={**os.environ, **caches}, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def first_part(name: str, kind: str) -> None:
    """Print the seconds of the first step, without what any program on the GPU has to do."""
    torch.ones(256, 256, device=DEVICE).matmul(torch.ones(256, 256, device=DEVICE))
    step = training_step(MODELS[name], kind, DEVICE)
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    print(json.dumps(time.perf_counter() - start))


def compile_table(rows: Sequence[dict[str, Any]]) -> str:
    base = {row["model"]: row for row in rows if row["kind"] == BF16}
    lines = []
    for row in rows:
        reference = base.get(row["model"])
        ratios = [row[key] / reference[key] if reference else None for key in ("cold_s", "warm_s")]
        lines.append((row["model"], row["kind"], row["cold_s"], ratios[0], row["warm_s"], ratios[1]))
    headers = ("model", "step", "first step, s", f"x {BF16}", "in a second process, s", f"x {BF16}")
    floats = ("", "", ".1f", ".2f", ".1f", ".2f")
    return tabulate(lines, headers=headers, floatfmt=floats, missingval="-", tablefmt="github")


def _measurable(kind: str) -> str:
    return kind if kind.startswith("torchao ") else compilable(kind)


def main() -> None:
    measuring: dict[str, Callable[[str, Candidates, int], Report]] = {"step": step_part, "profile": profile_part}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*measuring, "compile", "first"])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=BY_DEFAULT)
    said = f"the first is the base of ratios; default: {', '.join(KINDS)}"
    parser.add_argument("--kinds", nargs="+", type=_measurable, help=said)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    if "first" in args.parts and len(args.parts) > 1:
        parser.error("'first' is what the processes of 'compile' run: ask for it alone")
    has_torchao = importlib.util.find_spec("torchao") is not None
    kinds = args.kinds or [kind for kind in KINDS if has_torchao or not kind.startswith("torchao")]
    if args.parts == ["first"]:
        first_part(args.models[0], kinds[0])
        return
    print(", ".join(f"{key} {value}" for key, value in provenance().items()), flush=True)
    for name in args.models:  # a section for each of its parts, which the next run of that model replaces
        steps = candidates(name, kinds) if measuring.keys() & set(args.parts) else ({}, {})
        for part in args.parts:
            results, table = (
                measuring[part](name, steps, args.rounds) if part in measuring else compile_part(name, kinds)
            )
            print(table, flush=True)
            write("bench_step", f"{part} {name}", results, table, args.out)
        del steps


if __name__ == "__main__":
    main()
