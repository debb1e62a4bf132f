"""finalize: weights become their own projections; what holds exactly, what to rounding, and what is refused."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import shared_graphs
import sparse_compile
import warm
from sparse_compile.kernels import reference
from sparse_compile.kernels.formats import E4M3_MAX
from sparse_compile.weights.pattern_24 import is_24, share_of_groups
from sparse_compile.weights.registry import find_record

clean_slate = shared_graphs.kept
uncompiled = shared_graphs.uncompiled
pytestmark = pytest.mark.usefixtures("uncompiled")

OPTIONS = {"sste.executor": "eager", "sste.when": "always"}


class Residual(nn.Module):
    """An FFN beside its input, and the loss if targets are given."""

    def __init__(self, layer: Any = nn.Linear) -> None:
        super().__init__()
        self.up, self.down = layer(64, 128), layer(128, 64)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        out = x + self.down(F.gelu(self.up(x)))
        return out if targets is None else F.mse_loss(out, targets)


PRUNED = ["up.weight", "down.weight"]


@pytest.fixture
def examples() -> tuple[Tensor, Tensor]:
    """Inputs and targets, ``[2, 32, 64]``."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 32, 64, generator=generator)
    return x, x.roll(1, -1)


def train(model: Any, optimizer: torch.optim.Optimizer, batch: Any, steps: int = 3) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="sste", options=OPTIONS | options)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def trained(examples):
    """A model, its compiled form and its optimizer after three steps."""
    model = Residual()
    optimizer = optimizer_of(model)
    call = compiled(model)
    train(call, optimizer, examples)
    return model, call, optimizer


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("kind", "dtype", "stored"),
    [
        ("FFN", torch.float32, "linear"),
        ("FFN", torch.float32, "conv1d"),
        ("tied GPT", torch.bfloat16, "linear"),
        pytest.param("tied GPT", torch.float32, "conv1d", marks=pytest.mark.nightly),
    ],
)
def test_the_weights_are_those_that_training_used(small_gpt, conv1d, examples, batch, kind, dtype, stored) -> None:
    """To the bit: beta * S(W), in the weight's dtype.  To e4m3's rounding: what the GEMMs of training read."""
    layer = conv1d if stored == "conv1d" else nn.Linear
    model, given = (Residual(layer), examples) if kind == "FFN" else (small_gpt(layer, tied=True).to(dtype), batch)
    call = compiled(model)
    train(call, optimizer_of(model), given)
    with torch.no_grad():
        call(*given)
    before, betas = weights_of(model), sparse_compile.beta(model)
    operands = {name: states(model.get_parameter(name)) for name in betas}
    expected_names = PRUNED if kind == "FFN" else [f"blocks.0.{name}" for name in PRUNED]
    assert sparse_compile.finalize(call) == list(betas) == expected_names
    after = weights_of(model)
    for name, weight in after.items():
        if name not in betas:
            assert torch.equal(weight, before[name]), name
            continue
        flip = (lambda w: w.t()) if stored == "conv1d" else (lambda w: w)
        expected = reference.soft_threshold24(flip(before[name]).float()) * betas[name]
        assert torch.equal(weight, flip(expected).to(dtype))
        assert is_24(weight, 0 if stored == "conv1d" else 1)
        assert share_of_groups(weight, 1 if stored == "conv1d" else 0) < 0.9, "not both ways by chance"
        values, metadata, _, scale_inv = operands[name]
        used = reference.decompress24(values, metadata)[:, : expected.shape[1]].float() * scale_inv
        # Half a unit in the last place of e4m3: 2**-4 of the value, or 2**-10 below its normal range.
        allowed = expected.abs() * 2**-4 + float(scale_inv) * 2**-10
        assert bool(((used - expected).abs() <= allowed * (1 + 2**-20)).all())
        assert not used[expected == 0].any()


def states(weight: nn.Parameter) -> list[torch.Tensor]:
    (only,) = find_record(weight).operands.values()
    return [operand.clone() for operand in only.operands]


def test_the_plain_model_computes_what_training_computed(trained, examples) -> None:
    """To FP8's rounding of activations and weights, where the trained weights as they are would not."""
    model, call, _ = trained
    with torch.no_grad():
        expected = call(examples[0])
        dense = model(examples[0])
        sparse_compile.finalize(model)
        plain = model(examples[0])
        again = call(examples[0])

    def error(actual: torch.Tensor) -> float:
        return float((actual - expected).norm() / expected.norm())

    assert error(plain) < 0.03
    assert error(dense) > 10 * error(plain)
    assert error(again) < 0.03, "beta * S(W) is not what is computed with the backend now"


def test_s_of_a_24_weight_is_the_weight_and_beta_is_one() -> None:
    weight = reference.soft_threshold24(torch.randn(32, 64)) * 1.7
    weight[:, 8:12] = torch.tensor([0.0, 0.0, -3.0, 0.0])
    assert torch.equal(reference.soft_threshold24(weight), weight)
    assert reference.sste_beta(weight) == 1.0


