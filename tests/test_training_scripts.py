"""What training scripts do besides the plain loop: each habit against the reference, or against a run without it."""

import copy
import dataclasses
import subprocess
import sys
import threading
from itertools import pairwise, product

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import shared_graphs
import sparse_compile
from ffn_training import (
    DENSE_FP8,
    EAGER,
    FFN,
    adamw,
    addresses,
    after_two_steps,
    assert_current,
    assert_equal,
    compiled,
    gradients,
    refreshes,
    some_tokens,
    train,
)
from sparse_compile import backend
from sparse_compile.weights.registry import find_record

clean_slate = shared_graphs.kept


@pytest.fixture
def x():
    return some_tokens()


# Precision.


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.nightly)])
def test_a_skipped_step_of_a_gradient_scaler(x, dtype):
    """The weights stay, and so do their operands."""
    model = FFN()
    step = compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    kept = []
    for factor in (1.0, float("inf"), 1.0):
        with torch.autocast("cpu", dtype):
            loss = step(x).float().square().mean()
        scaler.scale(loss * factor).backward()
        before = model.up.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        kept.append(torch.equal(before, model.up.weight))
        step(x)
        assert_current(model)
    assert kept == [False, True, False]
    assert scaler.get_scale() == 2.0**9
    # Two calls before the first step, one after it, none after the skipped one, one after the last.
    assert refreshes(model) == [3, 3]


# Memory and shapes.


