"""Training steps on 1, 2, 4, 8 GPUs of one host: torch.compile in bf16 against backend "sste", with DDP and FSDP2.

    python benchmarks/bench_distributed.py                   as many as there are, by powers of two
    python benchmarks/bench_distributed.py --gpus 1 2

Scaling is weak: each GPU has the same number of tokens.  Llama-3.2-1B's shape, 8 layers, with both, 8 x 2048 tokens;
Llama-3-8B's, 4 layers, with FSDP2, 4 x 4096 tokens.  DDP holds bf16 parameters and is compiled as a whole, and so cut
into its buckets; FSDP2 holds fp32 shards, gathers them in bf16, and each layer is compiled.  Each number of GPUs is,
for each model and kind of parallelism, a job of torchrun, in which all candidates take turns.  Times are those of the
wall, from the moment that all processes are ready until the device is done.

What is checked: betas are the same on all processes; losses are those of one process that adds up the gradients of all
batches, within what reduction order and sampling change.  ``--tiny`` rehearses everything on two small layers, on CPUs
too, where no code is generated.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jinja2 import ChoiceLoader, DictLoader, Environment, PackageLoader
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from distributed_worker import BUSY, COMMUNICATION, COMMUNICATION_ALONE, CURVE, DDP, FSDP2, TINY, Row
from harness import RESULTS, provenance, write
from step_models import BF16, MODELS, SSTE, SSTE_BOTH, compilable

from sparse_compile.reporting.html_plot import Line, Plot

WORKER = Path(__file__).with_name("distributed_worker.py")
PARTS = (("llama-1b", DDP), ("llama-1b", FSDP2), ("llama-8b", FSDP2))
KINDS = (BF16, SSTE, SSTE_BOTH)
# Relative, of the first loss: what pruning and FP8 may change of random weights.
LOSS_TOLERANCE = 0.01
# Of what the dense loss falls by.  Pruned models learn random tokens by heart more slowly: on two GPUs their loss
# fell 0.38 times as much with bf16 parameters and 0.66 times with fp32.
LEAST_FALL = 0.2
# Relative, of the losses of as many processes as of one that has all their batches: of the first, which depends on the
# order of sums alone, and of all, of which those of the backend depend on what its gradients sample.
SAME_FIRST, SAME_CURVE = 2e-3, 0.03
CANDIDATE = ("model", "parallelism", "kind")


def parts_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    if args.tiny:
        return [(TINY, DDP), (TINY, FSDP2)]
    return [(name, parallelism) for name, parallelism in PARTS if name in args.models]


def run_jobs(args: argparse.Namespace, name: str, parallelism: str) -> list[Row]:
    """Of one part, one after another, each by torchrun."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in args.gpus:
            file = Path(folder) / f"{count}.json"
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(WORKER)]
            which = [str(file), name, parallelism, "--counts", *map(str, args.gpus), "--kinds", *args.kinds]
            print(f"{name}, {parallelism}: {count} processes", flush=True)
            done = subprocess.run([sys.executable, *launch, *which, "--rounds", str(args.rounds)], check=False)
            if not file.exists():
                raise SystemExit(f"FAILED: the job of {count} processes ended with status {done.returncode}")
            found = json.loads(file.read_text())
            for row in found:
                print(f"{title(row)}: {row['ms']['median']:.1f} ms", flush=True)
            rows += found
    return rows


def require_alike(losses: Mapping[str, Sequence[float]]) -> None:
    """End the measurement unless each curve begins as the first one does and falls, too."""
    (base, expected), *others = losses.items()
    for name, curve in others:
        # Not "difference > tolerance": NaN must fail.
        alike = abs(curve[0] - expected[0]) <= LOSS_TOLERANCE * expected[0]
        if not (alike and curve[0] - curve[-1] >= LEAST_FALL * (expected[0] - expected[-1]) > 0):
            raise SystemExit(f"FAILED: losses are {expected} in {base}, {curve} in {name}")


def require_those_of_one(rows: Sequence[Row]) -> None:
    """End the measurement unless processes train as one that has all their batches."""
    for row in rows:
        (one,) = [other for other in rows if same(row, other, *CANDIDATE) and "expected" in other]
        expected = one["expected"][str(row["processes"])]
        limits = [SAME_FIRST, *[SAME_CURVE] * (CURVE - 1)]
        # Not "difference > limit": NaN must fail.
        near = [abs(a - b) <= limit * b for a, b, limit in zip(row["losses"], expected, limits, strict=True)]
        if not all(near):
            raise SystemExit(f"FAILED: losses of {title(row)} are {row['losses']}, of one process {expected}")


def same(row: Row, other: Row, *fields: str) -> bool:
    return all(row[field] == other[field] for field in fields)


def title(row: Row) -> str:
    return f"{row['model']}, {row['parallelism']}, {row['kind']} on {row['processes']}"


