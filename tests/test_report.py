"""The report: a row for each linear, what stands in the way of more, as text, as JSON, and read again."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shared_graphs
import sparse_compile
import warm
from sparse_compile.__main__ import main
from sparse_compile.reporting.health import Health
from sparse_compile.reporting.model import GraphReport, GraphTiming, Measurement, Row, Spread
from sparse_compile.reporting.report import Report

uncompiled = shared_graphs.uncompiled

EAGER = {"sste.executor": "eager", "sste.when": "always"}
# The rewritten graph is not compiled.
AS_IT_IS = "backend.compile_graph = lambda graph, *args, **named: graph.forward"


def row(module, decision="s-ste", reason="", **more):
    return Row(module=module, role="ffn", shape="64 x 64 -> 256", decision=decision, reason=reason, **more)


def sized(module, precision, **more):
    """16 tokens, 32 -> 64 features, all products alike."""
    sizes = {"tokens": 16, "in_features": 32, "out_features": 64}
    return row(module, **sizes, fprop=precision, dgrad=precision, wgrad=precision, **more)


def test_rows_that_differ_in_layer_numbers_are_folded():
    rows = (row("blocks.0.up"), row("blocks.1.up"), row("blocks.1.fc2"), row("head", "dense", "because"))
    text = str(Report([GraphReport(rows=rows, execution="kernels")]))
    assert text.splitlines()[0] == "graph 0: 3 of 4 linears rewritten, kernels"
    modules = [line.split()[0] for line in text.splitlines()[4:7]]
    assert modules == ["blocks.*.up", "blocks.1.fc2", "head"]
    assert "blocks.*.up (2)" in text
    assert "because" in text


def measurement():
    passes = {"forward": Spread(median=2.0, low=1.9, high=2.5), "backward": Spread(median=4.0, low=3.9, high=4.5)}
    dense = GraphTiming(**passes, peak_bytes=3 * 2**20)
    now = GraphTiming(forward=Spread(median=1.5, low=1.0, high=2.0), backward=None, peak_bytes=None)
    return Measurement(dense=dense, rewritten=now, rounds=5, weights_ms=0.5, casts_ms=0.15, mvue_ms=None)


def test_measured_times_in_the_text():
    text = str(Report([GraphReport(rows=(), execution="kernels", measured=measurement())]))
    assert "measured: 3.00x, medians of 5 alternating runs of each" in text
    assert "dense forward 2.000 ms (1.900 to 2.500), backward 4.000 ms (3.900 to 4.500), peak 3 MiB" in text
    assert "of which weights 0.500 ms (25 %), casts 0.150 ms (8 %); weights are made once per optimizer step" in text


def test_json_is_read_again():
    rows = (sized("blocks.0.up", "fp8"), row("blocks.1.up", reason="because", advice="do", dense_us=3.0))
    graph = GraphReport(
        rows=rows, execution="kernels", id="0/0", dynamic=("x.size(0) = s0",), calls=3, measured=measurement()
    )
    health = {"up": [Health(step=2, flips=None, zeros=0.5, underflow=0.0, saturated=0.25, noise=0.5)]}
    report = Report([graph], health, [12.5, 13.0], device="a GPU")
    text = report.to_json()
    again = Report.from_json(text)
    assert again == report
    assert again.to_json() == text
    assert [r["module"] for r in json.loads(text)["graphs"][0]["rows"]] == ["blocks.0.up", "blocks.1.up"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is not a report of sparse_compile"),
        ("[]", "this is not a report of sparse_compile"),
        ('{"version": 99}', "the report has version 99; this sparse_compile reads version 3"),
        ('{"version": 3, "graphs": [{"rows": []}]}', "the report is damaged"),
    ],
)
def test_what_is_no_report_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Report.from_json(text)


def test_what_is_damaged_is_named():
    read = Report([GraphReport(rows=(row("a"), row("b")), execution="kernels")]).to_dict()
    read["graphs"][0]["rows"][1]["tokens"] = "x"
    with pytest.raises(ValueError, match=r"damaged: graphs\[0\]\.rows\[1\]\.tokens: expected int or null, got 'x'"):
        Report.from_json(json.dumps(read))
    with pytest.raises(ValueError, match="damaged: 'health' is missing"):
        Report.from_json(json.dumps({name: value for name, value in read.items() if name != "health"}))


def test_empty_report_says_so():
    assert "no graph was compiled" in str(Report())


def test_where_linears_are_called_is_in_the_table():
    rows = [row(f"blocks.{n}.up", source=f"/path/model.py:{10 + n // 2}") for n in range(3)]
    rows.append(row("head", source="/path/model.py:30", dense_us=12.3))
    text = str(Report([GraphReport(rows=tuple(rows), execution="kernels")]))
    assert [line.split()[1:5] for line in text.splitlines() if line.startswith("blocks")] == [
        ["(3)", "ffn", "model.py:10", "+1"]
    ]
    assert "model.py:30" in text
    assert "dense us" in text
    assert "dense us" not in str(Report([GraphReport(rows=(row("a"),), execution="kernels")]))


def test_training_steps():
    """Each measured graph gains its calls' times, and loses the time of its weights once."""
    graph = GraphReport(rows=(sized("up", "2:4 fp8"),), execution="kernels", calls_a_step=3, measured=measurement())
    idle = GraphReport(rows=(sized("a", "2:4 fp8"),), execution="kernels")
    report = Report([graph, idle], step_ms=[30.0, 10.0, *[20.0] * 18])
    assert report.step() == Spread(median=20.0, low=20.0, high=20.0)
    assert report.dense_step_ms() == 20.0 - (3 * 1.5 + 0.5) + 3 * 6.0
    assert (
        "training: 20.0 ms a step (8 of 10 take 20.0 to 20.0; last 20 steps); about 33.0 ms if the measured graphs "
        "were dense: 1.65x" in str(report)
    )
    idle.calls_a_step = 1
    assert report.dense_step_ms() is None  # one that was not measured
    assert str(report).endswith("last 20 steps)")
    assert Report([graph]).dense_step_ms() is None
    busy = Report([graph], step_ms=[4.0])  # shorter than the graphs were when they were measured
    assert busy.dense_step_ms() == pytest.approx(4.0 * 18.0 / 5.0)
    assert "training:" not in str(Report([graph]))


