"""What one traced graph is compiled to: a variant for each way in which its weights are found.

Whether a weight was trained pruned, is 2:4 itself, or is in a dense phase may change from call to call.  So linears are
decided on for each answer when dynamo traces the graph, and compiled for the answers that calls give.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import cache
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from sparse_compile.kernels import ops
from sparse_compile.measuring.baseline import Baseline
from sparse_compile.options import Options
from sparse_compile.passes.decide import Plan, alike
from sparse_compile.passes.find import Found
from sparse_compile.passes.flow import Region
from sparse_compile.passes.report_rows import planned_row, rejected_row
from sparse_compile.passes.sites import LinearSite, Reason, Rejection
from sparse_compile.reporting.model import GraphReport
from sparse_compile.reporting.process_report import record
from sparse_compile.runtime import DenseRead, Question, Runtime, follow, standing_of
from sparse_compile.torch_internals.dynamo import forget_examples, trace_artifact
from sparse_compile.torch_internals.fake import fake_inputs
from sparse_compile.torch_internals.graph import (
    clone_graph_module,
    example_value,
    real_parameter,
    with_checkpoint_bodies,
)
from sparse_compile.torch_internals.weak_tensors import weak
from sparse_compile.weights.operand_set import OperandLayout
from sparse_compile.weights.operands import are_sparse
from sparse_compile.weights.record import Trainer
from sparse_compile.weights.registry import record_of
from sparse_compile.weights.slot import WeightSlot
from sparse_compile.weights.standing import Standing
from sparse_compile.weights.target_pattern import NamedLinear

logger = logging.getLogger(__name__)

Decided = tuple[list[Plan], list[Rejection]]


class Compiled(NamedTuple):
    """A compiled graph, and what its inputs are beyond those of the traced one: seeds, then operands."""

    call: Callable[..., Any]
    slots: Sequence[WeightSlot]
    fakes: Sequence[Tensor]  # of seeds and operands
    seed_devices: Sequence[torch.device]


# Compiles a graph, in which linears are rewritten by plans, for inputs.
Compiler = Callable[[GraphModule, Sequence[Plan], Sequence[Any]], Compiled]
# A linear that is rewritten, one that is not, or why neither can be.
Outcome = Plan | Rejection | ValueError


class Decisions:
    """What becomes of each linear of a graph, by how its weight is found.

    Args:
        found: the linears, and what is left dense however weights are found.
        decide: a plan or a rejection for each of some linears whose weights are found so.
        choose: the same, for all plans: what the schedule and times make of them.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        found: Found,
        options: Options,
        decide: Callable[[Sequence[LinearSite], Standing], Decided],
        choose: Callable[[Sequence[Plan], Standing], Decided],
    ) -> None:
        self._options = options
        self.trainer: Trainer = (options.recipe.full_name, options.targets)
        self.graph_module, self.found, self.sites = graph_module, found, found.sites
        self._choose = choose
        self._decided = {
            standing: _alike([_decide(decide, site, standing) for site in self.sites]) for standing in Standing
        }
        self._outcomes = cache(self._outcomes_of)
        placeholders = list(graph_module.graph.find_nodes(op="placeholder"))
        self.positions = [placeholders.index(site.weight) for site in self.sites]  # of the weights among the inputs
        # Those that a pattern may name; now, while dynamo tells which weights it traces.
        weights = [real_parameter(site.weight) for site in self.sites]
        self.linears = [
            NamedLinear(position, site.name, site.path, None if weight is None else weak(weight))
            for position, site, weight in zip(self.positions, self.sites, weights, strict=True)
        ]
        asked = [index for index, _ in enumerate(self.sites) if self._depends(index)]
        self.questions = [self._question(index, self.positions[index]) for index in asked]
        self._asked = dict(zip(asked, range(len(asked)), strict=True))
        self.standings_now = tuple(
            self._standing_now(index, question) for index, question in zip(asked, self.questions, strict=True)
        )

    @property
    def dense_reads(self) -> list[DenseRead]:
        """Of products that stay dense however their weights are found."""
        places = {node: at for at, node in enumerate(self.graph_module.graph.find_nodes(op="placeholder"))}
        return [
            DenseRead(
                position=places[weight], product=f"{rejection.name}: {rejection.reason.value}: {rejection.detail}"
            )
            for rejection in self.found.rejections
            for weight in (rejection.weights if rejection.site is None else (rejection.site.weight,))
            if weight in places
        ]

    @property
    def names(self) -> list[str]:
        """Of the graph's linears."""
        return [site.name for site in self.sites] + [rejection.name for rejection in self.found.rejections]

    def outcomes(self, standings: tuple[Standing, ...]) -> list[Plan | Rejection]:
        """Of each linear, the weights of the questions standing so.

        Raises:
            ValueError: a linear that the user named can't be rewritten.
        """
        alike: dict[Standing, list[int]] = {}
        for index in range(len(self.sites)):
            standing = standings[self._asked[index]] if index in self._asked else Standing.FRESH
            alike.setdefault(standing, []).append(index)
        found: dict[int, Plan | Rejection] = {}
        for standing, indices in alike.items():
            for index, outcome in zip(indices, self._outcomes(standing, tuple(indices)), strict=True):
                if isinstance(outcome, ValueError):
                    raise outcome
                found[index] = outcome
        return [found[index] for index in range(len(self.sites))]

    def _depends(self, index: int) -> bool:
        """Whether it matters how the weight is found: not for one that is trainable, and never pruned."""
        decided = [self._decided[standing][index] for standing in Standing]
        return len({_kind(outcome) for outcome in decided}) > 1 or any(map(_prunes, decided))

    def _question(self, index: int, position: int) -> Question:
        site, pruned = self.sites[index], self._decided[Standing.RESUMED][index]
        target = None
        if isinstance(pruned, Plan) and _prunes(pruned):
            device = example_value(site.weight).device
            target = OperandLayout(pruned.recipe.projection, site.transposed, device)
        asks_24 = self._options.frozen and not example_value(site.weight).requires_grad
        dim = (-2 if site.transposed else -1) if asks_24 else None
        return Question(position=position, target=target, in_features_dim=dim)

    def _standing_now(self, index: int, question: Question) -> Standing:
        """As far as dynamo says which weight it has traced; the calls will tell."""
        weight = real_parameter(self.sites[index].weight)
        if weight is None:
            return Standing.FRESH
        known = record_of(weight)
        trainer = self.trainer if torch.is_grad_enabled() and weight.requires_grad else None
        if question.target is not None:
            follow(known, question.target, self._options.schedule, trainer)
        dim = question.in_features_dim
        sparse = dim is not None and are_sparse([weight], [known], [dim])[0]
        return standing_of(known, sparse=sparse, trainer=trainer)

    def _outcomes_of(self, standing: Standing, indices: tuple[int, ...]) -> list[Outcome]:
        """Of the linears whose weights stand so, with the phase of the schedule, and what is faster."""
        outcomes = [self._decided[standing][index] for index in indices]
        return _placed(outcomes, self._choose([outcome for outcome in outcomes if isinstance(outcome, Plan)], standing))


