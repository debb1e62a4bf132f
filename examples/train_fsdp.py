"""Train a small GPT with FSDP2 and ``backend="sste"``, write checkpoints, and resume from them.

    torchrun --nproc-per-node 2 examples/train_fsdp.py                          # 40 steps
    torchrun --nproc-per-node 2 examples/train_fsdp.py --steps 80 --resume      # 40 more, from the last checkpoint

With GPUs, 8 layers of 2048 features are trained in bf16; without, a tiny model over gloo, whose kernels are emulated.

Compile each block in place, then shard it.  The optimizer's state holds β, the scale of each pruned weight, so a
checkpoint needs the model and the optimizer, as usual.  A resumed run is the continued run: the two commands above
print the losses that ``--steps 80`` prints.  The text is the source code of Python's standard library.

Expect a loss that falls from about 6, the table of what was rewritten (one for all blocks, since they share their
graph), and the speed of all processes together.
"""

import argparse
import os
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import sparse_compile


class Block(nn.Module):
    """PyTorch's own transformer layer with a causal mask.

    A class of one's own is needed: dynamo skips the ``forward`` of torch.nn's classes, so ``Module.compile`` alone does
    nothing for a plain ``nn.TransformerEncoderLayer`` or ``nn.Sequential``.
    """

    mask: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, self.mask, is_causal=True)
        return out


class GPT(nn.Module):
    """Returns logits ``[batch, context, 256]``."""

    def __init__(self, width: int, layers: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, context) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def corpus() -> Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of the whole run, those before a resume included")
    parser.add_argument("--save-every", type=int, default=20, help="steps between two checkpoints")
    parser.add_argument("--checkpoints", type=Path, default=Path("out/train_fsdp"), help="folder of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    args = parser.parse_args(argv)

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    context, batch = (2048, 8) if on_gpu else (64, 4)  # of each process

    torch.manual_seed(0)
    model = (GPT(2048, 8, 16, context) if on_gpu else GPT(64, 2, 4, context)).to(device)
    # Without a Hopper GPU nothing would be rewritten. "always" emulates the kernels, slowly, and "eager" needs no C++
    # compiler. On a GPU leave both out: then what is measured to be faster is rewritten.
    options = {} if on_gpu else {"sste.when": "always", "sste.executor": "eager"}
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        block.compile(backend="sste", options=options)
        fully_shard(block, mp_policy=precision)
    fully_shard(model, mp_policy=precision)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4 if on_gpu else 3e-3)

    text, first, state = corpus(), 0, dict[str, Any]()
    saved = [int(file.parent.name) for file in args.checkpoints.glob("*/.metadata")]
    if args.resume and saved:
        first = max(saved)
        # A call tells the backend which weights it prunes, so that the optimizer's state has a place for their β.
        model(torch.zeros(batch, context, dtype=torch.long, device=device))
        state["model"], state["optimizer"] = get_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=args.checkpoints / str(first))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    for step in range(first, args.steps):
        # The backward pass samples. With a seed for each step and process, a resumed run samples and reads the same.
        torch.manual_seed(step * processes + rank)
        offsets = torch.randint(len(text) - context, (batch, 1))
        tokens = text[offsets + torch.arange(context + 1)].long().to(device)
        loss = F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / processes
        dist.all_reduce(mean)
        if rank == 0 and (step % 5 == 0 or step + 1 == args.steps):
            print(f"step {step + 1}: loss {mean.item():.4f}", flush=True)
        if (step + 1) % args.save_every == 0:
            state["model"], state["optimizer"] = get_state_dict(model, optimizer)
            dcp.save(state, checkpoint_id=args.checkpoints / str(step + 1))

    report = sparse_compile.report()
    if rank == 0:
        print(f"\n{report}\n")
        if time := report.step():  # without steps that compile
            speed = processes * batch * context / time.median * 1e3
            print(f"{speed:,.0f} tokens a second" + ("" if on_gpu else " (emulated)"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
