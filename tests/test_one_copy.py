"""A large weight, or with small memory each, is kept once: backward makes the copy for dgrad, with the same bits."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shared_graphs
import sparse_compile
from gpu_weights import in_layout
from sparse_compile.kernels import ops, reference
from sparse_compile.kernels.formats import E4M3, metadata_shape, values_shape
from sparse_compile.passes import keep_one_copy
from sparse_compile.passes.choose import _components
from sparse_compile.projections.groups_of_four import SOFT, SOFT_ONCE, TOP2, TOP2_ONCE
from sparse_compile.projections.identity import IDENTITY, IDENTITY_BACKWARD, IDENTITY_ONCE
from sparse_compile.projections.transposable import SOFT_TRANSPOSABLE
from sparse_compile.recipe import FP8, RECIPES, SSTE, SSTE_TRANSPOSABLE, STE, Gemm, Recipe
from sparse_compile.testing import assert_same_bits
from sparse_compile.weights.registry import record_of

clean_slate = shared_graphs.kept
pytestmark = pytest.mark.usefixtures("nothing_watched")

OPTIONS = {"sste.executor": "eager", "sste.when": "always", "sste.health": 1}
SAMPLED = replace(SSTE, dgrad=Gemm.MVUE24)
X = torch.randn(32, 128)


def _name(recipe: Recipe | str) -> str:
    return recipe if isinstance(recipe, str) else recipe.full_name


class Block(nn.Module):
    """Linears of an FFN, and one that is none; the width of the last is no multiple of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.up, self.down = nn.Linear(128, 128), nn.Linear(128, 256), nn.Linear(256, 144)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.other(x).softmax(-1)).relu())


def compiled(model: nn.Module, memory: str, recipe: Recipe | str = "s-ste") -> Callable[..., Any]:
    return torch.compile(model, backend="sste", options=OPTIONS | {"sste.memory": memory, "sste.recipe": recipe})


def trained(memory: str, recipe: Recipe | str, steps: int = 3) -> tuple[Block, torch.optim.Optimizer, list[Tensor]]:
    """A model, its optimizer, and all gradients on the way."""
    torch.manual_seed(0)
    model = Block()
    call, optimizer = compiled(model, memory, recipe), torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradients = []
    for _ in range(steps):
        x = X.clone().requires_grad_()
        call(x).square().sum().backward()
        gradients += [x.grad, *(parameter.grad.clone() for parameter in model.parameters())]
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, gradients


@pytest.mark.parametrize(
    "recipe",
    [
        "s-ste",
        *(pytest.param(other, marks=pytest.mark.nightly) for other in ("s-ste-transposable", "ste", "fp8", SAMPLED)),
    ],
    ids=_name,
)
def test_training_is_the_same(recipe: Recipe | str) -> None:
    fast, small = trained("fast", recipe), trained("small", recipe)
    assert all(torch.equal(one, other) for one, other in zip(fast[2], small[2], strict=True))
    healths = [
        [{**vars_of(sample), "step": 0} for history in names for sample in history] for names in histories(fast, small)
    ]
    assert healths[0] == healths[1]
    assert any(sample["noise"] for sample in healths[0]) == (recipe != "fp8")


def histories(*trainings: tuple[Block, Any, Any]) -> list[list[Any]]:
    """The samples of the pruned weights of each model: those of the second have names of their own."""
    found = sparse_compile.report().health
    return [
        [history for name, history in found.items() if name.endswith("(2)") == bool(index)]
        for index in range(len(trainings))
    ]


def vars_of(sample: Any) -> dict[str, Any]:
    return {name: getattr(sample, name) for name in sample.__slots__}


@pytest.mark.parametrize(
    ("memory", "bytes_an_element"),
    # fprop's copy is compressed, with an eighth of metadata; the other one is dense.
    [("fast", {"other": 2, "up": 5 / 8 + 1}), ("small", {"other": 1, "up": 5 / 8})],
)
def test_what_is_kept_of_a_weight(memory: str, bytes_an_element: dict[str, float]) -> None:
    require_kept(trained(memory, "s-ste", steps=1)[0], bytes_an_element)


def test_one_copy_is_kept_of_a_large_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained("fast", "s-ste")
    monkeypatch.setattr(keep_one_copy, "LARGE", 128 * 256)
    torch._dynamo.reset()
    found = trained("fast", "s-ste")
    assert all(torch.equal(one, other) for one, other in zip(found[2], expected[2], strict=True))
    require_kept(found[0], {"other": 2, "up": 5 / 8})
    torch._dynamo.reset()  # for tests that would find these graphs


def require_kept(model: Block, bytes_an_element: dict[str, float]) -> None:
    for name, expected in bytes_an_element.items():
        weight = model.get_submodule(name).weight
        (kept,) = record_of(weight).operands.values()
        assert sum(operand.nbytes for operand in kept.operands) == expected * weight.numel() + 4
    down = record_of(model.down.weight).operands
    assert [layout.projection for layout in down] == [SOFT], "of 144 rows, which are no whole blocks"


def test_backward_keeps_no_dense_copy() -> None:
    torch.manual_seed(0)
    saved: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.extend([tuple(tensor.shape)] * (tensor.dtype is E4M3))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compiled(Block(), "small")(X)
    assert (256, 64) in saved, "the values of up, as fprop reads them"
    assert (128, 256) not in saved