def test_a_second_call_changes_nothing(trained, examples) -> None:
    """Nor one after the weights changed, if they are 2:4 still."""
    model, call, _ = trained
    names = sparse_compile.finalize(model)
    assert sparse_compile.beta(model) == dict.fromkeys(names, 1.0)
    before = weights_of(model)
    versions = [parameter._version for parameter in model.parameters()]
    assert sparse_compile.finalize(model) == names
    with torch.no_grad():
        call(*examples)
    call(*examples)  # which records gradients, but nothing steps
    assert sparse_compile.finalize(model) == names
    assert [parameter._version for parameter in model.parameters()] == versions
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())
    with torch.no_grad():
        model.up.weight.mul_(2.0)
    assert sparse_compile.finalize(model) == names
    assert torch.equal(model.up.weight, 2.0 * before["up.weight"])


def test_weights_that_changed_without_the_backend_are_refused(trained, examples) -> None:
    model, call, _ = trained
    sparse_compile.finalize(model)
    train(model, optimizer_of(model), examples, steps=1)  # dense
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"'up.weight' was finalized, then changed without the backend"):
        sparse_compile.finalize(model)
    with torch.no_grad():
        call(*examples)
    with pytest.raises(ValueError, match="changed without the backend"):
        sparse_compile.finalize(model)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())
    sparse_compile.set_beta(model, dict.fromkeys(PRUNED, 1.0))
    assert sparse_compile.finalize(model) == PRUNED, "as the error says"


def test_weights_that_are_put_back_without_their_scales_warn(trained, examples) -> None:
    """An export in the middle of training."""
    model, call, _ = trained
    before, scales = weights_of(model), sparse_compile.beta(model)
    with torch.no_grad():
        expected = call(*examples)
        sparse_compile.finalize(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call(*examples)
        model.load_state_dict(before, strict=False)
        with pytest.warns(UserWarning, match="'up' was finalized, then changed"):
            assert not torch.equal(call(*examples), expected)
        sparse_compile.set_beta(model, scales)
        assert torch.equal(call(*examples), expected), "as the warning says"


def test_training_goes_on(trained, examples) -> None:
    """With beta = 1 from the loss where it was; off the pattern in the weights, on it in what is multiplied."""
    model, call, optimizer = trained
    with torch.no_grad():
        before = float(call(*examples))
    sparse_compile.finalize(model)
    losses = train(call, optimizer, examples, steps=8)
    assert losses[0] == pytest.approx(before, rel=2e-3)
    assert losses[-1] < losses[0]
    assert sparse_compile.beta(model) == dict.fromkeys(PRUNED, 1.0), "frozen"
    assert optimizer.state_dict()["state"][list(dict(model.named_parameters())).index(PRUNED[0])]["sste_beta"] == 1.0
    weight = model.up.weight
    assert share_of_groups(weight, 1) < 0.1, "gradients are straight through"
    with torch.no_grad():
        expected = call(examples[0])
        assert sparse_compile.finalize(model) == PRUNED
        assert (model(examples[0]) - expected).norm() < 0.03 * expected.norm()
    assert is_24(weight, 1)


@pytest.mark.parametrize("finalized", [True, False], ids=["finalized", "dense"])
def test_training_from_a_checkpoint_computes_beta_anew(trained, examples, finalized: bool) -> None:
    """Without an optimizer's state: of a finalized model beta is 1 and the loss goes on; of a dense one it is new."""
    model, call, _ = trained
    if finalized:
        sparse_compile.finalize(model)
        with torch.no_grad():
            before = float(call(*examples))
    loaded = copy.deepcopy(model)
    expected = {name: reference.sste_beta(loaded.get_parameter(name)) for name in PRUNED}
    first, *_, last = train(compiled(loaded), optimizer_of(loaded), examples)
    assert sparse_compile.beta(loaded) == expected
    assert last < first
    if finalized:
        assert set(expected.values()) == {1.0}
        assert first == pytest.approx(before, rel=1e-6)
    else:
        assert min(expected.values()) > 1.2


def test_a_copy_with_its_scales_and_a_model_with_its_optimizer(trained) -> None:
    """What was never called in this process: averages, and checkpoints of a run."""
    model, _, optimizer = trained
    average = torch.optim.swa_utils.AveragedModel(model)
    sparse_compile.set_beta(average, sparse_compile.beta(model))
    resumed = Residual()
    resumed.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="no weight of this model was trained pruned"):
        sparse_compile.finalize(resumed)
    again = optimizer_of(resumed)
    again.load_state_dict(optimizer.state_dict())
    for copied in (average, resumed, model):
        assert sparse_compile.finalize(copied) == PRUNED
        assert sparse_compile.finalize(copied) == PRUNED
    for name, weight in weights_of(model).items():
        assert torch.equal(resumed.get_parameter(name), weight)
        assert torch.equal(average.module.get_parameter(name), weight)


