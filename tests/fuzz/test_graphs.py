"""Random models against an oracle of their own: outputs, gradients, a second call of another size, a step between.

``bash scripts/fuzz.sh`` tries more of them; ``FUZZ_SHRINK=1`` in front of it looks for the smallest that fails.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparse_compile
from fuzz.oracle import PROJECTIONS, Kept, Linear, beta_of, kept
from fuzz.programs import Model, Program, programs

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))
LARGEST = 1e12  # beyond it fp32 may overflow on the way
# Of norms, for each linear.  fp32 and fp64 round a few elements to other neighbours in e4m3, which are 6 % apart, and
# bf16 many.  Products that should be in FP8 and are not would be off by 2.6 % each.
TOLERANCES = {torch.float32: 4e-3, torch.bfloat16: 5e-2}
MOST = {torch.float32: 0.02, torch.bfloat16: 0.1}
PHASES = [Phase.explicit, Phase.generate, *([Phase.shrink] if "FUZZ_SHRINK" in os.environ else [])]
SETTINGS = settings(
    max_examples=EXAMPLES, deadline=None, derandomize="FUZZ_EXAMPLES" not in os.environ, print_blob=True,
    database=None, suppress_health_check=list(HealthCheck), phases=PHASES,
)  # fmt: skip


class Oracle:
    """The same model in fp64, each weight multiplied as the report says, from ``operands`` that were made of it."""

    def __init__(self, program: Program, real: Model) -> None:
        self.recipes: dict[int, str | None] = {}
        self._operands: dict[int, Kept] = {}
        self.betas: dict[int, float] = {}
        self.model = Model(program, self.multiply).double()
        self.copy(real)

    def copy(self, real: Model) -> None:
        """The weights as they are now; what is made of them is made anew, with the betas that they began with."""
        self.model.load_state_dict({name: value.double() for name, value in real.state_dict().items()})
        self._operands.clear()

    def multiply(self, index: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        recipe = self.recipes[index]
        if recipe is None:
            return F.linear(x, weight, bias)
        if index not in self._operands:
            if index not in self.betas:
                self.betas[index] = beta_of(weight.detach(), recipe)
            self._operands[index] = kept(weight.detach(), recipe, self.betas[index])
        flat = Linear.apply(x.reshape(-1, x.shape[-1]), weight, self._operands[index])
        y = flat.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


def decisions(program: Program) -> dict[int, str | None]:
    """What the report says of each weight: its recipe, or None where it stays dense."""
    found: dict[int, set[str | None]] = {}
    for row in sparse_compile.report().rows:
        index = int(row.module.split(".")[1])
        found.setdefault(index, set()).add(None if row.decision == "dense" else row.decision.split(" ")[0])
    assert sorted(found) == sorted({step.weight for step in program.steps}), "each linear has a row"
    assert all(len(choices) == 1 for choices in found.values()), found
    return {index: choices.pop() for index, choices in found.items()}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, what
    actual, expected = actual.detach().double(), expected.detach()
    error = float((actual - expected).norm())
    norm = float(expected.norm())
    # The derivative of a tanh that is nearly 1 has few bits in fp32, and may be none.
    floor = 1e-5 * expected.numel() ** 0.5
    assert error <= tolerance * norm + floor, f"{what} is off by {error:.3g} of {norm:.3g}"


def check(program: Program, recipe: str) -> None:
    torch._dynamo.reset()
    sparse_compile.report().graphs.clear()
    real = Model(program)
    oracle = Oracle(program, real)
    options = {
        "sste.executor": "eager", "sste.when": "always", "sste.targets": "all", "sste.recipe": recipe,
        **({} if recipe == "fp8" else {"sste.mvue": "off"}),
    }  # fmt: skip
    step = torch.compile(real, backend="sste", options=options, dynamic=None)
    tolerance = min(TOLERANCES[program.dtype] * len(program.steps), MOST[program.dtype])
    trained = [parameter for parameter in real.parameters() if parameter.requires_grad and parameter.numel()]
    optimizer = torch.optim.SGD(trained, lr=0.05) if trained else None
    inputs = [program.leading, *([program.again] if program.again is not None else [])]
    for call, leading in enumerate(inputs):
        x = torch.randn(*leading, program.shapes[program.steps[0].weight][1]).to(program.dtype).requires_grad_()
        exact = x.detach().double().requires_grad_()
        y = step(x)
        weighting = torch.randn(y.shape).to(program.dtype)
        y.backward(weighting)
        oracle.recipes = decisions(program)
        expected = oracle.model(exact)
        expected.backward(weighting.double())
        largest = [expected, exact.grad, *(other.grad for other in oracle.model.parameters() if other.grad is not None)]
        assume(all(float(value.detach().abs().max()) < LARGEST for value in largest if value.numel()))
        assert_near(y, expected, tolerance, f"output of call {call}")
        assert_near(x.grad, exact.grad, tolerance, f"gradient of the input of call {call}")
        for (name, parameter), other in zip(real.named_parameters(), oracle.model.parameters(), strict=True):
            if other.grad is not None and other.numel():
                assert parameter.grad is not None, name
                assert_near(parameter.grad, other.grad, tolerance, f"gradient of {name} of call {call}")
        if optimizer is not None:
            optimizer.step()
        real.zero_grad()
        oracle.model.zero_grad()
        oracle.copy(real)


@pytest.mark.nightly
@SETTINGS
@given(program=programs(), recipe=st.sampled_from(sorted(PROJECTIONS)))
def test_models(program: Program, recipe: str) -> None:
    check(program, recipe)


@pytest.mark.nightly
@SETTINGS
@given(program=programs(torch.bfloat16, most=2), recipe=st.sampled_from(sorted(PROJECTIONS)))
def test_models_in_bf16(program: Program, recipe: str) -> None:
    check(program, recipe)