def test_a_checkpoint_goes_on_with_the_other_memory() -> None:
    model, optimizer, _ = trained("fast", "s-ste")
    states = model.state_dict(), optimizer.state_dict()
    losses = []
    for memory in ("fast", "small"):
        resumed = Block()
        optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
        resumed.load_state_dict(states[0])
        optimizer.load_state_dict(copy.deepcopy(states[1]))  # it would share the tensors
        torch.manual_seed(1)
        call = compiled(resumed, memory)
        for _ in range(2):
            loss = call(X).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:2] == losses[2:]
    betas = [sparse_compile.beta(name) for name in (model, resumed)]
    assert betas[0].keys() == betas[1].keys()


def test_switching_memory_in_a_process_drops_the_other_operands() -> None:
    model, optimizer, _ = trained("fast", "s-ste")
    torch._dynamo.reset()
    call = compiled(model, "small")
    for _ in range(3):
        call(X).square().sum().backward()
        optimizer.step()
    assert [layout.projection for layout in record_of(model.up.weight).operands] == [SOFT_ONCE]


@pytest.mark.parametrize(
    ("recipe", "component"),
    [(SSTE, "transpose_pruned"), (STE, "transpose_pruned"), (FP8, "transpose_weight")],
    ids=_name,
)
def test_prices_hold_what_backward_makes(recipe: Recipe, component: str) -> None:
    once = replace(recipe, projection=recipe.projection.one_copy)
    assert set(_components(once)) - set(_components(recipe)) == {component, once.projection.cost_key}
    for variant in once.variants():
        assert (component in _components(variant)) == (variant.dgrad is not Gemm.DENSE)
    for variant in recipe.variants():
        assert component not in _components(variant)


@pytest.mark.parametrize(("head", "bytes_an_element"), [("fp8", 2), ("fp8-backward", 1)])
def test_what_no_product_reads_is_not_kept(head: str, bytes_an_element: float) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 192)), torch.randn(8, 64)

    def loss(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x), torch.zeros(8, dtype=torch.int64))

    torch.compile(loss, backend="sste", options=OPTIONS | {"sste.head": head})(x).backward()
    (kept,) = record_of(model[1].weight).operands.values()
    assert sum(operand.nbytes for operand in kept.operands) == bytes_an_element * 64 * 192 + 4


def test_a_dense_dgrad_reads_no_transposed_copy() -> None:
    dense = [variant for variant in FP8.variants() if variant.dgrad is Gemm.DENSE]
    assert [variant.projection for variant in dense] == [IDENTITY_ONCE]
    assert all(variant.projection is IDENTITY for variant in FP8.variants() if variant not in dense)


def test_which_projections_can_be_kept_once() -> None:
    kept_once = {recipe.projection: recipe.projection.one_copy for recipe in RECIPES.values()}
    assert {projection: once for projection, once in kept_once.items() if once is not None} == {
        SOFT: SOFT_ONCE, TOP2: TOP2_ONCE, IDENTITY: IDENTITY_ONCE
    }  # fmt: skip
    assert SSTE_TRANSPOSABLE.projection is SOFT_TRANSPOSABLE, "both of its copies are compressed"


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (3072, 768), (1664, 6400)], ids=str)
def test_kernels_match_the_reference(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    torch.manual_seed(0)
    weight, beta = in_layout(layout, *shape, dtype), torch.tensor([1.4839], device="cuda")
    for projection, expected in (
        (SOFT_ONCE, reference.prune_weight(weight, beta)),
        (TOP2_ONCE, reference.prune_weight(weight, beta.new_ones(1), hard=True)),
        (IDENTITY_ONCE, reference.cast_weight(weight)),
        (IDENTITY_BACKWARD, reference.cast_weight(weight)[1:]),
    ):
        operands = projection.new_operands(*shape, weight.device)
        for operand in operands:
            operand.view(torch.uint8).fill_(0x7F)  # NaN in FP8
        projection.fill(weight, operands, beta if projection.has_beta else None, None, False)
        kept = expected if projection is IDENTITY_BACKWARD else [*expected[:-2], expected[-1]]
        for name, actual, right in zip(operands._fields, operands, kept, strict=True):
            assert_same_bits(actual, right, f"{name} of {projection}")
        made = projection.dgrad_operand(*projection.kept_for_dgrad(operands))
        # Zeros that nothing was kept of have no sign here.
        assert torch.equal(made.payload.float(), expected[-2].float()), projection


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 128), (80, 384), (144, 256), (4096, 14336)], ids=str)
def test_transposing_what_was_pruned(shape: tuple[int, int]) -> None:
    """Of any bytes, NaN and zeros of either sign among them."""
    torch.manual_seed(0)
    rows, columns = shape
    dense = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda").view(E4M3)
    positions = torch.rand(rows, columns // 4, 4, device="cuda").argsort(dim=-1)[..., :2].sort(dim=-1).values
    values, metadata = reference.compress24(dense, positions)
    assert_same_bits(ops.transpose_pruned(values, metadata), reference.transpose_pruned(values, metadata))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    # More than 2^31 elements of the result, of which only the last rows are not zero.
    rows, columns = 65536 + 128, 32768
    values = torch.zeros(values_shape(rows, columns), dtype=torch.uint8, device="cuda").view(E4M3)
    metadata = torch.full(metadata_shape(rows, columns), 0x44444444, dtype=torch.int32, device="cuda")
    torch.manual_seed(0)
    dense = torch.randn(128, columns, device="cuda").to(E4M3)
    positions = torch.tensor([1, 3], device="cuda").expand(128, columns // 4, 2)
    values[-128:], metadata[:, -8:] = reference.compress24(dense, positions)
    made = ops.transpose_pruned(values, metadata)
    assert_same_bits(made[:, -128:], reference.transpose_pruned(values[-128:], metadata[:, -8:].contiguous()))
    assert not made[:, :-128].view(torch.uint8).any()
