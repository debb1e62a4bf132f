"""Two processes follow a schedule, and decay: in the buckets of DistributedDataParallel, and in FSDP2's shards."""

import json
from pathlib import Path

import pytest
import torch

import warm

BUCKETS = """
import pathlib, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
import sparse_compile

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(256), nn.Linear(256, 1024), nn.Linear(1024, 256)
    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(*(Block() for _ in range(2))), bucket_cap_mb=2)
compiled = torch.compile(model, backend="sste", options={"sste.executor": "eager", "sste.when": "always"})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
torch.manual_seed(1 + dist.get_rank())
losses = []
for _ in range(4):
    loss = compiled(torch.randn(32, 256)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
gathered = [torch.empty_like(weights) for _ in range(2)]
dist.all_gather(gathered, weights)
assert torch.equal(*gathered)
graphs = sparse_compile.report().graphs
assert len(graphs) > 1, "the model was meant to be cut into buckets"
assert all(graph.rewritten == len(graph.rows) > 0 for graph in graphs), str(sparse_compile.report())
pathlib.Path(f"rank{dist.get_rank()}").touch()
dist.barrier()
dist.destroy_process_group()
"""


# On one process or several, each with its part of the same batches.
SHARDED = """
import json, pathlib, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
import sparse_compile
from conftest import FFN

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh("cpu", (size,))
torch.manual_seed(0)
model = torch.nn.Sequential(FFN(), FFN())
names = [name for name, _ in model.named_parameters()]
options = {"sste.executor": "eager", "sste.when": "always", **json.loads(sys.argv[1])}
for block in model:
    block.compile(backend="sste", options=options)
    if size > 1:
        fully_shard(block, mesh=mesh)
if size > 1:
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(1)
losses = []
for _ in range(4):
    x = torch.rand(4, 16, 64, generator=generator).chunk(size)[rank]
    loss = (model(x.requires_grad_()) - 1).square().mean()  # as the second block's: one graph serves both
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    losses.append(total.item() / size)
saved = {names[i]: kept["sste_beta"] for i, kept in optimizer.state_dict()["state"].items() if "sste_beta" in kept}
kept = optimizer.state_dict()["state"]
steps = {names[i]: kept[i]["sste_steps"] for i in kept if "sste_steps" in kept[i]}
up = model[0].up.weight.detach()
up = up.full_tensor() if hasattr(up, "full_tensor") else up
result = {"losses": losses, "betas": sparse_compile.beta(model), "saved": saved, "steps": steps, "up": up.tolist()}
pathlib.Path(f"rank{rank}").write_text(json.dumps(result))
assert all(graph.rewritten for graph in sparse_compile.report().graphs), str(sparse_compile.report())
dist.barrier()
dist.destroy_process_group()
"""


def run(tmp_path, processes, script, *arguments):
    (tmp_path / "train.py").write_text(script)
    paths = f"{Path(__file__).parents[1]}:{Path(__file__).parent}"
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return warm.group(processes, "train.py", *arguments, cwd=tmp_path, env=environment)


def one_and_two(tmp_path, options):
    """What one process results in, and what each of two does."""
    results = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        done = run(folder, processes, SHARDED, json.dumps(options))
        files = [folder / f"rank{rank}" for rank in range(processes)]
        assert all(file.exists() for file in files), "\n".join(process.stderr[-4000:] for process in done)
        results[processes] = [json.loads(file.read_text()) for file in files]
    return results[1][0], results[2]


@pytest.mark.nightly
def test_fsdp2_shards_decay_and_follow_a_schedule(tmp_path):
    """The last step is dense, from weights of which half was dropped; before, the decay outweighs the gradients."""
    options = {"sste.recipe": "sr-ste", "sste.decay": 1.0, "sste.warmup": 1, "sste.tail": 1, "sste.total_steps": 4}
    one, two = one_and_two(tmp_path, options | {"sste.mvue": "off"})
    assert one["steps"] == dict.fromkeys([f"{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")], 4)
    up = torch.tensor(one["up"])
    assert 0.45 < float((up.abs() < 2e-3).double().mean()) < 0.55, "one step of 1e-3 away from zero"
    for result in two:
        assert result["steps"] == one["steps"]
        assert result["losses"] == pytest.approx(one["losses"], abs=0.01)
        # Adam's first steps have the gradient's sign, which rounding may turn where it is next to nothing.
        close = (torch.tensor(result["up"]) - up).abs() < 1e-4
        assert float(close.double().mean()) > 0.9


@pytest.mark.nightly
def test_fsdp2_shards_what_is_pruned_both_ways(tmp_path):
    """Nothing is searched for or kept, so gathered weights are as good; in the tail each process writes its tiles."""
    options = {"sste.recipe": "s-ste-transposable", "sste.mvue": "off", "sste.tail": 1, "sste.total_steps": 4}
    one, two = one_and_two(tmp_path, options)
    for result in two:
        assert result["losses"] == pytest.approx(one["losses"], abs=0.01)
        close = (torch.tensor(result["up"]) - torch.tensor(one["up"])).abs() < 1e-4
        assert float(close.double().mean()) > 0.9


@pytest.mark.nightly
def test_buckets_of_ddp_follow_a_schedule(tmp_path):
    schedule = '"sste.recipe": "ste", "sste.targets": "all", "sste.warmup": 1, "sste.tail": 1, "sste.total_steps": 3'
    script = BUCKETS.replace('"sste.executor": "eager"', f'"sste.executor": "eager", "sste.when": "always", {schedule}')
    check = """
calls = {kind: sum(g.calls for g in graphs if g.rows[0].decision.startswith(kind)) for kind in ("fp8", "ste")}
assert calls["fp8"] == 3 * calls["ste"] > 0, calls
"""
    result = run(tmp_path, 2, script.replace("pathlib.Path(", f"{check}pathlib.Path("))
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"], result.stderr[-4000:]
