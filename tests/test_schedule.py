"""Schedules: dense warm-up, pruned, dense tail; counted in optimizer steps, exact at switches and across resuming."""

import copy
import io
import warnings
from itertools import product

import pytest
import torch
from torch import nn

import shared_graphs
import sparse_compile
from sparse_compile.kernels import reference
from sparse_compile.options import read_options
from sparse_compile.weights import skipped_steps
from sparse_compile.weights.optimizer_state import PRUNED
from sparse_compile.weights.pattern_24 import is_24
from sparse_compile.weights.record import Phase
from sparse_compile.weights.registry import find_record
from sparse_compile.weights.schedule import Schedule
from sparse_compile.weights.skipped_steps import SkipCount

clean_slate = shared_graphs.kept
uncompiled = shared_graphs.uncompiled

EAGER = {"sste.executor": "eager", "sste.when": "always"}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
}


class FFN(nn.Module):
    def __init__(self, layer=nn.Linear):
        super().__init__()
        self.up, self.down = layer(64, 128), layer(128, 64)

    def forward(self, x):
        return self.down(self.up(x).relu())


def compiled(model, recipe="ste", **options):
    named = {f"sste.{name}": value for name, value in options.items()}
    return torch.compile(model, backend="sste", options=EAGER | {"sste.recipe": recipe} | named)


def train(step, optimizer, steps, microbatches=1):
    """Losses of the given steps, each with data and samples of its own."""
    losses = []
    for number in steps:
        for microbatch in range(microbatches):
            torch.manual_seed(100 * number + microbatch)
            loss = (step(torch.randn(16, 64)) - 1.0).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def recipes():
    """Of each graph, in the order of compilation."""
    return [{row.decision.split()[0] for row in graph.rows} for graph in sparse_compile.report().graphs]


