"""A process of bench_distributed.py: candidates that train together with those of other processes, and their rows.

torchrun starts it; the first process writes the rows.
"""

import argparse
import gc
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_step import categorise
from harness import timing
from step_models import BF16, MODELS, StepModel, compilable, how_to_compile, llama

import sparse_compile

DDP, FSDP2 = "DDP", "FSDP2"
TINY = "tiny"  # two small layers, also without GPUs
CURVE = 10  # steps whose losses are looked at; the tokens are the same in each
COMMUNICATION, COMMUNICATION_ALONE, BUSY = "communication", "communication alone", "busy"
_STEPS = 3  # in a row, so that a step begins as it does in training: behind another of its own

Row = dict[str, Any]  # a candidate on so many processes


def model_of(name: str) -> StepModel:
    if name == TINY:
        return StepModel(make=lambda: llama(128, 256, layers=2, context=32), vocabulary=256, batch=(2, 32))
    return MODELS[name]


class Candidate:
    """A compiled network in training, on the batches of ``seeds``, whose gradients are added up."""

    def __init__(
        self, model: StepModel, parallelism: str, kind: str, device: torch.device, seeds: Sequence[int]
    ) -> None:
        torch.manual_seed(0)
        network = model.make().to(device).train()
        compiling = how_to_compile(kind)
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
        rows[kind]["host_ms"] = slowest([enqueued(candidate.step, device)], device)[0]
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
    dist.barrier()
    wait_for(device)
    start = time.perf_counter()
    for _ in range(_STEPS):
        step()
    wait_for(device)
    return (time.perf_counter() - start) * 1e3 / _STEPS


def enqueued(step: Callable[[], Tensor], device: torch.device) -> float:
    """Milliseconds after which the host has started all kernels of a step, and could go on to the next."""
    dist.barrier()
    wait_for(device)
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def profile(step: Callable[[], Tensor], device: torch.device) -> dict[str, float]:
    """Milliseconds of a step, by category, in which this process's device, or on a CPU what it calls, is busy.

    ``"communication alone"`` is what nothing else runs beside, ``"busy"`` all in which anything runs.
    """
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    step()
    dist.barrier()
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(_STEPS):
            step()
        wait_for(device)
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in profiler.events():
        if on_gpu and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        if not on_gpu and not re.match(r"aten::|c10d::|gloo:|sparse_compile::", event.name):
            continue
        category = COMMUNICATION if re.search(r"nccl|gloo|c10d", event.name) else categorise(event.name)
        spans.setdefault(category, []).append((event.time_range.start, event.time_range.end))
    others = [span for category, found in spans.items() if category != COMMUNICATION for span in found]
    found = {category: covered(times) / 1e3 / _STEPS for category, times in sorted(spans.items())}
    busy = covered([*others, *spans.get(COMMUNICATION, [])])
    sums = {COMMUNICATION_ALONE: busy - covered(others), BUSY: busy}
    return found | {name: total / 1e3 / _STEPS for name, total in sums.items()}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of what intervals cover together."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, help="file that the rows are written to")
    parser.add_argument("model", choices=[TINY, *MODELS])
    parser.add_argument("parallelism", choices=[DDP, FSDP2])
    parser.add_argument("--counts", type=int, nargs="+", help="of processes, whose losses one process tells")
    parser.add_argument("--kinds", nargs="+", type=compilable)
    parser.add_argument("--rounds", type=int)
    args = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rows = part(args.model, args.parallelism, args.kinds, args.counts, device, args.rounds)
    if dist.get_rank() == 0:
        args.rows.write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
