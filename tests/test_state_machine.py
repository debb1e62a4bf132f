"""Whatever a script does, in whatever order: which phase each weight is in, which scale it has, what is computed.

A small model of what must hold is driven beside the package.  It knows of one weight what a reader of DESIGN.md does.
"""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from hypothesis.strategies import integers, sampled_from
from torch import nn

import shared_graphs
import sparse_compile
from sparse_compile.kernels.reference import soft_threshold24
from sparse_compile.weights.pattern_24 import is_24
from sparse_compile.weights.record import Phase
from sparse_compile.weights.registry import find_record
from sparse_compile.weights.schedule import Schedule

uncompiled = shared_graphs.uncompiled

EAGER = {"sste.executor": "eager", "sste.when": "always", "sste.mvue": "off"}
SCHEDULES = {
    "none": (None, {}),
    "warm-up": (Schedule(begin=2, end=None), {"sste.warmup": 2}),
    "tail": (Schedule(begin=0, end=4), {"sste.tail": 2, "sste.total_steps": 6}),
    "both": (Schedule(begin=1, end=3), {"sste.warmup": 1, "sste.tail": 2, "sste.total_steps": 5}),
}


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


@dataclass
class Expected:
    """Of the up projection.

    Attributes:
        beta: final; None before a weight is trained, and in dense phases.
        steps: of the optimizer.
    """

    phase: Phase = Phase.FRESH
    beta: float | None = None
    steps: int = 0
    schedule: Schedule | None = None
    unbaked: bool = False
    told: bool = False  # by set_beta

    def keep_to_schedule(self):
        prunes = self.schedule is None or self.schedule.prunes_at(self.steps)
        if prunes:
            self.unbaked = False
            if not self.phase.prunes:
                self.phase = Phase.FRESH
        elif self.phase is Phase.PRUNED:
            self.unbaked = self.steps >= self.schedule.begin
        else:
            self.go_dense()

    def go_dense(self):
        self.phase = Phase.WARMUP if self.steps < self.schedule.begin else Phase.TAIL
        self.beta, self.unbaked, self.told = None, False, False


@dataclass
class Saved:
    model: dict
    optimizer: dict
    expected: Expected = field(default_factory=Expected)


