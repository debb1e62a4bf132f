"""Llama-3.2-1B's layers in Hugging Face's classes, called as the GPTs of these benchmarks are."""

import sys
from pathlib import Path

import torch.nn.functional as F
from step_models import llama
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from train_gpt import GPTConfig


class Llama(nn.Module):
    """Gated FFNs of four times the width, eight heads of keys and values, an untied head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.network = llama(config.width, 4 * config.width, config.layers, config.context)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = self.network(input_ids=tokens).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