def test_coverage_counts_flops_and_calls():
    first = GraphReport(rows=(sized("a", "2:4 fp8"), sized("b", "fp8", forwards=2)), execution="kernels")
    assert first.flops() == {"2:4 fp8": 6 * 16 * 32 * 64, "fp8": 8 * 16 * 32 * 64}
    second = GraphReport(rows=(sized("c", "bf16"),), execution="dense", calls=7)
    assert Report([first, second]).coverage() == {"bf16": 1.0}  # the first never ran
    first.calls = 3
    assert Report([first, second]).coverage() == {"bf16": 0.5, "fp8": 24 / 84, "2:4 fp8": 18 / 84}


def test_gains_are_ordered_by_time_where_all_have_one_and_by_flops_else():
    small, large = sized("small", "bf16", reason="s", rewritten_us=9.0), sized("l.0", "bf16", reason="l", forwards=5)
    rewritten = sized("rewritten", "2:4 fp8")
    report = Report([GraphReport(rows=(small, large, rewritten), execution="kernels")])
    assert [gain.modules for gain in report.gains()] == ["l.0", "small"]
    assert [gain.share for gain in report.gains()] == [7 / 13, 3 / 13]
    timed = Row(**{name: getattr(large, name) for name in Row.__slots__} | {"rewritten_us": 2.0})
    report = Report([GraphReport(rows=(small, timed, rewritten), execution="kernels", calls=2)])
    assert [(gain.modules, gain.microseconds) for gain in report.gains()] == [("small", 9.0), ("l.0", 2.0)]


def test_the_same_gain_in_two_graphs_is_one():
    graphs = [GraphReport(rows=(sized(f"b.{n}.up", "bf16", reason="r"),), execution="dense") for n in (0, 1, 1)]
    (gain,) = Report(graphs).gains()
    assert (gain.modules, gain.share) == ("b.*.up (2)", 1.0)


