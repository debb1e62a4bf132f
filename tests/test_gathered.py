"""Operands of weights that FSDP2 gathers: freed with the gathered weight, and made again for what still reads them."""

import gc
from itertools import chain
from weakref import WeakSet

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shared_graphs
import sparse_compile
from sparse_compile.measuring import weight_health
from sparse_compile.weights.operand_set import OperandSet

clean_slate = shared_graphs.kept

# Those of this test: walks over the heap, after each forward, would take as long as the training.
_alive: WeakSet[OperandSet] = WeakSet()


@pytest.fixture(autouse=True)
def remembered(monkeypatch):
    """Operands are known from when they are made."""

    def remember(operands, shards):
        make(operands, shards)
        _alive.add(operands)

    _alive.clear()
    make = OperandSet.__init__
    monkeypatch.setattr(OperandSet, "__init__", remember)


@pytest.fixture(autouse=True)
def one_process():
    """A process group of one, in which FSDP2 frees and gathers as in any other."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def make(small_gpt, ffn):
    """A model whose two blocks, which have no attention, are compiled and sharded, and its optimizer."""

    def run(sharded=True, device="cpu", **options):
        torch.manual_seed(0)
        model = small_gpt()
        model.blocks = nn.ModuleList(ffn() for _ in range(2))
        model.to(device)
        for block in model.blocks:
            block.compile(backend="sste", options={"sste.executor": "eager", "sste.when": "always", **options})
        for module in (*model.blocks, model) if sharded else ():
            fully_shard(module, mesh=init_device_mesh(device, (1,)))
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    return run


def operand_bytes():
    """What the operands of all weights take, but for their scales."""
    assert _alive
    return sum(operand.untyped_storage().size() for state in _alive for operand in state.operands[:-1])


def gradients(model):
    return [
        getattr(parameter.grad, "_local_tensor", parameter.grad).clone()
        for parameter in model.parameters()
        if parameter.grad is not None
    ]


@pytest.mark.parametrize(
    ("device", "executor"),
    [
        ("cpu", "eager"),
        pytest.param("cpu", "inductor", marks=pytest.mark.nightly),
        pytest.param("cuda", "inductor", marks=pytest.mark.gpu),
    ],
)
def test_losses_are_those_of_one_device(make, batch, device, executor):
    """To the last bit, but for what adds in any order on a GPU; and a forward leaves no operands behind."""
    batch = [part.to(device) for part in batch]
    losses = []
    for sharded in (True, False):
        model, optimizer = make(sharded, device, **{"sste.executor": executor, "sste.when": "always"})
        losses.append([])
        for _ in range(3):
            loss = model(*batch)
            assert (operand_bytes() == 0) == sharded
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        del model, optimizer, loss
        torch._dynamo.reset()
        gc.collect()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if device == "cuda" else 0, abs=0)
    assert losses[0][-1] < losses[0][0] - 0.5


def test_forwards_may_come_before_their_backwards(make, batch):
    """Each backward reads what its forward did, whatever was freed and made again in between."""
    results = []
    for sharded in (True, False):
        model, _ = make(sharded)
        first, second = model(*batch), model(*(part.flip(0) for part in batch))
        assert (operand_bytes() == 0) == sharded
        first.backward()
        assert (operand_bytes() == 0) == sharded
        second.backward()
        results.append(gradients(model))
        del model, first, second
        torch._dynamo.reset()
    assert all(map(torch.equal, *results))


def test_backward_after_the_step_fails(make, batch):
    """As it does for the operands of weights that are not sharded."""
    model, optimizer = make()
    model(*batch).backward()
    loss = model(*batch)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_changes_in_the_shards_is_seen(make, batch):
    """An edit through ``.data``, of one element, after which the weight is gathered anew."""
    model, _ = make()
    with torch.no_grad():
        before = model(*batch)
        assert torch.equal(model(*batch), before)
        model.blocks[0].down.weight._local_tensor.data[3, 5] += 100
        assert not torch.equal(model(*batch), before)


def test_a_backward_without_the_weight_says_so(make, batch):
    """Calls of a module's forward run none of FSDP2's hooks."""
    model, _ = make()
    block = model.blocks[0]
    forward = torch.compile(block.forward, backend="sste", options={"sste.executor": "eager", "sste.when": "always"})
    block.unshard()
    loss = forward(torch.randn(2, 8, 64)).sum()
    block.reshard()
    with pytest.raises(RuntimeError, match=r"'[\w.]+' runs while FSDP2 holds its weight in shards: call the module"):
        loss.backward()


@pytest.mark.nightly
def test_health_is_sampled_before_operands_are_freed(make, batch, monkeypatch):
    healths = []
    for sharded in (True, False):
        weight_health.monitor.watched.clear()
        model, optimizer = make(sharded, **{"sste.health": 1})
        for _ in range(2):
            model(*batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        healths.append(dict(sparse_compile.report().health))
        sparse_compile.report().health.clear()
        del model, optimizer
        torch._dynamo.reset()
    weight_health.monitor.noise.watch(False)  # or gradients are watched until the next step, be it of another test
    samples = [[(health.flips, health.zeros) for health in chain(*taken.values())] for taken in healths]
    assert samples[0] == samples[1]
    assert len(samples[0]) == 2 * 4
    assert any(flips for flips, _ in samples[0])


class Block(nn.Module):
    """Two linears whose dimensions are multiples of 128."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(128, 256), nn.Linear(256, 128)

    def forward(self, x):
        return self.down(self.up(x).relu())


@pytest.mark.nightly
def test_one_copy_is_freed_and_made_again_as_two_are():
    losses = []
    for sharded in (False, True):
        torch.manual_seed(0)
        x, model = torch.randn(32, 128), Block()
        model.compile(backend="sste", options={"sste.executor": "eager", "sste.when": "always", "sste.memory": "small"})
        if sharded:
            fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:2] == losses[2:]
    assert [row.decision.split()[0] for row in sparse_compile.report().rows] == ["s-ste"] * 4
    assert operand_bytes() <= 2 * 5 / 8 * 2 * 128 * 256, "more than one copy was kept"
