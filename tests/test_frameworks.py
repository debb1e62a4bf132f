"""The training loops of the libraries that people use, with the libraries themselves.

Each trains a tiny model twice from one seed, dense and with the backend.  The losses must agree within ``BAND`` at
every step and fall as far, and not be equal from the first one on: equal losses would mean that the run was dense.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shared_graphs
import sparse_compile
from libraries import library
from sparse_compile.launcher.accelerate_patch import accept_in_accelerate
from sparse_compile.launcher.auto_compile import AutoCompile
from sparse_compile.launcher.route_compile import _routed, _Seen

OPTIONS = {"sste.executor": "eager", "sste.when": "always"}
# At losses of 4 to 5, which fall by 0.4 to 1.2.
BAND = 0.2
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
GPT = {"s-ste": {"blocks.0.up", "blocks.0.down"}, "fp8": {"blocks.0.qkv", "blocks.0.proj", "head"}}
SMALLEST = {"s-ste": {"up", "down"}, "fp8": {"mix", "head"}}

Way = Callable[[nn.Module], Any]
uncompiled = shared_graphs.uncompiled


class Smallest(nn.Module):
    """A linear of each decision, and no attention: each token follows from the one before.  It compiles soon."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(128, 64), nn.Linear(64, 64)
        self.up, self.down, self.head = nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 128, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = F.layer_norm(x + self.mix(x), (64,))
        x = F.layer_norm(x + self.down(F.gelu(self.up(x))), (64,))
        return F.cross_entropy(self.head(x).float().flatten(0, 1), labels.flatten())


@pytest.fixture
def chosen(small_gpt: type[nn.Module], device: str) -> tuple[Callable[[], nn.Module], dict[str, set[str]]]:
    """What makes the model of a device, and how its linears are decided."""
    return (small_gpt, GPT) if device == "cuda" else (Smallest, SMALLEST)


@pytest.fixture
def quickly(request: pytest.FixtureRequest, device: str, way: str | Way) -> None:
    """On a CPU rewritten graphs run as they are, but where the model is compiled in place."""
    if device == "cpu" and way not in (in_place, "Module.compile"):
        request.getfixturevalue("uncompiled")


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries wrap torch.compile when they are imported, and here it is routed: both end with the test."""
    monkeypatch.setattr(torch, "compile", torch.compile)
    monkeypatch.setattr(nn.Module, "_compiled_call_impl", None)


def in_place(model: nn.Module) -> None:
    model.compile(backend="sste", options=OPTIONS)


def dense(model: nn.Module) -> None:
    pass


def automatic(model: nn.Module) -> None:
    """As under ``--auto``, for models called from here on."""
    AutoCompile(lambda call: torch.compile(call, backend="sste", options=OPTIONS))


def route() -> None:
    """As under the launcher."""
    torch.compile = _routed(torch.compile, OPTIONS, _Seen(launched=True), None)
    accept_in_accelerate()


def decisions() -> dict[str, set[str]]:
    """Names of linears by the recipe they got, of all graphs."""
    found: dict[str, set[str]] = {}
    for row in sparse_compile.report().rows:
        found.setdefault(row.decision.split()[0], set()).add(row.module)
    return found


def assert_close_but_not_equal(losses: list[float], dense: list[float]) -> None:
    assert len(losses) == len(dense) > 3
    assert all(math.isfinite(loss) for loss in losses)
    assert 0.5 < (losses[0] - losses[-1]) / (dense[0] - dense[-1]) < 1.5, (losses, dense)
    assert dense[-1] < dense[0] - 0.2, "the steps do too little to tell a good one from none"
    assert losses[0] != dense[0], "this run was dense"
    assert max(abs(a - b) for a, b in zip(losses, dense, strict=True)) < BAND, (losses, dense)


def tokens(count: int, length: int = 33) -> Tensor:
    """Each token follows from the one before it, mostly: ``[count, length]``, vocabulary 128."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 128, (count, length), generator=generator)
    for position in range(1, length):
        follows = torch.rand(count, generator=generator) < 0.9
        ids[:, position] = torch.where(follows, (ids[:, position - 1] * 3 + 1) % 32, ids[:, position])
    return ids


