"""Train a vision transformer with ``backend="sste"``.

    pip install timm                            # or transformers: its ViT is taken where timm is missing
    python examples/train_vit.py                # a GPU: ViT-L/16 on images of 224 x 224, in bf16 autocast
    python examples/train_vit.py --steps 100    # no GPU: a tiny ViT on images of 16 x 16, its kernels are emulated

The images are generated, so nothing is downloaded: stripes in one of ten directions, of random width and phase, under
noise.  The model is to name the direction.

Expect a loss that falls from about 2.3, right answers on new images well above the 10 % of a guess, the table of what
was rewritten, and the speed.  The first step is slow: it compiles.
"""

import argparse
import math
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparse_compile

CLASSES = 10


class ViT(nn.Module):
    """timm's or transformers' vision transformer with random weights; returns logits ``[batch, CLASSES]``."""

    def __init__(self, image: int, patch: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        if find_spec("timm"):
            timm: Any = import_module("timm.models.vision_transformer")
            self.model = timm.VisionTransformer(
                img_size=image, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=CLASSES
            )
        else:
            transformers: Any = import_module("transformers")
            config = transformers.ViTConfig(
                image_size=image, patch_size=patch, hidden_size=width, num_hidden_layers=depth,
                num_attention_heads=heads, intermediate_size=4 * width, num_labels=CLASSES,
            )  # fmt: skip
            self.model = transformers.ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        logits: Tensor = getattr(output, "logits", output)
        return logits


def stripes(batch: int, size: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images ``[batch, 3, size, size]`` of about ``count`` stripes, and the number of their direction, ``[batch]``."""
    labels = torch.randint(CLASSES, (batch,), device=device)
    angle = (labels * math.pi / CLASSES).view(-1, 1, 1)
    width, phase = torch.rand(2, batch, 1, 1, device=device)
    y, x = torch.meshgrid(*[torch.arange(size, device=device) / size] * 2, indexing="ij")
    waves = torch.sin(2 * math.pi * (count * (0.75 + 0.5 * width) * (x * angle.cos() + y * angle.sin()) + phase))
    noise = torch.randn(batch, 3, size, size, device=device)
    return waves.unsqueeze(1) + 0.3 * noise, labels


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="default: 200 on a GPU, 60 elsewhere")
    args = parser.parse_args(argv)

    on_gpu = torch.cuda.is_available()
    steps = args.steps or (200 if on_gpu else 60)
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    if on_gpu:
        size, patch, batch = 224, 16, 128
        model = ViT(size, patch, width=1024, depth=24, heads=16).to(device)
    else:
        size, patch, batch = 16, 4, 32
        model = ViT(size, patch, width=64, depth=2, heads=4)
    # Without a Hopper GPU nothing would be rewritten. "always" emulates the kernels, slowly, and "eager" needs no C++
    # compiler. On a GPU leave both out: then what is measured to be faster is rewritten.
    options = {} if on_gpu else {"sste.when": "always", "sste.executor": "eager"}
    model.compile(backend="sste", options=options)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4 if on_gpu else 4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], steps, pct_start=0.1)
    for step in range(steps):
        images, labels = stripes(batch, size, size // patch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 0 or step + 1 == steps:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)

    model.eval()
    images, labels = stripes(batch, size, size // patch, device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
        right = (model(images).argmax(1) == labels).float().mean().item()
    report = sparse_compile.report()
    print(f"\n{report}\n\n{right:.0%} of new images are classified correctly")
    if time := report.step():  # without steps that compile
        print(f"{batch / time.median * 1e3:,.0f} images a second" + ("" if on_gpu else " (emulated)"))


if __name__ == "__main__":
    main()
