"""Random models: linears in every spelling, and what lies between them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTHS = (64, 80, 128)
LEADING = ((16,), (4, 8), (2, 3, 5), (1,), (33,))

# A spelling that is not rewritten.
DENSE = "einsum"
# By name, the product of ``x [..., K]`` with a weight ``[N, K]`` and a bias ``[N]`` or none.
SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "F.linear": F.linear,
    "matmul": lambda x, w, b: _plus(torch.matmul(x, w.t()), b),
    "@": lambda x, w, b: _plus(x @ w.transpose(0, 1), b),
    "mm": lambda x, w, b: _plus(torch.mm(x.reshape(-1, x.shape[-1]), w.T).view(*x.shape[:-1], -1), b),
    "addmm": lambda x, w, b: (
        torch.mm(x.flatten(0, -2), w.t()) if b is None else torch.addmm(b, x.flatten(0, -2), w.t())
    ).unflatten(0, x.shape[:-1]),
    DENSE: lambda x, w, b: _plus(torch.einsum("...k,nk->...n", x, w), b),
    "permuted": lambda x, w, b: F.linear(x, w.t().contiguous().t(), b),
}


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x + bias


def _in_place(x: Tensor) -> Tensor:
    y = x + 0.25
    y.mul_(0.5)
    y[..., ::2].add_(1.0)
    return y


# Functions of ``[..., C]`` that keep its shape.
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "gelu": F.gelu,
    "relu": torch.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "squared relu": lambda x: F.relu(x).square(),
    "gated by itself": lambda x: x * torch.sigmoid(x),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms norm": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5),
    "halves swapped": lambda x: torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1),
    "reversed": lambda x: x.flip(-1),
    "strided": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "flattened": lambda x: x.flatten(0, -2).clone().view(x.shape),
    "in place": _in_place,
    "scaled": lambda x: x * 3.0 - 1.0,
}


@dataclass(frozen=True)
class Step:
    """A linear and what follows it.

    Attributes:
        weight: which of the program's weights; those that two steps name are shared.
        after: functions, in order.
        residual: whether what went in is added to what comes out, where the shapes allow.
        checkpointed: whether backward makes it again; with reentrant autograd, or without.
        broken: whether the graph ends behind it.
    """

    spelling: str
    weight: int
    after: tuple[str, ...]
    residual: bool
    checkpointed: bool | None
    broken: bool


@dataclass(frozen=True)
class Program:
    """A model of several linears and its input.

    Attributes:
        shapes: ``(N, K)`` of each weight, whether it is stored transposed, has a bias, and is frozen.
        leading: dimensions of the input, but the last one.
        again: leading dimensions of a second call, if there is one.
    """

    shapes: tuple[tuple[int, int, bool, bool, bool], ...]
    steps: tuple[Step, ...]
    leading: tuple[int, ...]
    again: tuple[int, ...] | None
    dtype: torch.dtype
    seed: int


@st.composite
def programs(draw: st.DrawFn, dtype: torch.dtype = torch.float32, most: int = 8) -> Program:
    """Of up to so many linears.  A weight of an einsum, which stays dense, is no other linear's."""
    count = draw(st.integers(2, most))
    width = first = draw(st.sampled_from(WIDTHS))
    shapes: list[tuple[int, int, bool, bool, bool]] = []
    steps: list[Step] = []
    for _ in range(count):
        spelling = draw(st.sampled_from(sorted(SPELLINGS)))
        fitting = [
            index for index, shape in enumerate(shapes)
            if shape[1] == width
            and all((step.spelling == DENSE) == (spelling == DENSE) for step in steps if step.weight == index)
        ]  # fmt: skip
        if fitting and draw(st.integers(0, 5)) == 0:
            index = draw(st.sampled_from(fitting))
        else:
            index = len(shapes)
            rows = draw(st.sampled_from(WIDTHS))
            shapes.append((rows, width, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 7)) == 0))
        steps.append(
            Step(
                spelling=spelling,
                weight=index,
                after=tuple(draw(st.lists(st.sampled_from(sorted(BETWEEN)), max_size=2))),
                residual=draw(st.booleans()),
                checkpointed=draw(st.sampled_from((None, None, None, True, False))),
                broken=draw(st.integers(0, 5)) == 0,
            )
        )
        width = shapes[index][0]
    assert shapes[steps[0].weight][1] == first
    return Program(
        shapes=tuple(shapes), steps=tuple(steps), leading=draw(st.sampled_from(LEADING)),
        again=draw(st.sampled_from((None, *LEADING))), dtype=dtype,
        seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


class Model(nn.Module):
    """Runs a program.  ``multiply``, if given, takes the place of the spellings."""

    def __init__(
        self, program: Program, multiply: Callable[[int, Tensor, Tensor, Tensor | None], Tensor] | None = None
    ) -> None:
        super().__init__()
        torch.manual_seed(program.seed)
        self.program, self.multiply = program, multiply
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for rows, columns, transposed, bias, frozen in program.shapes:
            weight = torch.randn(rows, columns) * columns**-0.5
            self.weights.append(nn.Parameter(weight.t().contiguous() if transposed else weight, not frozen))
            self.biases.append(nn.Parameter(0.1 * torch.randn(rows) if bias else torch.zeros(0)))
        self.to(program.dtype)

        # Written out: dynamo does not go on in a loop whose body ends a graph.
        lines = []
        for index, step in enumerate(program.steps):
            run = f"self._step(self.program.steps[{index}], x)"
            if step.checkpointed is not None:
                run = f"checkpoint({run.replace('(', ', ', 1)[:-1]}, use_reentrant={step.checkpointed})"
            lines.append(f"    x = {run}")
            lines += ["    graph_break()"] * step.broken
        scope = {"checkpoint": checkpoint, "graph_break": torch._dynamo.graph_break}
        exec("\n".join(["def forward(self, x):", *lines, "    return x"]), scope)
        self.forward = scope["forward"].__get__(self)

    def _step(self, step: Step, x: Tensor) -> Tensor:
        _, _, transposed, has_bias, _ = self.program.shapes[step.weight]
        weight = self.weights[step.weight].t() if transposed else self.weights[step.weight]
        bias = self.biases[step.weight] if has_bias else None
        if self.multiply is None:
            y = SPELLINGS[step.spelling](x, weight, bias)
        else:
            y = self.multiply(step.weight, x, weight, bias)
        for name in step.after:
            y = BETWEEN[name](y)
        return x + y if step.residual and x.shape == y.shape else y
