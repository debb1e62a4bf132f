"""DistributedDataParallel on two processes: the backend sees a graph for each bucket, with fake tensors first."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
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
model = nn.parallel.DistributedDataParallel(nn.Sequential(*(Block() for _ in range(3))), bucket_cap_mb=2)
compiled = torch.compile(model, backend="sste", options={"sste.executor": "eager"})
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


def test_two_processes_stay_equal(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    root = Path(__file__).parents[1]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    # Not the exit status: the process group's threads may abort while they are torn down, when all is done.
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0", "rank1"], result.stderr[-4000:]