def _alike(outcomes: list[Outcome]) -> list[Outcome]:
    """One arithmetic for the linears that share a weight."""
    plans = [outcome for outcome in outcomes if isinstance(outcome, Plan)]
    rejections = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
    return _placed(outcomes, alike(plans, rejections))


def _placed(outcomes: Sequence[Outcome], decided: Decided) -> list[Outcome]:
    """The outcomes, in the place of each linear what was decided on it."""
    by_node: dict[Node, Outcome] = {plan.site.node: plan for plan in decided[0]}
    by_node |= {rejection.node: rejection for rejection in decided[1]}
    nodes = [None if isinstance(outcome, ValueError) else _node(outcome) for outcome in outcomes]
    return [
        outcome if node is None else by_node.get(node, outcome) for node, outcome in zip(nodes, outcomes, strict=True)
    ]


def _node(outcome: Plan | Rejection) -> Node:
    return outcome.site.node if isinstance(outcome, Plan) else outcome.node


def _decide(
    decide: Callable[[Sequence[LinearSite], Standing], Decided], site: LinearSite, standing: Standing
) -> Outcome:
    try:
        plans, rejections = decide([site], standing)
    except ValueError as error:
        return error
    return plans[0] if plans else rejections[0]


def _prunes(outcome: Outcome) -> bool:
    return isinstance(outcome, Plan) and outcome.recipe.projection.prunes


def _kind(outcome: Outcome) -> str | Reason:
    """What a linear becomes, up to its price."""
    if isinstance(outcome, Plan):
        return outcome.recipe.full_name
    return outcome.reason if isinstance(outcome, Rejection) else str(outcome)


