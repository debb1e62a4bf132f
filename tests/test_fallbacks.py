"""What dynamo runs eagerly of the modules that were compiled is told at the end of the report; nothing else is."""

import gc
import warnings

import pytest
import torch
import torch._dynamo.config
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import shared_graphs
import sparse_compile
from sparse_compile.measuring import eager_fallbacks
from sparse_compile.measuring.eager_fallbacks import watch_fallbacks
from sparse_compile.reporting.report import Report
from sparse_compile.torch_internals.dynamo import RecompileLimit
from sparse_compile.torch_internals.modules import compiled_modules

uncompiled = shared_graphs.uncompiled
pytestmark = pytest.mark.usefixtures("uncompiled")

OPTIONS = {"sste.executor": "eager", "sste.when": "always", "sste.recipe": "fp8"}
LIMIT = 3
ADVICE = f"recompile limit {LIMIT}; use dynamic=True or raise it"


@pytest.fixture(autouse=True)
def nothing_reached_so_far():
    watch_fallbacks()._limits.clear()
    watch_fallbacks()._warned.clear()
    watch_fallbacks()._pruning.clear()  # dynamo counts functions anew for each test
    gc.collect()  # modules of other tests, which count as long as they are alive


@pytest.fixture
def low_limit():
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        yield


class Block(nn.Module):
    """Specialised on its own label: each needs a graph of its own."""

    def __init__(self, label=""):
        super().__init__()
        self.up, self.down, self.label = nn.Linear(64, 64), nn.Linear(64, 64), label

    def forward(self, x):
        return x + (1 + len(self.label)) * self.down(self.up(x).relu())


class BrokenBlock(Block):
    def forward(self, x):
        y = self.up(x)
        torch._dynamo.graph_break()
        return x + self.down(y.relu())


