"""Training steps on several GPUs: torch.compile in bf16 against backend "sste", with DDP and with FSDP2.

    torchrun --nproc-per-node 2 benchmarks/bench_distributed.py

Llama-3.2-1B's shape, 8 layers, 8 x 2048 tokens on each GPU.  DDP holds bf16 parameters and is compiled as a whole,
and so cut into its buckets; FSDP2 holds fp32 shards, gathers them in bf16, and each layer is compiled.  All
candidates of one kind of parallelism take turns in one job.  Times are those of the wall, from the moment that all
processes are ready until the device is done.  ``--tiny`` rehearses everything on two small layers, on CPUs too, where
no code is generated.
"""

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import RESULTS, Report, provenance, timing, write
from step_models import BF16, COMPILE, MODELS, SSTE, StepModel, llama, steps_of

import sparse_compile

DDP, FSDP2 = "DDP", "FSDP2"
TINY = StepModel(make=lambda: llama(128, 256, layers=2, context=32), vocabulary=256, batch=(2, 32))
STEPS = 3  # in a row, so that a step begins as it does in training: behind another of its own
CURVE = 10  # steps whose losses are looked at; the tokens are the same in each
# Relative, of the first loss: what pruning and FP8 may change of random weights.
LOSS_TOLERANCE = 0.01
# Of what the dense loss falls by.  Pruned models learn random tokens by heart more slowly: on two GPUs their loss
# fell 0.38 times as much with bf16 parameters and 0.66 times with fp32.
LEAST_FALL = 0.2


def candidate(model: StepModel, parallelism: str, kind: str, device: torch.device) -> Callable[[], Tensor]:
    """A step that returns the mean of all processes' losses."""
    torch.manual_seed(0)
    network = model.make().to(device).train()
    compiling = dict(COMPILE.get(kind, COMPILE[BF16]))
    if device.type == "cpu":
        compiling = (
            {"backend": "aot_eager"}
            if kind == BF16
            else {**compiling, "options": {"sste.executor": "eager", "sste.when": "always"}}
        )
    compiled: nn.Module
    if parallelism == DDP:
        devices = [device.index] if device.type == "cuda" else None
        compiled = DistributedDataParallel(network.to(torch.bfloat16), device_ids=devices)
        compiled.compile(**compiling)
    else:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in network.model.layers:
            layer.compile(**compiling)
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        compiled = fully_shard(network, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(compiled.parameters(), lr=1e-5, fused=True)
    step = steps_of(model, compiled, optimizer, device, seed=dist.get_rank())

    def mean_of_losses() -> Tensor:
        loss = step().float()
        dist.all_reduce(loss)
        return loss / dist.get_world_size()

    return mean_of_losses


def facts(step: Callable[[], Tensor], device: torch.device) -> dict[str, Any]:
    """Losses of the first steps, and what a step allocates at most, on the process that allocates most."""
    losses = [float(step()) for _ in range(CURVE)]
    if device.type == "cpu":
        return {"losses": losses, "peak_gib": None}
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {"losses": losses, "peak_gib": slowest([torch.cuda.max_memory_allocated() / 2**30], device)[0]}


def require_alike(losses: Mapping[str, Sequence[float]]) -> None:
    """End the measurement unless each curve begins as the first one does and falls, too."""
    (base, expected), *others = losses.items()
    for name, curve in others:
        # Not "difference > tolerance": NaN must fail.
        alike = abs(curve[0] - expected[0]) <= LOSS_TOLERANCE * expected[0]
        if not (alike and curve[0] - curve[-1] >= LEAST_FALL * (expected[0] - expected[-1]) > 0):
            raise SystemExit(f"FAILED: losses are {expected} in {base}, {curve} in {name}")


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


def part(model: StepModel, parallelism: str, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Rows of the candidates of one way to train in parallel, which take turns."""
    steps, found, before = {}, {}, {}
    for kind in (BF16, SSTE):
        gc.collect()
        before[kind] = torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        compiled = len(sparse_compile.report().graphs)
        steps[kind] = candidate(model, parallelism, kind, device)
        found[kind] = facts(steps[kind], device)
        if found[kind]["peak_gib"] is not None:
            found[kind]["peak_gib"] -= before[kind]
        rows = [row for graph in sparse_compile.report().graphs[compiled:] for row in graph.rows]
        found[kind]["sparse"] = sum(row.fprop == "2:4 fp8" for row in rows)
        found[kind]["linears"] = len(rows)
    require_alike({f"{parallelism}, {kind}": fact["losses"] for kind, fact in found.items()})
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(rounds):
        for kind, step in steps.items():
            times[kind].append(milliseconds(step, device))
    times = {kind: slowest(values, device) for kind, values in times.items()}
    base = statistics.median(times[BF16])
    return [
        {
            "parallelism": parallelism,
            "kind": kind,
            "ms": asdict(timing(values)),
            "speedup": base / statistics.median(values),
            **found[kind],
        }
        for kind, values in times.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        (
            row["parallelism"],
            row["kind"],
            *(row["ms"][key] for key in ("median", "low", "high")),
            row["speedup"],
            row["peak_gib"],
            row["losses"][0],
            row["losses"][-1],
            f"{row['sparse']} of {row['linears']}" if row["linears"] else None,
        )
        for row in rows
    ]
    last = f"loss of step {CURVE}"
    headers = ("", "step", "ms", "p10", "p90", f"x {BF16}", "peak GiB", "first loss", last, "2:4 in compiled graphs")
    floats = ("", "", ".1f", ".1f", ".1f", ".3f", ".1f", ".3f", ".3f", "")
    return tabulate(lines, headers=headers, floatfmt=floats, missingval="-", tablefmt="github")


def measure(model: StepModel, device: torch.device, rounds: int) -> Report:
    rows = []
    for parallelism in (DDP, FSDP2):
        rows += part(model, parallelism, device, rounds)
        if dist.get_rank() == 0:
            print(table(rows), flush=True)
        torch.compiler.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"processes": dist.get_world_size(), "rows": rows}, table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="two small layers instead, also without GPUs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif not args.tiny:
        parser.error("no GPU is available; without one only --tiny can run")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    results, text = measure(TINY if args.tiny else MODELS["llama-1b"], device, args.rounds)
    if dist.get_rank() == 0:
        print(", ".join(f"{key} {value}" for key, value in provenance().items()), flush=True)
        write("bench_distributed", f"{dist.get_world_size()} processes", results, text, args.out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
