"""One watch of all optimizers: what counts as a step, who hears of it, and what checkpoints carry."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

import shared_graphs
import sparse_compile
from sparse_compile.weights.optimizer_watch import OptimizerWatch, Stage, watch
from sparse_compile.weights.registry import find_record

clean_slate = shared_graphs.kept
uncompiled = shared_graphs.uncompiled
pytestmark = pytest.mark.usefixtures("uncompiled")

EAGER = {"sste.executor": "eager", "sste.when": "always"}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return x + self.down(gelu(self.up(x)))


def model_of(blocks=1):
    return nn.Sequential(*(Block() for _ in range(blocks)))


def compiled(model, **options):
    return torch.compile(model, backend="sste", options=EAGER | {f"sste.{name}": v for name, v in options.items()})


def losses_of(run, optimizer, steps):
    found = []
    for number in steps:
        torch.manual_seed(number)
        x = torch.randn(16, 64)

        def loss_of(x=x):
            optimizer.zero_grad()
            loss = (run(x) - 1.0).square().mean()
            loss.backward()
            return loss

        takes_closure = isinstance(optimizer, torch.optim.LBFGS)
        loss = optimizer.step(loss_of) if takes_closure else loss_of()
        if not takes_closure:
            optimizer.step()
        found.append(loss.item())
    return found


# Steps that call other steps.


class Around(torch.optim.Optimizer):
    """Lookahead, and others that hold the groups of the optimizer inside."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups, self.state = base.param_groups, base.state

    def step(self, closure=None):
        return self.base.step()


