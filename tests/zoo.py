"""What is checked of every architecture of the zoo: it trains, its FFNs are found, every product is accounted for."""

import copy
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pytest
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparse_compile
from sparse_compile.reporting.model import DENSE, GraphReport

STEPS = 3
# Between the gradients of a step and those of a dense copy with the same projected weights: of all together, and of
# each rewritten weight.  Without MVUE, whose noise would hide other faults: of the FFN weights of LlamaForCausalLM and
# BertForMaskedLM the cosine is 0.997 and 0.998 without it, 0.83 to 0.93 with it.
COSINE = 0.96
OPTIONS = {"sste.executor": "eager", "sste.when": "always", "sste.mvue": "off"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A model of tiny sizes with random weights, and what is known of it.

    Attributes:
        build: the model, which draws nothing at random in its forward.
        inputs: what it is called with.
        loss: of what it returns.
        up, down: patterns of the FFN linears' names, matched at their end; empty if it has no FFN that is rewritten.
        exceptions: patterns of linears that are an FFN by name and not found to be one, or the other way, and why.
        eager: why some of its products reach no graph, if they do not.
        library: that must be there.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Mapping[str, Any]]
    loss: Callable[[Any], Tensor] = lambda output: output.loss
    up: str = ""
    down: str = ""
    exceptions: Mapping[str, str] = field(default_factory=dict)
    eager: str = ""
    library: str = "torch"


@dataclass(kw_only=True)
class Outcome:
    """Of three training steps and an evaluation.

    Attributes:
        linears, rewritten: products with a parameter that the report of training names, and those that are rewritten.
        ffn, ffn_found: linears that are FFN by the architecture, and those of them that are found and pruned.
        cosine, lowest_cosine: of all gradients of the first step; the lowest of a rewritten weight.
        training_counted, training_reported: FLOPs of three training steps, of eager dense training and by the report;
            without convolutions.
        evaluation_counted, evaluation_reported: of a call without gradients.
        seconds: of the compiled steps.
        faults: what is wrong, in words; that it failed as long as it has not come to its end.
    """

    name: str
    linears: int = 0
    rewritten: int = 0
    ffn: int = 0
    ffn_found: int = 0
    cosine: float = 0.0
    lowest_cosine: float = 0.0
    training_counted: int = 0
    training_reported: int = 0
    evaluation_counted: int = 0
    evaluation_reported: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=lambda: ["it raised an error"])


# Of the architectures that a run has examined.
OUTCOMES = pytest.StashKey[list[Outcome]]()


def examine(architecture: Architecture, outcome: Outcome) -> None:
    """Train three steps, evaluate once, and compare with a dense copy that runs eagerly."""
    torch.manual_seed(0)
    model, inputs = architecture.build().train(), architecture.inputs()
    baseline = copy.deepcopy(model)
    graphs = sparse_compile.report().graphs
    step = torch.compile(model, backend="sste", options=OPTIONS)

    start = time.perf_counter()
    losses, gradients, betas = _train(architecture, model, step, inputs)
    outcome.seconds = time.perf_counter() - start
    if not all(map(math.isfinite, losses)):
        outcome.faults.append(f"losses {losses}")
    if all(torch.equal(now, before) for now, before in zip(model.parameters(), baseline.parameters(), strict=True)):
        outcome.faults.append("no parameter moved")
    _check_linears(architecture, baseline, graphs, outcome)

    trained = reported_flops(graphs)
    counted = count(lambda: architecture.loss(baseline(**inputs)).backward())
    _check_flops("training", trained, _times(counted, STEPS), outcome, partly=bool(architecture.eager))
    baseline.zero_grad()

    if betas:
        sparse_compile.set_beta(baseline, betas)
        sparse_compile.finalize(baseline)
    architecture.loss(baseline(**inputs)).backward()
    _check_gradients(gradients, _gradients(baseline), graphs, outcome)

    (
        model.eval(),
        baseline.eval().requires_grad_(False),
    )  # the counter can't follow parameters without gradients otherwise
    with torch.no_grad():
        step(**inputs)
        counted = count(lambda: baseline(**inputs))
    _check_flops("evaluation", reported_flops(graphs) - trained, counted, outcome, partly=bool(architecture.eager))
    outcome.faults.pop(0)


def reported_flops(graphs: Iterable[GraphReport]) -> Counter[str]:
    """By how they run, as the report has them: every product of every graph, as often as the graph was called."""
    return sum((_times(graph.flops(), graph.calls) for graph in graphs), Counter())


