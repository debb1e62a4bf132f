"""Train a small GPT with Lightning and ``backend="sste"``.

    pip install lightning
    python examples/trainer_lightning.py                # a GPU: 8 layers of 2048 features, in bf16 autocast
    python examples/trainer_lightning.py --steps 100    # no GPU: a tiny model, its kernels are emulated

The backend needs one line: compile the model that ``training_step`` calls, in place, ``module.model.compile(
backend="sste")``.  Checkpoints, callbacks and loggers stay as they are.  The text is the source code of Python's
standard library, read byte by byte.

Expect a loss that falls from 5.5, the table of what was rewritten (the FFN in 2:4 FP8, attention in FP8, the head
dense), and the speed.  The first step is slow: it compiles.
"""

import argparse
import sysconfig
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compile


class GPT(nn.Module):
    """PyTorch's own transformer layers with a causal mask; returns logits ``[batch, context, 256]``."""

    mask: Tensor

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for layer in self.layers:
            x = layer(x, self.mask, is_causal=True)
        logits: Tensor = self.head(self.norm(x))
        return logits


class Module(lightning.LightningModule):
    """Next-byte prediction."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (tokens,) = batch
        logits = self.model(tokens[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        if index % 5 == 0:
            self.print(f"step {index + 1}: loss {loss.item():.3f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def windows(length: int) -> Tensor:
    """The standard library's source, int64 ``[windows, length]``."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return text[: len(text) // length * length].view(-1, length).long()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args(argv)

    on_gpu = torch.cuda.is_available()
    context, batch = (2048, 8) if on_gpu else (64, 8)
    torch.manual_seed(0)
    model = GPT(2048, 8, 16, context) if on_gpu else GPT(64, 2, 4, context)
    module = Module(model, learning_rate=3e-4 if on_gpu else 3e-3)
    # Without a Hopper GPU nothing would be rewritten. "always" emulates the kernels, slowly, and "eager" needs no C++
    # compiler. On a GPU leave both out: then what is measured to be faster is rewritten.
    options = {} if on_gpu else {"sste.when": "always", "sste.executor": "eager"}
    module.model.compile(backend="sste", options=options)

    trainer = lightning.Trainer(
        max_steps=args.steps,
        precision="bf16-mixed" if on_gpu else "32-true",
        devices=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    dataset = torch.utils.data.TensorDataset(windows(context + 1))
    trainer.fit(module, torch.utils.data.DataLoader(dataset, batch, shuffle=True, drop_last=True))

    report = sparse_compile.report()
    print(f"\n{report}\n")
    if step := report.step():  # without steps that compile
        print(f"{batch * context / step.median * 1e3:,.0f} tokens a second" + ("" if on_gpu else " (emulated)"))


if __name__ == "__main__":
    main()
