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
import gc
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jinja2 import ChoiceLoader, DictLoader, Environment, PackageLoader
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_step import categorise
from harness import RESULTS, provenance, timing, write
from step_models import BF16, COMPILE, MODELS, SSTE, SSTE_UP, StepModel, llama

import sparse_compile
from sparse_compile.reporting.html_plot import Line, Plot

DDP, FSDP2 = "DDP", "FSDP2"
PARTS = (("llama-1b", DDP), ("llama-1b", FSDP2), ("llama-8b", FSDP2))
TINY = "tiny"
KINDS = (BF16, SSTE, SSTE_UP)
STEPS = 3  # in a row, so that a step begins as it does in training: behind another of its own
CURVE = 10  # steps whose losses are looked at; the tokens are the same in each
# Relative, of the first loss: what pruning and FP8 may change of random weights.
LOSS_TOLERANCE = 0.01
# Of what the dense loss falls by.  Pruned models learn random tokens by heart more slowly: on two GPUs their loss
# fell 0.38 times as much with bf16 parameters and 0.66 times with fp32.
LEAST_FALL = 0.2
# Relative, of the losses of as many processes as of one that has all their batches: of the first, which depends on the
# order of sums alone, and of all, of which those of the backend depend on what its gradients sample.
SAME_FIRST, SAME_CURVE = 2e-3, 0.03
COMMUNICATION = "communication"
CANDIDATE = ("model", "parallelism", "kind")

Row = dict[str, Any]  # a candidate on so many processes


def model_of(name: str) -> StepModel:
    if name == TINY:
        return StepModel(make=lambda: llama(128, 256, layers=2, context=32), vocabulary=256, batch=(2, 32))
    return MODELS[name]


# On each process of a job.


class Candidate:
    """A compiled network in training, on the batches of ``seeds``, whose gradients are added up."""

    def __init__(
        self, model: StepModel, parallelism: str, kind: str, device: torch.device, seeds: Sequence[int]
    ) -> None:
        torch.manual_seed(0)
        network = model.make().to(device).train()
        compiling = dict(COMPILE[kind])
        if device.type == "cpu":
            options = {**compiling.get("options", {}), "sste.executor": "eager", "sste.when": "always"}
            compiling = {"backend": "aot_eager"} if kind == BF16 else {**compiling, "options": options}
        self.network: nn.Module
        if parallelism == DDP:
            devices = [device.index] if device.type == "cuda" else None
            self.network = DistributedDataParallel(network.to(torch.bfloat16), device_ids=devices)
            self.network.compile(**compiling)
        else:
            mesh = init_device_mesh(device.type, (dist.get_world_size(),))
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for layer in network.model.layers:
                layer.compile(**compiling)
                fully_shard(layer, mesh=mesh, mp_policy=policy)
            self.network = fully_shard(network, mesh=mesh, mp_policy=policy)
        self._first = [local(parameter).detach().clone().cpu() for parameter in self.network.parameters()]
        self._model, self._device = model, device
        self.begin(seeds)

    def begin(self, seeds: Sequence[int]) -> None:
        """Training, from the first weights, on the batches of ``seeds``."""
        with torch.no_grad():
            for parameter, first in zip(self.network.parameters(), self._first, strict=True):
                local(parameter).copy_(first)
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-5, fused=True)
        generators = [torch.Generator(self._device).manual_seed(seed) for seed in seeds]
        vocabulary, shape = self._model.vocabulary, self._model.batch
        self._batches = [
            torch.randint(vocabulary, shape, device=self._device, generator=generator) for generator in generators
        ]
        torch.manual_seed(1 + dist.get_rank())  # of what backward samples

    def step(self) -> Tensor:
        """The mean of all processes' losses."""
        total = torch.zeros((), device=self._batches[0].device)
        for ids in self._batches:
            loss = self.network(input_ids=ids, labels=ids).loss.float() / len(self._batches)
            loss.backward()
            total += loss.detach()
        self._optimizer.step()
        self._optimizer.zero_grad()
        dist.all_reduce(total)
        return total / dist.get_world_size()

    def losses(self) -> list[float]:
        return [float(self.step()) for _ in range(CURVE)]


def part(
    name: str, parallelism: str, kinds: Sequence[str], counts: Sequence[int], device: torch.device, rounds: int
) -> list[Row]:
    """Rows of the candidates of a model and one way to train it in parallel, which take turns."""
    model, rank, size = model_of(name), dist.get_rank(), dist.get_world_size()
    candidates: dict[str, Candidate] = {}
    rows: dict[str, Row] = {}
    for kind in kinds:
        fresh(device)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        compiled = len(sparse_compile.report().graphs)
        candidate = candidates[kind] = Candidate(model, parallelism, kind, device, [rank])
        row = rows[kind] = {"model": name, "parallelism": parallelism, "kind": kind, "processes": size}
        row["losses"] = candidate.losses()
        row["betas"] = len(require_the_same(sparse_compile.beta(candidate.network)))
        linears = [row for graph in sparse_compile.report().graphs[compiled:] for row in graph.rows]
        row |= {"sparse": sum(row.fprop == "2:4 fp8" for row in linears), "linears": len(linears), "peak_gib": None}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            candidate.step()
            torch.cuda.synchronize()
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            row["peak_gib"] = slowest([peak], device)[0]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, candidate in candidates.items():
            times[kind].append(milliseconds(candidate.step, device))
    for kind, candidate in candidates.items():
        rows[kind]["ms"] = asdict(timing(slowest(times[kind], device)))
        rows[kind]["profile"] = profile(candidate.step, device)
        if size == 1:
            # What the jobs of more processes must find.
            rows[kind]["expected"] = {}
            for count in counts:
                candidate.begin(range(count))
                rows[kind]["expected"][str(count)] = candidate.losses()
    return list(rows.values())


