"""An FFN that is trained, and what tests of it ask: whether its operands are current, how often they were made."""

import torch
import torch.nn.functional as F
from torch import nn

import sparse_compile
from sparse_compile.kernels import reference
from sparse_compile.testing import assert_same_bits
from sparse_compile.weights.registry import find_record

EAGER = {"sste.executor": "eager", "sste.when": "always"}
# No randomness: results must be the same to the last bit, whatever the order of calls.
DENSE_FP8 = EAGER | {"sste.recipe": "fp8"}


class FFN(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def compiled(model, options=EAGER, **named):
    return torch.compile(model, backend="sste", options=options, **named)


def some_tokens():
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(2))


def states(model):
    """The operands of the pruned weights by name."""
    records = {name: find_record(parameter) for name, parameter in model.named_parameters()}
    return {name: kept for name, record in records.items() if record for kept in record.operands.values()}


def assert_current(model, pruned=2):
    """The operands are those of the weights as they are now."""
    parameters = dict(model.named_parameters())
    assert len(states(model)) == pruned
    for name, weight_state in states(model).items():
        beta = torch.tensor([sparse_compile.beta(model)[name]])
        expected = reference.prune_weight(parameters[name].detach(), beta)
        for actual, wanted in zip(weight_state.operands, expected, strict=True):
            assert_same_bits(actual, wanted, name)


def refreshes(model):
    return [weight_state.refreshes for weight_state in states(model).values()]


def addresses(model):
    return [operand.data_ptr() for kept in states(model).values() for operand in kept.operands]


def gradients(model):
    return [parameter.grad for parameter in model.parameters()]


def assert_equal(actual, expected):
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def adamw(model):
    """To be kept by the test: a weight whose optimizer is gone is pruned at every call."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(step, optimizer, x, steps=2):
    for _ in range(steps):
        step(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def after_two_steps(x):
    """A model after two steps, its compiled call, and its optimizer."""
    model = FFN()
    step, optimizer = compiled(model), adamw(model)
    train(step, optimizer, x)
    return model, step, optimizer
