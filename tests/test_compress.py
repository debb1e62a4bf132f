"""to_sparse: what is refused, and on a GPU that the compressed model computes what the 2:4 model did."""

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import sparse_compile
from sparse_compile.export import to_sparse
from sparse_compile.kernels.reference import soft_threshold24


def prune(*weights: Tensor) -> None:
    with torch.no_grad():
        for weight in weights:
            weight.copy_(soft_threshold24(weight))


@pytest.fixture
def pruned(small_gpt) -> nn.Module:
    """As it is loaded: nothing is known of it in this process."""
    model = small_gpt(depth=1)
    prune(model.blocks[0].up.weight, model.blocks[0].down.weight)
    return model


def test_on_the_cpu_it_is_an_error(pruned) -> None:
    with pytest.raises(ValueError, match=r"'blocks.0.up.weight' is on cpu; compressed weights run only on GPUs"):
        sparse_compile.to_sparse(pruned)


def test_a_model_without_24_weights_is_an_error(small_gpt) -> None:
    model = small_gpt(depth=1)
    nn.init.zeros_(model.blocks[0].up.weight)
    with pytest.raises(ValueError, match=r"no linear of this model has a 2:4 weight; sparse_compile.finalize makes"):
        sparse_compile.to_sparse(model)


def test_weights_that_were_trained_pruned_and_are_not_24_are_an_error(small_gpt, batch) -> None:
    model = small_gpt(depth=1)
    torch.compile(model, backend="sste", options={"sste.executor": "eager", "sste.when": "always"})(*batch)
    for change in ("not finalized", "changed after it"):
        if change == "changed after it":
            sparse_compile.finalize(model)
            nn.init.ones_(model.blocks[0].down.weight)
        else:
            prune(model.blocks[0].up.weight)
        with pytest.raises(
            ValueError, match=r"^trained pruned, but not a 2:4 weight of a linear .*: 'blocks.0.down.weight'; "
        ):
            sparse_compile.to_sparse(model)


class OnGPU:
    """What is asked of a weight before it is compressed, as on a GPU."""

    is_cuda = True
    device = torch.device("cuda")

    def __init__(self, dtype: torch.dtype, *shape: int) -> None:
        self.dtype, self.shape = dtype, torch.Size(shape)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (OnGPU(torch.float32, 64, 64), r"'w' is torch.float32; cuSPARSELt takes bfloat16 and float16: call model.to"),
        (OnGPU(torch.bfloat16, 64, 72), r"'w' is \(64, 72\); cuSPARSELt takes multiples of 16"),
        (OnGPU(torch.float16, 8, 64), r"'w' is \(8, 64\); cuSPARSELt takes multiples of 16"),
    ],
)
def test_weights_that_cannot_be_compressed(weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_sparse._check("w", weight)
    to_sparse._check("w", OnGPU(torch.bfloat16, 16, 32))  # type: ignore[arg-type]


def test_without_cusparselt_it_is_an_error_and_nothing_changes(pruned) -> None:
    with (
        mock.patch.object(to_sparse, "_check"),
        mock.patch.object(torch.backends.cusparselt, "is_available", return_value=False),
        pytest.raises(RuntimeError, match="built without cuSPARSELt"),
    ):
        sparse_compile.to_sparse(pruned)
    assert type(pruned.blocks[0].up.weight.data) is Tensor


def test_what_is_handed_to_be_compressed(pruned) -> None:
    """Contiguous ``[N, K]``, 2:4 along K; tied weights and other modules' are left."""
    transformers = pytest.importorskip("transformers")
    pruned.conv = transformers.pytorch_utils.Conv1D(32, 64)
    pruned.conv.weight.data = soft_threshold24(torch.randn(32, 64)).t().contiguous()
    pruned.table = nn.Embedding(16, 32)
    pruned.tied = nn.Linear(32, 16, bias=False)
    prune(pruned.table.weight)
    pruned.tied.weight = pruned.table.weight
    expected = {name: pruned.get_parameter(name).detach().clone() for name in PRUNED}
    given: list[Tensor] = []

    def compressed(matrix: Tensor) -> Tensor:
        assert matrix.is_contiguous()
        given.append(matrix)
        return matrix

    with (
        mock.patch.object(to_sparse, "_check"),
        mock.patch.object(torch.backends.cusparselt, "is_available", return_value=True),
        mock.patch.object(to_sparse, "to_sparse_semi_structured", compressed),
    ):
        assert sparse_compile.to_sparse(pruned) == PRUNED
    assert [tuple(matrix.shape) for matrix in given] == [(256, 64), (64, 256), (32, 64)]
    for name in PRUNED:
        weight = pruned.get_parameter(name)
        assert torch.equal(weight, expected[name])
        assert not weight.requires_grad
    assert pruned.tied.weight is pruned.table.weight


PRUNED = ["blocks.0.up.weight", "blocks.0.down.weight", "conv.weight"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_linears_compute_what_they_did(pruned, batch, dtype: torch.dtype) -> None:
    model = pruned.to("cuda", dtype)
    ids = batch[0].cuda()
    with torch.no_grad():
        expected = model(ids)
        dense = copy.deepcopy(model)
        assert sparse_compile.to_sparse(model) == PRUNED[:2]
        assert isinstance(model.blocks[0].up.weight, torch.sparse.SparseSemiStructuredTensor)
        actual = model(ids)
        nn.init.zeros_(dense.blocks[0].up.weight)
        other = dense(ids)
    error = (actual - expected).float().norm()
    assert error < 0.02 * expected.float().norm()
    assert error < 0.1 * (other - expected).float().norm()


@pytest.mark.gpu
def test_conv1d_computes_what_it_did() -> None:
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(128, 64).to("cuda", torch.bfloat16)
    nn.init.normal_(layer.bias)
    layer.weight.data = soft_threshold24(torch.randn(128, 64)).t().contiguous().to("cuda", torch.bfloat16)
    x = torch.randn(2, 24, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = layer(x)
        assert sparse_compile.to_sparse(layer) == ["weight"]
        assert isinstance(layer.weight, torch.sparse.SparseSemiStructuredTensor)
        torch.testing.assert_close(layer(x), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_a_trained_model_of_transformers_goes_all_the_way() -> None:
    """Trained by kernels, finalized, compressed: each step computes what the one before did, to its rounding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=256, n_embd=256, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).cuda()
    model.compile(backend="sste", options={"sste.when": "always"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 256, (8, 64), device="cuda")
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    names = sparse_compile.finalize(model)
    assert len(names) == 4
    plain = transformers.GPT2LMHeadModel(config).cuda()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        pruned = model(input_ids=ids).logits
        expected = plain(input_ids=ids).logits
        # Rounding to e4m3 is an error of 2.5 % of each operand, 3.6 % of a product.
        assert (pruned - expected).norm() < 0.05 * expected.norm()
    plain.to(torch.bfloat16)
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        assert sparse_compile.to_sparse(plain) == names
        assert (plain(input_ids=ids).logits - expected).float().norm() < 0.02 * expected.float().norm()
