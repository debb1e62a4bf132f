"""The 2:4 GEMM against the GEMMs of the libraries: cuBLAS, cuSPARSELt, and CUTLASS as packaged by torchao.

    python benchmarks/bench_gemm.py cube        8192 cubed, fp8 and bf16
    python benchmarks/bench_gemm.py shapes      fprop and wgrad of the linears of Llama and GPT-2 models
    python benchmarks/bench_gemm.py accuracy    the error of wgrad as the number of tokens grows
    python benchmarks/bench_gemm.py choice      the tiles that the estimate chooses against the fastest
    python benchmarks/bench_gemm.py shared      in several waves, while another kernel holds multiprocessors

Several parts can be named at once.  Every product is ``out = A @ B.T``, A ``[R, C]`` and B ``[D, C]``, bf16 out; A is
2:4 for sparse GEMMs, dense for dense ones.  Data is random normal.  To compare with another cuSPARSELt than
PyTorch's, preload it: ``LD_PRELOAD=<folder>/libcusparseLt.so.0``.  A library stores out or its transpose, whichever is
faster, and applies the scales that cost it least: vectors for A and B (rowwise, CUTLASS) or none (all others).
TFLOP/s are dense-equivalent, 2 * R * D * C divided by the time, also where half of the products are skipped.
"""

import gc
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from gemm_libraries import (
    BF16,
    CUBLAS,
    CUSPARSELT_BF16,
    FP8_LIBRARIES,
    OURS,
    OURS_ACCURATE,
    SCALED_MM_ACCURATE,
    TOKENS,
    Gemm,
    Inputs,
    Problem,
    column_scale_inv,
    cusparselt_version,
    fprop,
    make_inputs,
    ours,
    wgrad,
)
from harness import Candidate, Report, Timing, brief, measure, require_close, run_parts
from shared_gpu import shared_part

from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3, E4M3_MAX, MVUE_GAIN
from sparse_compile.kernels.reference import decompress24
from sparse_compile.kernels.sparse_gemm import tuning
from sparse_compile.kernels.sparse_gemm.configs import Config, choose, configs, contraction_stages
from sparse_compile.kernels.sparse_gemm.problem import Problem as GemmProblem
from sparse_compile.linear.fp8 import cast, token_amax, token_scale

DEVICE = torch.device("cuda")
# Dense TFLOP/s of an H200 SXM: NVIDIA's data sheet, half of what it states with sparsity.
PEAK = {E4M3: 1979.0, BF16: 989.5}
CUBE = 8192
CUBE_TARGET = 2200.0  # TFLOP/s in fp8
SHAPES = (  # out_features, in_features
    (14336, 4096), (4096, 14336), (4096, 4096), (8192, 2048), (2048, 8192),
    (6400, 1600), (1600, 6400), (3072, 768), (768, 3072),
)  # fmt: skip
CHOICES = (  # out_features, in_features, tokens; none of them was part of the fit
    (11008, 4096, 8192), (4096, 11008, 16384), (2560, 9728, 16384), (9728, 2560, 4096), (896, 4864, 8192),
    (4864, 896, 16384), (3584, 14336, 4096), (13696, 5120, 4096), (1152, 4304, 16384), (6144, 24576, 2048),
)  # fmt: skip
CHOICE_TARGET = 0.05
ACCURACY_TOKENS = (2**14, 2**16, 2**18, 2**20)
ACCURACY_SIDE = 256
ACCURACY_TARGET = 2.0  # error over that of the reference
ROUNDS = 20
WGRADS = (OURS_ACCURATE, OURS)  # as a linear runs it, and with fast accumulation


def compare(problem: Problem, gemms: Sequence[Gemm], device: torch.device = DEVICE) -> list[dict[str, Any]]:
    """A row for each implementation, with the faster of its layouts; without a time where none ran."""

    @cache
    def inputs(dtype: torch.dtype) -> list[Inputs]:
        return [make_inputs(problem, dtype, device) for _ in range(problem.sets)]

    @cache
    def products(dtype: torch.dtype, sparse: bool) -> list[Tensor]:
        return [(x.sparse if sparse else x.dense).float() @ x.b.float().t() for x in inputs(dtype)]

    def check(gemm: Gemm, transpose: bool, outputs: Sequence[Tensor]) -> None:
        for x, product, out in zip(inputs(gemm.dtype), products(gemm.dtype, gemm.sparse), outputs, strict=True):
            expected = product * (x.scale_inv * column_scale_inv(x)) if gemm.scaled else product
            require_close(out.t() if transpose else out, expected)

    def candidate(gemm: Gemm, transpose: bool) -> Candidate:
        # Inputs are made in prepare: what fails there is the result of the candidates that need them.
        return Candidate(
            prepare=lambda: gemm.prepare(inputs(gemm.dtype), transpose),
            check=lambda outputs: check(gemm, transpose, outputs),
        )

    candidates = {(gemm.name, layout): candidate(gemm, layout) for gemm in gemms for layout in gemm.layouts}
    results = measure(candidates, problem.calls, ROUNDS)
    rows = [_row(problem, gemm, {layout: results[gemm.name, layout] for layout in gemm.layouts}) for gemm in gemms]
    for row in rows:
        outcome = f"{row['tflops']:.0f} TFLOP/s" if row["tflops"] else "absent"
        print("; ".join([f"{_label(row)}, {row['name']}: {outcome}", *map(brief, row["errors"])]), flush=True)
    return rows


