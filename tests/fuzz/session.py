"""A model in training beside the oracle, which is told of all that happens to it: what is equal then."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_compile
from fuzz.oracle import RECIPES, Linear, Product, Recipe, beta_of, kept, transposable_mask
from fuzz.programs import Model, Program, exact, input_of, real
from sparse_compile.reporting.model import Row

# Beyond it what is computed may overflow on the way.
LARGEST = {"float32": 1e12, "bfloat16": 1e12, "autocast": 1e12, "float16": 1e3}
# Of norms, for each linear.  fp32 and fp64 round a few elements to other neighbours in e4m3, which are 6 % apart, and
# 16 bits many.  Products that should be in FP8 and are not would be off by 2.6 % each.
TOLERANCES = {"float32": 4e-3, "bfloat16": 5e-2, "autocast": 5e-2, "float16": 2e-2}
MOST = {"float32": 0.02, "bfloat16": 0.1, "autocast": 0.1, "float16": 0.05}
# Of a product, relative.
ROUNDING = {"float32": 2.0**-20, "bfloat16": 2.0**-8, "autocast": 2.0**-8, "float16": 2.0**-10}
# A sampled gradient is off by up to its own norm: then its cosine to the exact one is 0.7.  Of another one it is 0.
LEAST_COSINE = 0.35
LEFT_DENSE = re.compile("adapter|head", re.IGNORECASE)


class Diverged(Exception):
    """Numbers are too large to be compared."""


@dataclass(frozen=True)
class Kind:
    """How models are compiled and called: on a CPU nothing but the definitions of kernels can run.

    Attributes:
        priced: whether measured times decide what becomes of linears; what they decided is then read in the report.
        mode: of torch.compile; "reduce-overhead" lets no region run again in backward, nor gradients of two calls add
            up, as their memory belongs to CUDA graphs.
        tolerance: of the norm, for each linear, up to a tenth; those of a CPU if they are larger.
        rounding: of a product, relative; that of the dtype if it is larger.
    """

    device: str = "cpu"
    executor: str = "eager"
    priced: bool = False
    mode: str | None = None
    tolerance: float = 0.0
    rounding: float = 0.0

    @property
    def calls_once(self) -> bool:
        """Whether each step is one call of one graph: of a call whose forward runs again, prices may choose two."""
        return self.priced or self.mode is not None


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.02),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "foreach Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, foreach=True),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.001),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    "NAdam": lambda parameters: torch.optim.NAdam(parameters, lr=0.002),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.01, max_iter=1),
}


class Session:
    """A model in training, and what an oracle that is told of all that happens to it says of its weights.

    Attributes:
        trained: the weights that are pruned whatever comes, with their betas.
        masks: those that are kept, of the recipe that keeps them.
        places: what the report says of linears that stay dense for their place, by which weights are frozen.
    """

    def __init__(self, program: Program, seed: int, kind: Kind, mvue: bool, places: "Places | None" = None) -> None:
        self.program, self.kind, self.sampled = program, kind, mvue
        self.recipe = RECIPES[program.recipe]
        self.trained: dict[int, float] = {}
        self.masks: dict[int, Tensor] = {}
        self.betas: dict[int, float] = {}  # of the last call
        self.places = places or Places()
        self.resumed = False  # from a checkpoint, and not called since
        self.noise = 0.0
        self.optimizer: torch.optim.Optimizer | None = None
        self.optimizer_name = ""
        self.compile(real(program)(program, seed).to(kind.device))
        self.oracle = exact(program)(program, seed).double().to(kind.device)
        self.oracle.multiply = self._multiply  # type: ignore[assignment]
        self.optimize("SGD")

    # What happens to the model.

    def compile(self, model: Model) -> None:
        options = {
            "sste.executor": self.kind.executor, "sste.when": "faster" if self.kind.priced else "always",
            "sste.targets": "all", "sste.recipe": self.program.recipe,
            **({} if self.sampled or not self.recipe.sampled else {"sste.mvue": "off"}),
        }  # fmt: skip
        if self.kind.mode is not None:
            from torch._inductor import list_mode_options

            options |= list_mode_options(self.kind.mode)
        self.model = model
        self.step = torch.compile(model, backend="sste", options=options, dynamic=self.program.dynamic)

    def optimize(self, name: str) -> None:
        self.optimizer_name = name
        self.optimizer = OPTIMIZERS[name](list(self.model.parameters()))

    def weight(self, index: int) -> nn.Parameter:
        return getattr(self.model, f"w{index}")

    def forget(self, index: int) -> None:
        """The weight is another one by now; it was never trained."""
        self.trained.pop(index, None)
        self.masks.pop(index, None)

    def edited(self, weights: Iterable[int]) -> None:
        """Masks are found anew; but for those of a checkpoint, which hold for the first call: a model may be loaded
        after its optimizer."""
        if not self.resumed:
            for index in weights:
                self.masks.pop(index, None)

    # What must be true of it.

    def _multiply(self, index: int, x: Tensor) -> Tensor:
        """In fp64: the product with a weight as it must be."""
        stored = getattr(self.oracle, f"w{index}")
        weight = stored.t() if self.program.weights[index].transposed else stored
        bias = getattr(self.oracle, f"b{index}", None)
        y = self._product(index, x, weight)
        if self.noise:
            # As large as what rounds in a sum: some of its addends may be larger than it.
            size = y.detach().square().mean(-1, keepdim=True).sqrt()
            y = y * (1 + self.noise * torch.randn_like(y)) + self.noise * size * torch.randn_like(y)
        return y if bias is None else y + bias

    def _product(self, index: int, x: Tensor, weight: Tensor) -> Tensor:
        recipe = self.recipe_of(index)
        if recipe is None:
            return F.linear(x, weight)
        matrix = weight.detach()
        beta = self.trained.get(index) or beta_of(matrix, recipe)
        self.betas[index] = beta
        mask = None
        if recipe.projection == "masks":
            mask = self.masks.setdefault(index, transposable_mask(matrix))
        if self.noise:
            # What is cast to e4m3 may stand between two of its numbers.
            matrix, x = (value * (1 + self.noise * torch.randn_like(value)) for value in (matrix, x))
        flat = Linear.apply(x.reshape(-1, x.shape[-1]), weight, kept(matrix, recipe, beta, mask), recipe)
        return flat.view(*x.shape[:-1], matrix.shape[0])

    def recipe_of(self, index: int) -> Recipe | None:
        """None where the linear is dense."""
        if self.kind.priced:
            return self.places.priced.get(index)
        if index in self.program.dense or index in self.places.dense.get(self._frozen(), ()):
            return None
        if not self.weight(index).requires_grad and index not in self.trained:
            return None
        return self.recipe

    def call(self, leading: Sequence[int], seed: int, around: bool | None = None, training: bool = True) -> "Called":
        """Of the model; the oracle has its weights as they are now."""
        self.resumed = False
        x = input_of(self.program, leading, seed).to(self.kind.device).requires_grad_(training)
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            raise Diverged  # as by Adam, whose eps is zero in fp16
        autocast = self.program.dtype == "autocast"
        if self.kind.mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.kind.device, torch.bfloat16, enabled=autocast):
            calls = [graph.calls for graph in sparse_compile.report().graphs]
            y = self.step(x) if around is None else checkpoint(self.step, x, use_reentrant=around)
        # Of neither does the oracle know anything.
        if self.kind.priced:
            self._read_prices(calls)
        else:
            self._read_places()
        state = self.model.state_dict()
        self.oracle.load_state_dict({name: value.detach().double() for name, value in state.items()})
        for parameter, other in zip(self.model.parameters(), self.oracle.parameters(), strict=True):
            other.requires_grad_(parameter.requires_grad)
        return Called(x, y)

    def expected(self, called: "Called", before: dict[str, Tensor], noise: float = 0.0) -> dict[str, Tensor]:
        """What must have come of a call: the output, and what a backward has added to the gradients before it.

        Args:
            noise: relative, of each product, as of rounding.
        """
        self.noise = noise
        x = called.x.detach().double().requires_grad_()
        y = self.oracle(x)
        found = {"output": y.detach()}
        if called.weighting is not None:
            wanted = {name: p for name, p in self.oracle.named_parameters() if p.requires_grad}
            weighting = called.weighting.double()
            grads = torch.autograd.grad(y, [x, *wanted.values()], weighting, allow_unused=True)
            for name, grad in zip(("input", *wanted), grads, strict=True):
                if grad is not None:
                    found[f"gradient of {name}"] = grad + before.get(f"gradient of {name}", 0.0)
        return found

    def _frozen(self) -> frozenset[int]:
        weights = range(len(self.program.weights))
        return frozenset(index for index in weights if not self.weight(index).requires_grad)

    def _read_places(self) -> None:
        """What follows from a linear's place in the model; of graphs that a backward compiled, too."""
        graphs = sparse_compile.report().graphs
        new, self.places.graphs = graphs[self.places.graphs :], len(graphs)
        for row in (row for graph in new for row in graph.rows):
            if row.decision == "dense" and LEFT_DENSE.search(row.reason):
                self.places.dense.setdefault(self._frozen(), set()).add(_index(row))

    def _read_prices(self, before: Sequence[int]) -> None:
        """What times have made of the linears of a call.

        Args:
            before: how often each graph had been called before it.
        """
        graphs = sparse_compile.report().graphs
        self.places.priced = {}
        called = [graph for graph, old in zip_longest(graphs, before, fillvalue=0) if graph.calls > old]
        for row in (row for graph in called for row in graph.rows):
            recipe = None
            if row.decision != "dense":
                products = re.findall("fp8|bf16|dense", row.decision.split("(")[1])[:3]
                fprop, dgrad, wgrad = cast(list[Product], products)
                recipe = replace(self.recipe, fprop=fprop, dgrad=dgrad, wgrad=wgrad)
            if self.places.priced.setdefault(_index(row), recipe) != recipe:
                raise Diverged  # two linears of one weight, which the oracle does not tell apart

    def compare(self, called: "Called", before: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What is expected of the call, and was found.

        Raises:
            AssertionError: something else was.
            Diverged: it is too large to be compared.
        """
        before = before or {}
        expected = self.expected(called, before)
        if any(value.numel() and not value.abs().max() < LARGEST[self.program.dtype] for value in expected.values()):
            raise Diverged
        actual = {"output": called.y, "gradient of input": called.x.grad}
        actual |= {f"gradient of {name}": parameter.grad for name, parameter in self.model.named_parameters()}
        far = []
        for what, value in expected.items():
            found = actual[what]
            assert found is not None, what
            assert found.shape == value.shape, what
            found = found.detach().double()
            if self._is_sampled(what):
                cosine = float((found * value).sum()) / (float(found.norm() * value.norm()) + 1e-300)
                near = cosine >= LEAST_COSINE or float(value.norm()) <= self._floor(value)
                assert near, f"the cosine of {what} to the exact one is {cosine:.3g}"
            # Not ">": NaN must count.
            elif not float((found - value).norm()) <= self._allowed(value):
                far.append((what, found))
        if far:
            # Where rounding alone moves the oracle as far, as at the kink of a ReLU, nothing can be said.
            noise = max(ROUNDING[self.program.dtype], self.kind.rounding)
            moved = [self.expected(called, before, noise) for _ in range(24)]
            for what, found in far:
                spread = max(float((other[what] - expected[what]).norm()) for other in moved)
                error, norm = float((found - expected[what]).norm()), float(expected[what].norm())
                allowed = self._allowed(expected[what]) + 6 * spread
                assert error <= allowed, f"{what} is off by {error:.3g} of {norm:.3g}; allowed is {allowed:.3g}"
        for name, parameter in self.model.named_parameters():
            unexpected = parameter.grad is not None and f"gradient of {name}" not in expected
            assert called.weighting is None or not unexpected, f"{name} has a gradient"
        return expected

    def _is_sampled(self, what: str) -> bool:
        if not (self.sampled and self.recipe.sampled and what.startswith("gradient of w")):
            return False
        return self.recipe_of(int(what.removeprefix("gradient of w"))) is not None

    def _floor(self, value: Tensor) -> float:
        """The derivative of a tanh that is nearly 1 has few bits in fp32, and may be none."""
        return (1e-5 if self.program.dtype == "float32" else 1e-3) * value.numel() ** 0.5

    def _allowed(self, value: Tensor) -> float:
        """The norm of an error that rounding may make."""
        linears = sum(len(step.weights) for step in self.program.steps)
        dtype = self.program.dtype
        tolerance = max(min(self.kind.tolerance * linears, 0.1), min(TOLERANCES[dtype] * linears, MOST[dtype]))
        return tolerance * float(value.norm()) + self._floor(value)


def _index(row: Row) -> int:
    """Of its weight."""
    return int(re.findall(r"\bw(\d+)", row.module)[-1])


@dataclass
class Places:
    """Of one program, whatever script runs over it; and how many graphs of the report were read."""

    dense: dict[frozenset[int], set[int]] = field(default_factory=dict)
    priced: dict[int, Recipe | None] = field(default_factory=dict)  # what times made of recipes, in the last call
    graphs: int = 0


@dataclass
class Called:
    x: Tensor
    y: Tensor
    weighting: Tensor | None = None  # of the outputs, in a loss
