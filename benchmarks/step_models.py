"""The training steps that are measured: random weights and random inputs, in the classes of Hugging Face and timm.

The tables of rotary embeddings that the backend keeps have nothing to do with sparsity or FP8, so every candidate has
them: the graphs of the baselines go through that pass, too.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from modern_gpt import ModernGPT, MuonAndAdamW
from train_gpt import GPTConfig, TrainConfig

import sparse_compile  # noqa: F401 - registers the backend where it is not installed
from sparse_compile.passes.keep_rotary_tables import keep_rotary_tables


def _inductor(mode: str = "default") -> dict[str, Any]:
    """Arguments of torch.compile: Inductor, with rotary tables."""
    compile_graph = torch._TorchCompileInductorWrapper(mode, None, None)

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        keep_rotary_tables(graph)
        compiled: Callable[..., Any] = compile_graph(graph, inputs)
        return compiled

    return {"backend": backend}


# How a step is compiled: these, and "sste" with more words (_OPTIONS).  Those of torchao, "torchao <recipe>" with or
# without HEAD_IN_FP8, are compiled as bf16 is.
BF16 = "bf16"
SSTE = "sste"
SSTE_BOTH = "sste, transposable"
COMPILE: dict[str, dict[str, Any]] = {
    BF16: _inductor(),
    "bf16 max-autotune": _inductor("max-autotune-no-cudagraphs"),
    "bf16 reduce-overhead": _inductor("reduce-overhead"),
    SSTE: {"backend": "sste"},
    "sste reduce-overhead": {"backend": "sste", "mode": "reduce-overhead"},
}
HEAD_IN_FP8 = ", head in fp8"
_OPTIONS: Mapping[str, dict[str, str]] = {
    "transposable": {"sste.recipe": "s-ste-transposable"},
    "dense fp8": {"sste.recipe": "fp8"},
    "fp8 and mvue": {"sste.recipe": "fp8-mvue"},
    "ffn-up": {"sste.targets": "ffn-up"},
    "all linears": {"sste.targets": "all"},
    "head dense": {"sste.head": "dense"},
    "head's backward in fp8": {"sste.head": "fp8-backward"},
    "small memory": {"sste.memory": "small"},
}


def how_to_compile(kind: str) -> dict[str, Any]:
    """Arguments of torch.compile.

    Args:
        kind: as ``"sste, transposable, head dense"``.

    Raises:
        argparse.ArgumentTypeError: no kind is called so.
    """
    if kind in COMPILE:
        return COMPILE[kind]
    base, *words = kind.split(", ")
    if base not in COMPILE or not base.startswith(SSTE) or not set(words) <= _OPTIONS.keys():
        raise argparse.ArgumentTypeError(
            f"no step is compiled as {kind!r}; allowed are {', '.join(map(repr, COMPILE))}, and 'sste' followed by "
            f"some of {', '.join(map(repr, _OPTIONS))}, such as 'sste, transposable, head dense'"
        )
    options: dict[str, str] = {name: value for word in words for name, value in _OPTIONS[word].items()}
    return {**COMPILE[base], "options": options}


def compilable(kind: str) -> str:
    """The kind, for argparse: if it is none, it is refused before any is measured."""
    how_to_compile(kind)
    return kind


def _draw_tokens(model: "StepModel", generator: torch.Generator) -> tuple[Tensor, ...]:
    return (torch.randint(model.vocabulary, model.batch, device=generator.device, generator=generator),)


def _draw_images(model: "StepModel", generator: torch.Generator) -> tuple[Tensor, ...]:
    count, width = model.batch
    images = torch.randn(count, 3, width, width, device=generator.device, generator=generator)
    return images, torch.randint(model.vocabulary, (count,), device=generator.device, generator=generator)


def _adamw(network: nn.Module, rate: float = 1e-5) -> torch.optim.Optimizer:
    return torch.optim.AdamW(network.parameters(), lr=rate, fused=True)


def _muon_and_adamw(network: nn.Module) -> Any:
    return MuonAndAdamW(network, TrainConfig(steps=1, batch=1, learning_rate=1e-5, seed=0))


@dataclass(frozen=True, kw_only=True)
class StepModel:
    """A model and its step.

    Args:
        make: returns the model with random fp32 weights.
        vocabulary: tokens, or classes, are drawn below it.
        batch: sequences of a microbatch and their length, or images and their width.
        draw: inputs of a microbatch.
        loss: of what is compiled, and these inputs.
        dtype: of the parameters; those in fp32 are multiplied under autocast.
        make_optimizer: of the network.
        microbatches: in an optimizer step.
        checkpointing: recompute each layer in backward.
        tolerance: of the first loss.  Random weights and tokens give log(vocabulary), whatever the arithmetic.
        pruning_changes_the_loss: it is compared with that of the backend's definitions then, not with the first kind's.
    """

    make: Callable[[], nn.Module]
    vocabulary: int
    batch: tuple[int, int]
    draw: Callable[["StepModel", torch.Generator], tuple[Tensor, ...]] = _draw_tokens
    loss: Callable[..., Tensor] = lambda network, ids: network(input_ids=ids, labels=ids).loss
    dtype: torch.dtype = torch.bfloat16
    make_optimizer: Callable[[nn.Module], Any] = _adamw
    microbatches: int = 1
    checkpointing: bool = False
    tolerance: float = 0.5
    pruning_changes_the_loss: bool = False


def _causal_attention() -> str:
    """Name of SDPA with its ``is_causal`` kernels: by its own name, a traced model hands it a mask, which is slow."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
    return "causal_sdpa"