def test_an_optimizer_from_before_beside_weights_from_after_is_an_error(trained, examples) -> None:
    model, _, optimizer = trained
    before = copy.deepcopy(optimizer.state_dict())
    sparse_compile.finalize(model)
    for saved, fits in ((before, False), (optimizer.state_dict(), True)):
        torch._dynamo.reset()
        resumed = Residual()
        resumed.load_state_dict(model.state_dict())
        again = optimizer_of(resumed)
        again.load_state_dict(saved)
        if fits:
            compiled(resumed)(*examples)
            assert sparse_compile.beta(resumed) == dict.fromkeys(PRUNED, 1.0)
        else:
            with pytest.raises(ValueError, match=r"'up' is 2:4 already, .* the weight was saved after finali"):
                compiled(resumed)(*examples)


def test_a_copy_whose_layout_nothing_tells(conv1d, examples) -> None:
    model = Residual(conv1d)
    train(compiled(model), optimizer_of(model), examples, steps=1)
    average = copy.deepcopy(model)
    sparse_compile.set_beta(average, sparse_compile.beta(model))
    with pytest.raises(ValueError, match=r"which 'up.weight' of a Conv1D is pruned is not known; call the comp"):
        sparse_compile.finalize(average)
    with torch.no_grad():
        compiled(average)(*examples)
    sparse_compile.finalize(average)
    sparse_compile.finalize(model)
    assert torch.equal(average.up.weight, model.up.weight)


def test_a_weight_that_is_projected_to_zero_becomes_zero(examples) -> None:
    model = Residual()
    with torch.no_grad():
        model.down.weight.fill_(0.01)
    with torch.no_grad():
        compiled(model)(*examples)
    assert sparse_compile.finalize(model) == PRUNED
    assert not model.down.weight.any()


@pytest.mark.nightly
def test_of_several_compilations_the_latest_training_counts(examples) -> None:
    """One in the dense recipe prunes nothing; as an evaluation, it does not hide that the model was trained pruned."""
    model = Residual()
    train(compiled(model, **{"sste.recipe": "fp8"}), optimizer_of(model), examples, steps=1)
    with pytest.raises(ValueError, match="no weight of this model was trained pruned"):
        sparse_compile.finalize(model)
    torch._dynamo.reset()
    train(compiled(model), optimizer_of(model), examples)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(model, **{"sste.recipe": "fp8"})(*examples)
    assert sparse_compile.finalize(model) == PRUNED


def test_an_error_leaves_all_weights_as_they_were(trained) -> None:
    """Of weights that are shared since training, or of values that are no numbers."""
    model, _, _ = trained
    before = weights_of(model)
    model.other = nn.Linear(64, 128)
    model.other.weight = model.up.weight
    with pytest.raises(ValueError, match=r"'up.weight' was trained pruned and is now shared with 'other.weig"):
        sparse_compile.finalize(model)
    del model.other
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())
    model.down.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"'down.weight' to torch.float32 holds NaN or infinite"):
        sparse_compile.finalize(model)
    assert torch.equal(model.up.weight, before["up.weight"])


def test_a_projection_beyond_fp16_is_refused(examples) -> None:
    model = Residual()
    compiled(model)(*examples)
    model.half()
    sparse_compile.set_beta(model, {PRUNED[0]: E4M3_MAX * 2**20})
    with pytest.raises(ValueError, match=r"'up.weight' to torch.float16 holds NaN or infinite"):
        sparse_compile.finalize(model)


def test_sharded_weights_are_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = Residual()
        call = compiled(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        call(torch.randn(2, 32, 64)).sum().backward()
        assert sparse_compile.beta(model)
        with pytest.raises(ValueError, match=r"'up.weight' is a DTensor; only a whole weight can be finalized"):
            sparse_compile.finalize(model)
    finally:
        torch.distributed.destroy_process_group()


def tiny(architecture: str) -> Any:
    transformers = pytest.importorskip("transformers")
    if architecture == "llama":
        config = transformers.LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.nightly  # the example that exports a model runs by day
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_of_transformers_are_saved_and_loaded(tmp_path: Path, batch, architecture: str, dtype) -> None:
    model = tiny(architecture).to(dtype)
    model.compile(backend="sste", options=OPTIONS)
    optimizer = optimizer_of(model)
    ids = batch[0]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    names = sparse_compile.finalize(model)
    assert len(names) == (3 if architecture == "llama" else 2)
    assert all("mlp" in name for name in names)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(weight, loaded.get_parameter(name)) for name, weight in weights_of(model).items())
    for name in names:
        assert is_24(loaded.get_parameter(name), 0 if architecture == "gpt2" else 1)
    # With labels, as that is compiled by now.
    plain, expected = (each(input_ids=ids, labels=ids).logits.detach() for each in (loaded, model))
    assert (plain - expected).norm() < 0.03 * expected.norm()
    globs = [f"--weights={name}" for name in names]
    done = warm.python("-m", "sparse_compile", "check", tmp_path, *globs)
    assert done.returncode == 0, done.stdout + done.stderr


def test_safetensors_files(tmp_path: Path, trained, examples) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, _, _ = trained
    sparse_compile.finalize(model)
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    loaded = Residual()
    safetensors.load_model(loaded, str(tmp_path / "model.safetensors"))
    with torch.no_grad():
        assert torch.equal(loaded(*examples), model(*examples))