@pytest.mark.usefixtures("uncompiled")
def test_one_graph_one_table(small_gpt, batch):
    model = torch.compile(small_gpt(), backend="sste", options=EAGER)
    for _ in range(2):
        model(*batch)
    (graph,) = sparse_compile.report().graphs
    assert graph.rewritten == 5
    assert len(graph.rows) == 5
    assert graph.execution == "emulated: no kernels for cpu"
    assert (graph.id, graph.calls, graph.origin, graph.ends) == ("0/0", 2, "SmallGPT.forward", "the function returns")
    by_module = {r.module: r for r in graph.rows}
    down = by_module["blocks.0.down"]
    assert down.decision == "s-ste (2:4 fp8, fp8, 2:4 fp8)"
    assert down.shape == "64 x 256 -> 64"
    assert (down.tokens, down.in_features, down.out_features) == (64, 256, 64)
    assert (down.fprop, down.dgrad, down.wgrad) == ("2:4 fp8", "fp8", "2:4 fp8")
    assert down.code == "return x + self.down(hidden)"
    file, line = down.source.rsplit(":", 1)
    assert Path(file).read_text().splitlines()[int(line) - 1].strip() == down.code
    head = by_module["head"]
    assert head.decision == "fp8 (fp8, fp8, fp8; e5m2 gradients)"
    assert (head.fprop, head.wgrad, head.advice) == ("fp8", "fp8", "")
    flops = {"qkv": 192, "proj": 64, "up": 256, "down": 256}
    # Attention multiplies 32 x 16 x 32 twice forward and five times backward, for each of 2 x 4 heads.
    attention = 64 / 3 * (2 + 5) / 2
    total = sum(flops.values()) + attention + 128
    coverage = sparse_compile.report().coverage()
    assert coverage["attention"] == pytest.approx(attention / total)
    assert coverage["2:4 fp8"] == pytest.approx((256 + 256) * 2 / 3 / total)
    assert "fp32" not in coverage


@pytest.mark.usefixtures("uncompiled")
def test_without_gradients_there_is_one_product(small_gpt, batch):
    with torch.no_grad():
        torch.compile(small_gpt(depth=1), backend="sste", options=EAGER)(*batch)
    rows = sparse_compile.report().rows
    assert {(row.fprop != "", row.dgrad, row.wgrad) for row in rows} == {(True, "", "")}


@pytest.mark.usefixtures("uncompiled")
def test_checkpointed_forwards_run_twice(small_gpt, batch):
    """But for the last linear of the region, whose result backward does not need."""
    torch.compile(small_gpt(depth=1, checkpoint=True), backend="sste", options=EAGER)(*batch)
    assert {row.module: row.forwards for row in sparse_compile.report().rows} == {
        "blocks.0.qkv": 2, "blocks.0.proj": 2, "blocks.0.up": 2, "blocks.0.down": 1, "head": 1
    }  # fmt: skip


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 70))

    def forward(self, x):
        y = self.inner(x)
        torch._dynamo.graph_break()
        return torch.einsum("bi,io->bo", y, self.inner[2].weight)


@pytest.mark.usefixtures("uncompiled")
def test_where_a_graph_comes_from_and_why_it_ends():
    model = torch.compile(Cut(), backend="sste", options=EAGER)
    for tokens in (8, 12):
        model(torch.randn(tokens, 64))
    first, rest, *_ = sparse_compile.report().graphs
    here = Path(__file__).read_text().splitlines()
    for graph, break_line in ((first, "torch._dynamo.graph_break()"), (rest, 'return torch.einsum("bi,io->bo"')):
        assert graph.origin == "Cut.forward"
        file, line = graph.ends_at.rsplit(":", 1)
        assert Path(file).name == Path(__file__).name
        assert here[int(line) - 1].strip().startswith(break_line)
    assert first.ends == "graph break: Call to `torch._dynamo.graph_break()`"
    assert "Remove the `torch._dynamo.graph_break()` call" in first.hint
    assert first.modules == "inner"
    assert (rest.ends, rest.hint) == ("the function returns", "")
    odd = next(row for row in first.rows if row.module == "inner.2")
    assert odd.reason == "shape: out_features = 70 is not a multiple of 16"
    assert odd.advice == "pad out_features to 80"
    (einsum,) = rest.rows
    assert (einsum.advice, einsum.tokens) == ("write it as F.linear", None)
    assert einsum.code.startswith("return torch.einsum(")
    dynamic = [graph for graph in sparse_compile.report().graphs if graph.dynamic]
    assert dynamic[0].dynamic[0].startswith("x.size(0) = s")
    assert dynamic[0].dynamic[0].endswith("(12 when traced)")
    assert dynamic[0].rows[0].tokens == 12