def llama(hidden: int, intermediate: int, layers: int, context: int, heads: int = 32) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        max_position_embeddings=context,
        use_cache=False,
        attn_implementation=_causal_attention(),
    )
    return LlamaForCausalLM(config)


def _llama_8b_layers() -> nn.Module:
    return llama(4096, 14336, layers=4, context=4096)


def _llama_1b_layers() -> nn.Module:
    return llama(2048, 8192, layers=8, context=2048)


def _llama_350m() -> nn.Module:
    return llama(1024, 2816, layers=12, context=1024, heads=16)


def _qwen_7b_layers() -> nn.Module:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=3,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        use_cache=False,
        attn_implementation=_causal_attention(),
    )
    return Qwen2ForCausalLM(config)


def _mixtral_layers() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        use_cache=False,
        attn_implementation=_causal_attention(),
    )
    return MixtralForCausalLM(config)


class Experts(nn.Module):
    """Gated experts of transformers alone: each token goes to ``top_k`` of them, which its number in the batch says.

    Args:
        skewed: whether few experts have most tokens.
    """

    def __init__(self, hidden: int, intermediate: int, number: int, top_k: int, tokens: int, *, skewed: bool) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=number)
        self.experts = MixtralExperts(config)
        self.experts.config._experts_implementation = "grouped_mm"
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.02)
        self.hidden: Tensor
        self.register_buffer("hidden", torch.randn(tokens, hidden))
        self.shift = nn.Parameter(torch.zeros(hidden))  # so that the input needs a gradient
        self.number, self.top_k, self.skewed = number, top_k, skewed

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        del labels
        first = input_ids.flatten()
        first = first * first // self.number if self.skewed else first
        steps = torch.arange(self.top_k, device=first.device) * (self.number // self.top_k)
        chosen = (first[:, None] + steps) % self.number
        weights = torch.full_like(chosen, 1 / self.top_k, dtype=self.hidden.dtype)
        return SimpleNamespace(loss=self.experts(self.hidden + self.shift, chosen, weights).float().square().mean())


def experts(hidden: int, intermediate: int, number: int, top_k: int, *, skewed: bool = False) -> "StepModel":
    """The step of experts alone, on 16,384 tokens.  The optimizer changes nothing: losses of two steps are the same."""
    batch = (4, 4096)
    make = partial(Experts, hidden, intermediate, number, top_k, batch[0] * batch[1], skewed=skewed)
    return StepModel(
        make=make, vocabulary=number, batch=batch, make_optimizer=partial(_adamw, rate=0.0), tolerance=0.02,
        pruning_changes_the_loss=True,
    )  # fmt: skip


def _gpt2_small() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=50304,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
        attn_implementation=_causal_attention(),
    )
    return GPT2LMHeadModel(config)


