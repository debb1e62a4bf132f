"""tune-decay: what is accepted and recommended; flips against masks by hand; the command, and what it refuses."""

import json
import shlex
import signal
import sys
from dataclasses import replace
from itertools import combinations, pairwise, product
from types import SimpleNamespace

import pytest
import torch

import warm
from sparse_compile.__main__ import main
from sparse_compile.decay_search import command
from sparse_compile.decay_search.command import RunFailed, run_script, search
from sparse_compile.decay_search.html import as_html
from sparse_compile.decay_search.run_files import Request
from sparse_compile.decay_search.table import DecayTable, Run


@pytest.fixture(autouse=True)
def warm_runs(request, monkeypatch):
    """Runs need not import torch, but for those of tests marked ``alone``."""

    def run(words, stdout, stderr, check):
        assert words[0] == sys.executable
        assert not check
        assert stdout is stderr
        done = warm.python(*words[1:])
        stdout.write((done.stdout + done.stderr).encode())
        return done

    if not request.node.get_closest_marker("alone"):
        monkeypatch.setattr(command, "subprocess", SimpleNamespace(run=run))


# One weight as nn.Linear stores it, one transposed; what it computes with at the end, the last step included, is saved.
# The rewritten graph runs as it is, which saves compiling it.
SCRIPT = """
import sys
import torch
from torch import nn
from sparse_compile import backend

backend.compile_graph = lambda graph, *args, **named: graph.forward


class FFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Parameter(torch.randn(128, 64) / 8)

    def forward(self, x):
        return self.up(x).relu() @ self.down


torch.manual_seed(0)
model = FFN().to("{device}")
teacher = nn.Linear(64, 64).to("{device}")
step = {compile}
optimizer = torch.optim.AdamW(model.parameters(), lr={rate}, weight_decay=0.0)
weights = []
try:
    for _ in range({length}):
        weights.append([weight.detach().clone() for weight in (model.up.weight, model.down.t())])
        x = torch.randn(64, 64, device="{device}")
        (step(x) - teacher(x).detach()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    print("came to its end")
finally:
    weights.append([weight.detach().clone() for weight in (model.up.weight, model.down.t())])
    torch.save(weights, sys.argv[1])
"""
# However small, pruned: on a GPU these linears would not be faster.
OPTIONS = {"sste.executor": "eager", "sste.when": "always"}


def script(folder, compile="torch.compile(model)", rate=1e-2, length=1000, device="cpu"):
    path = folder / "train.py"
    path.write_text(SCRIPT.format(compile=compile, rate=rate, length=length, device=device))
    return [str(path), str(folder / "weights.pt")]


def asked(steps, options, overrides):
    return Request(steps=steps, auto=False, module=False, options=options, overrides=overrides)


def run(folder, decay, recipe="sr-ste", steps=6, **of_script):
    own = {"sste.warmup": 2**40} if decay is None else {"sste.warmup": 0, "sste.decay": decay}
    request = asked(steps, OPTIONS, own | {"sste.recipe": recipe})
    return run_script(decay, request, script(folder, **of_script))


def top2(weight):
    magnitude = weight.abs().reshape(-1, 4)
    return (magnitude >= magnitude.sort(dim=1).values[:, 2:3]).reshape(weight.shape)


# All 90 masks of a tile.
ROWS = [[float(i in pair) for i in range(4)] for pair in combinations(range(4), 2)]
TILES = [tile for rows in product(ROWS, repeat=4) if ((tile := torch.tensor(rows)).sum(0) == 2).all()]


