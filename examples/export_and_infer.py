"""Train a small Llama with ``backend="sste"``, export it as a 2:4 model, and run inference with that.

    pip install transformers
    python examples/export_and_infer.py                 # a GPU: 4 layers of Llama-3.2-1B's shape, and how fast they are
    python examples/export_and_infer.py --steps 30      # no GPU: a tiny Llama, its kernels are emulated, no speeds

Training keeps the weights dense and multiplies with their 2:4 projections.  ``finalize`` writes these into the weights:
the result is an ordinary model that computes the same without this package.

Expect the loss, a check that the weights of the FFN are 2:4, a loss of the saved model that is that of the trained one
up to the rounding of FP8, generated text (poor, after so few steps), and on a Hopper GPU the time of a forward
pass with dense weights, with 2:4 weights in bf16 (torch.sparse, cuSPARSELt), and in FP8 (this backend).
"""

import argparse
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM

import sparse_compile


def batches(count: int, batch: int, context: int) -> Tensor:
    """The standard library's source, byte by byte: int64 ``[count, batch, context]``."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    offsets = torch.randint(len(text) - context, (count, batch, 1))
    return text[offsets + torch.arange(context)].long()


def is_24(weight: Tensor) -> bool:
    """Whether at most two of each four neighbours along in_features are nonzero; ``weight`` is ``[out, in]``."""
    return bool((weight.unflatten(1, (-1, 4)).count_nonzero(-1) <= 2).all())


def load(folder: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """The saved model, on the GPU if there is one."""
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def milliseconds(model: LlamaForCausalLM, ids: Tensor) -> float:
    """Median time of a forward pass."""
    with torch.no_grad():
        timer = Timer("model(input_ids=ids, use_cache=False)", globals={"model": model, "ids": ids})
        timer.timeit(3)  # compiles
        return float(timer.blocked_autorange(min_run_time=2).median * 1e3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--output", default="out/export_and_infer", help="folder of the 2:4 model")
    args = parser.parse_args(argv)

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    context, batch = (2048, 8) if on_gpu else (64, 8)
    if on_gpu:
        shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    else:
        shape = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    # Without a Hopper GPU nothing would be rewritten. "always" emulates the kernels, slowly, and "eager" needs no C++
    # compiler. On a GPU leave both out: then what is measured to be faster is rewritten.
    options = {} if on_gpu else {"sste.when": "always", "sste.executor": "eager"}

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, bos_token_id=None, eos_token_id=None, **shape, **heads)
    model = LlamaForCausalLM(config).to(device)
    model.compile(backend="sste", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4 if on_gpu else 3e-3)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=on_gpu)
    *training, held_out = batches(args.steps + 1, batch, context).to(device)
    for step, ids in enumerate(training):
        with autocast:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step + 1 == args.steps:
            print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    print(f"\n{sparse_compile.report()}\n")

    with autocast:
        trained = model(input_ids=held_out, labels=held_out).loss.item()
    names = sparse_compile.finalize(model)
    model.save_pretrained(args.output)

    loaded = load(args.output, torch.float32)
    weights = dict(loaded.named_parameters())
    pruned = [name for name in names if is_24(weights[name])]
    print(f"{len(pruned)} of the {len(names)} weights that training pruned are 2:4 in {args.output}")
    with autocast, torch.no_grad():
        exported = loaded(input_ids=held_out, labels=held_out).loss.item()
    print(f"loss on held-out text: {trained:.4f} as trained, {exported:.4f} as exported")

    prompt = torch.tensor([list(b"    def ")], device=device)
    generated = loaded.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=0)
    print(f"generated: {bytes(generated[0].tolist())!r}")

    if not on_gpu:
        print("no GPU: the comparison of speeds is skipped")
        return
    # Frozen weights are rewritten only where they are 2:4, and only if asked to.
    ways: dict[str, dict[str, Any]] = {
        "dense bf16": {"backend": "inductor"},
        "2:4 FP8": {"backend": "sste", "options": {"sste.frozen": "sparse"}},
    }
    for way, compiled in ways.items():
        model = load(args.output, torch.bfloat16).requires_grad_(False)
        model.compile(**compiled)
        print(f"{way:<12} compiled {milliseconds(model, held_out):8.2f} ms for {held_out.numel()} tokens")
    model = load(args.output, torch.bfloat16)
    print(f"{'dense bf16':<12} eager    {milliseconds(model, held_out):8.2f} ms")
    sparse_compile.to_sparse(model)
    print(f"{'2:4 bf16':<12} eager    {milliseconds(model, held_out):8.2f} ms")


if __name__ == "__main__":
    main()