class Variants:
    """Compiles a graph for what its linears become, each time that this is new.

    Args:
        graph_module: the graph that was decided on.
        described: the fields of ``GraphReport`` that say where it comes from.
        baseline: the graph as it was traced, to be measured.
        health: optimizer steps between two samples of the weights' health; 0 takes none.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        described: dict[str, Any],
        decisions: Decisions,
        compile: Compiler,
        *,
        follows_schedule: bool,
        baseline: Baseline | None,
        health: int,
    ) -> None:
        self._health = health
        self._decisions = decisions
        self._compiler = compile
        self._follows_schedule = follows_schedule
        self._baseline = baseline
        self._origin = described
        # Dynamo lets go of the real parameters when its backend returns; of its weak references to them, too.
        self._graph = clone_graph_module(forget_examples(graph_module))
        self._variants: dict[Any, Runtime] = {}
        self._reports: dict[tuple[str | Reason, ...], GraphReport] = {}
        self._recorded: set[tuple[str | Reason, ...]] = set()
        self._lock = RLock()

    def traced(self, inputs: Sequence[Any]) -> Runtime:
        """While dynamo traces: the variant for how the weights stand now, of whatever sizes dynamo lets vary.

        Where sizes vary, that of the other phase of a schedule is compiled as well: later it could not be guarded.
        """
        now = self._decisions.standings_now
        if self._origin["dynamic"] and self._follows_schedule:
            dense = Standing.DENSE in now
            phase = Standing.PRUNED if dense else Standing.DENSE
            # What has no target follows no schedule.
            other = tuple(
                standing if question.target is None else phase
                for standing, question in zip(now, self._decisions.questions, strict=True)
            )
            kinds, outcomes = self._outcomes(other)
            self._variants[kinds] = self._compile(kinds, outcomes, inputs)
        kinds, outcomes = self._outcomes(now)
        if kinds not in self._variants:
            self._variants[kinds] = self._compile(kinds, outcomes, inputs)
        self._record(kinds)
        return self._variants[kinds]

    def of_call(self, standings: tuple[Standing, ...], arguments: Sequence[Any]) -> Runtime:
        """The variant for how the weights of the questions stand, compiled for a call's arguments if there is none."""
        with self._lock:
            kinds, outcomes = self._outcomes(standings)
            sizes = tuple(argument.shape if isinstance(argument, Tensor) else argument for argument in arguments)
            key = (kinds, sizes) if self._origin["dynamic"] else kinds
            found = self._variants.get(kinds) or self._variants.get(key)
            if found is None:
                logger.info("a graph is compiled again: its weights are %s", sorted({s.value for s in standings}))
                found = self._variants[key] = self._compile(kinds, outcomes, fake_inputs(arguments))
                found.fixed_sizes = bool(self._origin["dynamic"])
            self._record(kinds)
            return found

    def _outcomes(self, standings: tuple[Standing, ...]) -> tuple[tuple[str | Reason, ...], list[Plan | Rejection]]:
        outcomes = self._decisions.outcomes(standings)
        return tuple(map(_kind, outcomes)), outcomes

    def _compile(
        self, kinds: tuple[str | Reason, ...], outcomes: list[Plan | Rejection], inputs: Sequence[Any]
    ) -> Runtime:
        graph = clone_graph_module(self._graph)
        places = _Places(self._decisions.graph_module, graph)
        plans = [replace(o, site=places.site(o.site)) for o in outcomes if isinstance(o, Plan)]
        call, slots, fakes, seed_devices = self._compiler(graph, plans, inputs)
        if kinds not in self._reports:
            self._reports[kinds] = self._report(outcomes, slots)
        return Runtime(
            call, slots, fakes, self._reports[kinds], self._baseline, seed_devices, self._health,
            self._decisions.trainer,
        )  # fmt: skip

    def _report(self, outcomes: list[Plan | Rejection], slots: Iterable[WeightSlot]) -> GraphReport:
        plans = [outcome for outcome in outcomes if isinstance(outcome, Plan)]
        refused = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
        refused += self._decisions.found.rejections
        for rejection in refused:
            logger.debug("left %s dense: %s: %s", rejection.name, rejection.reason.value, rejection.detail)
        rows = (*map(planned_row, plans), *map(rejected_row, refused))
        logger.info("rewrote %d of %d linears", len(plans), len(rows))
        others = dict(self._decisions.found.others)
        return GraphReport(rows=rows, others=others, execution=_execution(slots), **self._origin)

    def _record(self, kinds: tuple[str | Reason, ...]) -> None:
        """In the report are the variants that calls need."""
        report = self._reports[kinds]
        if kinds not in self._recorded:
            self._recorded.add(kinds)
            record(report)
            trace_artifact("sparse_compile_report", lambda: json.dumps(asdict(report), indent=1))


class _Places:
    """Where the nodes of a graph, and of its checkpointed bodies, are in a clone of it."""

    def __init__(self, graph_module: GraphModule, clone: GraphModule) -> None:
        self._nodes: dict[Node, Node] = {}
        self._graphs: dict[GraphModule, GraphModule] = {}
        for body, cloned in zip(with_checkpoint_bodies(graph_module), with_checkpoint_bodies(clone), strict=True):
            self._graphs[body] = cloned
            self._nodes.update(zip(body.graph.nodes, cloned.graph.nodes, strict=True))

    def site(self, site: LinearSite) -> LinearSite:
        region = Region(
            graph_module=self._graphs[site.region.graph_module],
            calls=tuple((self._graphs[caller], self._nodes[call]) for caller, call in site.region.calls),
            handed={self._nodes[inner]: self._nodes[outer] for inner, outer in site.region.handed.items()},
        )
        node, input, weight = (self._nodes[place] for place in (site.node, site.input, site.weight))
        bias = self._nodes.get(site.bias, site.bias) if site.bias is not None else None
        offsets = self._nodes[site.offsets] if site.offsets is not None else None
        return replace(site, node=node, region=region, input=input, weight=weight, bias=bias, offsets=offsets)


def _execution(slots: Iterable[WeightSlot]) -> str:
    """What runs the rewritten linears, as the report says it."""
    reasons = {ops.emulation_reason(slot.device) for slot in slots}
    emulated = sorted(filter(None, reasons))
    if emulated:
        return "emulated: " + "; ".join(emulated)
    return "kernels" if reasons else "dense"
