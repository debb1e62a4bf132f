"""What stays dense trains as without the backend, and the report says why."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import sparse_compile


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def compiled(model):
    return torch.compile(model, backend="sste", options={"sste.executor": "eager", "sste.when": "always"})


@pytest.fixture
def one_process():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def x():
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(2))


class LoRA(nn.Module):
    def __init__(self, base, rank=16):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(64, rank, bias=False), nn.Linear(rank, 64, bias=False)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def lora():
    model = FFN()
    model.up, model.down = LoRA(model.up), LoRA(model.down)
    return model


def tied():
    model = FFN()
    model.down.weight = model.up.weight
    return model


def weight_norm():
    model = FFN()
    for layer in (model.up, model.down):
        torch.nn.utils.parametrizations.weight_norm(layer)
    return model


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.ffn = FFN()

    def forward(self, x):
        halves = {name: parameter / 2 for name, parameter in self.ffn.named_parameters()}
        return torch.func.functional_call(self.ffn, halves, (x,))


class PerSample(nn.Module):
    def __init__(self):
        super().__init__()
        self.ffn = FFN()

    def forward(self, x):
        return torch.func.vmap(lambda sample: self.ffn(sample))(x)


class Sensitivity(nn.Module):
    def __init__(self):
        super().__init__()
        self.ffn = FFN()

    def forward(self, x):
        return torch.func.grad(lambda x: self.ffn(x).square().sum())(x) + self.ffn.norm.weight


class Sharded(nn.Module):
    """Tensor parallelism: the weights are DTensors."""

    def __init__(self):
        super().__init__()
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        self.ffn = parallelize_module(FFN(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

    def forward(self, x):
        return self.ffn(x)


class Experts(nn.Module):
    """Four, whose products a function spells, with the tokens of each in turn."""

    def __init__(self, multiply):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, 64, 64) / 8) for _ in range(2))
        self.multiply = multiply

    def forward(self, x):
        x = x.view(4, -1, 64)
        return self.multiply(F.gelu(self.multiply(x, self.up)), self.down)


def in_a_loop(x, weight):
    return torch.stack([F.linear(x[e], weight[e]) for e in range(4)])


def expert_parallel():
    model = Experts(lambda x, weight: torch.bmm(x, weight.to_local()))
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for name, weight in list(model.named_parameters()):
        setattr(model, name, nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)])))
    return model


COMPUTED = "weight is not a parameter: it is computed in the graph, for instance by a parametrization"
TRANSFORMED = "not a plain tensor: input is inside a transform of torch.func, such as vmap or grad"
DENSE = {
    "LoRA": (lora, ["weight is frozen: requires_grad is False"] * 2 + ["adapter: of low rank"] * 4),
    "two linears, one weight": (tied, ["weight is shared: held by Linear.weight, Linear.weight"] * 2),
    "weight_norm": (weight_norm, [COMPUTED] * 2),
    "functional_call": (Functional, [COMPUTED] * 2),
    "vmap": (PerSample, [TRANSFORMED] * 2),
    "grad": (Sensitivity, [TRANSFORMED] * 2),
    "tensor parallel": (Sharded, ["not a plain tensor: weight is a DTensor"] * 2),
    "expert parallel": (expert_parallel, ["not a plain tensor: weight is a DTensor"] * 2),
    "experts in a loop": (
        lambda: Experts(in_a_loop), ["weight is not a matrix: linear multiplies by the matrices of one parameter"] * 8
    ),
}  # fmt: skip


@pytest.mark.by_day(3)
@pytest.mark.parametrize(("make", "why"), DENSE.values(), ids=DENSE.keys())
def test_dense_with_its_reason(x, make, why, one_process):
    """Output and gradients are dense training's."""
    model = make()
    baseline = copy.deepcopy(model)
    results = []
    for step in (compiled(model), baseline):
        y = step(x)
        y.square().mean().backward()
        results.append([y, *(parameter.grad for parameter in step.parameters())])
    rows = sparse_compile.report().rows
    assert len(rows) == len(why)
    assert all({"up", "down"} & set(row.module.split(".")) for row in rows)
    assert all(row.advice for row in rows)
    reasons = sorted(row.reason for row in rows)
    assert all(actual.startswith(wanted) for actual, wanted in zip(reasons, sorted(why), strict=True))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_export_gives_the_dense_model(x):
    model = FFN()
    step = compiled(model)
    for exported in (torch.export.export(model, (x,)), torch.export.export(step, (x,))):
        assert torch.equal(exported.module()(x), model(x))
    assert not torch.equal(step(x), model(x))
