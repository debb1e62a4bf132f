"""A GPT as they are tuned in 2026, and its optimizers: what a recipe must hold in, beside GPT-2's."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import _muon

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from train_gpt import GPTConfig, TrainConfig

HEAD_WIDTH = 64
# Muon's update has the size of AdamW's, so both take the learning rate of the run; the embedding and the head learn
# faster than matrices between them.
_EMBEDDING_RATE = 3.0


class Attention(nn.Module):
    """Causal attention of normalised queries and keys, which are rotated by their position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        batch, context, width = x.shape
        heads = (batch, context, width // HEAD_WIDTH, HEAD_WIDTH)
        query, key = (F.rms_norm(part(x).view(heads), (HEAD_WIDTH,)) for part in (self.q, self.k))
        query, key = (_rotated(part, cosines, sines).transpose(1, 2) for part in (query, key))
        value = self.v(x).view(heads).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, context, width))
        return out


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines + second * sines, second * cosines - first * sines), dim=-1).to(x.dtype)


class FeedForward(nn.Module):
    """Two linears with the square of a ReLU between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.relu(self.up(x)).square())
        return out


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention, self.ffn = Attention(config), FeedForward(config)

    def forward(self, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        x = x + self.attention(F.rms_norm(x, x.shape[-1:]), cosines, sines)
        out: Tensor = x + self.ffn(F.rms_norm(x, x.shape[-1:]))
        return out


class ModernGPT(nn.Module):
    """RMS norms without weights, rotary positions, an untied head, and output projections that begin at zero."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                nn.init.zeros_(parameter)
            elif name.startswith("embedding"):
                nn.init.normal_(parameter)
            else:
                nn.init.normal_(parameter, std=config.width**-0.5)
        frequencies = 10000.0 ** -torch.linspace(0, 1, HEAD_WIDTH // 2)
        angles = torch.arange(config.context).outer(frequencies)[:, None, :]
        self.register_buffer("cosines", angles.cos(), persistent=False)
        self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = F.rms_norm(self.embedding(tokens), (self.embedding.embedding_dim,))
        for block in self.blocks:
            x = block(x, self.cosines, self.sines)
        logits = self.head(F.rms_norm(x, x.shape[-1:]))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Graphed:
    """A function of one CUDA tensor and constants as one CUDA graph for each shape, dtype and device: the same kernels.

    What it returns is overwritten by the next call of that shape.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, *constants: Any) -> Tensor:
        if not x.is_cuda:
            return self._function(x, *constants)
        key = (x.shape, x.dtype, x.device, constants)
        if key not in self._graphs:
            self._graphs[key] = self._captured(x, *constants)
        graph, argument, result = self._graphs[key]
        argument.copy_(x)
        graph.replay()
        return result

    def _captured(self, x: Tensor, *constants: Any) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        argument = x.clone(memory_format=torch.contiguous_format)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            self._function(argument, *constants)  # loads what a first call loads, which cannot be captured
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self._function(argument, *constants)
        return graph, argument, result


class MuonAndAdamW:
    """Muon for the matrices of blocks, AdamW for the embedding and the head, stepped together.

    Muon's many small products are one CUDA graph of each shape: the host would launch them more slowly than a small
    model trains, with every backend.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        if not isinstance(_muon._zeropower_via_newtonschulz, Graphed):
            _muon._zeropower_via_newtonschulz = Graphed(_muon._zeropower_via_newtonschulz)
        hidden = [p for name, p in model.named_parameters() if name.startswith("blocks.")]
        others = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
        muon = torch.optim.Muon(
            hidden, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        adamw = torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._optimizers = (muon, adamw)
        self.param_groups = [_Scaled(group, 1.0) for group in muon.param_groups]
        self.param_groups += [_Scaled(group, _EMBEDDING_RATE) for group in adamw.param_groups]

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()


class _Scaled:
    """A group of an optimizer, whose learning rate is a multiple of the one that is set."""

    def __init__(self, group: dict[str, Any], factor: float) -> None:
        self._group, self._factor = group, factor

    def __setitem__(self, name: str, value: float) -> None:
        self._group[name] = value * self._factor

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)
