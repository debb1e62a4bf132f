"""A linear of experts computes what a loop over experts does, each with the linear of one matrix."""

import pytest
import torch
from torch import nn

import sparse_compile
from experts_training import COUNT, EAGER, EXACT, WIDTH, Model, adamw, compiled, train
from experts_training import operands as kept_operands
from sparse_compile.kernels.formats import expert_stream, grouped_columns, padded
from sparse_compile.linear.function import LinearSpec, linear
from sparse_compile.recipe import Gemm
from variants import VARIANTS

SEED = torch.tensor([42])
K, N = 32, 48
# Tokens of each expert: skewed, none at the beginning, in the middle and at the end, one alone, more than a tile.
ROUTINGS = {
    "skewed": (3, 150, 1, 22),
    "empty ones": (0, 5, 0, 0, 9, 0),
    "all to one": (0, 40, 0),
    "none": (0, 0, 0),
    "one expert": (17,),
}
RECIPES = {name: recipe for name, recipe in VARIANTS.items() if recipe.dgrad is not Gemm.MVUE24}


def operands_of(weight, recipe):
    """Of ``weight [E, N, K]``, with another beta for each expert."""
    projection = recipe.projection
    operands = projection.new_operands_of_experts(*weight.shape, weight.device)
    masks = projection.new_masks_of_experts(*weight.shape, weight.device)
    beta = torch.linspace(1.0, 2.0, len(weight)) if projection.has_beta else None
    projection.fill_experts(weight.detach(), operands, beta, masks, True)
    return operands


def in_a_loop(x, stored, spec, operands, counts):
    """The definition."""
    outputs, first = [], 0
    for e, count in enumerate(counts):
        own = type(operands)(*(operand[e] for operand in operands))
        tokens = x[first : first + count]
        of_expert = spec._replace(stream=expert_stream(spec.stream, e))
        outputs.append(linear(tokens, stored[e], None, SEED, of_expert, own))
        first += count
    return torch.cat(outputs)


# Of each kind of product one; the other recipes differ in the weight, or in how gradients are cast.
BY_DAY = (
    ("fp8", False), ("fp8", True), ("fp8-mvue", False), ("fp8-mvue", True), ("fp8-backward", True),
    ("fp8/projection=identity-once/dgrad=DENSE/wgrad=DENSE", False), ("s-ste", False), ("s-ste", True),
    ("s-ste/wgrad=FP8/estimator=", True), ("s-ste/wgrad=DENSE/estimator=", False),
    ("s-ste-transposable", True), ("t-sr-ste", False), ("s-ste-approximate/rounding=STOCHASTIC", False),
    ("s-ste-bf16", True),
)  # fmt: skip


def marked():
    for name in RECIPES:
        for transposed in (False, True):
            marks = () if (name, transposed) in BY_DAY else (pytest.mark.nightly,)
            yield pytest.param(name, transposed, marks=marks)


@pytest.mark.parametrize(("name", "transposed"), list(marked()))
def test_experts_are_a_loop_over_linears(name, transposed):
    recipe, dtype = RECIPES[name], torch.bfloat16 if RECIPES[name].is_bf16 else torch.float32
    for counts in ROUTINGS.values():
        x = torch.randn(sum(counts), K, dtype=dtype)
        weight = torch.randn(len(counts), N, K, dtype=dtype)
        stored = weight.mT.contiguous() if transposed else weight
        operands, spec = operands_of(weight, recipe), LinearSpec(name, 3, transposed, dtype)
        grad_output = torch.randn(sum(counts), N, dtype=dtype)
        results = []
        offsets = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for compute in (
            lambda a, b: linear(a, b, None, SEED, spec, operands, offsets),  # noqa: B023
            lambda a, b: in_a_loop(a, b, spec, operands, counts),  # noqa: B023
        ):
            a, b = x.clone().requires_grad_(), stored.clone().requires_grad_()
            y = compute(a, b)
            y.backward(grad_output)
            results.append((y, a.grad, b.grad))
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
            assert actual.isfinite().all()


def test_what_runs_by_day_is_there():
    assert {name for name, _ in BY_DAY} <= RECIPES.keys()


@pytest.mark.parametrize("name", ["fp8", "s-ste"])
def test_as_many_tokens_for_each_need_no_offsets(name):
    x, weight = torch.randn(3, 20, K), torch.randn(3, N, K)
    operands, spec = operands_of(weight, RECIPES[name]), LinearSpec(name, 0, False, torch.float32)
    together, apart = ((x.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2))
    y = linear(*together, None, SEED, spec, operands)
    expected = linear(apart[0].view(60, K), apart[1], None, SEED, spec, operands, torch.tensor([20, 40, 60]))
    assert y.is_contiguous()
    assert torch.equal(y, expected.view(3, 20, N))
    for output in (y, expected):
        output.backward(torch.ones_like(output))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("name", ["fp8", "s-ste", "s-ste-bf16"])
def test_rows_that_are_nobody_s_change_nothing(name):
    """transformers leaves tokens of other processes' experts at the end, and masks what comes of them."""
    dtype = torch.bfloat16 if RECIPES[name].is_bf16 else torch.float32
    offsets, weight = torch.tensor([5, 5, 17]), torch.randn(3, N, K, dtype=dtype)
    operands, spec = operands_of(weight, RECIPES[name]), LinearSpec(name, 0, False, dtype)
    x, grad_output = torch.randn(20, K, dtype=dtype), torch.randn(20, N, dtype=dtype)
    x[17:], grad_output[17:] = torch.inf, torch.nan
    results = []
    for rows in (20, 17):
        a, b = x[:rows].clone().requires_grad_(), weight.clone().requires_grad_()
        y = linear(a, b, None, SEED, spec, operands, offsets)
        y.backward(grad_output[:rows])
        results.append((y[:17], a.grad[:17], b.grad))
    assert all(torch.equal(actual, expected) for actual, expected in zip(*results, strict=True))


