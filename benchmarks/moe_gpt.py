"""A GPT whose FFNs are gated experts: tokens lie sorted by expert, as trainers have them."""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from train_gpt import Attention, GPTConfig

NUMBER, TOP_K = 8, 2
_BALANCE = 0.01  # weight of the loss that spreads tokens over experts (Fedus et al., 2022, equation 4)


class Experts(nn.Module):
    """``NUMBER`` experts of twice the width, of which each token gets the ``TOP_K`` that its router prefers."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, hidden = config.width, 2 * config.width
        self.router = nn.Linear(width, NUMBER, bias=False)
        self.gate_up = nn.Parameter(torch.empty(NUMBER, 2 * hidden, width).normal_(std=0.02))
        self.down = nn.Parameter(torch.empty(NUMBER, width, hidden).normal_(std=0.02 / math.sqrt(2 * config.layers)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens ``[tokens, width]`` the sum over their experts, and how unevenly experts are used, 1 at best."""
        chances = self.router(x).float().softmax(dim=-1)
        weights, chosen = chances.topk(TOP_K)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        experts, order = chosen.flatten().sort()
        used = torch.histc(experts.float(), NUMBER, 0, NUMBER - 1)
        ends = used.cumsum(0, dtype=torch.int32)
        tokens = order // TOP_K
        gate, up = _grouped(x[tokens], self.gate_up, ends).chunk(2, dim=-1)
        out = _grouped(F.silu(gate) * up, self.down, ends) * weights.flatten()[order][:, None]
        balance = NUMBER * (used / len(experts) * chances.mean(dim=0)).sum()
        return torch.zeros_like(x, dtype=out.dtype).index_add(0, tokens, out), balance


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """In bf16, which autocast does not see to."""
    return torch._grouped_mm(x.bfloat16(), weight.bfloat16().transpose(-2, -1), offs=ends)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(config.width), Attention(config)
        self.experts_norm, self.experts = nn.LayerNorm(config.width), Experts(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attention(self.attention_norm(x))
        out, balance = self.experts(self.experts_norm(x).flatten(0, 1))
        return x + out.view_as(x), balance


class MoEGPT(nn.Module):
    """As GPT-2, but for its FFNs; where gradients are recorded the loss holds that of the routers."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        balances = []
        for block in self.blocks:
            x, balance = block(x)
            balances.append(balance)
        loss = F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), targets.flatten())
        return loss + _BALANCE * torch.stack(balances).sum() if torch.is_grad_enabled() else loss
