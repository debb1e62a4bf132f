"""Fixtures of all tests: a small transformer, a clean slate, the marks of tests that need a GPU or a night."""

import gc
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compile
import warm
import zoo
from sparse_compile.kernels import ops
from sparse_compile.measuring import weight_health

SLOWEST = {
    "test_asked_at_each_call.py", "test_backend.py", "test_distributed.py", "test_distributed_schedule.py",
    "test_examples.py", "test_interpreted_kernels.py", "test_kill.py", "test_packaging.py", "test_state_machine.py",
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the tests marked nightly, too")
    parser.addoption("--zoo-results", metavar="FILE", help="write what a nightly run found of the zoo, as JSON")


@pytest.hookimpl(tryfirst=True)  # -m selects what is marked here, too
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_cases_as_nightly(items)
    if not config.getoption("--nightly"):
        nightly = [item for item in items if item.get_closest_marker("nightly")]
        items[:] = [item for item in items if item not in nightly]
        config.hook.pytest_deselected(items=nightly)
    # Files of long tests first, so that workers end together.
    items.sort(key=lambda item: item.path.name not in SLOWEST)
    devices = torch.cuda.device_count()
    skip = pytest.mark.skip(reason="needs an NVIDIA Hopper GPU; torch.cuda.is_available() is False")
    skip_two = pytest.mark.skip(reason=f"needs two NVIDIA Hopper GPUs; torch.cuda.device_count() is {devices}")
    for item in items:
        # Where there are as many GPUs as it needs, a test runs or fails, it is never skipped.
        if item.get_closest_marker("gpus2"):
            if devices < 2:
                item.add_marker(skip_two)
        elif item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(skip)


def mark_cases_as_nightly(items: list[pytest.Item]) -> None:
    """Of tests that are marked ``by_day``: all cases but so many, which lie as far apart as they can."""
    cases = defaultdict(list)
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if "by_day" in marks and not marks & {"gpu", "gpus2", "nightly"}:
            cases[item.nodeid.partition("[")[0]].append(item)
    for alike in cases.values():
        mark = alike[0].get_closest_marker("by_day")
        assert mark is not None
        (count,) = mark.args
        by_day = {len(alike) * (index + 1) // count - 1 for index in range(count)}
        for index, item in enumerate(alike):
            if index not in by_day:
                item.add_marker(pytest.mark.nightly)


def gpus_of(worker: str, devices: int) -> str | None:
    """What a worker of pytest-xdist sees of several GPUs: all, each worker with another as the first."""
    if not worker.startswith("gw") or devices < 2:
        return None
    first = int(worker.removeprefix("gw"))
    return ",".join(str((first + index) % devices) for index in range(devices))


def pytest_configure(config: pytest.Config) -> None:
    seen = gpus_of(os.environ.get("PYTEST_XDIST_WORKER", ""), torch.cuda.device_count())
    if seen is not None:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", seen)
    config.stash[zoo.OUTCOMES] = []
    if warm.ADDRESS not in os.environ:  # or this is a worker
        warm.share()
    # pytest listens to loggers that do not propagate: all graphs would be printed for the trace of a compilation.
    logging.getLogger("torch.__trace").propagate = True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    outcomes, file = config.stash[zoo.OUTCOMES], config.getoption("--zoo-results")
    if outcomes and config.getoption("--nightly"):
        terminalreporter.section("zoo")
        terminalreporter.write_line(zoo.as_table(outcomes))
    if outcomes and file:
        Path(file).write_text(zoo.as_json(outcomes))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Make compilations faster, and walks over the heap, from which is left out what each of them needs."""
    if not session.config.getoption("--nightly"):
        warm.compile_quickly()
    import_module("torch._inductor.compile_fx")
    # The patterns of Inductor's passes over joint graphs.  With a GPU they would begin to use it.
    if not torch.cuda.is_available():
        import_module("torch._inductor.fx_passes.joint_graph").lazy_init()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)  # a compilation makes many objects, few of which are garbage


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


# For devices that are not there torch.manual_seed keeps each call, with its stack, until they are.
seed_all = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    torch._dynamo.reset()
    sparse_compile.report().graphs.clear()
    sparse_compile.report().health.clear()
    sparse_compile.report().step_ms.clear()
    sparse_compile.report().fallbacks.clear()
    sparse_compile.report().choices.clear()
    ops.observe(None)
    seed_all(0)
    yield
    torch._dynamo.reset()
    sparse_compile.report()  # keeps it from being written when the tests end


class Conv1D(nn.Module):
    """A linear whose weight is stored ``[in_features, out_features]`` and spelt addmm, as in GPT-2."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features).normal_(std=in_features**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], self.weight.shape[1])


class Block(nn.Module):
    def __init__(self, width: int, heads: int, layer: Callable[[int, int], nn.Module], gated: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = layer(width, 3 * width), layer(width, width)
        self.up, self.down = layer(width, 4 * width), layer(4 * width, width)
        self.gate = layer(width, 4 * width) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0), is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, tokens, width))
        h = self.ffn_norm(x)
        hidden = F.gelu(self.up(h)) if self.gate is None else F.silu(self.gate(h)) * self.up(h)
        return x + self.down(hidden)


class SmallGPT(nn.Module):
    def __init__(
        self,
        layer: Callable[[int, int], nn.Module] = nn.Linear,
        *,
        width: int = 64,
        depth: int = 1,
        vocabulary: int = 128,
        gated: bool = False,
        tied: bool = False,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, 4, layer, gated) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.checkpoint = checkpoint
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.checkpoint else block(x)
        logits = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


@pytest.fixture
def ffn() -> type[FFN]:
    return FFN


@pytest.fixture
def small_gpt() -> type[SmallGPT]:
    return SmallGPT


@pytest.fixture
def conv1d() -> type[Conv1D]:
    return Conv1D


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Token ids and targets, ``[2, 32]``, vocabulary 128."""
    ids = torch.randint(0, 128, (2, 33), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@pytest.fixture
def trace() -> Callable[..., torch.fx.GraphModule]:
    """Dynamo's graph of a module's or function's first call."""

    def run(module: Callable[..., object], *args: object) -> torch.fx.GraphModule:
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph_module: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
            graphs.append(graph_module)
            return graph_module.forward

        torch.compile(module, backend=keep)(*args)
        assert len(graphs) == 1
        return graphs[0]

    return run


@pytest.fixture(scope="module")
def traced() -> dict[Any, tuple[SmallGPT, torch.fx.GraphModule]]:
    """Models by what they were made with, and their graphs."""
    return {}


@pytest.fixture
def gpt_graph(
    traced: dict[Any, tuple[SmallGPT, torch.fx.GraphModule]],
    trace: Callable[..., torch.fx.GraphModule],
    batch: tuple[Tensor, Tensor],
) -> Callable[..., torch.fx.GraphModule]:
    """A SmallGPT's graph, which tests of a file share: none may change it."""

    def run(**model: Any) -> torch.fx.GraphModule:
        key = tuple(model.items())
        if key not in traced:
            made = SmallGPT(**model)
            traced[key] = made, trace(made, *batch)
        return traced[key][1]

    return run


@pytest.fixture
def nothing_watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither weights of other tests, which live until they are collected, nor gradients."""
    weight_health.monitor.noise.watch(False)
    monkeypatch.setattr(weight_health, "monitor", weight_health.HealthMonitor())
    yield
    weight_health.monitor.noise.watch(False)
