"""Is it true?  Real kernels against the eager reference, their instructions, and the time of a training step.

    python benchmarks/first_slice.py loss       300 steps of a GPT-2-small shape: kernels and reference, same seed
    python benchmarks/first_slice.py profile    which kernels a step runs; the sparse instruction in their SASS
    python benchmarks/first_slice.py step       step time against torch.compile bf16, and torchao float8 if installed

Each part adds its results to ``results/first_slice.json`` and its table to ``results/first_slice.md``.
"""

import argparse
import gc
import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_gpt
from harness import RESULTS, interleave, write

import sparse_compile
from sparse_compile.kernels import ops

DEVICE = torch.device("cuda")
TOLERANCE = 0.02


def loss_part(steps: int) -> tuple[dict[str, Any], str]:
    """Losses of the same training run, once through the kernels and once through their eager definitions."""
    model_config, config = train_gpt.PRESETS["gpt2-small"]
    config = replace(config, steps=steps, batch=8)
    data = train_gpt.corpus()
    runs = {}
    for name in ("kernels", "reference"):
        with ops.force_reference() if name == "reference" else nullcontext():
            runs[name] = train_gpt.train(
                name, model_config, config, data, DEVICE, lambda model: train_gpt.sste_step(model, DEVICE, "s-ste")
            )
    difference = runs["kernels"].training_loss - runs["reference"].training_loss
    validation = runs["kernels"].validation_loss - runs["reference"].validation_loss
    marks = train_gpt.milestones(steps)
    rows = [(f"loss at step {mark + 1}", *(run.losses[mark] for run in runs.values())) for mark in marks]
    rows.append(("training loss, last tenth", *(run.training_loss for run in runs.values())))
    rows.append(("validation loss", *(run.validation_loss for run in runs.values())))
    rows = [(name, kernels, reference, kernels - reference) for name, kernels, reference in rows]
    headers = ("", "kernels", "reference", "difference")
    table = tabulate(rows, headers=headers, floatfmt=("", ".4f", ".4f", "+.4f"), tablefmt="github")
    print(table)
    executions = [graph.execution for graph in sparse_compile.report().graphs]
    if not any(execution == "kernels" for execution in executions) or max(abs(difference), abs(validation)) > TOLERANCE:
        raise SystemExit(f"FAILED: off by more than {TOLERANCE}, or no kernels ran: {executions}")
    results = {
        "model": asdict(model_config),
        "training": asdict(config),
        "difference": {"training": difference, "validation": validation},
        "runs": {name: asdict(run) for name, run in runs.items()},
    }
    return results, table


def profile_part() -> tuple[dict[str, Any], str]:
    """GPU time of one step by kernel, and the matrix instructions in the sparse GEMM's machine code."""
    step = training_step(gpt2_small(), "sste")
    for _ in range(5):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = sorted(
        ((event.key, event.count, event.device_time_total / 1e3) for event in profiler.key_averages()),
        key=lambda kernel: -kernel[2],
    )
    instructions = sass_instructions()
    top = [(name[:80], count, time) for name, count, time in kernels[:20]]
    table = tabulate(top, headers=("kernel", "calls", "ms"), floatfmt=".3f", tablefmt="github")
    table += "\n\nMatrix instructions in the machine code of the sparse GEMM:\n\n"
    table += tabulate(
        [(variant, name, count) for variant, found in instructions.items() for name, count in found.items()],
        headers=("", "instruction", "count"),
        tablefmt="github",
    )
    print(table)
    sparse_calls = sum(count for key, count, _ in kernels if "sparse_gemm" in key)
    # 12 blocks, two FFN linears each, fprop and wgrad.
    if sparse_calls != 48 or not all(any("QGMMA.SP" in name for name in found) for found in instructions.values()):
        raise SystemExit(f"FAILED: {sparse_calls} sparse GEMMs in a step instead of 48, or no QGMMA.SP: {instructions}")
    return {"kernels": kernels, "sparse_gemm_calls": sparse_calls, "sass": instructions}, table


