"""beta in checkpoints: a resumed run goes on as the first one would have, and says so where it can't."""

import copy
import io
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import shared_graphs
import sparse_compile
from sparse_compile.projections.groups_of_four import SOFT
from sparse_compile.weights.operands import current_operands, layout_of, operand_set
from sparse_compile.weights.optimizer_state import BETA
from sparse_compile.weights.registry import record_of
from sparse_compile.weights.slot import WeightSlot

clean_slate = shared_graphs.kept

OPTIONS = {"sste.executor": "eager", "sste.when": "always"}
OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


class Model(nn.Module):
    """An FFN and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return (y + self.down(nn.functional.gelu(self.up(y))) - x.roll(1, 1)).square().mean()


@pytest.fixture
def batch() -> tuple[Tensor]:
    return (torch.randn(16, 64, generator=torch.Generator().manual_seed(1)),)


def compiled(model: nn.Module) -> Callable[..., Tensor]:
    # A copy: the graphs that tests share are known by the options, which one of them changes.
    return torch.compile(model, backend="sste", options=dict(OPTIONS))


def train(step: Callable[..., Tensor], optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]) -> list[float]:
    losses = []
    for seed in range(3):
        torch.manual_seed(seed)
        loss = step(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def saved(*parts: Any) -> list[Any]:
    """State dicts, through a file."""
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_factor_of_what_fits_best(batch) -> None:
    """Of fresh weights; a checkpoint's scale and a weight that is 2:4 are taken as they are."""
    model, plain = Model(), Model()
    plain.load_state_dict(model.state_dict())
    compiled(plain)(*batch).backward()
    fitted = sparse_compile.beta(plain)
    options = {**OPTIONS, "sste.beta": 1.5}
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    step = torch.compile(model, backend="sste", options=options)
    train(step, optimizer, batch)
    scaled = sparse_compile.beta(model)
    assert scaled == pytest.approx({name: 1.5 * value for name, value in fitted.items()})

    resumed = copy.deepcopy(model)
    later = OPTIMIZERS["AdamW"](resumed.parameters())
    later.load_state_dict(optimizer.state_dict())
    train(torch.compile(resumed, backend="sste", options=options), later, batch)
    assert sparse_compile.beta(resumed) == scaled

    sparse_compile.finalize(model)
    finalized = copy.deepcopy(model)
    torch.compile(finalized, backend="sste", options=options)(*batch).backward()
    assert set(sparse_compile.beta(finalized).values()) == {1.0}


def interrupted(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> tuple[list[Any], list[float]]:
    """A checkpoint of model and optimizer after some steps, and the losses with which the run went on."""
    step = compiled(model)
    train(step, optimizer, batch)
    checkpoint = saved(model, optimizer)
    return checkpoint, train(step, optimizer, batch)


# The others' tests resume AdamW; the forms of one optimizer keep alike.
ELSEWHERE = {"SGD momentum", "AdamW", "AdamW foreach"}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=pytest.mark.nightly if name in ELSEWHERE else ())
        for name, make in OPTIMIZERS.items()
    ],
)
def test_a_resumed_run_is_the_continued_one(batch, make) -> None:
    model = Model()
    checkpoint, continued = interrupted(model, make(model.parameters()), batch)

    resumed = Model()
    optimizer = make(resumed.parameters())
    resumed.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(compiled(resumed), optimizer, batch) == continued