def local(parameter: Tensor) -> Tensor:
    """The parameter, or this process's shard of it."""
    shard: Tensor = getattr(parameter, "_local_tensor", parameter)
    return shard


def fresh(device: torch.device) -> None:
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def require_the_same(betas: dict[str, float]) -> dict[str, float]:
    """Raises: SystemExit: another process has other scales."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, betas)
    for rank, other in enumerate(found):
        if other != betas:
            raise SystemExit(f"FAILED: the betas of process {dist.get_rank()} are {betas}, those of {rank} {other}")
    return betas


def slowest(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of all processes' values, each."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def milliseconds(step: Callable[[], Tensor], device: torch.device) -> float:
    """Of one step, the mean of several."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    dist.barrier()
    wait()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    wait()
    return (time.perf_counter() - start) * 1e3 / STEPS


def profile(step: Callable[[], Tensor], device: torch.device) -> dict[str, float]:
    """Milliseconds of a step, by category, in which this process's device, or on a CPU what it calls, is busy.

    ``"communication alone"`` is what nothing else runs beside.
    """
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    step()
    dist.barrier()
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(STEPS):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in profiler.events():
        if on_gpu and event.device_type is not torch.autograd.DeviceType.CUDA:
            continue
        if not on_gpu and not re.match(r"aten::|c10d::|gloo:|sparse_compile::", event.name):
            continue
        category = COMMUNICATION if re.search(r"nccl|gloo|c10d", event.name) else categorise(event.name)
        spans.setdefault(category, []).append((event.time_range.start, event.time_range.end))
    others = [span for category, found in spans.items() if category != COMMUNICATION for span in found]
    found = {category: covered(times) / 1e3 / STEPS for category, times in sorted(spans.items())}
    alone = covered([*others, *spans.get(COMMUNICATION, [])]) - covered(others)
    return {**found, "communication alone": alone / 1e3 / STEPS}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what intervals cover together."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def work(args: argparse.Namespace) -> None:
    """A job's process; the first writes the rows."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rows = part(*args.part, args.kinds, args.gpus, device, args.rounds)
    if dist.get_rank() == 0:
        args.worker.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def parts_of(args: argparse.Namespace) -> list[tuple[str, str]]:
    if args.tiny:
        return [(TINY, DDP), (TINY, FSDP2)]
    return [(name, parallelism) for name, parallelism in PARTS if name in args.models]


# Of all jobs together.


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
            share(row, COMMUNICATION),
            share(row, "communication alone"),
            row["losses"][0],
            row["losses"][-1],
            f"{row['sparse']} of {row['linears']}" if row["linears"] else None,
        )
        for row in rows
    ]
    headers = (
        "", "", "step", "GPUs", "ms", "p10", "p90", f"x {BF16}", "of that at 1", "efficiency", "peak GiB",
        COMMUNICATION, "alone", "first loss", f"loss of step {CURVE}", "2:4 in compiled graphs",
    )  # fmt: skip
    floats = ("", "", "", "", ".1f", ".1f", ".1f", ".3f", ".3f", ".3f", ".1f", ".1%", ".1%", ".3f", ".3f", "")
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


def run_jobs(args: argparse.Namespace, name: str, parallelism: str) -> list[Row]:
    """Of one part, one after another, each by torchrun."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for count in args.gpus:
            file = Path(folder) / f"{count}.json"
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            which = ["--worker", str(file), "--part", name, parallelism]
            print(f"{name}, {parallelism}: {count} processes", flush=True)
            done = subprocess.run([sys.executable, *launch, __file__, *sys.argv[1:], *which])
            if not file.exists():
                raise SystemExit(f"FAILED: the job of {count} processes ended with status {done.returncode}")
            found = json.loads(file.read_text())
            for row in found:
                print(f"{title(row)}: {row['ms']['median']:.1f} ms", flush=True)
            rows += found
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    there = torch.cuda.device_count()
    powers = [2**power for power in range(there.bit_length())]
    parser.add_argument("--gpus", type=int, nargs="+", default=powers, help="of each job; one is always among them")
    parser.add_argument("--models", nargs="+", choices=sorted({name for name, _ in PARTS}), default=[*MODELS])
    parser.add_argument("--kinds", nargs="+", choices=[*COMPILE], default=[*KINDS], help="bf16 is always among them")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="two small layers instead, also without GPUs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.gpus = sorted({1, *args.gpus})
    args.kinds = [BF16, *(kind for kind in args.kinds if kind != BF16)]
    if there == 0 and not args.tiny:
        parser.error("no GPU is available; without one only --tiny can run")
    if 0 < there < args.gpus[-1]:
        parser.error(f"there are {there} GPUs")
    if args.worker is not None:
        work(args)
        return
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
