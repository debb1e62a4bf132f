"""The snippets of docs/ run as they stand there."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse_compile
import warm
from sparse_compile import backend
from sparse_compile.recipe import RECIPES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WAYS = (DOCS / "integrations.md").read_text()
OUT = (DOCS / "checkpoints.md").read_text().partition("## Export: a 2:4 model")[2]
SNIPPETS = {
    library: snippet
    for snippet in re.findall(r"```python\n(.*?)```", WAYS, re.DOTALL)
    for library in ("transformers", "accelerate", "lightning")
    if library in snippet
}
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", WAYS, re.DOTALL) for line in block.splitlines()]
SCRIPT = """
import torch
from torch import nn
from sparse_compile import backend
backend.compile_graph = lambda graph, *args, **named: graph.forward  # nothing waits for a compiler
backend.leave_without_kernels = lambda plans: (plans, [])  # as on a GPU that has them
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
step = torch.compile(model) if {compiles} else model
step(torch.ones(8, 64)).sum().backward()
"""


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default rewrites nothing where there are no kernels; and nothing waits for a compiler."""
    monkeypatch.setattr(backend, "compile_graph", lambda graph, *_, **__: graph.forward)
    monkeypatch.setattr(backend, "leave_without_kernels", lambda plans: (plans, []))


def test_all_are_found() -> None:
    assert list(SNIPPETS) == ["transformers", "accelerate", "lightning"]
    assert len(COMMANDS) == 5


@pytest.mark.by_day(1)
@pytest.mark.parametrize("command", [command for command in COMMANDS if "-m sparse_compile" in command])
def test_commands(tmp_path: Path, command: str) -> None:
    """Those with SPARSE_COMPILE need an installation: ``test_packaging.py``."""
    (tmp_path / "package").mkdir()
    for script in ("train.py", "package/train.py"):
        (tmp_path / script).write_text(SCRIPT.replace("{compiles}", str("--auto" not in command)))
    python, *arguments = shlex.split(command)
    assert python == "python"
    done = warm.python(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    if "--report" in command:
        assert "2 of 2 linears rewritten" in (tmp_path / "report.html").read_text()
    else:
        assert "s-ste" in done.stderr


@pytest.mark.parametrize("library", SNIPPETS)
def test_snippets(ffn: type[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    module = pytest.importorskip(library)
    monkeypatch.setattr(torch, "compile", torch.compile)  # Lightning wraps it
    as_on_a_gpu(monkeypatch)
    monkeypatch.chdir(tmp_path)

    class WithLoss(ffn):  # type: ignore[valid-type, misc]
        def forward(self, x: torch.Tensor) -> Any:
            loss = super().forward(x).square().mean()
            return {"loss": loss} if library == "transformers" else loss

    model: Any = WithLoss()
    x = torch.randn(4, 16, 64)
    names: dict[str, Any] = {library: module, "model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    if library == "transformers":
        names["examples"] = [{"x": tokens} for tokens in x]
        names["arguments"] = module.TrainingArguments(
            output_dir="out", max_steps=1, use_cpu=True, report_to=[], save_strategy="no", remove_unused_columns=False
        )
    elif library == "accelerate":
        module.state.AcceleratorState._reset_state(True)
    else:

        class Module(module.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: torch.Tensor, number: int) -> torch.Tensor:
                return self.model(batch)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return torch.optim.AdamW(self.parameters())

        names |= {"module": Module(), "batches": torch.utils.data.DataLoader(list(x), batch_size=4)}
    exec(SNIPPETS[library], names)
    if library == "accelerate":
        names["accelerator"].backward(names["model"](x))
    rewritten = {row.module for row in sparse_compile.report().rows if row.decision != "dense"}
    assert rewritten == {"up", "down"}


@pytest.mark.nightly  # the example that exports a model runs by day
def test_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the part that needs a GPU: ``test_compress.py``."""
    transformers = pytest.importorskip("transformers")
    save, compress, infer = re.findall(r"```python\n(.*?)```", OUT, re.DOTALL)
    assert "to_sparse" in compress
    (command,) = re.findall(r"```sh\n(.*?)```", OUT, re.DOTALL)
    as_on_a_gpu(monkeypatch)
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.compile(backend="sste")
    ids = torch.randint(0, 128, (4, 32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    names: dict[str, Any] = {
        "model": model, "ids": ids, "sparse_compile": sparse_compile, "transformers": transformers, "torch": torch
    }  # fmt: skip
    exec(save, names)
    assert len(names["names"]) == 3
    python, *arguments = shlex.split(command)
    assert python == "python"
    done = warm.python(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of 3 weights: 3 2:4" in done.stdout
    sparse_compile.report().graphs.clear()
    exec(infer, names)
    with torch.no_grad():
        expected = model(ids).logits
    assert (names["logits"] - expected).norm() < 0.05 * expected.norm()
    rewritten = {row.module for row in sparse_compile.report().graphs[0].rows if row.decision != "dense"}
    assert {name.rpartition(".")[2] for name in rewritten} == {"gate_proj", "up_proj", "down_proj"}


def test_recipes_are_those_of_the_code() -> None:
    section = (DOCS / "recipes.md").read_text().partition("\n## All recipes")[2].partition("\n## ")[0]
    (recipes,) = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    first_cells = [line.split("|")[1] for line in recipes.splitlines()[2:]]
    assert sorted(re.findall(r'`"(.*?)"`', " ".join(first_cells))) == sorted(RECIPES)


def test_a_recipe_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    as_on_a_gpu(monkeypatch)
    own = (DOCS / "recipes.md").read_text().partition("## A recipe of your own")[2]
    (snippet,) = re.findall(r"```python\n(.*?)```", own, re.DOTALL)
    names: dict[str, Any] = {"torch": torch}
    names["model"] = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    exec(snippet, names)
    names["model"](torch.randn(8, 64)).sum().backward()
    assert {row.decision for row in sparse_compile.report().rows} == {"dense-wgrad (2:4 fp8, fp8, fp8)"}
