"""A linear of experts computes what a loop over experts does, each with the linear of one matrix."""


import pytest
import torch

from sparse_compile.kernels.formats import expert_stream
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", RECIPES)
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
