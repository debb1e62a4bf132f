"""--auto: what is compiled in a script that compiles nothing itself, and what must not be."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_compile
from sparse_compile.launcher.auto_compile import AutoCompile
from sparse_compile.launcher.route_compile import _routed, _Seen


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Broken(FFN):
    """Two graphs, between which its parts are called outside of any."""

    def __init__(self) -> None:
        super().__init__()
        self.between = FFN()

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        torch._dynamo.graph_break()
        return self.aside(x) + x.sin()

    @torch.compiler.disable
    def aside(self, x: Tensor) -> Tensor:
        return self.between(x)


class Wrapper(nn.Module):
    """Has no parameters of its own, and hides those of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = [model]

    def forward(self, x: Tensor) -> Tensor:
        return self.model[0](x)


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> AutoCompile:
    # Set, so that what AutoCompile sets is undone.
    monkeypatch.setattr(nn.Module, "_compiled_call_impl", None)
    return AutoCompile(
        partial(torch.compile, backend="sste", options={"sste.executor": "eager", "sste.when": "always"})
    )


def rewritten() -> list[str]:
    return [row.module for row in sparse_compile.report().rows if row.decision != "dense"]


x = torch.randn(8, 64)


def test_the_first_training_call_is_compiled_already(auto: AutoCompile, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit what Module.compile does; and the module stays what it is."""
    model = FFN()
    state, explicit = model.state_dict(), copy.deepcopy(model)
    explicit.compile(backend="sste", options={"sste.executor": "eager", "sste.when": "always"})
    assert torch.equal(model(x), explicit(x))
    assert auto.compiled == ["FFN"]
    assert type(model) is FFN
    assert list(model.state_dict()) == list(state)
    assert capsys.readouterr().err == "sparse_compile: compiling FFN (33,088 parameters) with backend 'sste'\n"
    assert rewritten() == ["up", "down"], "a graph that both share"


def test_evaluation_first_is_left_alone(auto: AutoCompile) -> None:
    model = FFN()
    dense = model.eval()(x)
    with torch.no_grad():
        assert torch.equal(model.train()(x), dense)
    assert not auto.compiled
    assert not torch.equal(model.train()(x), dense)
    assert auto.compiled == ["FFN"]


def test_losses_and_frozen_models_are_not_picked(auto: AutoCompile) -> None:
    frozen, loss, model = FFN().requires_grad_(False), nn.MSELoss(), FFN()
    loss(Wrapper(model)(frozen(x)), x).backward()
    assert auto.compiled == ["FFN"]
    assert frozen._compiled_call_impl is None
    assert model.up.weight.grad is not None


def test_parts_of_a_model_belong_to_it(auto: AutoCompile) -> None:
    Broken()(x).sum().backward()
    assert auto.compiled == ["Broken"]


def test_parts_run_again_in_backward_are_not_picked(auto: AutoCompile, monkeypatch: pytest.MonkeyPatch) -> None:
    class Checkpointed(FFN):
        @torch.compiler.disable
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    Checkpointed()(x).sum().backward()
    assert auto.compiled == ["Checkpointed"]


def test_several_models(auto: AutoCompile) -> None:
    generator, discriminator = FFN(), nn.Sequential(FFN(), nn.Linear(64, 1))
    discriminator(generator(x)).sum().backward()
    assert auto.compiled == ["FFN", "Sequential"]
    assert rewritten() == ["up", "down", "0.up", "0.down"]


def test_containers_of_pytorch_are_one_graph(auto: AutoCompile) -> None:
    """Module.compile would trace none of it."""
    nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))(x).sum().backward()
    (graph,) = sparse_compile.report().graphs
    assert [row.decision.split()[0] for row in graph.rows] == ["s-ste", "s-ste"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_a_model_of_its_own(auto: AutoCompile, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = FFN()
    model(x)
    average = copied(model).requires_grad_(False)
    average(x)
    assert auto.compiled == ["FFN"]
    average.requires_grad_(True)(x).sum().backward()
    assert auto.compiled == ["FFN", "FFN"]
    assert average.up.weight.grad is not None


@pytest.mark.parametrize(
    "compile", [lambda model, **kw: torch.compile(model, **kw), lambda model, **kw: model.compile(**kw) or model]
)
def test_a_script_that_compiles_is_left_to_that(
    auto: AutoCompile, monkeypatch: pytest.MonkeyPatch, compile: Callable[..., Any]
) -> None:
    monkeypatch.setattr(torch, "compile", _routed(torch.compile, {}, _Seen(launched=True), auto))
    other, model = FFN(), FFN()
    compile(model, backend="eager")(x)
    other(x)
    assert not auto.compiled


def test_a_compiled_function_is_no_compiled_model(auto: AutoCompile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers and losses are often compiled; but nothing within what is compiled is picked."""
    monkeypatch.setattr(torch, "compile", _routed(torch.compile, {}, _Seen(launched=True), auto))
    model = FFN()

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return model(x)

    step(x)
    assert not auto.compiled
    model(x)
    assert auto.compiled == ["FFN"]


def test_traces_and_lazy_modules_are_left_alone(auto: AutoCompile) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = FFN()

        def forward(self, x: Tensor) -> Tensor:
            return self.ffn(x) + 1

    torch.fx.symbolic_trace(Parts())
    torch.jit.trace(Parts(), x)
    with torch.device("meta"):
        FFN()(torch.empty(8, 64))
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        FFN()(x)
    model = FFN()
    torch.func.grad(lambda weights: torch.func.functional_call(model, weights, x).sum())(dict(model.named_parameters()))
    lazy = nn.LazyLinear(64)
    lazy(x)
    assert not auto.compiled
    lazy(x)
    assert auto.compiled == ["Linear"], "what it has become"


def test_data_parallel_is_refused(auto: AutoCompile, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.DataParallel(FFN())
    model.device_ids = [0, 1]
    model.forward = lambda x: x
    for _ in range(2):
        model(x)
    assert not auto.compiled
    assert capsys.readouterr().err.count("copies the model to several devices at every call") == 1
