"""A run that is killed at any moment and started again is the run that was not."""

import json
import os
import random
import signal
from pathlib import Path

import pytest

import warm

ROOT = Path(__file__).parents[1]
STEPS = 24
# Saves everything after every step, in one file that is replaced at once, and goes on from it when started again.
TRAIN = """
import json, os, signal, sys
from pathlib import Path
import torch
import sparse_compile
from torch import nn

class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)
    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

file, steps, device, last, moment = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(float, sys.argv[4:])
torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
model = FFN().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
# Measured times, which differ between runs, would choose other arithmetic.
step = torch.compile(model, backend="sste", options={"sste.executor": "eager", "sste.when": "always"})
losses = []
if file.exists():
    saved = torch.load(file)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["generator"])
    torch.cuda.set_rng_state_all(saved["generators"])
    losses = saved["losses"]
while len(losses) < steps:
    loss = (step(torch.randn(32, 64).to(device)) - 1).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": torch.get_rng_state(),
         "generators": torch.cuda.get_rng_state_all(), "losses": losses},
        file.with_suffix(".new"),
    )
    os.replace(file.with_suffix(".new"), file)
    print(len(losses), flush=True)
    if len(losses) == last:
        # As by SIGKILL, the kernel ends the process, wherever it is then.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, moment)
print(json.dumps(losses))
"""


def start(folder: Path, file: str, device: str, last: int = 0, moment: float = 0.0) -> tuple[int, str, str]:
    """Exit status, output and errors; the run ends ``moment`` seconds after step ``last``, if there is one."""
    (folder / "train.py").write_text(TRAIN)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # The last is what cuBLAS needs to be deterministic.
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = warm.python("train.py", file, STEPS, device, last, moment, cwd=folder, env=environment)
    return done.returncode, done.stdout, done.stderr


def finish(status: int, output: str, errors: str) -> tuple[int, list[float]]:
    """The first step of the run, and all losses."""
    assert status == 0, errors
    assert "2 of 2 linears rewritten" in errors
    assert "beta" not in errors, "a warning that it is missing"
    first, *_, losses = output.splitlines()
    return int(first), json.loads(losses)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.nightly), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_killed_and_resumed_is_uninterrupted(tmp_path: Path, device: str) -> None:
    """To the last bit, on a GPU with deterministic algorithms."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    last = chance.randrange(1, STEPS - 2)
    moment = 1e-6 + chance.random() * 0.02  # anywhere in a step, or in saving
    status, _, errors = start(tmp_path, "killed.pt", device, last, moment)
    assert status == -signal.SIGALRM, f"seed {seed}: {errors}"
    first, losses = finish(*start(tmp_path, "whole.pt", device))
    assert first == 1
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    first, resumed = finish(*start(tmp_path, "killed.pt", device))
    assert first > last
    assert resumed == losses, f"seed {seed}"
