"""A small model of gated experts, trained through the backend."""

import torch
import torch.nn.functional as F
from torch import nn

from sparse_compile.weights.registry import find_record

EAGER = {"sste.executor": "eager", "sste.when": "always"}
# No random numbers: results are the same to the last bit.
EXACT = EAGER | {"sste.mvue": "off"}
COUNT, WIDTH = 4, 64


class Experts(nn.Module):
    """Gated experts as transformers has them: tokens sorted, one grouped product up and one down."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(COUNT, 2 * WIDTH, WIDTH) / 8)
        self.down = nn.Parameter(torch.randn(COUNT, WIDTH, WIDTH) / 8)

    def forward(self, x, ids):
        ids, order = ids.sort()
        offsets = torch.histc(ids.float(), COUNT, 0, COUNT - 1).cumsum(0, dtype=torch.int32)
        hidden = torch._grouped_mm(x[order], self.up.transpose(-2, -1), offs=offsets)
        gate, up = hidden.chunk(2, dim=-1)
        out = torch._grouped_mm(F.silu(gate) * up, self.down.transpose(-2, -1), offs=offsets)
        return torch.zeros_like(x).index_add(0, order, out)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.experts = nn.LayerNorm(WIDTH), Experts()
        self.bfloat16()

    def forward(self, x, ids):
        return x + self.experts(self.norm(x), ids)


def compiled(model, options=EXACT, **named):
    return torch.compile(model, backend="sste", options=options, **named)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def batches(number=3, tokens=40):
    """Tokens and the expert of each: of the first batch all have some, of the second one has all, ..."""
    random = torch.Generator().manual_seed(1)
    for index in range(number):
        x = torch.randn(tokens, WIDTH, generator=random).bfloat16()
        yield x, torch.randint(1 if index % 2 else COUNT, (tokens,), generator=random)


def train(step, optimizer, steps=3):
    losses = []
    device = optimizer.param_groups[0]["params"][0].device
    for x, ids in batches(steps):
        x, ids = x.to(device), ids.to(device)
        torch.manual_seed(len(losses))
        loss = (step(x, ids) - x.roll(1, 1)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def operands(weight):
    (kept,) = find_record(weight).operands.values()
    return kept.operands