def _gpt_1280() -> nn.Module:
    network = ModernGPT(GPTConfig(layers=20, width=1280, heads=20, context=2048, vocabulary=8192, tied=False))
    for parameter in network.parameters():
        if not parameter.any():  # where training begins; products of zeros draw less power than any others
            nn.init.normal_(parameter, std=1280**-0.5)
    return network


def _vit_large() -> nn.Module:
    import timm

    return timm.create_model("vit_large_patch16_224", pretrained=False)


MODELS = {
    "llama-8b": StepModel(make=_llama_8b_layers, vocabulary=32000, batch=(4, 4096)),
    "llama-1b": StepModel(make=_llama_1b_layers, vocabulary=32000, batch=(8, 2048)),
    "qwen-7b": StepModel(make=_qwen_7b_layers, vocabulary=152064, batch=(2, 4096)),
    "gpt2-small": StepModel(make=_gpt2_small, vocabulary=50304, batch=(16, 1024)),
    "mixtral": StepModel(make=_mixtral_layers, vocabulary=32000, batch=(4, 4096)),
    "experts-mixtral": experts(4096, 14336, 8, 2),
    "experts-mixtral-skewed": experts(4096, 14336, 8, 2, skewed=True),
    "experts-olmoe": experts(2048, 1024, 64, 8),
    "experts-qwen3-30b-a3b": experts(2048, 768, 128, 8),
    "llama-350m": StepModel(make=_llama_350m, vocabulary=32000, batch=(16, 1024)),
    "gpt-1280": StepModel(
        make=_gpt_1280, vocabulary=8192, batch=(16, 2048), loss=lambda network, ids: network(ids, ids),
        make_optimizer=_muon_and_adamw, microbatches=4,
    ),
    "vit-large": StepModel(
        make=_vit_large, vocabulary=1000, batch=(128, 224), draw=_draw_images, dtype=torch.float32,
        loss=lambda network, images, labels: F.cross_entropy(network(images), labels),
    ),
    "llama-8b-checkpointed": StepModel(make=_llama_8b_layers, vocabulary=32000, batch=(4, 4096), checkpointing=True),
    "llama-8b-microbatches": StepModel(make=_llama_8b_layers, vocabulary=32000, batch=(4, 4096), microbatches=4),
}  # fmt: skip


def _is_no_head(module: nn.Module, name: str) -> bool:
    del module
    return name.rpartition(".")[2] not in ("lm_head", "head")


# Those with experts are measured where they are named.
BY_DEFAULT = [name for name in MODELS if "mixtral" not in name and "experts" not in name]


def training_step(model: StepModel, kind: str, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward of each microbatch and one step of the optimizer, in bf16; returns the last loss."""
    torch.manual_seed(0)
    network = model.make().to(device, model.dtype).train()
    if model.checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if kind.startswith("torchao "):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        recipe = kind.removeprefix("torchao ").removesuffix(HEAD_IN_FP8)
        config = Float8LinearConfig.from_recipe_name(recipe)
        chosen = None if kind.endswith(HEAD_IN_FP8) else _is_no_head
        convert_to_float8_training(network, config=config, module_filter_fn=chosen)
    compiled = torch.compile(network, **how_to_compile(BF16 if kind.startswith("torchao ") else kind))
    return steps_of(model, compiled, model.make_optimizer(network), device)


def steps_of(
    model: StepModel, compiled: Callable[..., Any], optimizer: Any, device: torch.device, seed: int = 0
) -> Callable[[], Tensor]:
    """One step of a compiled network, on random inputs that are the same in each; ``seed`` says which."""
    generator = torch.Generator(device).manual_seed(seed)
    batches = [model.draw(model, generator) for _ in range(model.microbatches)]

    def step() -> Tensor:
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=model.dtype is torch.float32):
                loss = model.loss(compiled, *batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
