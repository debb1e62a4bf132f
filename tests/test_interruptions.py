"""A step that ends in the middle, by an error, want of memory or the user, and is made again, as if it had never begun.

The runs that are compared sample nothing, so they are equal to the last bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ffn_training import EAGER, FFN, adamw, assert_equal, some_tokens
from sparse_compile.kernels import ops
from sparse_compile.projections.groups_of_four import SOFT
from sparse_compile.weights import beta

OPTIONS = EAGER | {"sste.mvue": "off"}
STEPS = 10
ERRORS = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError]
PRODUCTS = {"a forward product": 1, "a backward product": 6}  # of eight of forward and backward by our kernels
PLACES = [
    "between two graphs", "backward", "before the optimizer", "after the optimizer", "while operands are made",
    "a module's hook", *PRODUCTS,
]  # fmt: skip


class TwoGraphs(nn.Module):
    """Two FFNs and a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = FFN(), FFN()
        self.between: Callable[[], None] = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        torch._dynamo.graph_break()
        self._pause()
        return self.second(x)

    @torch.compiler.disable
    def _pause(self) -> None:
        self.between()


@contextmanager
def raising(place: str, error: type[BaseException], model: TwoGraphs, optimizer: Any, patch: Any) -> Iterator[None]:
    """The next step fails there, once."""
    left = [1]

    def fail(*_: Any, **__: Any) -> None:
        if left:
            left.pop()
            raise error("interrupted")

    if place == "between two graphs":
        model.between = fail
        yield
        model.between = lambda: None
    elif place in ("before the optimizer", "after the optimizer"):
        register = optimizer.register_step_pre_hook if place[0] == "b" else optimizer.register_step_post_hook
        handle = register(fail)
        yield
        handle.remove()
    elif place == "a module's hook":
        handle = model.register_forward_hook(fail)
        yield
        handle.remove()
    elif place in PRODUCTS:
        products = iter(range(100))

        def observer(name: str, call: Callable[..., Any], arguments: Any) -> Any:
            if name.endswith("_mm") and next(products) == PRODUCTS[place]:
                fail()
            return call(*arguments)

        with ops.observed(observer):
            yield
    elif place == "backward":
        handle = model.second.norm.weight.register_hook(fail)
        yield
        handle.remove()
    else:
        # Of the four weights the third: those before it are made, its own operands are half written.
        calls = iter(range(100))
        fill = type(SOFT).fill

        def half(self: Any, weight: Tensor, operands: Any, *rest: Any) -> None:
            if next(calls) == 2:
                operands[0].view(torch.uint8).fill_(0x55)
                fail()
            fill(self, weight, operands, *rest)

        with patch.context() as context:
            context.setattr(type(SOFT), "fill", half)
            yield
    assert not left, "it has failed"


def trained(interruptions: dict[int, tuple[str, type[BaseException]]], patch: Any) -> tuple[list[Tensor], list[Any]]:
    """Weights, and the state of training, after as many steps, of which those were made twice."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = TwoGraphs()
    step = torch.compile(model, backend="sste", options=OPTIONS)
    optimizer, x = adamw(model), some_tokens()

    def once() -> None:
        optimizer.zero_grad()
        step(x).square().mean().backward()
        optimizer.step()

    for index in range(STEPS):
        if index in interruptions:
            place, error = interruptions[index]
            before = [parameter.detach().clone() for parameter in model.parameters()]
            kept = [sorted(state) for state in optimizer.state.values()]
            with raising(place, error, model, optimizer, patch), pytest.raises(error, match="interrupted"):
                once()
            if place == "after the optimizer":
                continue  # the step was made
            assert_equal([*model.parameters()], before)
            assert [sorted(state) for state in optimizer.state.values()] == kept
        once()
    return [*model.parameters()], [beta(model), optimizer.state_dict()["state"]]


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[list[Tensor], list[Any]]:
    return trained({}, None)


def assert_same_training(actual: tuple[list[Tensor], list[Any]], expected: Any, uncounted: int) -> None:
    assert_equal(actual[0], expected[0])
    assert actual[1][0] == expected[1][0]
    state = {
        index: {name: value - uncounted if name == "sste_steps" else value for name, value in of_weight.items()}
        for index, of_weight in expected[1][1].items()
    }
    torch.testing.assert_close(actual[1][1], state, rtol=0, atol=0)


def test_steps_that_are_made_again(uninterrupted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in each place.  A step that a hook of the user's ends is none to those who count them."""
    errors = [*ERRORS, *ERRORS, *ERRORS]
    interruptions = {index: (place, errors[index]) for index, place in enumerate(PLACES, 1)}
    assert_same_training(trained(interruptions, monkeypatch), uninterrupted, uncounted=1)


@pytest.mark.nightly
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_a_step_that_is_made_again(
    uninterrupted: Any, monkeypatch: pytest.MonkeyPatch, place: str, error: type[BaseException]
) -> None:
    uncounted = 1 if place == "after the optimizer" else 0
    assert_same_training(trained({2: (place, error)}, monkeypatch), uninterrupted, uncounted)


@pytest.mark.nightly
def test_the_very_first_step(uninterrupted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """When betas are fitted, and operands are made for the first time."""
    trained_again = trained({0: ("while operands are made", KeyboardInterrupt)}, monkeypatch)
    assert_same_training(trained_again, uninterrupted, uncounted=0)


@pytest.mark.nightly
def test_the_next_smaller_batch_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the compilation for one size: what was compiled for others goes on."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = FFN()
    step = torch.compile(model, backend="sste", options=OPTIONS, dynamic=False)
    optimizer, x = adamw(model), some_tokens()

    def once(tokens: Tensor) -> Tensor:
        optimizer.zero_grad()
        out = step(tokens)
        out.square().mean().backward()
        optimizer.step()
        return out

    once(x)
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("interrupted")

        patch.setattr("sparse_compile.backend.compile_graph", fail)
        with pytest.raises(Exception, match="interrupted"):
            once(torch.cat([x, x]))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    once(x)
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)), "it trains on"
    assert torch.isfinite(once(torch.cat([x, x]))).all(), "and the larger batch, once there is room"