def transposable(weight):
    n, k = weight.shape
    tiles = weight.abs().reshape(n // 4, 4, k // 4, 4).transpose(1, 2)
    best = torch.stack([(tiles * tile).sum((-1, -2)) for tile in TILES]).argmax(0)
    return torch.stack(TILES)[best].bool().transpose(1, 2).reshape(n, k)


def flips_by_hand(folder, mask):
    """Of both weights, in each step."""
    history = torch.load(folder / "weights.pt", map_location="cpu")
    masks = [[mask(weight) for weight in weights] for weights in history]
    pairs = list(pairwise(masks))
    return [[int((before[i] != after[i]).sum()) for before, after in pairs] for i in range(2)]


def runs_on_each_device():
    """On a CPU one by day: ``test_the_dense_run_is_dense_and_decays_nothing`` counts those of a dense one, too."""
    for device, recipe, (name, decay) in product(
        ("cpu", "cuda"), ("sr-ste", "t-sr-ste"), {"dense": None, "pruned": 6e-3}.items()
    ):
        by_day = () if (recipe, name) == ("t-sr-ste", "pruned") else pytest.mark.nightly
        marks = pytest.mark.gpu if device == "cuda" else by_day
        yield pytest.param(recipe, decay, device, id=f"{name}-{recipe}-{device}", marks=marks)


@pytest.mark.parametrize(("recipe", "decay", "device"), list(runs_on_each_device()))
def test_flips_are_those_of_masks_by_hand(tmp_path, recipe, decay, device):
    assert_counted(tmp_path, run(tmp_path, decay, recipe, device=device), recipe)


def assert_counted(tmp_path, done, recipe):
    by_hand = flips_by_hand(tmp_path, top2 if recipe == "sr-ste" else transposable)
    assert [len(flips) for flips in by_hand] == [6, 6]
    assert min(map(min, by_hand)) > 0
    assert list(done.flips.values()) == by_hand
    assert set(done.elements.values()) == {64 * 128}
    assert done.rates()[2] == pytest.approx((by_hand[0][2] + by_hand[1][2]) / (2 * 64 * 128))
    assert done.stopped


@pytest.mark.nightly
def test_the_dense_run_is_dense_and_decays_nothing(tmp_path):
    """What ``fp8`` trains, to the bit."""
    dense = run(tmp_path, None)
    assert_counted(tmp_path, dense, "sr-ste")
    trained = torch.load(tmp_path / "weights.pt")
    options = f"torch.compile(model, backend='sste', options={OPTIONS | {'sste.recipe': 'fp8'}})"
    with pytest.raises(RunFailed, match=r"no weight is or would be pruned in the dense run; (.|\n)*fp8"):
        run_script(None, asked(6, {}, {}), script(tmp_path, options))
    for expected, weights in zip(torch.load(tmp_path / "weights.pt"), trained, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, weights, strict=True))
    # A decay of next to nothing trains what a recipe without decay does, and not what dense training does.
    nothing = run(tmp_path, 1e-30)
    ste = flips_by_hand(tmp_path, top2)
    assert list(nothing.flips.values()) == ste
    assert nothing.flips != dense.flips
    assert DecayTable(recipe="sr-ste", dense=dense, runs=(nothing,)).mu(nothing) > 0.9


def status(*arguments):
    """What the command exits with."""
    try:
        main(["tune-decay", *arguments])
    except SystemExit as ended:
        return ended.code
    return 0


def test_the_command(tmp_path, capsys, monkeypatch):
    """Options of the script that each run sets itself do not count; larger decays flip less."""
    monkeypatch.chdir(tmp_path)
    own = "torch.compile(model, options={'sste.recipe': 's-ste', 'sste.decay': 1e-4, 'sste.report': 'report.txt'})"
    arguments = ["--decays", "1e-1,1e-30", "--steps", "10", "--option", "sste.executor=eager"]
    exited = status(*arguments, "--out", "out.json", "--out", "out.html", *script(tmp_path, own))
    written = json.loads((tmp_path / "out.json").read_text())
    printed, said = capsys.readouterr()
    dense, *runs = written["runs"]
    assert [run["decay"] for run in (dense, *runs)] == [None, 1e-30, 1e-1]
    assert all(len(run["flip_rates"]) == 10 and run["stopped"] for run in (dense, *runs))
    assert dense["mean"] == pytest.approx(sum(dense["flip_rates"][5:]) / 5)
    mus = [run["mu"] for run in runs]
    assert mus == [pytest.approx(run["mean"] / dense["mean"]) for run in runs]
    assert mus[0] > mus[1]
    assert written["accepted"] == [run["decay"] for run in runs if 0.60 <= run["mu"] <= 0.95]
    assert exited == (0 if written["accepted"] else 1)
    rows = [line.split() for line in printed.splitlines()]
    assert ["1e-30", f"{100 * runs[0]['mean']:.3g}", "%", f"{mus[0]:.3f}"] in [row[:4] for row in rows]
    assert said.splitlines()[-1] == "sparse_compile: run 3 of 3, decay 0.1"
    assert "came to its end" not in printed
    assert not (tmp_path / "report.txt").exists()
    assert "Flip rate in each optimizer step" in (tmp_path / "out.html").read_text()