@pytest.mark.by_day(1)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_distributed_checkpoints_of_sgd(batch, momentum, tmp_path) -> None:
    """Biases have no numbers of ours, and without momentum nothing of the optimizer's."""
    runs = []
    for _ in range(2):
        model = Model()
        runs.append((model, compiled(model), torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)))
    (model, step, optimizer), (resumed, step_again, fresh) = runs
    train(step, optimizer, batch)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=tmp_path)
    continued = train(step, optimizer, batch)

    step_again(*batch)
    states = dict(zip(("model", "optimizer"), get_state_dict(resumed, fresh), strict=True))
    dcp.load(states, checkpoint_id=tmp_path)
    set_state_dict(resumed, fresh, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    assert len(fresh.state) == (6 if momentum else 0)
    assert train(step_again, fresh, batch) == continued
    assert sparse_compile.beta(resumed) == sparse_compile.beta(model)


def test_saving_a_distributed_checkpoint_is_no_step(batch) -> None:
    """PyTorch makes one, at a rate of 0, where it finds no state: each time for what keeps none."""
    model = Model()
    step, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(2):
        get_state_dict(model, optimizer)
        train(step, optimizer, batch)
        _, state = get_state_dict(model, optimizer)
    assert {kept["sste_steps"] for kept in state["state"].values() if kept} == {6}


def test_a_checkpoint_that_is_loaded_late_brings_its_beta(batch) -> None:
    """Evaluation needs a beta before there is an optimizer: it is not frozen by that, nor by a first call at all."""
    model = Model()
    checkpoint, continued = interrupted(model, torch.optim.AdamW(model.parameters(), lr=1e-2), batch)
    expected = sparse_compile.beta(model)

    for when in ("after an evaluation", "after a forward in training", "in the middle", "after the first call"):
        resumed = Model()
        step = compiled(resumed)
        if when in ("after an evaluation", "after a forward in training"):
            resumed.load_state_dict(checkpoint[0])
        if when == "after the first call":
            optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
        with torch.set_grad_enabled(when != "after an evaluation"):
            step(*batch)
        assert sparse_compile.beta(resumed) != expected, when
        if when != "after the first call":
            optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
        if when == "in the middle":
            train(step, optimizer, batch)
        if when in ("in the middle", "after the first call"):
            resumed.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(copy.deepcopy(checkpoint[1]))  # which it would change
        losses = train(step, optimizer, batch)
        assert sparse_compile.beta(resumed) == expected, when
        assert losses == continued, when


def test_without_it_a_resumed_run_differs_and_warns(batch) -> None:
    model = Model()
    checkpoint, continued = interrupted(model, torch.optim.AdamW(model.parameters(), lr=1e-2), batch)

    resumed = Model()
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(checkpoint[0])
    for kept in checkpoint[1]["state"].values():
        kept.pop(BETA, None)
    optimizer.load_state_dict(checkpoint[1])
    with pytest.warns(UserWarning, match=r"trained 'up' before but holds no S-STE scale beta for it"):
        losses = train(compiled(resumed), optimizer, batch)
    assert losses != continued


def test_wrappers_of_optimizers_do_no_harm(batch) -> None:
    """Accelerate's derives from Optimizer and initialises nothing of it."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

        state = property(lambda self: self.optimizer.state)
        param_groups = property(lambda self: self.optimizer.param_groups)

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapper = Wrapper(optimizer)
    train(compiled(model), optimizer, batch)
    assert sum(BETA in entry for entry in optimizer.state_dict()["state"].values()) == 2
    assert wrapper.state is optimizer.state


@pytest.mark.parametrize("called", [True, False], ids=["called first", "not called"])
def test_distributed_checkpoints(batch, tmp_path, called) -> None:
    """A fresh optimizer asks a distributed checkpoint for beta only if the model has been called; else it is said."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = Model()
    optimizer, step = torch.optim.AdamW(model.parameters(), lr=1e-2), compiled(model)
    train(step, optimizer, batch)
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)), checkpoint_id=tmp_path)
    continued = train(step, optimizer, batch)

    resumed = Model()
    optimizer, step = torch.optim.AdamW(resumed.parameters(), lr=1e-2), compiled(resumed)
    if called:
        step(*batch)
    state = dict(zip(("model", "optimizer"), get_state_dict(resumed, optimizer), strict=True))
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(
        resumed, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )  # fmt: skip
    if called:
        assert train(step, optimizer, batch) == continued
    else:
        with pytest.warns(UserWarning, match=r"loads beta if the model is called once before get_state_dict"):
            assert train(step, optimizer, batch) != continued


def test_only_pruned_weights_have_one_and_the_model_has_none(small_gpt) -> None:
    model, ids = small_gpt(), torch.zeros(2, 8, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = list(model.state_dict())
    train(compiled(model), optimizer, (ids, ids))
    names = [name for name, _ in model.named_parameters()]
    kept = optimizer.state_dict()["state"]
    assert {names[i] for i in kept if BETA in kept[i]} == {"blocks.0.up.weight", "blocks.0.down.weight"}
    assert all(isinstance(entry.get(BETA, 0.0), float) for entry in kept.values())
    assert list(model.state_dict()) == before


def test_a_run_without_the_backend_can_load_the_checkpoint(batch) -> None:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(compiled(model), optimizer, batch)
    model_state, optimizer_state = saved(model, optimizer)
    dense = Model()
    dense.load_state_dict(model_state)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2)
    optimizer.load_state_dict(optimizer_state)
    losses = train(dense, optimizer, batch)
    assert losses[-1] < losses[0]


def test_a_weight_without_gradient_so_far_can_get_one_later() -> None:
    """AdamW initialises a weight's state when it finds none: a beta alone would look like one."""
    weights = [nn.Parameter(torch.randn(32, 64)) for _ in range(2)]
    slot = WeightSlot(
        name="w", position=0, transposed=False, projection=SOFT, out_features=32, in_features=64,
        device=torch.device("cpu"),
    )  # fmt: skip
    for weight in weights:
        kept = operand_set(weight, slot)
        current_operands([weight], [slot], [record_of(weight)], [kept])
        record_of(weight).target = layout_of(slot)
    optimizer = torch.optim.AdamW(weights)
    weights[0].grad = torch.randn(32, 64)
    optimizer.step()
    assert [BETA in entry for entry in optimizer.state_dict()["state"].values()] == [True]
    weights[1].grad = torch.randn(32, 64)
    optimizer.step()
    assert [BETA in entry for entry in optimizer.state_dict()["state"].values()] == [True, True]


def test_hard_pruning_resumes_without_anything_of_its_own(batch, monkeypatch) -> None:
    monkeypatch.setitem(OPTIONS, "sste.recipe", "ste")
    model = Model()
    checkpoint, continued = interrupted(model, torch.optim.AdamW(model.parameters(), lr=1e-2), batch)
    assert not any(BETA in entry for entry in checkpoint[1]["state"].values())
    resumed = Model()
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train(compiled(resumed), optimizer, batch) == continued


def test_a_copy_of_a_trained_model_starts_quietly(batch) -> None:
    """No optimizer has stepped with its weights."""
    model = Model()
    train(compiled(model), torch.optim.AdamW(model.parameters()), batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(copy.deepcopy(model))(*batch)
