"""Trains experts alone and in shards, in two processes; each rank writes whether both are the same.

torchrun --nproc-per-node 2 tests/distributed_experts.py
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import sparse_compile
from experts_training import EXACT, Model, train

CASES: dict[str, dict[str, Any]] = {
    "plain": EXACT,
    "the end of a schedule": {**EXACT, "sste.total_steps": 4, "sste.tail": 2},
    "masked decay": {**EXACT, "sste.recipe": "sr-ste", "sste.decay": 0.1},
}


def run(wrap: str, options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    """Losses, weights, scales."""
    torch._dynamo.reset()
    model = Model()
    call: Any = model
    model.compile(backend="sste", options=options)
    if wrap == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    elif wrap == "ddp":
        call = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = train(call, optimizer)
    weights = {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
        for name, parameter in model.named_parameters()
    }
    return losses, weights, sparse_compile.beta(model)


def main() -> None:
    dist.init_process_group("gloo")
    results = {}
    for name, options in CASES.items():
        losses, weights, betas = run("none", options)
        for wrap in ("fsdp2", "ddp"):
            others = run(wrap, options)
            same = all(torch.equal(weight, others[1][key]) for key, weight in weights.items())
            results[f"{name}, {wrap}"] = [losses == others[0], same, betas == others[2]]
    Path(f"rank{os.environ['RANK']}").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