def compare(rows: Sequence[Row]) -> None:
    """Add to each row its ratio to bf16's, and to its own on one process."""
    for row in rows:
        alike = [other for other in rows if same(row, other, "model", "parallelism")]
        (base,) = [other for other in alike if other["kind"] == BF16 and same(row, other, "processes")]
        (one,) = [other for other in alike if other["processes"] == 1 and same(row, other, "kind")]
        row["speedup"] = base["ms"]["median"] / row["ms"]["median"]
        row["efficiency"] = one["ms"]["median"] / row["ms"]["median"]
    for row in rows:
        (one,) = [other for other in rows if same(row, other, *CANDIDATE) and other["processes"] == 1]
        row["speedup_kept"] = row["speedup"] / one["speedup"]


def table(rows: Sequence[Row]) -> str:
    lines = [
        (
            row["model"],
            row["parallelism"],
            row["kind"],
            row["processes"],
            *(row["ms"][key] for key in ("median", "low", "high")),
            row["speedup"],
            row["speedup_kept"],
            row["efficiency"],
            row["peak_gib"],
            row["host_ms"],
            share(row, BUSY),
            share(row, COMMUNICATION),
            share(row, COMMUNICATION_ALONE),
            row["losses"][0],
            row["losses"][-1],
            f"{row['sparse']} of {row['linears']}" if row["linears"] else None,
        )
        for row in rows
    ]
    headers = (
        "", "", "step", "GPUs", "ms", "p10", "p90", f"x {BF16}", "of that at 1", "efficiency", "peak GiB",
        "host ms", BUSY, COMMUNICATION, "alone", "first loss", f"loss of step {CURVE}", "2:4 in compiled graphs",
    )  # fmt: skip
    floats = (
        "",
        "",
        "",
        "",
        ".1f",
        ".1f",
        ".1f",
        ".3f",
        ".3f",
        ".3f",
        ".1f",
        ".1f",
        ".1%",
        ".1%",
        ".1%",
        ".3f",
        ".3f",
        "",
    )
    return tabulate(lines, headers=headers, floatfmt=floats, missingval="-", tablefmt="github")


def share(row: Row, category: str) -> float:
    """Of a step, in which this runs; beside other things, where it does not say "alone"."""
    return float(row["profile"].get(category, 0.0)) / row["ms"]["median"]


_PAGE = """
{% extends "page.html" %}
{% from "plot.html" import figure %}
{% block title %}bench_distributed{% endblock %}
{% block body %}
<h1>Scaling efficiency over GPUs</h1>
{% call figure(plot, keys) %}
<p class="faint">Time of a step on one GPU, over that on as many; each has the same number of tokens. The horizontal
axis is logarithmic. {{ provenance }}</p>
{% endcall %}
{% endblock %}
"""


def plot(rows: Sequence[Row]) -> str:
    """A page of HTML."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in sorted(rows, key=lambda row: row["processes"]):
        curves.setdefault(title(row).rsplit(" on ", 1)[0], []).append((math.log2(row["processes"]), row["efficiency"]))
    colours = {name: f"hsl({360 * index // len(curves)} 65% 45%)" for index, name in enumerate(curves)}
    top = 1.1 * max(1.0, *(y for points in curves.values() for _, y in points))
    shown = Plot(
        lines=[Line(points=points, colour=colours[name], dots=True) for name, points in curves.items()],
        title=", ".join(f"{name}: {points[-1][1]:.3f}" for name, points in curves.items()),
        top=top,
        top_label=f"{top:.2f}",
        left_label="0, one GPU",
        right_label=f"{max(row['processes'] for row in rows)} GPUs",
    )
    environment = Environment(
        loader=ChoiceLoader([DictLoader({"plot_page": _PAGE}), PackageLoader("sparse_compile.reporting")]),
        autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    said = ", ".join(f"{key} {value}" for key, value in provenance().items())
    keys = [(colour, name) for name, colour in colours.items()]
    return environment.get_template("plot_page").render(plot=shown, keys=keys, provenance=said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = torch.cuda.device_count()
    powers = [2**power for power in range(there.bit_length())]
    parser.add_argument("--gpus", type=int, nargs="+", default=powers, help="of each job; one is always among them")
    parser.add_argument("--models", nargs="+", choices=sorted({name for name, _ in PARTS}), default=[*MODELS])
    parser.add_argument("--kinds", nargs="+", type=compilable, default=[*KINDS], help="bf16 is always among them")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="two small layers instead, also without GPUs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    args.gpus = sorted({1, *args.gpus})
    args.kinds = [BF16, *(kind for kind in args.kinds if kind != BF16)]
    if there == 0 and not args.tiny:
        parser.error("no GPU is available; without one only --tiny can run")
    if 0 < there < args.gpus[-1]:
        parser.error(f"there are {there} GPUs")
    rows: list[Row] = []
    for name, parallelism in parts_of(args):
        rows += run_jobs(args, name, parallelism)
        compare(rows)
        # Now and again: a program that is stopped loses one part, not all.
        write("bench_distributed", f"up to {args.gpus[-1]} processes", {"rows": rows}, table(rows), args.out)
    print(table(rows), flush=True)
    (args.out / "bench_distributed.html").write_text(plot(rows))
    require_those_of_one(rows)
    for row in rows:
        job = [other for other in rows if same(row, other, "model", "parallelism", "processes")]
        require_alike({title(other): other["losses"] for other in job if other is row or other["kind"] == BF16})


if __name__ == "__main__":
    main()