# By day the run that exits is alone: it ends before it imports what a compilation needs.
@pytest.mark.parametrize(
    "alone", [False, pytest.param(True, marks=(pytest.mark.alone, pytest.mark.nightly))], ids=["warm", "alone"]
)
def test_scripts_that_end_by_themselves(tmp_path, alone):
    done = run(tmp_path, None, length=3)
    assert not done.stopped
    assert len(done.rates()) == 3


@pytest.mark.parametrize(
    ("compile", "message"),
    [
        (
            "1 / 0",
            r"run with decay 0.5 failed, exit status 1; its last output was:(.|\n)*ZeroDivisionError: division by zero",
        ),
        pytest.param(
            "sys.exit(7)", "run with decay 0.5 failed, exit status 7", marks=[pytest.mark.alone, pytest.mark.nightly]
        ),
        ("__import__('os').kill(__import__('os').getpid(), 9)", f"failed, ended by signal {int(signal.SIGKILL)}"),
        (
            "model",
            r"no weight is or would be pruned in the run with decay 0.5; "
            r"(.|\n)*neither torch.compile nor Module.compile",
        ),
    ],
    ids=["error", "exit", "signal", "nothing compiled"],
)
def test_runs_that_fail(tmp_path, compile, message):
    with pytest.raises(RunFailed, match=message):
        run(tmp_path, 0.5, compile=compile, length=2)