def _row(problem: Problem, gemm: Gemm, results: dict[bool, Timing | str]) -> dict[str, Any]:
    names = {False: "[R, D]", True: "[D, R]"}
    timings = {names[layout]: result for layout, result in results.items() if isinstance(result, Timing)}
    fastest = min(timings, key=lambda layout: timings[layout].median, default=None)
    tflops = problem.flop / timings[fastest].median / 1e9 if fastest else None
    return {
        "problem": asdict(problem),
        "name": gemm.name,
        "dtype": str(gemm.dtype).removeprefix("torch."),
        "layout": fastest,
        "ms": {layout: asdict(timing) for layout, timing in timings.items()},
        "tflops": tflops,
        "share_of_dense_peak": tflops / PEAK[gemm.dtype] if tflops else None,
        "errors": [f"{names[layout]} {result}" for layout, result in results.items() if isinstance(result, str)],
    }


def against_libraries(rows: Sequence[dict[str, Any]], ours: str, libraries: Sequence[str]) -> dict[str, Any]:
    """Ours over the fastest of the libraries; no ratio if either is absent."""
    tflops = {row["name"]: row["tflops"] for row in rows}
    present = [name for name in libraries if tflops[name]]
    best = max(present, key=lambda name: tflops[name], default=None)
    ratio = tflops[ours] / tflops[best] if tflops[ours] and best else None
    return {"name": ours, "problem": rows[0]["problem"], "best_library": best, "ratio": ratio}


