"""What torch.compiler.save_cache_artifacts takes to another machine; kernels: ``test_launch.py``."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch.compiler._cache import CacheArtifactManager

import warm
from sparse_compile.kernels.timing import gpu_times
from sparse_compile.launcher import autoload


def caches(tmp_path: Path, machine: str) -> dict[str, str]:
    """Variables of a machine whose caches are empty."""
    folders = {"SPARSE_COMPILE_CACHE_DIR": "ours", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    return {name: str(tmp_path / machine / folder) for name, folder in folders.items()}


@pytest.mark.parametrize("found", [False, True], ids=["measured", "found on disk"])
def test_measured_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, found: bool) -> None:
    def shape_on(machine: str) -> Path:
        for name, folder in caches(tmp_path, machine).items():
            monkeypatch.setenv(name, folder)
        return gpu_times.root() / "device" / "linear" / "shape.json"

    with CacheArtifactManager.with_fresh_cache():
        path = shape_on("first")
        gpu_times.keep(path, {"copy": 3.0})
        gpu_times.keep(path, {"copy": 3.0, "cast": 4.0})
        if found:
            CacheArtifactManager.clear()
            assert gpu_times.kept(path, dict[str, float]) == {"copy": 3.0, "cast": 4.0}
        artifacts, _ = torch.compiler.save_cache_artifacts()
        path = shape_on("second")
        assert gpu_times.kept(path, dict[str, float]) is None
        torch.compiler.load_cache_artifacts(artifacts)
        assert gpu_times.kept(path, dict[str, float]) == {"copy": 3.0, "cast": 4.0}


def test_another_pytorch_is_imported_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(name: str) -> None:
        raise AttributeError(f"{name} is not what it was")

    monkeypatch.setattr(autoload, "import_module", fails)
    autoload.register_cache_artifacts()
    said = capsys.readouterr().err
    assert said.count("sparse_compile: torch.compiler.save_cache_artifacts will save nothing of it: Attri") == 2


TRAIN = """
import json, sys
from pathlib import Path
import torch
from torch import nn

file = Path("artifacts")
if file.exists():
    torch.compiler.load_cache_artifacts(file.read_bytes())

torch.manual_seed(0)
model = nn.Linear(64, 64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
step = torch.compile(model, backend="sste", options={"sste.when": "always", "sste.targets": "all"})
for _ in range(3):
    loss = step(torch.randn(16, 64)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
from torch._dynamo.utils import counters
print(json.dumps([loss.item(), counters["aot_autograd"]["autograd_cache_hit"]]))
if not file.exists():
    file.write_bytes(torch.compiler.save_cache_artifacts()[0])
"""


@pytest.mark.nightly
def test_another_machine_compiles_nothing(tmp_path: Path) -> None:
    machines = [caches(tmp_path, machine) for machine in ("first", "second")]
    runs = [warm.python("-c", TRAIN, cwd=tmp_path, env={**os.environ, **machine}, check=True) for machine in machines]
    (first, compiled), (second, found) = (json.loads(run.stdout.splitlines()[-1]) for run in runs)
    assert (compiled, found) == (0, 1)
    assert second == first
