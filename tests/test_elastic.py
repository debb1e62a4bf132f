"""A rank is killed at any step, and the elastic agent of torchrun starts all anew: the run is the one that was not."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = 8
# Each rank has what it needs to go on: all of it with DDP, its shards with FSDP2.  A checkpoint counts when all have
# written theirs.
TRAIN = """
import json, os, random, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
import sparse_compile

class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)
    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

wrap, folder, steps, victim, last, moment, device = json.loads(sys.argv[1])
folder = Path(folder)
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    device = f"cuda:{rank}"
    torch.cuda.set_device(rank)
torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
model = nn.Sequential(FFN(), FFN()).to(device)
options = {"sste.executor": "eager", "sste.when": "always"}
if wrap == "fsdp2":
    for block in model:
        block.compile(backend="sste", options=options)
        fully_shard(block, mesh=dist.init_device_mesh(device.split(":")[0], (size,)))
    fully_shard(model)
else:
    model = nn.parallel.DistributedDataParallel(model)
    model.compile(backend="sste", options=options)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
losses, done = [], sorted(folder.glob("*.json"))
if done:
    model(torch.zeros(32, 64, device=device))  # so that beta is asked for
    fresh = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.load(fresh, checkpoint_id=done[-1].with_suffix(""))
    set_state_dict(model, optimizer, model_state_dict=fresh["model"], optim_state_dict=fresh["optimizer"])
    losses = json.loads(done[-1].read_text())
first = len(losses)
while len(losses) < steps:
    # What each rank draws depends on the step alone, as with a sampler that is set to an epoch.
    torch.manual_seed(1000 * len(losses) + rank)
    loss = (model(torch.randn(32, 64).to(device)) - 1).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    total = loss.detach().clone()
    dist.all_reduce(total)
    losses.append(total.item())
    name = folder / f"step{len(losses):04}"
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=name)
    if rank == 0:
        name.with_suffix(".new").write_text(json.dumps(losses))
        os.replace(name.with_suffix(".new"), name.with_suffix(".json"))
    dist.barrier()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and rank == victim and len(losses) == last:
        # As by SIGKILL, the kernel ends the process, wherever it is then.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, moment)
rewritten = sum(graph.rewritten for graph in sparse_compile.report().graphs)
Path(folder / f"rank{rank}").write_text(json.dumps([first, losses, sparse_compile.beta(model), rewritten]))
dist.barrier()
dist.destroy_process_group()
"""


def train(folder: Path, wrap: str, device: str, victim: int, last: int, moment: float) -> list[list[object]]:
    """The first step of each rank's last process, the losses, the betas, and how many linears were rewritten."""
    folder.mkdir()
    (folder / "train.py").write_text(TRAIN)
    given = json.dumps([wrap, ".", STEPS, victim, last, moment, device])
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    done = subprocess.run(
        [sys.executable, *launch, "train.py", given],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    files = [folder / f"rank{rank}" for rank in range(2)]
    assert all(file.exists() for file in files), done.stderr[-6000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.nightly
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpus2)])
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_killed_and_restarted_is_uninterrupted(tmp_path: Path, wrap: str, device: str) -> None:
    """To the last bit."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    victim, last, moment = chance.randrange(2), chance.randrange(1, STEPS - 2), 1e-6 + chance.random() * 0.02
    whole = train(tmp_path / "whole", wrap, device, -1, 0, 0.0)
    killed = train(tmp_path / "killed", wrap, device, victim, last, moment)
    for (first, losses, betas, rewritten), (again, its_losses, its_betas, its_rewritten) in zip(
        whole, killed, strict=True
    ):
        assert first == 0
        assert again >= last, "it was killed, and went on from its last checkpoint"
        assert len(losses) == STEPS
        assert losses[-1] < losses[0]
        assert rewritten == its_rewritten > 0
        assert its_losses == losses, f"seed {seed}"
        assert its_betas == betas