@pytest.mark.usefixtures("uncompiled")
def test_attention_could_be_sparse_unless_all_are_dense(small_gpt, batch):
    torch.compile(small_gpt(depth=1), backend="sste", options=EAGER)(*batch)
    torch.compile(small_gpt(depth=1), backend="sste", options=EAGER | {"sste.recipe": "fp8"})(*batch)
    default, dense = sparse_compile.report().graphs
    advised = {row.module for row in default.rows if "'sste.targets': 'all'" in row.advice}
    assert advised == {"blocks.0.qkv", "blocks.0.proj"}
    assert not any(row.advice for row in dense.rows)


def test_written_to_stderr_when_the_process_ends():
    code = (
        "import torch; from torch import nn; import sparse_compile; from sparse_compile import backend\n"
        f"{AS_IT_IS}\n"
        "ffn = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))\n"
        "options = {'sste.executor': 'eager', 'sste.when': 'always'}\n"
        "f = torch.compile(lambda x: ffn(x), backend='sste', options=options)\n"
        "f(torch.randn(8, 64)).sum().backward()"
    )
    result = warm.python("-c", code, check=True)
    assert "graph 0: 2 of 2 linears rewritten, emulated: no kernels for cpu" in result.stderr
    assert result.stdout == ""


def test_option_writes_files_which_are_viewed_again(tmp_path, capsys):
    code = (
        "import sys, torch; from torch import nn; import sparse_compile; from sparse_compile import backend\n"
        f"{AS_IT_IS}\n"
        "ffn = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))\n"
        "for file in sys.argv[1:]:\n"
        "    options = {'sste.executor': 'eager', 'sste.when': 'always', 'sste.report': file}\n"
        "    torch.compile(lambda x: ffn(x), backend='sste', options=options)(torch.randn(8, 64))"
    )
    files = [str(tmp_path / f"report.{suffix}") for suffix in ("txt", "json", "html")]
    result = warm.python("-c", code, *files, check=True)
    assert "linears rewritten" not in result.stderr
    text = Path(files[0]).read_text()
    assert "graph 2: 2 of 2 linears rewritten" in text
    main(["report", files[1]])
    assert capsys.readouterr().out == text
    again = tmp_path / "again.html"
    main(["report", files[1], "--html", str(again)])
    assert again.read_text() == Path(files[2]).read_text()


def test_view_explains_wrong_arguments(tmp_path, capsys):
    wrong = tmp_path / "wrong.json"
    wrong.write_text("text")
    for arguments, message in (
        ([wrong], "this is not a report of sparse_compile"),
        ([tmp_path / "none.json"], "No such file"),
    ):
        with pytest.raises(SystemExit):
            main(["report", *map(str, arguments)])
        assert message in capsys.readouterr().err
    wrong.write_text(Report().to_json())
    for name, message in (("no/report.html", "there is no folder"), ("report.txt", "must end in .html")):
        with pytest.raises(SystemExit):
            main(["report", str(wrong), "--html", str(tmp_path / name)])
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("uncompiled")
def test_near_misses_say_where(trace):
    weight = nn.Parameter(torch.randn(64, 64))
    compiled = torch.compile(lambda x: F.linear(x, weight * 2).sum(), backend="sste", options=EAGER)
    compiled(torch.randn(8, 64))
    (only,) = sparse_compile.report().rows
    assert only.reason.startswith("weight is not a parameter")
    assert "F.linear(x, weight * 2)" in only.code