def test_the_command_shows_what_failed(tmp_path, capsys):
    """And with a learning rate of 0 nothing flips, which the dense run tells before the others."""
    assert status(*script(tmp_path, "1 / 0")) == 1
    assert "dense run failed, exit status 1" in capsys.readouterr().err
    assert status("--steps", "4", "--option", "sste.executor=eager", *script(tmp_path, rate=0.0)) == 1
    said = capsys.readouterr().err
    assert "no mask changes in the dense run in optimizer steps 3 to 4" in said
    assert said.count("sparse_compile: run ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: SCRIPT"),
        ("nothing.py", "there is no file 'nothing.py'; to run a module, use -m nothing.py"),
        ("--decays 1e-4,0 train.py", "the decays are 0.0001, 0; allowed are positive, finite numbers, each once"),
        ("--decays 1e-4,1e-4 train.py", "the decays are 0.0001, 0.0001; allowed"),
        ("--decays nan train.py", "the decays are nan; allowed"),
        ("--decays 1e-4,x train.py", "'1e-4,x' is not a list of numbers such as 2e-5,6e-5,2e-4"),
        ("--steps 1 train.py", "'1' is not a number of optimizer steps from 2 up"),
        ("--recipe ste train.py", "invalid choice: 'ste'"),
        ("--out decay.txt train.py", "'decay.txt' must end in .json or .html"),
        ("--option sste.decay=1 train.py", "each run sets its own 'sste.decay'; use --decays"),
        ("--option sste.warmup=1 train.py", "each run sets its own 'sste.warmup'"),
        ("--option sste.executer=eager train.py", "did you mean 'sste.executor'"),
    ],
)
def test_wrong_arguments_are_explained(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    script(tmp_path)
    assert status(*shlex.split(arguments)) == 2
    assert message in capsys.readouterr().err


def test_the_environment_that_does_without_the_launcher_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPARSE_COMPILE", "1")
    assert status(*script(tmp_path)) == 2
    assert "SPARSE_COMPILE is set" in capsys.readouterr().err


def made(decay, *flips, **more):
    """A run of one weight of 1000 elements."""
    return Run(decay=decay, elements={"up": 1000}, flips={"up": flips}, **more)


def table(**mus):
    runs = tuple(made(float(decay), 9, 9, round(100 * mu), round(100 * mu)) for decay, mu in mus.items())
    return DecayTable(recipe="t-sr-ste", dense=made(None, 500, 500, 100, 100), runs=runs)


def test_what_is_accepted_and_recommended():
    found = table(**{"1e-5": 0.96, "1e-4": 0.95, "1e-3": 0.70, "1e-2": 0.60, "1e-1": 0.59})
    assert [run.decay for run in found.accepted()] == [1e-4, 1e-3, 1e-2]
    assert found.recommended() == 1e-3
    assert 'options={"sste.recipe": "t-sr-ste", "sste.decay": 0.001}' in str(found)
    verdicts = [line[-1] for line in found.lines()]
    assert verdicts == ["", "too weak", "accepted", "accepted", "accepted", "too strong"]
    assert found.lines()[2] == ("0.0001", "9.5 %", "0.950", "accepted")
    assert found.notes() == ["flip rates are means over optimizer steps 3 to 4, of 1 weight"]


@pytest.mark.parametrize(
    ("mus", "advice"),
    [
        ({"1e-5": 1.2, "1e-4": 1.0}, "all are too weak: try larger ones than 0.0001"),
        ({"1e-5": 0.5, "1e-4": 0.1}, "all are too strong: try smaller ones than 1e-05"),
        ({"1e-6": 1.1, "1e-5": 1.2, "1e-4": 0.1}, "try some between 1e-05 and 0.0001"),
    ],
)
def test_where_none_is_accepted(mus, advice):
    assert table(**mus).recommended() is None
    assert table(**mus).advice() == f"no decay is accepted; {advice} with --decays"


def test_runs_of_different_lengths_are_compared_where_all_have_steps():
    short = made(1e-4, 90, 80, 50, 30, stopped=False)
    found = DecayTable(recipe="sr-ste", dense=made(None, 90, 90, 90, 70, 10, 10), runs=(short,))
    assert found.mu(short) == pytest.approx((50 + 30) / (90 + 70))
    assert found.notes()[1] == "the script ended before its last step in: decay 0.0001"
    two = Run(decay=None, elements={"up": 60, "down": 40}, flips={"up": [6, 3, 1], "down": [4, 2]})
    assert two.rates() == [0.10, 0.05]


def test_runs_that_cannot_be_compared():
    dense = made(None, 1, 1)
    other = replace(made(1e-4, 1, 1), elements={"down": 1000})
    with pytest.raises(ValueError, match="the runs prune different weights: down, up of dense and decay"):
        DecayTable(recipe="sr-ste", dense=dense, runs=(other,))
    with pytest.raises(ValueError, match="no mask changes in the dense run"):
        DecayTable(recipe="sr-ste", dense=made(None, 1, 0))
    with pytest.raises(ValueError, match="a run has 1 optimizer steps; at least 2"):
        DecayTable(recipe="sr-ste", dense=made(None, 1))
    with pytest.raises(ValueError, match="no weight is pruned"):
        DecayTable(recipe="sr-ste", dense=Run(decay=None, elements={}, flips={}))
    with pytest.raises(ValueError, match="the decays are none"):
        search("sr-ste", [], lambda decay: dense)


def test_the_plots():
    shown = as_html(table(**{"1e-4": 0.95, "1e-3": 0.70, "1e-1": 0.50}))
    # 0.95, 0.7 and 0.5 of 1.1 * 0.95, over the logarithms.
    assert 'points="0.0,9.09 333.3,33.01 1000.0,52.15"' in shown
    assert 'points="0.0,42.58 1000.0,42.58"' in shown, "0.60, dashed"
    # 500, 500, 100, 100 of 1.1 * 500 flips.
    assert 'points="0.0,9.09 333.3,9.09 666.7,81.82 1000.0,81.82"' in shown
    assert "options={&#34;sste.recipe&#34;: &#34;t-sr-ste&#34;, &#34;sste.decay&#34;: 0.001}" in shown
    assert all(f"decay {decay}</li>" in shown for decay in ("0.0001", "0.001", "0.1"))
