"""Random models, as the source text of their forward: linears in every spelling, and what lies between them."""

import linecache
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTHS = (64, 80, 128)
# Of inputs, but for the last dimension: by how many there are, so that a model may be called with several.
LEADING: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((16,), (1,), (33,), (0,)),
    2: ((4, 8), (1, 1), (3, 11)),
    3: ((2, 3, 5), (1, 2, 1)),
    0: ((),),
}
# Dtypes of parameters and inputs; the last is float32 under autocast to bfloat16.
DTYPES = ("float32", "bfloat16", "float16", "autocast")

# The product of ``x [..., {k}]`` with a weight ``{w} [{n}, {k}]`` and a bias ``{b}``, or none.
SPELLINGS = {
    "F.linear": "F.linear(x, {w}, {b})",
    "F.linear of a transposed copy": "F.linear(x, {w}.t().contiguous().t(), {b})",
    "F.linear of a clone": "F.linear(x.clone(), {w}.view({n}, {k}), {b})",
    "matmul": "torch.matmul(x, {w}.t()){plus}",
    "@": "x @ {w}.transpose(0, 1){plus}",
    "@ mT": "(x @ {w}.mT){plus}",
    "permute": "torch.matmul(x, {w}.permute(1, 0)){plus}",
    "method": "x.matmul({w}.T){plus}",
    "mm": "torch.mm(x.reshape(-1, {k}), {w}.T).view(*x.shape[:-1], {n}){plus}",
    "addmm": "torch.addmm({b}, x.flatten(0, -2), {w}.t()).unflatten(0, x.shape[:-1])",
    "baddbmm": "torch.addmm({b}, x.reshape(-1, {k}), {w}.t(), beta=1, alpha=1).reshape(x.shape[:-1] + ({n},))",
    # These stay dense.
    "einsum": "torch.einsum('...k,nk->...n', x, {w}){plus}",
    "tensordot": "torch.tensordot(x, {w}, dims=([-1], [1])){plus}",
}
DENSE = ("einsum", "tensordot")
# Where there is no bias to be added.
WITHOUT_BIAS = {"addmm": "mm", "baddbmm": "mm"}
# They need a dimension before the last.
FLAT = ("addmm",)

# What is done to ``y [..., {n}]``, and keeps its shape.
BETWEEN = {
    "nothing": (),
    "gelu": ("y = F.gelu(y)",),
    "relu": ("y = torch.relu(y)",),
    "relu in place": ("y = y.relu_()",),
    "silu": ("y = F.silu(y)",),
    "tanh": ("y = y.tanh()",),
    "squared relu": ("y = F.relu(y).square()",),
    "leaky": ("y = torch.where(y > 0, y, 0.1 * y)",),
    "gated by itself": ("y = y * torch.sigmoid(y)",),
    "gated by its halves": ("a, b = y.chunk(2, dim=-1)", "y = torch.cat([a * b.sigmoid(), b], dim=-1)"),
    "layer norm": ("y = F.layer_norm(y, ({n},))",),
    "rms norm": ("y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)",),
    "divided by its size": ("with torch.no_grad():", "    size = y.abs().mean(-1, keepdim=True) + 1.0", "y = y / size"),
    "softmax": ("y = y.softmax(-1) * {n}",),
    "halves swapped": ("y = torch.cat(y.chunk(2, dim=-1)[::-1], dim=-1)",),
    "rolled": ("y = y.roll(1, -1)",),
    "reversed": ("y = y.flip(-1)",),
    "strided": ("y = y.transpose(0, -1).contiguous().transpose(0, -1)",),
    "as strided": ("y = y.view(*y.shape[:-1], 2, {n} // 2).transpose(-1, -2).reshape(y.shape)",),
    "flattened": ("y = y.reshape(-1, {n}).clone().reshape(y.shape)",),
    "expanded": ("y = y.unsqueeze(0).expand(2, *y.shape).sum(0) * 0.5",),
    "doubled precision": ("y = y.double().sin().to(y.dtype)",),
    "written in place": ("y.mul_(0.5)", "y.add_(0.25)"),
    "written in part": ("y = y * 1.0", "y[..., ::2].add_(1.0)"),
    "written through a view": ("y = y + 0.25", "y.unsqueeze(0).mul_(0.5)"),
    "copied into": ("z = torch.zeros_like(y)", "z[..., 9:] = y[..., 9:]", "z[..., :9].copy_(y[..., 9:18])", "y = z"),
    "scaled": ("y = y * 3.0 - 1.0",),
    "shifted by a sum of all": ("y = y + y.detach().mean()",),
}  # fmt: skip
# Their derivatives jump, so what rounds coarsely can't be compared.
KINKED = ("relu", "relu in place", "leaky")