def sass_instructions() -> dict[str, dict[str, int]]:
    """Counts of the matrix instructions in each compiled variant of the sparse GEMM."""
    from sparse_compile.kernels import sparse_gemm

    caches = sparse_gemm.sparse_gemm_kernel.device_caches.values()
    variants = [compiled for cache in caches for compiled in cache[0].values()]
    return {
        f"variant {index}": dict(Counter(re.findall(r"\b[QH]GMMA[.\w]*", compiled.asm["sass"])))
        for index, compiled in enumerate(variants)
    }


def gpt2_small() -> tuple[nn.Module, int, tuple[int, int]]:
    """Hugging Face's GPT-2 small with random weights: the model, its vocabulary, a batch's shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50304, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, use_cache=False)
    return GPT2LMHeadModel(config), 50304, (16, 1024)


def llama_8b_shape() -> tuple[nn.Module, int, tuple[int, int]]:
    """Four layers of Llama-3-8B with a vocabulary of 32000."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=4,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        use_cache=False,
    )
    return LlamaForCausalLM(config), 32000, (4, 4096)


MODELS: dict[str, Callable[[], tuple[nn.Module, int, tuple[int, int]]]] = {
    "gpt2-small": gpt2_small,
    "llama-8b-4-layers": llama_8b_shape,
}


def training_step(made: tuple[nn.Module, int, tuple[int, int]], kind: str) -> Callable[[], Tensor]:
    """One step of a bf16 model: forward, backward, fused AdamW.  ``kind``: bf16, sste, or a recipe of torchao."""
    model, vocabulary, shape = made
    model = model.to(DEVICE, torch.bfloat16)
    if kind.startswith("torchao "):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(kind.removeprefix("torchao "))
        convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: "lm_head" not in name)
    compiled = torch.compile(model, backend="sste" if kind == "sste" else "inductor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    ids = torch.randint(0, vocabulary, shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))

    def step() -> Tensor:
        loss: Tensor = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def step_part(names: list[str], rounds: int) -> tuple[dict[str, Any], str]:
    """Median step times of the candidates of each model, taking turns, and ratios to torch.compile bf16."""
    kinds = ["bf16", "sste"]
    if importlib.util.find_spec("torchao") is not None:
        kinds.append("torchao tensorwise")
    results: dict[str, Any] = {}
    rows = []
    for name in names:
        torch.compiler.reset()
        gc.collect()
        torch.manual_seed(0)
        candidates = {kind: training_step(MODELS[name](), kind) for kind in kinds}
        losses = {kind: float(step()) for kind, step in candidates.items()}
        if not all(abs(loss - losses["bf16"]) < 0.5 for loss in losses.values()):
            raise SystemExit(f"FAILED: first losses of {name} differ: {losses}")
        timings = interleave(candidates, rounds, warmup=4)
        bf16 = timings["bf16"].median
        results[name] = {kind: {**asdict(timing), "speedup": bf16 / timing.median} for kind, timing in timings.items()}
        rows += [(name, kind, t.median, t.low, t.high, bf16 / t.median, losses[kind]) for kind, t in timings.items()]
    headers = ("model", "step", "ms", "p10", "p90", "x bf16", "first loss")
    table = tabulate(rows, headers=headers, floatfmt=".3f", tablefmt="github")
    print(table)
    return results, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("loss", "profile", "step"))
    parser.add_argument("--steps", type=int, default=300, help="of the loss part")
    parser.add_argument("--rounds", type=int, default=20, help="of the step part")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    parts: dict[str, Callable[[], tuple[dict[str, Any], str]]] = {
        "loss": lambda: loss_part(args.steps),
        "profile": profile_part,
        "step": lambda: step_part(args.models, args.rounds),
    }
    results, table = parts[args.part]()
    write("first_slice", args.part, results, table, args.out)


if __name__ == "__main__":
    main()