class Logged(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


class Both(torch.optim.Optimizer):
    """One optimizer for matrices, another for the rest; it holds a weight of neither."""

    def __init__(self, weights):
        weights = list(weights)
        super().__init__([nn.Parameter(torch.zeros(1))], {})
        self.inner = [torch.optim.SGD(weights[:1], lr=0.1), torch.optim.SGD(weights[1:], lr=0.1)]

    def step(self, closure=None):
        for optimizer in self.inner:
            optimizer.step()


class SharpnessAware(torch.optim.Optimizer):
    def __init__(self, weights):
        super().__init__(weights, {})
        self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    def step(self, closure=None):
        self.base.step()
        self.base.step()


NESTED = {
    "around": lambda p: Around(torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "subclass": lambda p: Logged(p, lr=1e-3),
    "two inside": Both,
    "sharpness-aware": SharpnessAware,
    "two around": lambda p: Around(Around(torch.optim.SGD(p, lr=0.1))),
}


@pytest.mark.parametrize("make", NESTED.values(), ids=NESTED.keys())
def test_a_step_that_calls_others_counts_once(make):
    model = model_of()
    optimizer, run = make(model.parameters()), compiled(model, tail=2, total_steps=20)
    before = watch.count
    losses_of(run, optimizer, range(3))
    assert watch.count == before + 3
    assert {find_record(weight).steps for weight in model.parameters()} == {3}


def test_a_wrapper_that_accumulates_counts_the_steps_inside():
    class Accumulating(Around):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            if self.calls % 2 == 0:
                self.base.step()

    model = model_of()
    optimizer, run = Accumulating(torch.optim.SGD(model.parameters(), lr=0.1)), compiled(model)
    losses_of(run, optimizer, range(2))
    before = find_record(model[0].up.weight).steps
    losses_of(run, optimizer, range(4))
    assert find_record(model[0].up.weight).steps == before + 2


def test_a_step_that_fails_leaves_nothing_behind():
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise MemoryError
            return super().step(closure)

    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = Failing([weight], lr=0.1)
    with pytest.raises(MemoryError):
        optimizer.step()
    optimizer.fails = False
    before = watch.count
    for _ in range(2):
        optimizer.step()
    assert watch.count == before + 2


def test_a_compiled_step_counts_once():
    model = model_of()
    optimizer, run = Logged(model.parameters(), lr=1e-3), compiled(model)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        run(torch.randn(16, 64)).square().mean().backward()
        step()
    assert find_record(model[0].up.weight).steps == 3


def test_subscribers_hear_in_the_declared_order_whoever_came_first():
    heard = []
    for stages in (list(Stage), list(reversed(Stage))):
        other = OptimizerWatch()
        for stage in stages:
            other.subscribe(stage, after=lambda *_, stage=stage: heard.append(stage))
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        heard.clear()
        optimizer.step()
        assert heard[-len(Stage) :] == sorted(Stage)
        other._after.clear()
        other._after.update({stage: [] for stage in Stage})


@pytest.mark.parametrize("make", [lambda p: Around(torch.optim.SGD(p, lr=1.0)), lambda p: torch.optim.SGD(p, lr=1.0)])
def test_masked_decay_is_added_once(make):
    """With gradients of zero: what is dropped shrinks by the decay, in each step."""
    model = Block()
    run, optimizer = compiled(model, recipe="sr-ste", decay=0.25), make(model.parameters())
    weight = model.up.weight
    kept = weight.detach().clone()
    (run(torch.randn(16, 64)) * 0).sum().backward()
    optimizer.step()
    dropped = weight != kept
    assert 0.45 < float(dropped.float().mean()) < 0.55
    torch.testing.assert_close(weight[dropped], 0.75 * kept[dropped])


# Checkpoints of optimizers that keep no state under each weight.


class Grouped(torch.optim.Optimizer):
    """Momentum of all weights of a shape in one tensor, under the first of them."""

    def __init__(self, weights, lr=0.2):
        weights = list(weights)
        shapes = {weight.shape: None for weight in weights}
        super().__init__([{"params": [w for w in weights if w.shape == shape]} for shape in shapes], {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            state, grads = self.state[group["params"][0]], torch.stack([w.grad for w in group["params"]])
            state["momentum"] = state["momentum"].lerp(grads, 0.1) if "momentum" in state else grads
            for weight, update in zip(group["params"], state["momentum"], strict=True):
                weight.sub_(update / update.norm(), alpha=group["lr"])


class Signs(torch.optim.Optimizer):
    def __init__(self, weights, lr=3e-3):
        super().__init__(weights, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(weight.grad.sign(), alpha=group["lr"])


class Flat(Signs):
    """All momentum in one buffer, under a name."""

    @torch.no_grad()
    def step(self, closure=None):
        weights = self.param_groups[0]["params"]
        grads = torch.cat([weight.grad.flatten() for weight in weights])
        self.state["flat"] = self.state["flat"].lerp(grads, 0.1) if "flat" in self.state else grads
        for weight, update in zip(weights, self.state["flat"].split([w.numel() for w in weights]), strict=True):
            weight.sub_(update.view_as(weight), alpha=1.0)


class Strict(torch.optim.Optimizer):
    """Initialises what it keeps of a weight where it finds nothing, and bears nothing else beside it."""

    def __init__(self, weights):
        super().__init__(weights, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            assert set(self.state[weight]) <= {"momentum"}
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
            weight.sub_(self.state[weight]["momentum"].lerp_(weight.grad, 0.5), alpha=0.1)


STATELESS = {
    "one buffer a shape": Grouped,
    "sign descent": Signs,
    "one flat buffer": Flat,
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=0.1),
    "strict": Strict,
    "around": lambda p: Around(torch.optim.SGD(p, lr=0.1)),
}


def saved(*parts):
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SCHEDULED = {"warmup": 1, "tail": 2, "total_steps": 7}
RESUMED = (1, 3, 6)  # after so many steps: behind the warm-up, while all prune, in the tail


def resumptions():
    """Of each optimizer without or with a schedule, from one place, both by turns; in a night all, from every place.

    By day the first two with graphs that are compiled afresh, as in another process.
    """
    kinds = {"pruned": {}, "scheduled": SCHEDULED}
    for index, (name, make) in enumerate(STATELESS.items()):
        kind = list(kinds)[index % 2]
        yield pytest.param(make, kinds[kind], [RESUMED[index % 3]], index < 2, id=f"{name}-{kind}")
        for kind, options in kinds.items():
            yield pytest.param(make, options, RESUMED, True, id=f"{name}-{kind}, anywhere", marks=pytest.mark.nightly)


@pytest.mark.by_day(4)
@pytest.mark.parametrize(("make", "options", "places", "afresh"), list(resumptions()))
def test_what_keeps_no_state_under_each_weight_resumes_all_the_same(make, options, places, afresh):
    blocks = 2 if make is Grouped else 1  # two weights of each shape
    model = model_of(blocks)
    run, optimizer = compiled(model, **options), make(model.parameters())
    checkpoints, losses = [], []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an optimizer has trained")
        for number in range(7):
            if number in places:
                checkpoints.append((number, saved(model, optimizer)))
            losses += losses_of(run, optimizer, [number])
    for number, checkpoint in checkpoints:
        if afresh:
            torch._dynamo.reset()
        resumed = model_of(blocks)
        optimizer = make(resumed.parameters())
        resumed.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert losses_of(compiled(resumed, **options), optimizer, range(number, 7)) == losses[number:], number


class Past(torch.optim.AdamW):
    """It loads without the hooks of PyTorch, as optimizers do that cast what they load in a way of their own."""

    def load_state_dict(self, state_dict):
        weights = self.param_groups[0]["params"]
        state = {weights[index]: dict(kept) for index, kept in state_dict["state"].items()}
        self.__setstate__({"state": state, "param_groups": [state_dict["param_groups"][0] | {"params": weights}]})


def test_a_state_that_is_loaded_past_the_hooks_is_taken_over():
    """After a call, too: a sanity check, or a step that is taken back."""
    model = model_of()
    run, optimizer = compiled(model, **SCHEDULED), Past(model.parameters(), lr=1e-2)
    losses_of(run, optimizer, range(3))
    checkpoint = saved(model, optimizer)
    losses = losses_of(run, optimizer, range(3, 7))
    resumed = model_of()
    again, other = compiled(resumed, **SCHEDULED), Past(resumed.parameters(), lr=1e-2)
    with torch.no_grad():
        again(torch.randn(16, 64))
    for owner, call, stepped in ((resumed, again, other), (model, run, optimizer)):
        owner.load_state_dict(checkpoint[0])
        stepped.load_state_dict(copy.deepcopy(checkpoint[1]))
        assert not any("sste_beta" in kept for kept in stepped.state.values())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert losses_of(call, stepped, range(3, 7)) == losses


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_copy_of_a_model_with_its_optimizer_goes_on(momentum, make_copy):
    model = model_of()
    run, optimizer = compiled(model, **SCHEDULED), torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
    losses_of(run, optimizer, range(3))
    other, its_optimizer = make_copy((model, optimizer))
    losses = losses_of(run, optimizer, range(3, 7))
    assert not any("sste_beta" in kept for kept in (*optimizer.state.values(), *its_optimizer.state.values()))
    assert losses_of(compiled(other, **SCHEDULED), its_optimizer, range(3, 7)) == losses


def test_transposable_masks_are_in_checkpoints():
    options = {"recipe": "t-sr-ste", "refresh": 4}
    model = model_of()
    run, optimizer = compiled(model, **options), torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses_of(run, optimizer, range(2))
    checkpoint = saved(model, optimizer)
    losses = losses_of(run, optimizer, range(2, 8))
    torch._dynamo.reset()
    resumed = model_of()
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    assert losses_of(compiled(resumed, **options), optimizer, range(2, 8)) == losses


def test_an_optimizer_that_writes_its_own_state_dict_says_that_it_cannot_hold_beta():
    class Own(Signs):
        def state_dict(self):
            return {"lr": self.param_groups[0]["lr"]}

        def load_state_dict(self, state_dict):
            self.param_groups[0]["lr"] = state_dict["lr"]

    model = model_of()
    optimizer = Own(model.parameters())
    with pytest.warns(UserWarning, match=r"Own writes its own state_dict, .* sparse_compile.set_beta"):
        losses_of(compiled(model), optimizer, range(1))


def test_the_optimizer_itself_holds_nothing_of_ours():
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses_of(compiled(model), optimizer, range(1))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    assert any("sste_beta" in kept for kept in checkpoint["state"].values())
    optimizer.load_state_dict(checkpoint)
    assert not any("sste_beta" in kept for kept in optimizer.state.values())
    assert not any("sste" in group for group in optimizer.param_groups)
    assert optimizer.state_dict()["state"] == checkpoint["state"]


def test_an_optimizer_loaded_without_a_weight_starts_it_afresh():
    """Its beta was that of other weights."""
    model = model_of()
    run, optimizer = compiled(model), torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = saved(model, optimizer)
    losses_of(run, optimizer, range(2))
    model.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    assert sparse_compile.beta(model) == {}
    losses_of(run, optimizer, range(1))
    other = model_of()
    other.load_state_dict(before[0])
    losses_of(compiled(other), torch.optim.AdamW(other.parameters(), lr=1e-2), range(1))
    assert sparse_compile.beta(model) == sparse_compile.beta(other)


def resumed_from(checkpoint):
    """In what a new process would make; not called."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    return model, optimizer


def trained(steps):
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses_of(compiled(model), optimizer, range(steps))
    return model, optimizer


def test_what_is_told_after_loading_is_saved_before_the_first_call():
    resumed = resumed_from(saved(*trained(1)))
    sparse_compile.set_beta(resumed[0], {"0.up.weight": 1.75})
    again, _ = resumed_from(saved(*resumed))
    run = compiled(again)
    for model in (resumed[0], again):
        assert sparse_compile.beta(model)["0.up.weight"] == 1.75
    run(torch.randn(16, 64))
    assert sparse_compile.beta(again)["0.up.weight"] == 1.75


def test_steps_after_loading_are_saved_before_the_first_call():
    resumed, optimizer = resumed_from(saved(*trained(2)))
    assert [kept["sste_steps"] for kept in optimizer.state_dict()["state"].values()] == [2, 2]
    losses_of(resumed, optimizer, range(3))
    assert [kept["sste_steps"] for kept in optimizer.state_dict()["state"].values()] == [5, 5]


def test_what_was_loaded_first_is_not_saved_after_a_checkpoint_without_it():
    dense = model_of()
    plain = torch.optim.SGD(dense.parameters(), lr=0.1)
    losses_of(dense, plain, range(1))
    _, optimizer = resumed_from(saved(*trained(1)))
    assert optimizer.state_dict()["state"]
    optimizer.load_state_dict(plain.state_dict())
    assert not optimizer.state_dict()["state"]


def test_loaded_weights_keep_no_masks():
    """Also between a step and the next call."""
    run = compiled(model := model_of(), recipe="t-sr-ste", refresh=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses_of(run, optimizer, range(2))
    other = model_of()
    model.load_state_dict(other.state_dict())
    x = torch.randn(16, 64)
    with torch.no_grad():
        assert torch.equal(run(x), compiled(other, recipe="t-sr-ste", refresh=100)(x))