class Blocks(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(64, 64)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Looped(nn.Module):
    """Experts as transformers has them without another implementation: which of them run depends on data."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(4, 64, 64)), nn.Parameter(torch.randn(4, 64, 64))
        self.head = nn.Linear(64, 64)

    @torch.compiler.disable
    def loop(self, x, ids):
        out = torch.zeros_like(x)
        for e in ids.unique().tolist():
            out[ids == e] = (x[ids == e] @ self.up[e]).relu() @ self.down[e]
        return out

    def forward(self, x):
        return self.head(self.loop(x, torch.arange(len(x)) % 4))


def train(model, call=None, steps=2, tokens=(8,), optimizer=torch.optim.SGD, **zero):
    optimizers = [
        optimizer(part.parameters(), lr=1e-3) for part in (model.children() if zero.pop("many", 0) else [model])
    ]
    call = model if call is None else call
    for step in range(steps):
        call(torch.randn(tokens[step % len(tokens)], 64)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(**zero)
    return sparse_compile.report().fallbacks


@pytest.mark.usefixtures("low_limit")
@pytest.mark.parametrize(
    "compile_block",
    [
        pytest.param(lambda block: block.compile, id="in place"),
        pytest.param(lambda block: None, id="wrapped", marks=pytest.mark.nightly),
    ],
)
def test_blocks_beyond_the_recompile_limit(compile_block):
    blocks = [Block(str(index)) for index in range(5)]
    if compile_block(blocks[0]) is None:
        blocks = [torch.compile(block, backend="sste", options=OPTIONS) for block in blocks]
    else:
        for block in blocks:
            block.compile(backend="sste", options=OPTIONS)
    expected = f"2 of 5 compiled modules of class Block fell back to eager: {ADVICE}"
    assert train(Blocks(blocks)) == [expected]
    report = sparse_compile.report()
    assert str(report).endswith(expected)
    assert Report.from_json(report.to_json()).fallbacks == [expected]


@pytest.mark.usefixtures("low_limit")
def test_a_model_whose_shapes_vary():
    model = Block()
    call = torch.compile(model, backend="sste", options=OPTIONS, dynamic=False)
    lengths = range(8, 8 + LIMIT + 5)
    (line,) = train(model, call, steps=LIMIT + 1, tokens=lengths)
    assert "test_fallbacks.py" in line
    assert line.endswith(f"has reached {ADVICE.replace(';', ': calls that fit none of its graphs run eagerly;')}")
    assert train(model, call, steps=2, tokens=lengths[LIMIT + 1 :]) == [
        f"1 of 1 compiled modules of class Block fell back to eager: {ADVICE}"
    ]
    # With a graph again there is nothing to tell but the limit.
    assert train(model, call, steps=2) == [line]


@pytest.mark.usefixtures("low_limit")
@pytest.mark.parametrize(("recipe", "warns"), [("fp8", False), ("s-ste", True)])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.by_day(1)
def test_calls_beyond_the_limit_that_prune_no_more_warn(recipe, warns, trains):
    other = torch.compile(BrokenBlock(), backend="sste", options=OPTIONS | {"sste.recipe": "s-ste"})
    train(other, other)  # which prunes, and is far from its limit
    model = Block()
    call = torch.compile(model, backend="sste", options=OPTIONS | {"sste.recipe": recipe}, dynamic=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if trains:
            train(model, call, steps=LIMIT + 3, tokens=range(8, 8 + LIMIT + 3))
        else:
            for tokens in range(8, 8 + LIMIT + 3):
                call(torch.randn(tokens, 64))
    told = [str(warning.message) for warning in caught if "prune them" in str(warning.message)]
    assert len(told) == warns
    assert all(f"has reached recompile limit {LIMIT}" in line and "raise it" in line for line in told)


def test_parts_that_are_disabled():
    model = Blocks([Block(), Block(), Block()])
    for block in model.blocks[1:]:
        block.down.forward = torch.compiler.disable(block.down.forward)
    call = torch.compile(model, backend="sste", options=OPTIONS)
    why = "outside any graph, because of a graph break or torch.compiler.disable; TORCH_LOGS=graph_breaks shows which"
    # A break inside of a loop makes dynamo leave the frame around it, and what that calls of PyTorch's own modules.
    assert train(model, call) == [f"{name} of Blocks runs eagerly, {why}" for name in ("blocks.*.down (2)", "head")]


@pytest.mark.parametrize(
    "named",
    [
        {},
        pytest.param({"set_to_none": False, "many": True}, marks=pytest.mark.nightly),
        pytest.param({"set_to_none": False}, marks=pytest.mark.nightly),
        pytest.param({"many": True}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_nothing_is_told_where_all_is_in_graphs(named):
    """With a head that nobody compiled, graph breaks between linears, and several optimizers that step in turns."""
    model = Blocks([BrokenBlock(), BrokenBlock()])
    for block in model.blocks:
        block.compile(backend="sste", options=OPTIONS)
    embedding = nn.Embedding(16, 64)
    assert train(model, steps=9, **named) == []
    # A module that is not called has no gradients, or those of before, as zeros.
    other = Block()
    other.compile(backend="sste", options=OPTIONS)
    assert train(other, **{name: value for name, value in named.items() if name != "many"}) == []
    assert embedding.weight.grad is None


class Untraced(Block):
    """All of whose linears run eagerly."""

    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


def test_a_module_of_which_no_graph_has_a_linear():
    model = Untraced()
    step = torch.compile(lambda x: model(x.sin()), backend="sste", options=OPTIONS)
    assert train(model, step) == []  # the module itself was not compiled
    assert train(torch.compile(model, backend="sste", options=OPTIONS)) == [
        "1 of 1 compiled modules of class Untraced fell back to eager: TORCH_LOGS=graph_breaks shows why"
    ]


def test_what_another_backend_compiles_is_its_own():
    ours, others = Block(), nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model = nn.Sequential(ours, others)
    ours.compile(backend="sste", options=OPTIONS)
    others.compile(backend="eager")
    assert train(model) == []


def test_the_limit_is_recognised_by_its_function():
    path = f"{torch.__path__[0]}/_dynamo/external_utils.py"
    assert RecompileLimit(f"'inner' ({path}:62)", "recompile limit", 8).is_pytorchs
    assert not RecompileLimit("'forward' (/home/me/model.py:12)", "recompile limit", 8).is_pytorchs


@pytest.fixture
def nothing_traced(monkeypatch):
    others = compiled_modules()  # of other tests, if any live

    def of_this_test():
        return [
            (root, backend) for root, backend in compiled_modules() if all(root is not other for other, _ in others)
        ]

    monkeypatch.setattr(eager_fallbacks, "compiled_modules", of_this_test)
    monkeypatch.setattr(watch_fallbacks(), "traced", False)
    monkeypatch.setattr(watch_fallbacks(), "_warned", set())


def containers():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def sharded(model):
    return fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))


@pytest.mark.usefixtures("nothing_traced")
def test_a_module_of_pytorchs_that_is_compiled_in_place_is_warned_of() -> None:
    """Dynamo traces nothing of it, so no graph tells."""
    model = containers()
    model.compile(backend="sste", options=OPTIONS)
    with pytest.warns(UserWarning, match=r"Sequential.compile\(\) had no effect.*use torch.compile\(module\)"):
        train(model)
    assert [line.partition(",")[0] for line in sparse_compile.report().fallbacks] == [
        "Sequential.compile() had no effect"
    ]


@pytest.mark.by_day(1)
@pytest.mark.parametrize("how", ["DDP", "FSDP2, compiled", "compiled, FSDP2", "compiled in place, FSDP2"])
@pytest.mark.usefixtures("nothing_traced", "one_process")
def test_modules_of_pytorchs_behind_hooks_are_warned_of(how: str) -> None:
    model = containers()
    if how == "DDP":
        called = torch.compile(DistributedDataParallel(model), backend="sste", options=OPTIONS)
    elif how == "FSDP2, compiled":
        called = torch.compile(sharded(model), backend="sste", options=OPTIONS)
    elif how == "compiled, FSDP2":
        called = torch.compile(model, backend="sste", options=OPTIONS)
        sharded(model)
    else:
        assert how == "compiled in place, FSDP2"
        called = model
        called.compile(backend="sste", options=OPTIONS)
        sharded(model)
    with pytest.warns(UserWarning, match="had no effect.*behind the hooks of DDP and FSDP; compile a class"):
        train(called)
    assert len(sparse_compile.report().fallbacks) == 1


@pytest.mark.usefixtures("nothing_traced")
def test_a_compiled_module_that_is_not_called_is_warned_of() -> None:
    model = Block()
    compiled = torch.compile(model, backend="sste", options=OPTIONS)
    with pytest.warns(UserWarning, match=r"torch.compile\(Block\) has traced nothing.*call what torch.compile returns"):
        train(model)
    assert train(compiled) == []


@pytest.mark.nightly
@pytest.mark.usefixtures("nothing_traced")
def test_what_another_backend_traces_is_not_warned_of(recwarn) -> None:
    model = torch.compile(containers(), backend="eager")
    assert train(model) == []
    assert not any("sparse_compile" in str(warning.message) for warning in recwarn)


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    "compiled",
    [
        lambda model: torch.compile(model, backend="sste", options=OPTIONS),
        lambda model: (nn.Sequential(*(Block(),)).compile(backend="sste", options=OPTIONS), model)[1],
    ],
    ids=["by torch.compile", "another one, of one's own classes"],
)
def test_modules_of_pytorchs_that_are_traced_are_not(compiled) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    train(model, compiled(model))
    assert sparse_compile.report().fallbacks == []


def test_a_loop_over_experts_is_told_with_what_to_do():
    model = Looped()
    lines = train(model, torch.compile(model, backend="sste", options=OPTIONS))
    assert sorted(line.split(" of Looped")[0] for line in lines) == ["down", "up"]
    assert all("set_experts_implementation('grouped_mm')" in line for line in lines)