def count(run: Callable[[], object]) -> Counter[str]:
    """FLOPs by operation, as PyTorch counts them, and with its formulas what it does not count on a CPU.

    Module by module: PyTorch counts nothing of the fast path of nn.TransformerEncoderLayer.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    return Counter({str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()})


def as_table(outcomes: Iterable[Outcome]) -> str:
    rows = [
        {
            "model": outcome.name,
            "seconds": f"{outcome.seconds:.0f}",
            "rewritten": f"{outcome.rewritten} of {outcome.linears}",
            "FFN found": f"{outcome.ffn_found} of {outcome.ffn}",
            "cosine (lowest)": f"{outcome.cosine:.3f} ({outcome.lowest_cosine:.3f})",
            "FLOPs in training": _share(outcome.training_reported, outcome.training_counted),
            "in evaluation": _share(outcome.evaluation_reported, outcome.evaluation_counted),
            "faults": ", ".join(fault.partition(":")[0] for fault in outcome.faults),
        }
        for outcome in outcomes
    ]
    return tabulate(rows, headers="keys", disable_numparse=True)


def as_json(outcomes: Iterable[Outcome]) -> str:
    libraries = ("torch", "transformers", "timm", "torchvision")
    versions = {name: sys.modules[name].__version__ for name in libraries if name in sys.modules}
    return json.dumps({**versions, "architectures": [asdict(outcome) for outcome in outcomes]}, indent=1) + "\n"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _train(
    architecture: Architecture, model: nn.Module, step: Callable[..., Any], inputs: Mapping[str, Any]
) -> tuple[list[float], dict[str, Tensor], dict[str, float]]:
    """Losses; the gradients of the first step, and the scales of the projections that it computed with."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, gradients, betas = [], {}, {}
    for number in range(STEPS):
        loss = architecture.loss(step(**inputs))
        loss.backward()
        if number == 0:
            gradients, betas = _gradients(model), sparse_compile.beta(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, gradients, betas


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Without those of zeros, which a graph gives to parameters whose results it hands out for nothing."""
    given = ((name, parameter.grad) for name, parameter in model.named_parameters())
    return {name: gradient.detach().clone() for name, gradient in given if gradient is not None and gradient.any()}


def _check_gradients(
    gradients: Mapping[str, Tensor], others: Mapping[str, Tensor], graphs: Iterable[GraphReport], outcome: Outcome
) -> None:
    if gradients.keys() != others.keys():
        outcome.faults.append(f"gradients: one alone has {sorted(gradients.keys() ^ others.keys())}")
        return
    rewritten = {row.module for graph in graphs for row in graph.rows if row.decision != DENSE}
    each = {
        name: _cosine([gradients[name]], [others[name]])
        for name in gradients
        if name.removesuffix(".weight") in rewritten
    }
    outcome.cosine = _cosine(gradients.values(), others.values())
    outcome.lowest_cosine = min(each.values(), default=1.0)
    low = {name: round(cosine, 3) for name, cosine in {"all": outcome.cosine, **each}.items() if not cosine >= COSINE}
    if low:
        outcome.faults.append(f"cosine: {low}")


def _cosine(gradients: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    flat, other = (torch.cat([gradient.flatten().double() for gradient in each]) for each in (gradients, others))
    return float(torch.dot(flat, other) / (flat.norm() * other.norm()))


def _check_linears(
    architecture: Architecture, model: nn.Module, graphs: Iterable[GraphReport], outcome: Outcome
) -> None:
    """What the report says of each linear, by the model's own names."""
    rows = {row.module: row for graph in graphs for row in graph.rows}
    weights = {name.removesuffix(".weight"): parameter for name, parameter in model.named_parameters()}
    outcome.linears = sum(name in weights for name in rows)
    outcome.rewritten = sum(row.decision != DENSE for row in rows.values())
    unused = dict(architecture.exceptions)
    for role, pattern in (("ffn up", architecture.up), ("ffn down", architecture.down)):
        by_name = {name for name, weight in weights.items() if weight.ndim in (2, 3) and _matches(pattern, name)}
        found = {name for name, row in rows.items() if row.role == role}
        pruned = {name for name in found if rows[name].decision != DENSE}
        outcome.ffn += len(by_name)
        outcome.ffn_found += len(by_name & pruned)
        if pattern and not by_name:
            outcome.faults.append(f"table: nothing is called {pattern}")
        for name in sorted(by_name ^ pruned | by_name ^ found):
            excused = [exception for exception in architecture.exceptions if _matches(exception, name)]
            for exception in excused:
                unused.pop(exception, None)
            if not excused:
                row = rows.get(name)
                said = f"{row.role}, {row.decision} {row.reason}" if row else "no row"
                outcome.faults.append(f"{role}: {name}: {said}" if name in by_name else f"no {role}: {name}: {said}")
    outcome.faults += [f"table: exception {pattern} is none" for pattern in unused]


def _matches(pattern: str, name: str) -> bool:
    """Whether the last parts of a dotted name are the pattern's."""
    return bool(pattern) and re.search(rf"(^|\.)({pattern})$", name) is not None


def _check_flops(what: str, reported: Counter[str], counted: Counter[str], outcome: Outcome, *, partly: bool) -> None:
    """Args:
    partly: whether products that reach no graph are counted as well.
    """
    setattr(outcome, f"{what}_reported", reported.total())
    setattr(outcome, f"{what}_counted", counted.total())
    if reported.total() != counted.total() and not (partly and 0 < reported.total() < counted.total()):
        share = reported.total() / max(1, counted.total())
        outcome.faults.append(f"{what}: {share:.1%} of the FLOPs have a row, counted {dict(counted)}")


def _times(flops: Counter[str], count: int) -> Counter[str]:
    return Counter({name: value * count for name, value in flops.items()})


def _grouped_flops(a_shape: Sequence[int], b_shape: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of rows in groups, each with a matrix of its own; or of groups of columns, whose products are the matrices."""
    return 2 * math.prod(a_shape) * b_shape[-1]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of scores and of their product with the values, for each head of the queries."""
    batch, heads, tokens, features = query
    scores = 2 * batch * heads * tokens * key[2] * features
    return scores + 2 * batch * heads * tokens * key[2] * value[3]


def _attention_backward_flops(
    grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Of both products' gradients, and of the scores, which are computed again."""
    again = _attention_flops(query, key, key)  # // 2 below: the scores alone
    return 2 * _attention_flops(query, key, value) + again // 2


def _formulas() -> dict[Any, Callable[..., int]]:
    aten, transformers = torch.ops.aten, torch.ops.transformers
    formulas = {
        aten._grouped_mm: _grouped_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    if hasattr(transformers, "grouped_mm_fallback"):
        formulas[transformers.grouped_mm_fallback] = _grouped_flops
    return formulas