# --- nanoGPT's loop ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        pytest.param(torch.float16, "cpu", id="fp16-cpu", marks=pytest.mark.nightly),
        pytest.param(torch.bfloat16, "cpu", id="bf16-cpu", marks=pytest.mark.nightly),
        pytest.param(torch.float16, "cuda", id="fp16-cuda", marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, "cuda", id="bf16-cuda", marks=pytest.mark.gpu),
    ],
)
def test_a_loop_as_nanogpt_s(chosen: Any, device: str, dtype: torch.dtype) -> None:
    """Autocast, a gradient scaler, accumulation over microbatches, clipping, warm-up and cosine decay, evaluation."""
    make, decided = chosen
    batches = tokens(4 * 12).to(device).split(4)

    def train(way: Way) -> tuple[list[float], float]:
        torch.manual_seed(0)
        model: Any = make().to(device)
        way(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: (step + 1) / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * step / 6))
        )
        scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
        losses = []
        for step in range(6):
            loss_of_step = 0.0
            for microbatch in batches[2 * step : 2 * step + 2]:
                with torch.autocast(device, dtype):
                    loss = model(microbatch[:, :-1].contiguous(), microbatch[:, 1:].contiguous()) / 2
                scaler.scale(loss).backward()
                loss_of_step += loss.item()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            assert norm.isfinite()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            losses.append(loss_of_step)
        model.eval()
        with torch.no_grad(), torch.autocast(device, dtype):
            return losses, model(batches[0][:, :-1].contiguous(), batches[0][:, 1:].contiguous()).item()

    expected, validation = train(dense)
    losses, sparse_validation = train(in_place)
    assert_close_but_not_equal(losses, expected)
    assert abs(sparse_validation - validation) < BAND
    assert decisions() == decided


# --- Hugging Face -----------------------------------------------------------------------------------------------------


