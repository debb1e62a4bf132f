"""Trains in one process or several as each of the given cases says; each rank writes what came of it.

torchrun --nproc-per-node 2 tests/distributed_steps.py cpu CASES_IN_JSON FOLDER
"""

import gc
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import sparse_compile
from conftest import SmallGPT
from sparse_compile.passes.agreement import agreed
from sparse_compile.weights import record

STEPS, SEQUENCES, TOKENS = 3, 4, 32


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def build(case: dict[str, Any], device: torch.device) -> nn.Module:
    """SmallGPT with or without attention, wrapped and compiled as the case says."""
    torch.manual_seed(0)
    width, recomputes = case.get("width", 64), case.get("checkpoint") == "outside"
    model = SmallGPT(width=width, depth=2, checkpoint=recomputes)
    if not case["attention"]:
        model.blocks = nn.ModuleList(FeedForward(width) for _ in model.blocks)
    model = model.to(device)
    executor = "inductor" if device.type == "cuda" else "eager"
    options = {"sste.executor": executor, "sste.when": "always", **case.get("options", {})}
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if case.get("bf16") else MixedPrecisionPolicy()
    sharding = {"mesh": mesh, "reshard_after_forward": case.get("reshard", True), "mp_policy": precision}
    for index, block in enumerate(model.blocks):
        if case.get("checkpoint") == "inside":
            block = model.blocks[index] = checkpoint_wrapper(block)
        if case["compile"] == "blocks":
            block.compile(backend="sste", options=options)
        if case["wrap"] == "fsdp2":
            fully_shard(block, **sharding)
    if case["wrap"] == "fsdp2":
        fully_shard(model, **sharding)
    if case["wrap"] == "ddp":
        model = DistributedDataParallel(model, bucket_cap_mb=2)
    if case["compile"] == "whole":
        model.compile(backend="sste", options=options)
    return model


def synchronised(model: nn.Module, last: bool, case: dict[str, Any]) -> Any:
    """What surrounds a microbatch: gradients are reduced in the last one alone."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or not case.get("keep_gathered", False))
    elif isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def plain(name: str) -> str:
    """A parameter's name without what wrappers add."""
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def local(model: nn.Module) -> list[torch.Tensor]:
    """The parameters, or this rank's shards of them."""
    return [getattr(parameter, "_local_tensor", parameter) for parameter in model.parameters()]


class RememberedOperands(record.OperandSet):
    """``alive`` has all that are: a walk over the heap in each microbatch would take as long as the training."""

    alive: ClassVar[WeakSet[record.OperandSet]] = WeakSet()

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.alive.add(self)


record.OperandSet = RememberedOperands


def operand_bytes() -> int:
    """What the operands of all weights take, but for their scales."""
    kept = [operand for found in RememberedOperands.alive for operand in found.operands[:-1]]
    return sum(operand.untyped_storage().size() for operand in kept)


def made() -> int:
    """How often operands were made so far."""
    return sum(found.refreshes for found in RememberedOperands.alive)


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-3)


def train(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Losses of the whole batch, what was kept and made on the way, and the betas in the end."""
    model = build(case, device)
    names = [plain(name) for name, _ in model.named_parameters()]
    optimizer = new_optimizer(model)
    torch.manual_seed(1 + dist.get_rank())  # of what backward samples
    result = run(model, optimizer, case, device)
    saved = optimizer.state_dict()["state"]
    result["saved"] = {names[i]: kept["sste_beta"] for i, kept in saved.items() if "sste_beta" in kept}
    result["betas"] = {plain(name): beta for name, beta in sparse_compile.beta(model).items()}
    report = sparse_compile.report()
    result["weights"] = [parameter.detach().double().sum().item() for parameter in local(model)]
    result["rewritten"] = [graph.rewritten for graph in report.graphs]
    result["sparse"] = sum(row.fprop == "2:4 fp8" for row in report.rows)
    return result


def run(
    model: nn.Module, optimizer: torch.optim.Optimizer, case: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Steps on one batch, of which each rank has its part: what each microbatch keeps, and each step makes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    microbatches = case.get("microbatches", 1)
    result: dict[str, Any] = {"losses": [], "after_forward": [], "after_backward": [], "made": []}
    batch = torch.randint(0, 128, (SEQUENCES, TOKENS + 1), generator=torch.Generator().manual_seed(1)).to(device)
    for _ in range(STEPS):
        before, total = made(), torch.zeros((), device=device)
        for index, part in enumerate(batch.chunk(microbatches)):
            ids = part.chunk(size)[rank]
            with synchronised(model, index == microbatches - 1, case):
                loss = model(ids[:, :-1], ids[:, 1:]) / microbatches
                result["after_forward"].append(operand_bytes())
                loss.backward()
                result["after_backward"].append(operand_bytes())
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        result["losses"].append(total.item() / size)
        result["made"].append(made() - before)
    return result


def resume(case: dict[str, Any], device: torch.device, folder: Path) -> dict[str, Any]:
    """Losses of a run after torch.distributed.checkpoint saved it, and of another one that loads what was saved."""
    model = build(case, device)
    optimizer = new_optimizer(model)
    run(model, optimizer, case, device)
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(saved, checkpoint_id=folder)
    torch.manual_seed(1 + dist.get_rank())
    uninterrupted = run(model, optimizer, case, device)["losses"]
    expected = sparse_compile.beta(model)

    model = build(case, device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # betas as they would be computed here are others
    optimizer = new_optimizer(model)
    ids = torch.zeros(SEQUENCES // dist.get_world_size(), TOKENS, dtype=torch.long, device=device)
    model(ids)  # so that beta is asked for; of a size that needs no other graph
    fresh = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(fresh, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=fresh["model"], optim_state_dict=fresh["optimizer"])
    torch.manual_seed(1 + dist.get_rank())
    resumed = run(model, optimizer, case, device)["losses"]
    return {
        "uninterrupted": uninterrupted, "resumed": resumed, "expected": expected, "betas": sparse_compile.beta(model)
    }  # fmt: skip


def main() -> None:
    kind, cases, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    # Rank 1 never asks the first question.
    questions = ["asked by one", "asked by all"][dist.get_rank() :]
    answers = {question: agreed(question, lambda: f"rank {dist.get_rank()}") for question in questions}
    results: dict[str, Any] = {"answers": answers}
    for name, case in cases.items():
        torch.compiler.reset()
        sparse_compile.report().graphs.clear()
        gc.collect()
        resumes = case.get("resume", False)
        results[name] = resume(case, device, folder / name) if resumes else train(case, device)
    (folder / f"rank{dist.get_rank()}").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