def parameters(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def by_turns(*values):
    """Combinations of values; by day those in which all come first, and those in which all come second."""
    by_day = list(zip(*values, strict=True))
    return [pytest.param(*c, marks=() if c in by_day else pytest.mark.nightly) for c in product(*values)]


@pytest.mark.by_day(1)
@pytest.mark.parametrize(("name", "microbatches"), by_turns(list(OPTIMIZERS), [1, 3]))
def test_phases_are_counted_in_optimizer_steps_and_compiled_once_each(name, microbatches):
    torch._dynamo.reset()
    model = FFN()
    step, optimizer = compiled(model, warmup=2, tail=3, total_steps=7), OPTIMIZERS[name](model.parameters())
    seen = []
    for number in range(8):
        train(step, optimizer, [number], microbatches)
        seen.append(len(recipes()))
    assert seen == [1, 1, 2, 2, 2, 2, 2, 2], "the tail uses the graph of the warm-up"
    assert recipes() == [{"fp8"}, {"ste"}]
    advice = "dense before optimizer step 2 and from optimizer step 4 on, by its schedule"
    assert sparse_compile.report().graphs[0].rows[0].advice == advice


@pytest.fixture
def reads(monkeypatch):
    """Counts of skipped steps that were read, which waits for the device."""
    read = []

    class Counted(SkipCount):
        def read(self):
            read.extend([self] * (self._read is None))
            return super().read()

    monkeypatch.setattr(skipped_steps, "SkipCount", Counted)
    return read


def scaled_run(fused, skipped, steps, **options):
    """Phases, and whether the device was waited for, after each step of a run in which some are skipped."""
    torch.manual_seed(0)
    model = FFN()
    step = compiled(model, "s-ste", **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for number in range(steps):
        torch.manual_seed(number)
        loss = (step(torch.randn(16, 64)) - 1.0).square().mean() * (torch.inf if number in skipped else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield find_record(model.up.weight).phase
    entry = optimizer.state_dict()["state"][0]
    assert entry["sste_steps"] == int(entry["step"]) == steps - len(skipped)
    yield sparse_compile.beta(model)


@pytest.mark.by_day(1)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("skipped", [(0, 1), (1, 3, 4, 8)], ids=str)
def test_steps_that_a_fused_optimizer_skips_do_not_count(skipped):
    plain, fused = (list(scaled_run(fused, skipped, 12, warmup=2, tail=3, total_steps=8)) for fused in (False, True))
    assert fused == plain
    assert {Phase.WARMUP, Phase.PRUNED, Phase.TAIL} <= set(plain[:-1])


@pytest.mark.usefixtures("uncompiled")
def test_the_device_is_asked_only_where_a_skipped_step_matters(reads):
    seen = []
    for _ in scaled_run(True, (5,), 12, warmup=2):
        seen.append(len(reads))
        reads.clear()
    # The begin of the pruned phase, its first step, the state_dict.
    assert [number for number, count in enumerate(seen) if count] == [1, 2, 12]
    assert max(seen) <= 2, "once for all weights"


@pytest.mark.usefixtures("uncompiled")
def test_other_linears_do_not_follow():
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), FFN())
    step = compiled(model, tail=1, total_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = dict(zip(dict(model.named_parameters()), parameters(model), strict=True))
    for _ in range(2):
        step(torch.randn(16, 64)).square().mean().backward()
        optimizer.step()
    assert [row.fprop for row in sparse_compile.report().graphs[0].rows] == ["fp8", "2:4 fp8", "2:4 fp8"]
    changed = {name for name, now in model.named_parameters() if not torch.equal(now, before[name])}
    assert changed == {"2.up.weight", "2.down.weight"}


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("recipe", "transposed", "dtype"), by_turns(["ste", "s-ste"], [False, True], [torch.float32, torch.bfloat16])
)
def test_the_tail_begins_with_what_the_pruned_model_computed_with(conv1d, recipe, transposed, dtype):
    model = (FFN(conv1d) if transposed else FFN()).to(dtype)
    step, optimizer = compiled(model, recipe, tail=3, total_steps=4), torch.optim.SGD(model.parameters(), lr=0.0)
    x = torch.randn(16, 64).to(dtype)
    matrices = [
        w.t() if transposed else w for w in (model.up.weight.detach().clone(), model.down.weight.detach().clone())
    ]
    pruned = step(x)
    scales = sparse_compile.beta(model)
    pruned.square().mean().backward()
    optimizer.step()
    for layer, matrix, name in zip((model.up, model.down), matrices, ("up.weight", "down.weight"), strict=True):
        if recipe == "ste":
            expected = reference.hard_threshold24(matrix.float())
        else:
            expected = scales[name] * reference.soft_threshold24(matrix.float())
        actual = layer.weight.t() if transposed else layer.weight
        assert torch.equal(actual, expected.to(dtype))
    assert sparse_compile.beta(model) == {}
    dense = step(x)
    assert recipes() == [{recipe}, {"fp8"}]
    # beta is in the payload now, so e4m3 rounds elsewhere; a weight that was not written would be off by half.
    assert (dense - pruned).norm() < 0.1 * pruned.norm()
    written = parameters(model)
    train(step, optimizer, range(1, 4))
    assert all(map(torch.equal, written, parameters(model))), "written once"


def saved(*parts):
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.by_day(1)
@pytest.mark.parametrize(("recipe", "name"), by_turns(["ste", "s-ste"], list(OPTIMIZERS)))
def test_a_resumed_run_is_the_continued_one_in_every_phase(recipe, name):
    torch._dynamo.reset()
    schedule, make = {"warmup": 2, "tail": 3, "total_steps": 7}, OPTIMIZERS[name]
    model = FFN()
    step, optimizer = compiled(model, recipe, **schedule), make(model.parameters())
    checkpoints, losses = [], []
    for number in range(7):
        checkpoints.append(saved(model, optimizer))
        losses += train(step, optimizer, [number])
    assert recipes() == [{"fp8"}, {recipe}]
    torch._dynamo.reset()
    for number in (1, 2, 3, 4, 5):  # the first compiles its graphs, the others share them
        resumed = FFN()
        optimizer = make(resumed.parameters())
        resumed.load_state_dict(checkpoints[number][0])
        optimizer.load_state_dict(checkpoints[number][1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            continued = train(compiled(resumed, recipe, **schedule), optimizer, range(number, 7))
        assert continued == losses[number:], f"from step {number}"


@pytest.mark.usefixtures("uncompiled")
def test_a_checkpoint_that_is_loaded_late_brings_its_phase():
    schedule = {"tail": 3, "total_steps": 6}
    model = FFN()
    step, optimizer = compiled(model, **schedule), torch.optim.AdamW(model.parameters())
    train(step, optimizer, range(4))
    checkpoint = saved(model, optimizer)
    continued = train(step, optimizer, range(4, 6))

    for order in ((0, 1), (1, 0)):
        resumed = FFN()
        step, optimizer = compiled(resumed, **schedule), torch.optim.AdamW(resumed.parameters())
        train(step, optimizer, range(1))
        for index in order:
            (resumed, optimizer)[index].load_state_dict(copy.deepcopy(checkpoint[index]))
        assert train(step, optimizer, range(4, 6)) == continued, order


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("recipe", ["ste", pytest.param("s-ste", marks=pytest.mark.nightly)])
def test_a_shorter_run_writes_the_weights_when_it_goes_on(recipe):
    """The checkpoint was pruned, and the new schedule has it dense: it writes beta times what pruning keeps."""
    model = FFN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(compiled(model, recipe, tail=1, total_steps=100), optimizer, range(3))
    checkpoint = saved(model, optimizer)
    beta = sparse_compile.beta(model)
    assert {entry[PRUNED] for entry in checkpoint[1]["state"].values() if PRUNED in entry} == {1}
    torch._dynamo.reset()
    resumed = FFN()
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.0)
    resumed.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(compiled(resumed, recipe, tail=2, total_steps=5), optimizer, range(3, 5))
    weight = model.up.weight.detach()
    kept = (
        reference.hard_threshold24(weight)
        if recipe == "ste"
        else reference.soft_threshold24(weight) * beta["up.weight"]
    )
    assert torch.equal(resumed.up.weight, kept)


@pytest.mark.usefixtures("uncompiled")
def test_an_evaluation_writes_no_weight():
    """Nor any other call: only the step that ends the pruned phase does; of a shorter run, its first one."""
    model = FFN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(compiled(model, "s-ste", tail=1, total_steps=100), optimizer, range(3))
    checkpoint = saved(model, optimizer)
    resumed = FFN()
    optimizer = torch.optim.SGD(resumed.parameters(), lr=0.1)
    resumed.load_state_dict(checkpoint[0])
    optimizer.load_state_dict(checkpoint[1])
    step, x = compiled(resumed, "s-ste", tail=3, total_steps=5), torch.randn(16, 64)
    expected = compiled(model, "s-ste")(x).detach()
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert torch.allclose(step(x), expected), "pruned as it was trained"
        assert torch.equal(resumed.up.weight, model.up.weight)
    train(step, optimizer, range(3, 4))
    assert is_24(resumed.up.weight, 1)
    assert not is_24(model.up.weight, 1)


@pytest.mark.by_day(1)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("schedule", [{"warmup": 2}, {"warmup": 2, "tail": 1, "total_steps": 5}], ids=str)
def test_a_copy_that_was_told_its_scales_has_its_warm_up_behind_it(schedule):
    """An average, or a run whose optimizer saves nothing of ours: neither has steps of its own."""
    model, x = FFN(), torch.randn(16, 64)
    run = compiled(model, "s-ste", **schedule)
    train(run, torch.optim.AdamW(model.parameters(), lr=1e-2), range(3))
    betas = sparse_compile.beta(model)
    assert set(betas) == {"up.weight", "down.weight"}
    resumed = copy.deepcopy(model)
    sparse_compile.set_beta(resumed, betas)
    step, optimizer = compiled(resumed, "s-ste", **schedule), torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            assert torch.allclose(step(x), run(x))
        assert torch.equal(resumed.up.weight, model.up.weight)
    for number in range(3):
        train(step, optimizer, [number])
        assert sparse_compile.beta(resumed) == betas, f"pruned in step {number}"
    train(step, optimizer, [3])
    assert sparse_compile.beta(resumed) == ({} if "tail" in schedule else betas), "its end comes"
    assert is_24(resumed.up.weight, 1) == ("tail" in schedule)


@pytest.mark.usefixtures("uncompiled")
def test_what_a_dense_tail_has_trained_is_not_finalized():
    """Though a checkpoint of the pruned phase has left its beta with the optimizer."""
    model = FFN()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = compiled(model, "s-ste", tail=2, total_steps=5)
    train(step, optimizer, range(2))
    optimizer.state_dict()
    train(step, optimizer, range(2, 5))
    before = parameters(model)
    with pytest.raises(ValueError, match="nothing to finalize"):
        sparse_compile.finalize(model)
    assert all(torch.equal(one, other) for one, other in zip(before, parameters(model), strict=True))


@pytest.mark.usefixtures("uncompiled")
def test_dense_phases_do_not_decay():
    """With gradients of zero, only the decay would change a weight."""
    model = FFN()
    step = compiled(model, "sr-ste", decay=0.5, warmup=1, tail=1, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    dropped = []
    for _ in range(5):
        weight = model.up.weight.detach().clone()
        dropped.append(float((weight - reference.hard_threshold24(weight)).norm()))
        (step(torch.randn(16, 64)) * 0).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    # Dense, pruned twice, and dense from weights of which only what is kept is left.
    assert dropped == pytest.approx([dropped[0], dropped[0], 0.95 * dropped[0], 0.0, 0.0])


@pytest.mark.usefixtures("uncompiled")
def test_without_fp8_dense_phases_have_none():
    model = FFN()
    step = compiled(model, "ste-bf16", warmup=1, tail=1, total_steps=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    weight = model.up.weight.detach().clone()
    train(step, optimizer, range(3))
    assert recipes() == [{"dense"}, {"ste-bf16"}]
    reason = "in a dense phase: dense before optimizer step 1 and from optimizer step 2 on, by its schedule"
    assert {row.reason for row in sparse_compile.report().graphs[0].rows} == {reason}
    assert torch.equal(model.up.weight, reference.hard_threshold24(weight))
    x = torch.randn(16, 64)
    torch.testing.assert_close(step(x), model(x))


@pytest.mark.by_day(1)
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("resumed", [False, True], ids=["continued", "resumed"])
def test_a_block_that_joins_later_is_in_the_phase_of_its_optimizer(resumed):
    """Progressive depth: the other blocks have made steps, and dense ones come at the end for all."""
    schedule = {"tail": 2, "total_steps": 6}

    def start():
        blocks = nn.ModuleList((FFN(), FFN()))
        runs = [compiled(block, "s-ste", **schedule) for block in blocks]
        return blocks, runs, torch.optim.AdamW(blocks.parameters(), lr=1e-2)

    blocks, runs, optimizer = start()
    train(runs[0], optimizer, range(3))
    if resumed:
        checkpoint = saved(blocks, optimizer)
        blocks, runs, optimizer = start()
        with torch.no_grad():
            runs[1](torch.randn(16, 64))
        blocks.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(checkpoint[1])
    train(lambda x: runs[1](runs[0](x)), optimizer, range(3, 4))
    assert is_24(blocks[0].up.weight, 1)
    assert is_24(blocks[1].up.weight, 1), "the pruned phase ends for both"
    train(lambda x: runs[1](runs[0](x)), optimizer, range(4, 6))
    assert sparse_compile.beta(blocks) == {}
    steps = [entry["sste_steps"] for entry in optimizer.state_dict()["state"].values() if "sste_steps" in entry]
    assert steps == [6] * 4


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("resumed", [False, True], ids=["continued", "resumed"])
def test_a_frozen_block_that_is_trained_later_is_in_the_phase_of_its_optimizer(resumed):
    """It was called from the beginning, and is in a parameter group of its own."""
    blocks = nn.ModuleList((FFN(), FFN()))
    blocks[1].requires_grad_(False)
    runs = [compiled(block, "s-ste", tail=2, total_steps=6) for block in blocks]
    optimizer = torch.optim.AdamW(blocks[0].parameters(), lr=1e-2)
    train(lambda x: runs[1](runs[0](x)), optimizer, range(3))
    if resumed:
        _, state = saved(blocks, optimizer)
        optimizer = torch.optim.AdamW(blocks[0].parameters(), lr=1e-2)
        optimizer.load_state_dict(state)
    blocks[1].requires_grad_(True)
    optimizer.add_param_group({"params": list(blocks[1].parameters())})
    train(lambda x: runs[1](runs[0](x)), optimizer, range(3, 6))
    assert sparse_compile.beta(blocks) == {}
    steps = [entry["sste_steps"] for entry in optimizer.state_dict()["state"].values() if "sste_steps" in entry]
    assert steps == [6] * 4


@pytest.mark.usefixtures("uncompiled")
def test_steps_before_the_first_call_count():
    """Of an optimizer that another model begins with; a warm-up may be over when the weight is first read."""
    first, second, x = nn.Linear(64, 64), FFN(), torch.randn(16, 64)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    train(first, optimizer, range(2))
    train(compiled(second, "s-ste", warmup=2), optimizer, range(2, 3))
    assert set(sparse_compile.beta(second)) == {"up.weight", "down.weight"}
    # A checkpoint without anything of ours is a new beginning.
    optimizer.load_state_dict(optimizer.state_dict() | {"state": {}})
    compiled(second, "s-ste", warmup=2)(x)
    assert sparse_compile.beta(second) == {}


@pytest.mark.usefixtures("uncompiled")
def test_both_models_of_a_class_have_phases_of_their_own():
    first, second = FFN(), FFN()
    runs = []
    for model in (first, second):
        runs.append((compiled(model, warmup=1), torch.optim.SGD(model.parameters(), lr=0.1)))
    train(*runs[0], range(2))
    train(*runs[1], range(1))
    calls = [graph.calls for graph in sparse_compile.report().graphs]
    assert (recipes(), calls) == ([{"fp8"}, {"ste"}], [2, 1]), "the second begins dense"
    train(*runs[1], range(1, 2))
    assert [graph.calls for graph in sparse_compile.report().graphs] == [2, 2]


def test_blocks_that_are_alike_share_their_graphs():
    """And switch together: their number must not count against dynamo's limit of recompilations."""
    model = nn.Sequential(*(FFN() for _ in range(10)))
    for block in model:
        block.compile(
            backend="sste",
            options=EAGER | {"sste.recipe": "ste", "sste.warmup": 1, "sste.tail": 1, "sste.total_steps": 3},
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = parameters(model)

    def step(x):
        return model(x.requires_grad_())  # as what each block but the first gets

    train(step, optimizer, range(3))
    assert recipes() == [{"fp8"}, {"ste"}]
    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, reference.hard_threshold24(old) if old.ndim == 2 else old)
    train(step, optimizer, range(3, 4))
    assert (recipes(), [graph.calls for graph in sparse_compile.report().graphs]) == ([{"fp8"}, {"ste"}], [30, 10])


def test_the_recipe_with_a_tail_of_its_own():
    options = read_options(None, {"sste.recipe": "ste-dense-tail", "sste.total_steps": 600})
    assert options.schedule == Schedule(begin=0, end=500)
    shorter = read_options(None, {"sste.recipe": "ste-dense-tail", "sste.total_steps": 600, "sste.tail": 60})
    assert shorter.schedule == Schedule(begin=0, end=540)
    assert read_options(None, {"sste.recipe": "ste-dense-tail", "sste.tail": 0}).schedule is None


@pytest.mark.parametrize(
    ("options", "begin", "end"),
    [
        ({"warmup": 10}, 10, None),
        ({"warmup": 0.1, "total_steps": 500}, 50, None),
        ({"warmup": "0.1", "tail": "0.2", "total_steps": 500}, 50, 400),
        ({"tail": 20, "total_steps": 500}, 0, 480),
    ],
)
def test_steps_or_shares(options, begin, end):
    named = {f"sste.{name}": value for name, value in options.items()}
    assert read_options(None, named).schedule == Schedule(begin=begin, end=end)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "ste-dense-tail"}, r"recipe 'ste-dense-tail' ends with dense steps .* set option 'sste.t"),
        ({"tail": 10}, r"recipe 's-ste' ends with dense steps .* set option 'sste.total_steps'"),
        ({"warmup": 0.5}, r"'sste.warmup' is 0.5, a share of the run: set 'sste.total_steps'"),
        ({"total_steps": 10}, r"'sste.total_steps' has no effect alone"),
        ({"warmup": 5, "tail": 5, "total_steps": 10}, r"make 5 \+ 5 of 10 optimizer steps dense, which leaves none"),
        ({"warmup": 1.5, "total_steps": 10}, r"'sste.warmup' is 1.5; allowed is .* a share below 1.0"),
        ({"warmup": -1}, r"'sste.warmup' is -1; allowed is a number of optimizer steps"),
        ({"tail": True, "total_steps": 10}, r"'sste.tail' is True; allowed is"),
        ({"recipe": "fp8", "warmup": 5}, r"recipe 'fp8' does not prune weights, so 'sste.warmup' has no effect"),
    ],
)  # fmt: skip
def test_schedules_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        read_options(None, {f"sste.{name}": value for name, value in options.items()})