@dataclass(frozen=True)
class Weight:
    """Its linear is ``[rows, columns]``.

    Attributes:
        transposed: whether it is stored ``[columns, rows]``.
    """

    rows: int
    columns: int
    transposed: bool
    bias: bool
    frozen: bool


@dataclass(frozen=True)
class Step:
    """A linear and what follows it.

    Attributes:
        weight: which of the program's weights; those that two steps name are shared.
        gate: another weight of the same shape, whose product with the same input multiplies this one's; or none.
        after: what is done to the product, in order.
        residual: whether what went in is added to what comes out, where the shapes allow.
        checkpointed: whether backward makes it again; with reentrant autograd, or without.
        broken: whether the graph ends behind it.
    """

    spelling: str
    weight: int
    gate: int | None
    after: tuple[str, ...]
    residual: bool
    checkpointed: bool | None
    broken: bool

    @property
    def weights(self) -> tuple[int, ...]:
        return (self.weight,) if self.gate is None else (self.weight, self.gate)


@dataclass(frozen=True)
class Program:
    """A model of several linears, and how it is called.

    Attributes:
        leading: dimensions of inputs, but the last one, that calls may have.
        dynamic: of torch.compile.
    """

    weights: tuple[Weight, ...]
    steps: tuple[Step, ...]
    leading: tuple[tuple[int, ...], ...]
    dtype: str
    dynamic: bool | None
    recipe: str

    @property
    def features(self) -> int:
        return self.weights[self.steps[0].weight].columns

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of parameters and inputs."""
        return torch.float32 if self.dtype == "autocast" else getattr(torch, self.dtype)

    @property
    def dense(self) -> set[int]:
        """The weights that no recipe touches."""
        return {index for step in self.steps if step.spelling in DENSE for index in step.weights}


@st.composite
def programs(
    draw: st.DrawFn,
    recipes: Sequence[str],
    dtypes: Sequence[str] = DTYPES,
    most: int = 8,
    small: bool = False,
    widths: Sequence[int] = WIDTHS,
    shapes: Mapping[int, Sequence[tuple[int, ...]]] = LEADING,
) -> Program:
    """Of up to so many linears; ``small`` ones compile once, or nearly.

    A weight of a spelling that stays dense is no other linear's.
    """
    dtype = draw(st.sampled_from(dtypes))
    # What rounds coarsely can be compared after a few products only.
    most = most if dtype == "float32" else min(most, 2)
    # Several masks of a tile keep as much where magnitudes are of 16 bits: any of them may be found.
    recipes = [name for name in recipes if name != "t-sr-ste" or dtype in ("float32", "autocast")]
    between = sorted(name for name in BETWEEN if dtype == "float32" or name not in KINKED)
    dimensions = draw(st.sampled_from(list(shapes)))
    leading = draw(st.lists(st.sampled_from(shapes[dimensions]), min_size=1, max_size=1 if small else 2, unique=True))
    weights: list[Weight] = []
    steps: list[Step] = []
    width = draw(st.sampled_from(widths))
    count = draw(st.integers(1 if small else 2, most))
    while (linears := sum(len(step.weights) for step in steps)) < count:
        spelling = draw(st.sampled_from([name for name in SPELLINGS if dimensions or name not in FLAT]))

        def weight(columns: int, rows: int | None, spelling: str = spelling) -> int:
            """A new one, or now and then one that is there and fits."""
            dense = {index for step in steps if step.spelling in DENSE for index in step.weights}
            fitting = [
                index for index, old in enumerate(weights)
                if old.columns == columns and rows in (None, old.rows) and (index in dense) == (spelling in DENSE)
            ]  # fmt: skip
            if fitting and draw(st.integers(0, 5)) == 0:
                return draw(st.sampled_from(fitting))
            rows = rows or draw(st.sampled_from(widths))
            frozen = draw(st.integers(0, 7)) == 7
            weights.append(Weight(rows, columns, draw(st.booleans()), draw(st.booleans()), frozen))
            return len(weights) - 1

        first = weight(width, None)
        gated = draw(st.integers(0, 3)) == 3 and linears + 2 <= most
        rare = st.sampled_from((False,) * (11 if small else 5) + (True,))
        steps.append(
            Step(
                spelling=spelling,
                weight=first,
                gate=weight(width, weights[first].rows) if gated else None,
                after=tuple(draw(st.lists(st.sampled_from(between), max_size=2))),
                residual=draw(st.booleans()),
                checkpointed=draw(st.sampled_from((None, None, None, None, None, True, False))),
                broken=draw(rare),
            )
        )
        width = weights[first].rows
    return Program(
        weights=tuple(weights), steps=tuple(steps), leading=tuple(leading), dtype=dtype,
        dynamic=draw(st.sampled_from((False,) if small else (None, False, True))),
        recipe=draw(st.sampled_from(recipes)),
    )  # fmt: skip


def source(program: Program, product: Callable[[Program, str, int], str]) -> str:
    """The forward, and a method for each checkpointed step; ``product`` is the text of a linear of ``x``."""
    methods, forward = [], ["def forward(self, x):"]
    for number, step in enumerate(program.steps):
        weight = program.weights[step.weight]
        body = [f"y = {product(program, step.spelling, step.weight)}"]
        if step.gate is not None:
            body.append(f"y = F.silu({product(program, step.spelling, step.gate)}) * y")
        body += [line.format(n=weight.rows) for name in step.after for line in BETWEEN[name]]
        residual = step.residual and weight.rows == weight.columns
        if step.checkpointed is None:
            forward += [f"    {line}" for line in [*body, "x = x + y" if residual else "x = y"]]
        else:
            methods += [f"def part{number}(self, x):", *(f"    {line}" for line in body)]
            methods.append("    return x + y" if residual else "    return y")
            forward.append(f"    x = checkpoint(self.part{number}, x, use_reentrant={step.checkpointed})")
        if step.broken:
            forward.append("    graph_break()")
    return "\n".join([*methods, *forward, "    return x", ""])


def spelt(program: Program, spelling: str, index: int) -> str:
    """The linear as a user writes it."""
    weight = program.weights[index]
    bias = f"self.b{index}" if weight.bias else None
    if bias is None:
        spelling = WITHOUT_BIAS.get(spelling, spelling)
    stored = f"self.w{index}.t()" if weight.transposed else f"self.w{index}"
    plus = f" + {bias}" if bias else ""
    return SPELLINGS[spelling].format(w=stored, b=bias, plus=plus, n=weight.rows, k=weight.columns)


class Model(nn.Module):
    """The parameters of a program; ``real`` and ``exact`` add the forward."""

    def __init__(self, program: Program, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for index, weight in enumerate(program.weights):
            matrix = torch.randn(weight.rows, weight.columns, generator=generator) * weight.columns**-0.5
            stored = matrix.t().contiguous() if weight.transposed else matrix
            self.register_parameter(f"w{index}", nn.Parameter(stored, not weight.frozen))
            if weight.bias:
                self.register_parameter(f"b{index}", nn.Parameter(0.1 * torch.randn(weight.rows, generator=generator)))
        self.to(program.torch_dtype)


def _class(text: str, name: str, scope: dict[str, Any]) -> type[Model]:
    """Of all models of that text: they share their compiled graphs."""
    file = f"<fuzz {name} {hash(text) & 0xFFFFFFFF:x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    exec(compile(text, file, "exec"), scope)
    methods = {key: value for key, value in scope.items() if key == "forward" or key.startswith("part")}
    return type(name, (Model,), methods)


@cache
def real(program: Program) -> type[Model]:
    """The model as a user writes it."""
    scope = {"torch": torch, "F": F, "checkpoint": checkpoint, "graph_break": torch._dynamo.graph_break}
    return _class(source(program, spelt), "Real", scope)


@cache
def exact(program: Program) -> type[Model]:
    """The model whose linears are ``self.multiply(index, x)``."""
    scope = {"torch": torch, "F": F, "graph_break": lambda: None}
    scope["checkpoint"] = lambda function, x, use_reentrant: function(x)
    return _class(source(program, lambda _, spelling, index: f"self.multiply({index}, x)"), "Exact", scope)


def input_of(program: Program, leading: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*leading, program.features, generator=generator).to(program.torch_dtype)