@pytest.mark.by_day(1)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_around_compiled_blocks(x, reentrant):
    """Recomputation finds the operands of its forward, and draws its samples."""
    results = []
    for checkpointed in (False, True):  # in one graph
        torch.manual_seed(0)
        blocks = [FFN() for _ in range(2)]
        for block in blocks:
            block.compile(backend="sste", options=DENSE_FP8 if reentrant else EAGER)
        parameters = [p for block in blocks for p in block.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            tokens = x.clone().requires_grad_()
            for block in blocks:
                tokens = checkpoint(block, tokens, use_reentrant=reentrant) if checkpointed else block(tokens)
            torch.manual_seed(1)
            tokens.square().mean().backward()
            optimizer.step()
        results.append([p.grad for p in parameters])
    assert_equal(*results)


def test_optimizers_that_step_inside_backward(x):
    """One for each parameter: the weights of blocks that are still to be recomputed have not stepped."""
    x.requires_grad_()  # as the outputs of blocks do: one graph serves all
    results = []
    for checkpointed, inside in product((False, True), (False, True)):
        torch.manual_seed(0)
        model = nn.Sequential(FFN(), FFN())
        for block in model:
            block.compile(backend="sste", options=DENSE_FP8)
        optimizers = [torch.optim.SGD([parameter], lr=0.1) for parameter in model.parameters()]
        hooked = zip(model.parameters(), optimizers, strict=True) if inside else ()
        for parameter, optimizer in hooked:
            parameter.register_post_accumulate_grad_hook(lambda _, step=optimizer.step: step())
        for _ in range(3):
            tokens = x
            for block in model:
                tokens = checkpoint(block, tokens, use_reentrant=False) if checkpointed else block(tokens)
            tokens.square().mean().backward()
            for optimizer in () if inside else optimizers:
                optimizer.step()
            model.zero_grad()
        results.append([model(x), *model.parameters()])
        counts = [
            kept.refreshes for p in model.parameters() if p.ndim == 2 for kept in find_record(p).operands.values()
        ]
        # Nobody knows the optimizers before their first step, so recomputation then makes the operands again.
        assert counts == [4 + checkpointed] * 4
    for other in results[1:]:
        assert_equal(results[0], other)


@pytest.mark.parametrize(
    "ways",
    [
        ("automatic", "mark_dynamic"),
        # By day ``test_symbolic_tokens_use_their_hint`` compiles so, and must not compile again.
        pytest.param(("dynamic=True",), marks=pytest.mark.nightly),
    ],
    ids=", ".join,
)
def test_lengths_do_not_recompile(ways):
    """Each result is that of a graph of its own."""
    model = FFN()
    batches = [torch.randn(length, 64) for length in (16, 24, 7, 50)]
    y = compiled(model, DENSE_FP8, dynamic=False)(batches[-1].clone())
    y.square().sum().backward()
    expected = [y, *gradients(model)]
    for how in ways:
        torch._dynamo.reset()
        sparse_compile.report().graphs.clear()
        step = compiled(model, DENSE_FP8, dynamic=True if how == "dynamic=True" else None)
        with torch._dynamo.config.patch(automatic_dynamic_shapes=how == "automatic"):
            for tokens in batches:
                if how == "mark_dynamic":
                    torch._dynamo.mark_dynamic(tokens, 0)
                y = step(tokens)
                model.zero_grad()
                y.square().sum().backward()
        assert len(sparse_compile.report().graphs) == (2 if how == "automatic" else 1), how
        assert_equal([y, *gradients(model)], expected)


@pytest.mark.by_day(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(x, dtype):
    """What says no dtype is of it: nothing of ours may."""
    parameters = []
    for default in (torch.float32, dtype):
        torch.manual_seed(0)
        model = FFN()
        torch.set_default_dtype(default)
        try:
            train(compiled(model), adamw(model), x)
        finally:
            torch.set_default_dtype(torch.float32)
        parameters.append([parameter.detach() for parameter in model.parameters()])
    assert_equal(*parameters)


def test_graph_breaks_change_nothing(x):
    class Broken(nn.Module):
        def __init__(self, broken):
            super().__init__()
            self.blocks = nn.ModuleList(FFN() for _ in range(2))
            self.broken = broken

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
                if self.broken:
                    torch._dynamo.graph_break()
            return x

    torch._dynamo.reset()
    results = []
    for broken in (False, True):
        torch.manual_seed(0)
        model = Broken(broken)
        y = compiled(model, DENSE_FP8)(x)
        y.square().mean().backward()
        results.append([y, *gradients(model)])
        assert len(sparse_compile.report().graphs) == (2 + 1 if broken else 1)
    assert_equal(*results)


def test_blocks_that_share_a_graph_train_as_one_model(x):
    x.requires_grad_()  # as the outputs of the blocks before do
    results = []
    for regional in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(FFN(), FFN())
        for block in model if regional else ():
            block.compile(backend="sste", options=DENSE_FP8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step = model if regional else compiled(lambda x, model=model: model(x), DENSE_FP8)
        for _ in range(3):
            optimizer.zero_grad()
            y = step(x)
            y.square().mean().backward()
            optimizer.step()
        results.append([y, *gradients(model)])
    assert [graph.rewritten for graph in sparse_compile.report().graphs] == [4, 2]
    assert_equal(*results)


# Averages and evaluation.


def test_averages_are_swapped_in_for_evaluation_and_out(x):
    model, step, _optimizer = after_two_steps(x)
    with torch.no_grad():
        trained = step(x)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    averages = {name: weight * 0.75 for name, weight in weights.items()}
    kept, betas = addresses(model), sparse_compile.beta(model)

    def swap(values, how):
        if how == "load_state_dict":
            model.load_state_dict(values)
            return
        for name, parameter in model.named_parameters():
            if how == "data":
                parameter.data.copy_(values[name])
            elif how == "copy_":
                with torch.no_grad():
                    parameter.copy_(values[name])
            else:
                parameter.data = values[name]

    for how in ("data", "copy_", "load_state_dict", "assign"):
        swap(averages, how)
        with torch.no_grad():
            averaged = [step(x) for _ in range(2)]
        assert_current(model)
        assert not torch.equal(averaged[0], trained), how
        assert torch.equal(*averaged), how
        swap(weights, how)
        assert torch.equal(step(x), trained), how
        assert_current(model)
        assert addresses(model) == kept, "CUDA graphs go on"
        assert sparse_compile.beta(model) == betas, how


def test_evaluation_between_forward_and_backward_disturbs_nothing(x):
    model, step, _optimizer = after_two_steps(x)
    results = []
    for evaluate in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        loss = step(x).square().mean()
        count = refreshes(model)
        if evaluate:
            model.eval()
            for context in (torch.no_grad, torch.inference_mode):
                with context(), torch.random.fork_rng():
                    assert torch.equal(step(x).square().mean(), loss)
            model.train()
        loss.backward()
        results.append([p.grad.clone() for p in model.parameters()])
        assert refreshes(model) == count
    assert_equal(*results)


# Threads and processes.


def test_a_model_called_from_several_threads(x):
    model, step, _optimizer = after_two_steps(x)
    model.up.weight.data.mul_(0.5)
    results, start = {}, threading.Barrier(4)

    def call(number):
        start.wait()
        results[number] = step(x).detach()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = step(x)
    assert len(results) == 4
    assert all(torch.equal(result, expected) for result in results.values())
    assert_current(model)


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_forked_loader_workers_change_nothing(x):
    losses = []
    for workers in (0, 2):
        torch.manual_seed(0)
        model = FFN()
        step = compiled(model)
        optimizer = adamw(model)
        torch.manual_seed(1)
        batches = DataLoader(
            TensorDataset(x), batch_size=4, num_workers=workers, multiprocessing_context="fork" if workers else None
        )
        for _ in range(2):
            for (batch,) in batches:
                torch.manual_seed(1)
                loss = step(batch).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1]


LOADERS = """
import json, sys, torch
from torch.utils.data import DataLoader, Dataset
from sparse_compile.reporting.process_report import report_so_far

class Numbers(Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, index):
        assert torch.utils.data.get_worker_info() is None or report_so_far().graphs == []
        return torch.randn(64, generator=torch.Generator().manual_seed(index))

if __name__ == "__main__":
    losses = []
    for context in (None, sys.argv[1]):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        options = {"sste.executor": "eager", "sste.when": "always", "sste.mvue": "off", "sste.report": "report.txt"}
        step = torch.compile(model, backend="sste", options=options)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        step(torch.randn(4, 64)).sum().backward()
        workers = {"num_workers": 2, "multiprocessing_context": context} if context else {}
        for batch in DataLoader(Numbers(), batch_size=4, **workers):
            loss = step(batch).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == losses[1], losses
"""


@pytest.mark.nightly
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_loader_workers_that_import_the_package_anew(tmp_path, context):
    """They compile nothing, and write no report."""
    (tmp_path / "train.py").write_text(LOADERS)
    done = subprocess.run([sys.executable, "train.py", context], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.txt", "train.py"]
    assert "2 of 2 linears rewritten" in (tmp_path / "report.txt").read_text()


def test_weights_made_under_inference_mode(x):
    with torch.inference_mode():
        model = FFN()
        step = compiled(model)
        first = step(x)
        model.up.weight.mul_(0.5)
        second = step(x)
    assert_current(model)
    assert not torch.equal(first, second)


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["data", "load_state_dict"])
def test_cuda_graphs_see_every_update(how, monkeypatch):
    """Steps of a fused optimizer, averages that are swapped in for evaluation, and the way back.

    At each of these moments another model, without graphs, is given the same weights.
    """

    torch._dynamo.reset()

    def without_randomness(plans, **_):
        return [dataclasses.replace(plan, recipe=plan.recipe.variants()[1]) for plan in plans], []

    monkeypatch.setattr(backend, "choose", without_randomness)

    def compiled_loss(model, mode):
        return torch.compile(lambda x: model(x).float().square().mean(), backend="sste", mode=mode)

    model = nn.Sequential(FFN(256), FFN(256)).to("cuda", torch.bfloat16)
    other = copy.deepcopy(model)
    step, expected_loss = compiled_loss(model, "reduce-overhead"), compiled_loss(other, "default")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    average = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    tokens = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16)
    losses, expected, kept = [], [], []

    def compare(loss):
        losses.append(loss.item())
        other.load_state_dict(model.state_dict())
        sparse_compile.set_beta(other, sparse_compile.beta(model))
        expected.append(expected_loss(tokens).item())

    for _ in range(8):
        torch.compiler.cudagraph_mark_step_begin()
        loss = step(tokens)
        loss.backward()
        compare(loss)
        optimizer.step()
        optimizer.zero_grad()
        trained = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for name, value in trained.items():
            average[name].lerp_(value, 0.5)
        for values in (average, trained):
            if how == "load_state_dict":
                model.load_state_dict(values)
            else:
                for name, parameter in model.named_parameters():
                    parameter.data.copy_(values[name])
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                compare(step(tokens))
        kept.append(addresses(model))
    assert all(later == kept[0] for later in kept), "a graph would be recorded anew"
    # Losses a step apart differ by far more than kernels that are fused otherwise.
    assert losses == pytest.approx(expected, rel=2e-3)
    assert min(abs(b - a) / a for a, b in pairwise(losses[1::3])) > 2e-2, losses
    assert losses[-1] < 0.9 * losses[0]
    assert {graph.execution for graph in sparse_compile.report().graphs} == {"kernels"}
