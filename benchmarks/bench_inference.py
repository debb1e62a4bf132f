"""Inference with a finalized model's FFN: its 2:4 weights against dense ones, from one token to many.

    python benchmarks/bench_inference.py up down    the FFN shapes of Llama-3-8B, 1 to 16384 tokens

Every product is ``out = x @ weight.T`` of x ``[tokens, K]`` and the weight ``[N, K]``, bf16 out, row-major: ours with a
2:4 weight in fp8 and in bf16 (``ops.sparse_mm``), ``ops.scaled_mm`` with a dense weight in fp8, ``torch.mm`` with one
in bf16.  Without the cast of x to fp8, which the compiler fuses into what makes x.  GPU time by CUDA graphs, no input
in L2.  The crossover is where 2:4 becomes, or ceases to be, the faster: the ranges of measured tokens in which its
median is lower.
"""

import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_gemm import compare, errors, failures
from gemm_libraries import BF16, CUBLAS, Calls, Gemm, Inputs, fprop, ours
from harness import Report, run_parts

from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3

DEVICE = torch.device("cuda")
SHAPES = {"up": (14336, 4096), "down": (4096, 14336)}  # out_features, in_features; gate is as up
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)


def scaled_mm(sets: Sequence[Inputs], transpose: bool) -> Calls:
    """The dense fp8 product as linears of this package run it, with a scale of 1."""
    assert transpose
    one = ops.unit_scale(sets[0].b.device)
    return [partial(ops.scaled_mm, x.b, x.dense, one, BF16, True) for x in sets]


ROW_MAJOR = (True,)  # [tokens, N]
DENSE_BF16 = replace(CUBLAS, name="dense bf16", layouts=ROW_MAJOR)
DENSE_FP8 = Gemm(name="dense fp8", dtype=E4M3, prepare=scaled_mm, sparse=False, scaled=False, layouts=ROW_MAJOR)
SPARSE_BF16, SPARSE_FP8 = ours(BF16, ROW_MAJOR), ours(E4M3, ROW_MAJOR)
GEMMS = (DENSE_BF16, DENSE_FP8, SPARSE_BF16, SPARSE_FP8)
# What a 2:4 weight is worth: against a dense one of the same precision, and against what a model is usually run in.
PAIRS = ((SPARSE_FP8, DENSE_FP8), (SPARSE_BF16, DENSE_BF16), (SPARSE_FP8, DENSE_BF16))
NAMES = {SPARSE_FP8.name: "2:4 fp8", SPARSE_BF16.name: "2:4 bf16"} | {
    gemm.name: gemm.name for gemm in (DENSE_FP8, DENSE_BF16)
}


def measure_shapes(shapes: Sequence[tuple[int, int]], tokens: Sequence[int], device: torch.device) -> Report:
    rows: list[dict[str, Any]] = []
    for n, k in shapes:
        for count in tokens:
            rows += compare(fprop(n, k, tokens=count), GEMMS, device)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    crossovers = crossover(rows)
    return {"rows": rows, "crossovers": crossovers, "failed": failures(rows)}, table(rows, crossovers)


def crossover(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each shape and pair: the ranges ``[first, last]`` of measured tokens in which the 2:4 weight is faster."""
    times = _medians(rows)
    shapes = dict.fromkeys((n, k) for n, k, _ in times)
    found = []
    for n, k in shapes:
        measured = sorted(tokens for *shape, tokens in times if shape == [n, k])
        for sparse, dense in PAIRS:
            ranges: list[list[int]] = []
            before = False
            for tokens in measured:
                fast = _ratio(times[n, k, tokens], sparse, dense)
                is_faster = fast is not None and fast > 1
                if is_faster and before:
                    ranges[-1][1] = tokens
                elif is_faster:
                    ranges.append([tokens, tokens])
                before = is_faster
            pair = {"sparse": NAMES[sparse.name], "dense": NAMES[dense.name]}
            found.append({"out_features": n, "in_features": k, **pair, "measured": measured, "faster": ranges})
    return found


def table(rows: Sequence[dict[str, Any]], crossovers: Sequence[dict[str, Any]]) -> str:
    lines = []
    for (n, k, tokens), times in _medians(rows).items():
        microseconds = [None if times[gemm.name] is None else times[gemm.name] * 1000 for gemm in GEMMS]
        lines.append((n, k, tokens, *microseconds, *(_ratio(times, *pair) for pair in PAIRS)))
    ratios = [f"{NAMES[sparse.name]} / {NAMES[dense.name]}" for sparse, dense in PAIRS]
    headers = ("N", "K", "tokens", *(f"{NAMES[gemm.name]}, us" for gemm in GEMMS), *ratios)
    floats = ("", "", "", *[".1f"] * len(GEMMS), *[".2f"] * len(PAIRS))
    medians = tabulate(lines, headers=headers, floatfmt=floats, missingval="-", tablefmt="github")
    spreads = _spread_table(rows)
    ranges = tabulate(
        [
            (c["out_features"], c["in_features"], c["sparse"], c["dense"], _ranges(c["faster"], c["measured"]))
            for c in crossovers
        ],
        headers=("N", "K", "weight", "against", "faster at tokens"),
        tablefmt="github",
    )
    absent = "\n".join(f"- {error}" for error in errors(rows))
    did_not_run = f"\n\nDid not run:\n\n{absent}" if absent else ""
    return (
        f"Medians; ratios are speeds:\n\n{medians}\n\nCrossover, among the tokens measured:\n\n{ranges}\n\n"
        f"10th and 90th percentile, us:\n\n{spreads}{did_not_run}"
    )


def _spread_table(rows: Sequence[dict[str, Any]]) -> str:
    lines: dict[tuple[int, int, int], dict[str, str]] = {}
    for row in rows:
        timing = row["ms"].get(row["layout"])
        text = "-" if timing is None else f"{timing['low'] * 1000:.1f} to {timing['high'] * 1000:.1f}"
        lines.setdefault(_key(row), {})[row["name"]] = text
    headers = ("N", "K", "tokens", *(NAMES[gemm.name] for gemm in GEMMS))
    cells = [(*key, *(texts[gemm.name] for gemm in GEMMS)) for key, texts in lines.items()]
    return tabulate(cells, headers=headers, tablefmt="github")


def _ranges(ranges: Sequence[Sequence[int]], measured: Sequence[int]) -> str:
    if not ranges:
        return "none"
    if len(ranges) == 1 and list(ranges[0]) == [measured[0], measured[-1]]:
        return f"all, {measured[0]} to {measured[-1]}"
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in ranges)


def _medians(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, int, int], dict[str, float | None]]:
    """Milliseconds by out_features, in_features and tokens, then by GEMM; None where it did not run."""
    times: dict[tuple[int, int, int], dict[str, float | None]] = {}
    for row in rows:
        timing = row["ms"].get(row["layout"])
        times.setdefault(_key(row), {})[row["name"]] = None if timing is None else timing["median"]
    return times


def _key(row: dict[str, Any]) -> tuple[int, int, int]:
    problem = row["problem"]
    return problem["rows"], problem["contraction"], problem["columns"]


def _ratio(times: dict[str, float | None], sparse: Gemm, dense: Gemm) -> float | None:
    """How many times as fast the sparse product is."""
    mine, other = times[sparse.name], times[dense.name]
    return None if mine is None or other is None else other / mine


def main() -> None:
    parts = {name: partial(measure_shapes, [shape], TOKENS, DEVICE) for name, shape in SHAPES.items()}
    run_parts("bench_inference", __doc__, parts)


if __name__ == "__main__":
    main()