def errors(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [f"{_label(row)}, {row['name']}: {brief(error)}" for row in rows for error in row["errors"]]


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Errors of ours."""
    return errors([row for row in rows if row["name"].startswith(OURS)])


def _label(row: dict[str, Any]) -> str:
    problem = row["problem"]
    return f"{problem['name']} {problem['rows']} x {problem['columns']} x {problem['contraction']}"


def _absent(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"- {error}" for error in errors(rows)]
    return "\n\nDid not run:\n\n" + "\n".join(lines) if lines else ""


def _with_version(results: dict[str, Any], table: str) -> Report:
    """The report, and with which cuSPARSELt it compares."""
    version = cusparselt_version()
    return {**results, "cusparselt": version}, f"{table}\n\ncuSPARSELt {version}."


def cube_part() -> Report:
    """8192 cubed in both dtypes; bf16 is compared with libraries in bf16 only."""
    problem = Problem(name="cube", rows=CUBE, columns=CUBE, contraction=CUBE)
    own = [ours(E4M3, (False, True)), ours(BF16, (False, True))]
    rows = compare(problem, [*own, *FP8_LIBRARIES, CUBLAS, CUSPARSELT_BF16])
    bf16_libraries = [CUBLAS.name, CUSPARSELT_BF16.name]
    fp8 = against_libraries(rows, own[0].name, [*(library.name for library in FP8_LIBRARIES), *bf16_libraries])
    bf16 = against_libraries(rows, own[1].name, bf16_libraries)
    results = {"rows": rows, "ratios": [fp8, bf16], "failed": failures(rows)}
    return _with_version(results, cube_table(rows, [fp8, bf16]))


def cube_table(rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]]) -> str:
    ratio_of = {ratio["name"]: ratio["ratio"] for ratio in ratios}
    lines = []
    for row in rows:
        spread = row["ms"].get(row["layout"], {})
        times = [spread.get(key) for key in ("median", "low", "high")]
        ratio = ratio_of.get(row["name"])
        lines.append((row["name"], row["layout"], *times, row["tflops"], row["share_of_dense_peak"], ratio))
    headers = ("GEMM", "layout", "ms", "p10", "p90", "TFLOP/s", "of dense peak", "x best library")
    floats = ("", "", ".3f", ".3f", ".3f", ".0f", ".0%", ".2f")
    table = tabulate(lines, headers=headers, floatfmt=floats, missingval="-", tablefmt="github")
    return f"{table}\n\nTarget in fp8: {CUBE_TARGET:.0f} TFLOP/s.{_absent(rows)}"


def shapes_part() -> Report:
    """Both sparse products of each linear; cuSPARSELt in bf16 is left out, which cannot be the fastest."""
    rows: list[dict[str, Any]] = []
    ratios = []
    fprop_libraries = [*FP8_LIBRARIES, CUBLAS]
    # Layout and accumulation are those of the linear; wgrad is measured with fast accumulation as well.
    own_wgrads = [ours(E4M3, (False,), use_fast_accum=name == OURS) for name in WGRADS]
    products = (
        (fprop, [ours(E4M3, (True,))], fprop_libraries),
        (wgrad, own_wgrads, [*fprop_libraries, SCALED_MM_ACCURATE]),
    )
    for make, own, libraries in products:
        for n, k in SHAPES:
            compared = compare(make(n, k), [*own, *libraries])
            ratios += [against_libraries(compared, gemm.name, [library.name for library in libraries]) for gemm in own]
            rows += compared
            gc.collect()
            torch.cuda.empty_cache()
    results = {"rows": rows, "ratios": ratios, "summary": summary(ratios), "failed": failures(rows)}
    return _with_version(results, shapes_table(rows, ratios))


def summary(ratios: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean and minimum of the ratios, and how often each library was the best."""
    fprops = [ratio for ratio in ratios if ratio["problem"]["name"] == "fprop"]
    wgrads = {name: [ratio for ratio in ratios if ratio not in fprops and ratio["name"] == name] for name in WGRADS}
    groups = {
        "fprop": fprops,
        "wgrad, accurate": wgrads[OURS_ACCURATE],
        "wgrad, fast accumulation": wgrads[OURS],
        "both, as a linear runs them": fprops + wgrads[OURS_ACCURATE],
        "both, fast accumulation": fprops + wgrads[OURS],
    }
    lines = []
    for role, group in groups.items():
        chosen = [ratio for ratio in group if ratio["ratio"]]
        values = [ratio["ratio"] for ratio in chosen]
        lines.append(
            {
                "role": role,
                "shapes": len(values),
                "geometric_mean": statistics.geometric_mean(values) if values else None,
                "minimum": min(values, default=None),
                "best_libraries": dict(Counter(ratio["best_library"] for ratio in chosen)),
            }
        )
    return lines


def shapes_table(rows: Sequence[dict[str, Any]], ratios: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(row["name"] for row in rows))
    lines = []
    for ratio in ratios:
        problem = ratio["problem"]
        found = {row["name"]: row for row in rows if row["problem"] == problem}
        # fprop is not measured with accurate accumulation.
        tflops = [found[name]["tflops"] if name in found else None for name in names]
        k = problem["contraction" if problem["name"] == "fprop" else "columns"]
        share = found[ratio["name"]]["share_of_dense_peak"]
        ours = (ratio["name"].removeprefix(OURS) or "fast", share, ratio["best_library"], ratio["ratio"])
        lines.append((problem["name"], problem["rows"], k, *tflops, *ours))
    headers = ("GEMM", "N", "K", *names, "of which", "of dense peak", "best library", "x best library")
    floats = ("", "", "", *[".0f"] * len(names), "", ".0%", "", ".2f")
    table = tabulate(lines, headers=headers, floatfmt=floats, missingval="-", tablefmt="github")
    totals = []
    for line in summary(ratios):
        best = ", ".join(f"{name} {count}" for name, count in line["best_libraries"].items())
        totals.append((line["role"], line["shapes"], line["geometric_mean"], line["minimum"], best))
    headers = ("ratio to the best library", "shapes", "geometric mean", "minimum", "best library of how many")
    total = tabulate(totals, headers=headers, floatfmt=".3f", missingval="-", tablefmt="github")
    return f"TFLOP/s with {TOKENS} tokens:\n\n{table}\n\n{total}{_absent(rows)}"


def accuracy_rows(tokens: int, mean: float, device: torch.device) -> list[dict[str, Any]]:
    """Errors of wgrad ``[256, 256]`` over ``tokens`` of this mean and standard deviation 1: sparse, and dense fp8.

    The dense one as linears run it, and with the fast accumulation that they do without.

    ``same_payloads`` is the kernel's error against the fp64 product of its own operands, ``error`` that against the
    fp64 product of what they were made of, and ``reference_error`` that of a sum of the same operands in fp32.
    """
    grad, x = (torch.randn(tokens, ACCURACY_SIDE, device=device).add_(mean).to(BF16) for _ in range(2))
    exact = grad.double().t() @ x.double()
    scale, scale_inv = token_scale(token_amax(x))
    x_t = ops.transpose_tokens(cast(x, scale))
    bound = (token_amax(grad) * scale_inv).amax(dim=0, keepdim=True)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    rows = []
    kinds = (("2:4", E4M3_MAX / MVUE_GAIN, False), ("dense", E4M3_MAX, False), ("dense, fast", E4M3_MAX, True))
    for kind, limit, use_fast_accum in kinds:
        scales = scale_inv * (limit / bound)
        if kind == "2:4":
            _, values, metadata = ops.cast_mvue(grad, scales, scales, seed, 0, False, False, E4M3)
            operand = decompress24(values, metadata)
            product = ops.sparse_mm(values, metadata, x_t, bound / limit, None, torch.float32, False, use_fast_accum)
        else:
            _, operand = ops.cast_transpose(grad, scales, scales, E4M3)
            product = ops.scaled_mm(operand, x_t, bound / limit, torch.float32, use_fast_accum)
        same = (operand.double() @ x_t.double().t()) * (bound.double() / limit)
        reference = (operand.float() @ x_t.float().t()) * (bound / limit)
        error, reference_error = _relative_error(product, exact), _relative_error(reference, exact)
        rows.append(
            {
                "gemm": kind,
                "tokens": tokens,
                "mean": mean,
                "same_payloads": _relative_error(product, same),
                "error": error,
                "reference_error": reference_error,
                "ratio": error / reference_error,
            }
        )
    return rows


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """In the Frobenius norm."""
    return float((actual.double() - expected).norm() / expected.norm())


def accuracy_part() -> Report:
    """Errors of wgrad without and with a mean, which lets the sums grow with the number of tokens."""
    rows = [row for mean in (0.0, 0.5) for tokens in ACCURACY_TOKENS for row in accuracy_rows(tokens, mean, DEVICE)]
    rows.sort(key=lambda row: row["gemm"])
    return {"rows": rows, "target": ACCURACY_TARGET, "failed": []}, accuracy_table(rows)


def accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    headers = ("wgrad", "tokens", "mean", "error, same payloads", "error", "error of an fp32 sum", "ratio")
    floats = ("", "", ".1f", ".2e", ".4f", ".4f", ".3f")
    table = tabulate([list(row.values()) for row in rows], headers=headers, floatfmt=floats, tablefmt="github")
    return f"Relative errors in the Frobenius norm; target of the ratio: at most {ACCURACY_TARGET:g}.\n\n{table}"


def choice_part() -> Report:
    """Problems that the estimate of a tile's time was not fitted to: its choice against the fastest tile."""
    sm_count = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    rows = []
    shapes = [("fprop", n, tokens, k) for n, k, tokens in CHOICES] + [("wgrad", *choice) for choice in CHOICES]
    for role, *shape in shapes:
        problem = product(role, *shape)
        candidates = list(configs())
        times = tuning.measure(problem, candidates, DEVICE)
        stages = contraction_stages(problem.contraction, problem.dtype.itemsize)
        chosen = choose(problem.rows, problem.columns, stages, sm_count)
        rows.append(choice_row(role, shape, {tile_name(config): times[config] for config in times}, tile_name(chosen)))
    return {"rows": rows, "failed": []}, choice_table(rows)


def product(role: str, rows: int, columns: int, contraction: int) -> GemmProblem:
    """What a linear asks of the GEMM."""
    form = {"scaled": role == "fprop", "transpose": role == "fprop", "use_fast_accum": role == "fprop"}
    sizes = {"rows": rows, "columns": columns, "contraction": contraction}
    return GemmProblem(**sizes, dtype=E4M3, dense_dtype=E4M3, out_dtype=BF16, **form)


def tile_name(config: Config) -> str:
    return f"128 x {config.block_d}" + (" in clusters" if config.cluster > 1 else "")


def choice_row(role: str, shape: Sequence[int], microseconds: dict[str, float], chosen: str) -> dict[str, Any]:
    fastest = min(microseconds, key=lambda name: microseconds[name])
    loss = microseconds[chosen] / microseconds[fastest] - 1
    return {
        "role": role,
        "shape": shape,
        "microseconds": microseconds,
        "chosen": chosen,
        "fastest": fastest,
        "loss": loss,
    }


def choice_table(rows: Sequence[dict[str, Any]]) -> str:
    headers = ("GEMM", "R x D x C", "chosen", "fastest", "slower by")
    lines = [
        (row["role"], " x ".join(map(str, row["shape"])), row["chosen"], row["fastest"], row["loss"]) for row in rows
    ]
    table = tabulate(lines, headers=headers, floatfmt=".1%", tablefmt="github")
    losses = [row["loss"] for row in rows]
    within = sum(loss <= CHOICE_TARGET for loss in losses)
    mean = statistics.mean(losses)
    return (
        f"{table}\n\nSlower by {mean:.1%} on average; {within} of {len(rows)} within the target of {CHOICE_TARGET:.0%}."
    )


def main() -> None:
    parts = {
        "cube": cube_part, "shapes": shapes_part, "accuracy": accuracy_part, "choice": choice_part,
        "shared": partial(shared_part, DEVICE),
    }  # fmt: skip
    run_parts("bench_gemm", __doc__, parts)


if __name__ == "__main__":
    main()