class SmallestForTrainer(Smallest):
    """With the loss where the trainer looks for it, and its targets, as transformers' models have them."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": super().forward(input_ids[:, :-1].contiguous(), labels[:, 1:].contiguous())}


def hugging_face_trainer(folder: Path, device: str, way: Way, architecture: str, **arguments: Any) -> Any:
    transformers = library("transformers")
    library("accelerate")
    torch.manual_seed(0)
    if architecture == "llama":
        config = transformers.LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config)
    elif architecture == "smallest":
        model = SmallestForTrainer()
    else:
        config = transformers.GPT2Config(
            vocab_size=128, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = transformers.GPT2LMHeadModel(config)
    way(model)
    given = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1,
        use_cpu=device == "cpu", report_to=[], disable_tqdm=True, lr_scheduler_type="cosine",
        **{"save_strategy": "no", **arguments},
    )  # fmt: skip
    if given.device.type == "cuda":
        given._n_gpu = 1  # of several it would make DataParallel, which the launcher does not compile
    examples = [{"input_ids": ids, "labels": ids} for ids in tokens(48)]
    return transformers.Trainer(model=model, args=given, train_dataset=examples)


def hugging_face_losses(trainer: Any, **arguments: Any) -> list[float]:
    trainer.train(**arguments)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


LLAMA = {
    "s-ste": {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")},
    "fp8": {*(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"), "lm_head"},
}
GPT2 = {
    "s-ste": {f"transformer.h.0.mlp.{name}" for name in ("c_fc", "c_proj")},
    "fp8": {f"transformer.h.0.attn.{name}" for name in ("c_attn", "c_proj")},
    "dense": {"transformer.wte"},
}


# By day the test of resuming has this trainer.
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.nightly), DEVICES[1]])
@pytest.mark.parametrize(
    ("architecture", "way", "arguments", "expected"),
    [
        ("gpt2", automatic, {"gradient_accumulation_steps": 2}, GPT2),
        pytest.param(
            "llama",
            dense,
            {"torch_compile_backend": "sste", "gradient_checkpointing": True, "bf16": True},
            LLAMA,
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["--auto", "launcher"],
)
def test_hugging_face_trainer(
    tmp_path: Path, device: str, architecture: str, way: Way, arguments: dict[str, Any], expected: dict[str, set[str]]
) -> None:
    plain = {name: value for name, value in arguments.items() if not name.startswith("torch_compile")}
    without = hugging_face_losses(hugging_face_trainer(tmp_path, device, dense, architecture, **plain))
    if plain != arguments:
        route()
    losses = hugging_face_losses(hugging_face_trainer(tmp_path, device, way, architecture, **arguments))
    assert_close_but_not_equal(losses, without)
    assert decisions() == expected


@pytest.mark.parametrize(
    ("architecture", "expected", "device"),
    [
        pytest.param("smallest", SMALLEST, "cpu", id="smallest-cpu"),
        pytest.param("llama", LLAMA, "cpu", id="llama-cpu", marks=pytest.mark.nightly),
        pytest.param("llama", LLAMA, "cuda", id="llama-cuda", marks=pytest.mark.gpu),
    ],
)
def test_hugging_face_trainer_resumes(
    tmp_path: Path, architecture: str, expected: dict[str, set[str]], device: str
) -> None:
    """With Module.compile, which needs neither launcher nor argument."""
    make = partial(hugging_face_trainer, tmp_path, device, architecture=architecture, bf16=True)
    without = hugging_face_losses(make(dense))
    losses = hugging_face_losses(make(in_place, save_strategy="steps", save_steps=3))
    assert_close_but_not_equal(losses, without)
    assert decisions() == expected
    torch.compiler.reset()
    resumed = make(in_place)
    assert hugging_face_losses(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-3")) == losses


# --- Accelerate -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.by_day(0)  # Hugging Face's Trainer, which runs by day, is built on it
@pytest.mark.parametrize("way", ["--auto", "dynamo_backend", "Module.compile"])
def test_accelerate(chosen: Any, tmp_path: Path, device: str, way: str) -> None:
    """Mixed precision, for which Accelerate replaces ``model.forward``, accumulation and clipping; and resuming."""
    make, expected = chosen
    accelerate = library("accelerate")

    def train(way: str, *, resume: bool = False) -> list[float]:
        accelerate.state.AcceleratorState._reset_state(True)
        named = {"dynamo_backend": "sste"} if way == "dynamo_backend" else {}
        accelerator = accelerate.Accelerator(
            cpu=device == "cpu", mixed_precision="bf16", gradient_accumulation_steps=2, **named
        )
        torch.manual_seed(0)
        model: Any = make()
        {"Module.compile": in_place, "--auto": automatic}.get(way, dense)(model)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        if resume:
            accelerator.load_state(str(tmp_path))
        losses = []
        for number, batch in enumerate(tokens(4 * 12).to(accelerator.device).split(4)):
            if number == 6:
                if resume:
                    losses.clear()
                elif way != "dense":
                    accelerator.save_state(str(tmp_path))
            if resume and number < 6:
                continue
            with accelerator.accumulate(model):
                loss = model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    without = train("dense")
    if way == "dynamo_backend":
        route()
    losses = train(way)
    assert_close_but_not_equal(losses, without)
    assert decisions() == expected
    if way == "Module.compile":
        torch.compiler.reset()
        assert train(way, resume=True) == losses[6:]


# --- Lightning --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "way", [pytest.param(in_place, marks=pytest.mark.nightly), automatic], ids=["Module.compile", "--auto"]
)
def test_lightning(chosen: Any, tmp_path: Path, device: str, way: Way) -> None:
    """Evaluation comes first, as Lightning's sanity check; then training, clipping, and resuming from a checkpoint."""
    make, expected = chosen
    lightning = library("lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = make(), []

        def on_train_batch_start(self, batch: Tensor, number: int) -> None:
            torch.manual_seed(self.global_step)  # Lightning's checkpoints do not hold the state of the generators

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            loss = self.model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
            self.losses.append(loss.item())
            return loss

        def validation_step(self, batch: Tensor, number: int) -> None:
            assert self.model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous()).isfinite()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]

    def train(way: Way, checkpoint: Path | None = None) -> list[float]:
        torch.compiler.reset()
        torch.manual_seed(0)
        module = Module()
        way(module.model)
        trainer = lightning.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu", devices=1, max_epochs=2, gradient_clip_val=1.0,
            precision="bf16-mixed", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)],
        )  # fmt: skip
        batches = torch.utils.data.DataLoader(list(tokens(16)), batch_size=4)
        trainer.fit(module, batches, torch.utils.data.DataLoader(list(tokens(4)), batch_size=4), ckpt_path=checkpoint)
        return list(module.losses)

    without = train(dense)
    for file in tmp_path.glob("*.ckpt"):
        file.unlink()
    losses = train(way)
    assert_close_but_not_equal(losses, without)
    assert decisions() == expected
    if way is in_place:
        assert train(way, tmp_path / "epoch=0.ckpt") == losses[4:]


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_timm(device: str) -> None:
    """Pieces of timm's train.py: mixup, label smoothing, its optimizer factory, scaler, schedule and average."""
    library("timm")
    import numpy as np  # timm draws from it
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3, NativeScaler

    def train(way: Way) -> list[float]:
        torch.manual_seed(0)
        model = VisionTransformer(
            img_size=16, patch_size=4, embed_dim=64, depth=1, num_heads=2, num_classes=16, drop_path_rate=0.1
        ).to(device)
        way(model)
        optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.9)
        schedule, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=6, warmup_epochs=1, warmup_lr=1e-4)
        scaler, loss_function = NativeScaler(device=device), SoftTargetCrossEntropy()
        average = ModelEmaV3(model, decay=0.9)
        mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=16)
        generator = torch.Generator().manual_seed(2)
        labels = torch.randint(0, 16, (16,), generator=generator).to(device)
        images = torch.randn(16, 3, 16, 16, generator=generator).to(device)
        losses = []
        for epoch in range(6):
            torch.manual_seed(epoch)  # of the dropped paths
            model.train()
            np.random.seed(epoch)  # of the mixture
            mixed, targets = mixup(images.clone(), labels)
            with torch.autocast(device, torch.bfloat16):
                loss = loss_function(model(mixed), targets)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, clip_mode="norm", parameters=model.parameters())
            average.update(model, step=epoch)
            schedule.step(epoch + 1)
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            assert average.module(images).isfinite().all()
        return losses

    assert_close_but_not_equal(train(in_place), train(dense))
    assert decisions() == {
        "s-ste": {"blocks.0.mlp.fc1", "blocks.0.mlp.fc2"},
        "fp8": {"blocks.0.attn.qkv", "blocks.0.attn.proj"},
        "dense": {"head", "patch_embed.proj"},  # the latter is a convolution
    }