def test_experts_have_draws_of_their_own_whatever_others_get():
    """Of the same tokens, and where the tokens before are more."""
    recipe, grad = RECIPES["s-ste"], torch.randn(40, N)
    weight = torch.randn(1, N, K).expand(2, N, K)
    operands, spec = operands_of(weight, recipe), LinearSpec("s-ste", 0, False, torch.float32)
    tokens = torch.randn(40, K)
    gradients = []
    for before in (40, 7):
        x = torch.cat([tokens[:before], tokens])
        stored = weight.clone().requires_grad_()
        y = linear(x, stored, None, SEED, spec, operands, torch.tensor([before, before + 40]))
        y.backward(torch.cat([grad[:before], grad]))
        gradients.append(stored.grad)
    assert not torch.equal(gradients[0][0], gradients[0][1])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_the_columns_of_padded_tokens_are_enough():
    for counts in ((1,) * 9, (128, 1, 0), (0,) * 5, (129,) * 3, (127, 128, 129)):
        total = sum(padded(count) for count in counts)
        assert total <= grouped_columns(sum(counts), len(counts)) < total + 128 * len(counts) + 1


class One(nn.Module):
    """One grouped product, stored as ``[E, N, K]`` or transposed."""

    def __init__(self, transposed):
        super().__init__()
        self.transposed = transposed
        shape = (COUNT, WIDTH, 128) if transposed else (COUNT, 128, WIDTH)
        self.weight = nn.Parameter((torch.randn(shape) / 8).bfloat16())

    def forward(self, x, offsets):
        return torch._grouped_mm(x, self.weight if self.transposed else self.weight.mT, offs=offsets)


@pytest.mark.parametrize(
    ("name", "transposed"),
    [
        ("fp8", True), ("s-ste", False), ("s-ste-transposable", True),
        *(pytest.param(*other, marks=pytest.mark.nightly)
          for other in (("fp8", False), ("s-ste", True), ("s-ste-transposable", False))),
    ],
)  # fmt: skip
def test_a_compiled_product_is_the_loop_over_experts(name, transposed):
    """Exactly, whatever the routing, in one graph."""
    recipe = VARIANTS[name] if name == "fp8" else VARIANTS[name].with_estimator(None)
    model = One(transposed)
    step = compiled(
        model, {**(EAGER if name == "fp8" else EXACT), "sste.targets": "all", "sste.recipe": name}, fullgraph=True
    )
    for counts in ((10, 0, 25, 5), (0, 0, 40, 0), (1, 1, 1, 37)):
        ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
        x = torch.randn(40, WIDTH).bfloat16()
        results = []
        for call in (step, None):
            a, model.weight.grad = x.clone().requires_grad_(), None
            if call is not None:
                y = call(a, ends)
            else:
                spec = LinearSpec(recipe.full_name, 0, transposed, torch.bfloat16)
                made = kept_operands(model.weight)
                tokens = zip([0, *ends.tolist()[:-1]], ends.tolist(), strict=True)
                each = [
                    linear(a[first:last], model.weight[e], None, None, spec, type(made)(*(part[e] for part in made)))
                    for e, (first, last) in enumerate(tokens)
                ]
                y = torch.cat(each)
            y.backward(x.repeat(1, 2))
            results.append((y, a.grad, model.weight.grad))
        assert all(torch.equal(actual, expected) for actual, expected in zip(*results, strict=True))
    (graph,) = sparse_compile.report().graphs
    assert graph.calls == 3
    assert [(row.shape, row.decision.split()[0]) for row in graph.rows] == [("40 x 64 -> 128, 4 experts", name)]


def test_experts_train_in_one_graph_and_have_a_row_each():
    model = Model()
    step, optimizer = compiled(model, EAGER, fullgraph=True), adamw(model)
    (first, *_), *_, (last, *_) = (train(step, optimizer, steps=2) for _ in range(3))
    assert last < 0.95 * first
    (graph,) = sparse_compile.report().graphs
    assert graph.calls == 6
    rows = {row.module: row for row in graph.rows}
    assert {name: (row.role, row.shape) for name, row in rows.items()} == {
        "experts.up": ("ffn up", "40 x 64 -> 128, 4 experts"),
        "experts.down": ("ffn down", "40 x 64 -> 64, 4 experts"),
    }
    assert {row.decision for row in rows.values()} == {"s-ste (2:4 fp8, fp8, 2:4 fp8)"}
    assert all("experts_training.py" in row.source for row in rows.values())


def test_the_last_product_of_a_graph_is_no_head_of_experts():
    """Whatever the shape of an embedding that lives."""
    embedding, model = nn.Embedding(128, WIDTH), One(transposed=False)
    step = compiled(model, EAGER)
    step(torch.randn(40, WIDTH).bfloat16(), torch.tensor([10, 20, 30, 40], dtype=torch.int32))
    (row,) = sparse_compile.report().graphs[-1].rows
    assert row.decision.split()[0] != "dense", (row.reason, embedding)
