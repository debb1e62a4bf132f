"""Train a small GPT twice, dense and with ``backend="sste"``, and compare the two runs.

    python examples/train_gpt.py                    # GPT-2-small shape on a GPU, a tiny model elsewhere
    python examples/train_gpt.py --steps 1000 --recipe fp8 --out run.json

The text is the source code of Python's standard library, read byte by byte, so nothing is downloaded.  Both runs start
from the same weights and see the same batches in the same order.
"""

import argparse
import gc
import json
import math
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import sparse_compile
from sparse_compile.kernels.ops import emulation_reason
from sparse_compile.recipe import RECIPES


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of a GPT, and whether its vocabulary head is tied to the embedding."""

    layers: int
    heads: int
    width: int
    context: int
    vocabulary: int = 256
    tied: bool = True


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        split = self.qkv(x).view(batch, context, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, context, width))
        return out


class FeedForward(nn.Module):
    """Two linears with a GELU between them: what becomes 2:4 sparse."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.width)
        self.ffn = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.ffn(self.ffn_norm(x))
        return out


class GPT(nn.Module):
    """A GPT with learned positions.  Returns the mean cross entropy."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # The products that write into the residual stream start smaller, so that its variance does not grow with depth.
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "ffn.down.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers))
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def corpus() -> tuple[Tensor, Tensor]:
    """Training and validation bytes, uint8: the standard library's sources by path, every 20th file held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    # Some installations leave the tests of the standard library out.
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    names: list[str] = []
    for folder, folders, files_there in os.walk(root):
        folders[:] = set(folders) - skipped  # not walked through: what is installed is large
        names += (Path(folder, name).relative_to(root).as_posix() for name in files_there if name.endswith(".py"))
    files = [(root / name).read_bytes() for name in sorted(names)]
    held_out = b"".join(files[19::20])
    train = b"".join(text for i, text in enumerate(files) if i % 20 != 19)
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, held_out))  # type: ignore[return-value]


def batches(
    data: Tensor, *, batch: int, context: int, steps: int, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """``steps`` pairs of tokens and next tokens, int64 ``[batch, context]``: windows of ``data`` at random offsets.

    Args:
        data: tokens of any integer dtype.
    """
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(context + 1)
    for _ in range(steps):
        offsets = torch.randint(len(data) - context, (batch, 1), generator=generator)
        text = data[offsets + window].long()
        if device.type == "cuda":
            text = text.pin_memory()
        text = text.to(device, non_blocking=True)
        yield text[:, :-1], text[:, 1:]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: batches of ``batch`` windows, AdamW with a warm-up and a cosine decay to a tenth."""

    steps: int
    batch: int
    learning_rate: float
    seed: int
    warmup: float = 0.1  # part of the steps
    weight_decay: float = 0.1  # of matrices
    clip: float = 1.0  # norm of the gradient
    validation_batches: int = 16

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of ``step``, counted from 0."""
        warmup_steps = max(1, round(self.warmup * self.steps))
        if step < warmup_steps:
            return self.learning_rate * (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, self.steps - warmup_steps)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What one training run gave."""

    losses: list[float]  # of each step
    validation_loss: float
    tokens_per_second: float  # without the first tenth of the steps, which compile
    seconds: float  # of all steps, compilation included
    peak_memory_gib: float | None  # of a GPU

    @property
    def training_loss(self) -> float:
        """Mean loss of the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def optimizer_of(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused AdamW; matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def train(
    name: str,
    model_config: GPTConfig,
    config: TrainConfig,
    data: tuple[Tensor, Tensor],
    device: torch.device,
    compiled: Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]],
    make_model: Callable[[GPTConfig], nn.Module] = GPT,
    make_optimizer: Callable[[nn.Module, TrainConfig], Any] = optimizer_of,
    on_step: Callable[[int, Callable[[Tensor, Tensor], Tensor]], None] = lambda step, model: None,
) -> TrainResult:
    """Train a fresh GPT and measure it.

    Args:
        compiled: turns the model into what is called in each step.
        on_step: called after each step, with its number from 0 and what is called in each.
    """
    # What an earlier run compiled must neither help this one nor hold memory.
    torch.compiler.reset()
    gc.collect()
    torch.manual_seed(config.seed)
    model = make_model(model_config).to(device)
    step_model = compiled(model)
    optimizer = make_optimizer(model, config)
    shape: dict[str, Any] = {"batch": config.batch, "context": model_config.context, "device": device}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    losses = []
    untimed = max(1, config.steps // 10) if config.steps > 1 else 0
    start = timed_from = _now(device)
    steps = batches(data[0], steps=config.steps, seed=config.seed, **shape)
    interval = 0.5 if sys.stdout.isatty() else 15.0
    progress = tqdm(steps, name, config.steps, unit="step", mininterval=interval, file=sys.stdout, ascii=True)
    for step, (tokens, targets) in enumerate(progress):
        if step == untimed:
            timed_from = _now(device)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step)
        with _autocast(device):
            loss = step_model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())  # a CUDA graph writes its next loss where the last one was
        if step % 10 == 9:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        on_step(step, step_model)
    end = _now(device)
    return TrainResult(
        losses=torch.stack(losses).tolist(),
        validation_loss=validation_loss(step_model, data[1], config, model_config.context, device),
        tokens_per_second=(config.steps - untimed) * config.batch * model_config.context / (end - timed_from),
        seconds=end - start,
        peak_memory_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    )