class Scripts(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.saved = []
        self.name = "none"
        self.make()

    def make(self):
        """A model that nothing is known of."""
        self.model = FFN()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.expected = Expected()
        self.compile(self.name)

    @property
    def weight(self):
        return self.model.up.weight

    @property
    def record(self):
        return find_record(self.weight)

    def compile(self, name):
        self.name = name
        self.schedule, options = SCHEDULES[name]
        self.step = torch.compile(self.model, backend="sste", options=EAGER | options)

    def call(self, training):
        """Run the model; before, the weight follows what the call says."""
        expected = self.expected
        trainable = training and self.weight.requires_grad
        if (trainable or expected.schedule is None) and expected.schedule != self.schedule:
            expected.schedule = self.schedule
            expected.unbaked = False
            expected.keep_to_schedule()
        before = self.weight.detach().clone()
        with torch.set_grad_enabled(training):
            out = self.step(torch.randn(8, 64, requires_grad=training))
        assert torch.equal(self.weight, before), "a call changes no weight"
        return out

    @rule()
    def train(self):
        expected = self.expected
        loss = self.call(True).square().mean()
        trains = expected.phase.prunes and self.weight.requires_grad
        current = self.record.current_beta
        loss.backward()
        before = self.weight.detach().clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        expected.steps += 1
        if trains:
            expected.phase = Phase.PRUNED
            if expected.beta is None:
                expected.beta = current.value
        expected.keep_to_schedule()
        if expected.unbaked:
            assert not torch.equal(self.weight, before)
            assert is_24(self.weight, 1), "what linears computed with is 2:4"
            expected.go_dense()

    @rule()
    def step_without_the_backend(self):
        """As another model that holds the weight makes it."""
        known = self.record is not None
        self.model(torch.randn(8, 64)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.expected.steps += 1
        if known:
            self.expected.keep_to_schedule()
            if self.expected.unbaked:
                self.expected.go_dense()

    @rule()
    def evaluate(self):
        with torch.no_grad():
            first, second = (self.call_same() for _ in range(2))
        assert torch.equal(first, second)

    def call_same(self):
        torch.manual_seed(7)
        return self.call(False)

    @rule()
    def evaluation_is_what_training_computes(self):
        if not self.weight.requires_grad or not self.model.down.weight.requires_grad:
            return
        torch.manual_seed(7)
        trained = self.call(True).detach()
        assert torch.equal(trained, self.call_same())

    @rule()
    def forward_without_a_step(self):
        self.call(True).sum().backward()
        self.optimizer.zero_grad()
        # A gradient has passed, and the next step of whatever optimizer would train the weight: it is taken back.
        if self.record is not None:
            self.record.trained_with = None

    @rule()
    def freeze(self):
        self.weight.requires_grad_(False)

    @rule()
    def unfreeze(self):
        self.weight.requires_grad_(True)

    @rule()
    def load_other_weights(self):
        if self.expected.phase in (Phase.FRESH, Phase.WARMUP, Phase.TAIL):
            self.model.load_state_dict(FFN().state_dict())

    @rule()
    def save(self):
        parts = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
        self.saved = [*self.saved[-2:], Saved(*parts, copy.copy(self.expected))]

    @precondition(lambda self: self.saved)
    @rule(which=integers(0, 2))
    def load(self, which):
        saved = self.saved[which % len(self.saved)]
        self.model.load_state_dict(saved.model)
        self.optimizer.load_state_dict(saved.optimizer)
        says_nothing = not saved.optimizer["state"] and "sste" not in saved.optimizer["param_groups"][0]
        if says_nothing and self.expected.told:
            return  # a scale that was told beside it stays
        now, then = self.expected, saved.expected
        schedule = now.schedule
        self.expected = copy.copy(then)
        if not any("sste_steps" in kept for kept in saved.optimizer["state"].values()):
            self.expected.steps = 0  # saved before the model was called
        if then.phase is Phase.FINALIZED:
            self.expected.phase = Phase.PRUNED
        if then.phase in (Phase.WARMUP, Phase.TAIL):
            self.expected.phase = Phase.FRESH
        self.expected.schedule = schedule
        self.expected.unbaked = self.expected.told = False
        self.expected.keep_to_schedule()

    @precondition(lambda self: self.saved)
    @rule(which=integers(0, 2))
    def resume(self, which):
        """In what another process would make; nothing is called before the next rule."""
        self.make()
        self.load(which)

    @rule(beta=sampled_from([1.25, 1.5, 1.75]))
    def tell(self, beta):
        sparse_compile.set_beta(self.model, {"up.weight": beta})
        self.expected.phase, self.expected.beta, self.expected.unbaked = Phase.PRUNED, beta, False
        self.expected.told = True
        self.expected.keep_to_schedule()

    @precondition(lambda self: self.expected.phase is Phase.PRUNED and not self.expected.unbaked)
    @rule()
    def finalize(self):
        before = self.weight.detach().clone()
        assert "up.weight" in sparse_compile.finalize(self.model)
        assert torch.equal(self.weight, self.expected.beta * soft_threshold24(before))
        self.expected.phase, self.expected.beta = Phase.FINALIZED, 1.0
        self.expected.told = False

    @rule()
    def copy_the_model(self):
        other = copy.deepcopy(self.model)
        assert sparse_compile.beta(other) == {}
        with torch.no_grad():
            torch.compile(other, backend="sste", options=EAGER)(torch.randn(8, 64))

    @rule()
    def forget_graphs(self):
        torch._dynamo.reset()

    @rule(name=sampled_from(sorted(SCHEDULES)))
    def compile_again(self, name):
        torch._dynamo.reset()
        self.compile(name)

    @invariant()
    def what_is_kept_is_what_is_expected(self):
        if not hasattr(self, "expected") or self.record is None:
            return
        record, expected = self.record, self.expected
        assert record.phase is expected.phase
        assert record.steps == expected.steps or record.target is None
        assert (None if record.beta is None else record.beta.value) == expected.beta
        assert record.unbaked == expected.unbaked
        listed = sparse_compile.beta(self.model).get("up.weight")
        assert listed is None or 1.0 <= listed <= 2.0
        if expected.beta is not None:
            assert listed == expected.beta
        if not expected.phase.prunes:
            assert listed is None


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("examples", [5, pytest.param(100, marks=pytest.mark.nightly)])
def test_scripts_in_any_order(examples):
    run_state_machine_as_test(
        Scripts,
        settings=settings(
            max_examples=examples,
            stateful_step_count=16,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