def validation_loss(
    model: Callable[[Tensor, Tensor], Tensor], text: Tensor, config: TrainConfig, context: int, device: torch.device
) -> float:
    """Mean loss of ``config.validation_batches`` batches of a text, the same for every run, whatever its seed."""
    windows = batches(text, steps=config.validation_batches, seed=0, batch=config.batch, context=context, device=device)
    with torch.no_grad(), _autocast(device):
        return torch.stack([model(tokens, targets).clone() for tokens, targets in windows]).mean().item()


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


PRESETS = {
    "tiny": (
        GPTConfig(layers=4, heads=4, width=128, context=128),
        TrainConfig(steps=200, batch=8, learning_rate=3e-3, seed=0),
    ),
    "gpt2-small": (
        GPTConfig(layers=12, heads=12, width=768, context=1024),
        TrainConfig(steps=300, batch=16, learning_rate=6e-4, seed=0),
    ),
    # Few layers of the width of an 8B model: large enough to gain.
    "wide": (
        GPTConfig(layers=4, heads=32, width=4096, context=2048, tied=False),
        TrainConfig(steps=60, batch=8, learning_rate=1e-4, seed=0),
    ),
}


def dense_step(model: nn.Module, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """The baseline: torch.compile on a GPU; eager elsewhere, where compiling would take longer than the run."""
    return torch.compile(model) if device.type == "cuda" else model


def sste_step(model: nn.Module, device: torch.device, recipe: str, when: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The same model through ``backend="sste"``; without code generation where the baseline is eager."""
    executor = "inductor" if device.type == "cuda" else "eager"
    options = {"sste.recipe": recipe, "sste.executor": executor, "sste.when": when}
    return torch.compile(model, backend="sste", options=options)  # type: ignore[arg-type]


def milestones(steps: int) -> list[int]:
    """The first step, the last one and four between them, counted from 0."""
    return sorted({round(i * (steps - 1) / 5) for i in range(6)})


def summary(runs: dict[str, TrainResult], device: torch.device) -> str:
    """Losses on the way and at the end, and speeds, one column for each run."""
    steps = len(next(iter(runs.values())).losses)
    rows = [["", *runs]]
    for mark in milestones(steps):
        rows.append([f"loss at step {mark + 1}", *(f"{run.losses[mark]:.4f}" for run in runs.values())])
    rows.append(["training loss, last tenth", *(f"{run.training_loss:.4f}" for run in runs.values())])
    rows.append(["validation loss", *(f"{run.validation_loss:.4f}" for run in runs.values())])
    rows.append(["tokens per second", *(f"{run.tokens_per_second:,.0f}" for run in runs.values())])
    rows.append(["seconds, with compilation", *(f"{run.seconds:.1f}" for run in runs.values())])
    if device.type == "cuda":
        rows.append(["peak memory, GiB", *(f"{run.peak_memory_gib:.2f}" for run in runs.values())])
    return "\n".join(f"{row[0]:<26}" + "".join(f"{cell:>12}" for cell in row[1:]) for row in rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line; defaults depend on the device."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=PRESETS, help="default: gpt2-small on a GPU, tiny elsewhere")
    parser.add_argument("--steps", type=int, help="default: the preset's")
    without_tail = [name for name, recipe in RECIPES.items() if not recipe.tail]  # a tail must know all steps
    parser.add_argument("--recipe", default="s-ste", choices=without_tail)
    # What is compared is how a recipe learns, whether or not it is faster for this model and there are kernels.
    parser.add_argument("--when", default="always", choices=["always", "faster"], help="which linears are rewritten")
    parser.add_argument("--runs", nargs="+", default=["dense", "sste"], choices=["dense", "sste"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all results to FILE as JSON")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train dense and with sste; print and save what came out."""
    args = parse(argv)
    device = torch.device(args.device)
    preset = args.preset or ("gpt2-small" if device.type == "cuda" else "tiny")
    model_config, config = PRESETS[preset]
    config = replace(config, seed=args.seed, steps=args.steps or config.steps)
    data = corpus()

    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    reason = emulation_reason(device)
    emulated = reason is not None and args.when == "always"
    kernels = (
        f"emulated by their eager definitions ({reason})" if emulated else f"none, the model runs dense ({reason})"
    )
    kernels = "run as kernels" if reason is None else kernels
    print(f"{preset} on {device_name}, torch {torch.__version__}: {model_config}, {config}")
    print(f"text: {len(data[0]) / 1e6:.1f} MB of Python source to train on, {len(data[1]) / 1e6:.1f} MB held out")
    print(f"sste operations: {kernels}")
    if device.type != "cuda":
        print("no code generation here: the dense run is eager, the sste run uses sste.executor=eager")

    ways: dict[str, Callable[[nn.Module], Callable[[Tensor, Tensor], Tensor]]] = {
        "dense": lambda model: dense_step(model, device),
        "sste": lambda model: sste_step(model, device, args.recipe, args.when),
    }
    runs = {name: train(name, model_config, config, data, device, ways[name]) for name in ways if name in args.runs}
    report = sparse_compile.report()
    print(f"\n{report}\n")
    print(summary(runs, device))
    if "sste" in runs and emulated:
        print("sste was emulated: its losses are those of the recipe, its speed means nothing")
    elif len(runs) == 2:
        ratio = runs["sste"].tokens_per_second / runs["dense"].tokens_per_second
        print(f"sste / dense: {ratio:.3f}x tokens per second")
    if args.out is not None:
        result = {
            "device": device_name,
            "torch": torch.__version__,
            "recipe": args.recipe,
            "emulated": reason if emulated else None,
            "model": asdict(model_config),
            "training": asdict(config),
            "runs": {name: asdict(run) for name, run in runs.items()},
            "report": json.loads(report.to_json()),
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
