"""The HTML report: well-formed, with nothing from outside, every row and number in it, and text as text."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from sparse_compile.decay_search.html import as_html
from sparse_compile.decay_search.table import DecayTable, Run
from sparse_compile.reporting.health import Health, over_time
from sparse_compile.reporting.html_page import render
from sparse_compile.reporting.model import GraphReport, GraphTiming, Measurement, Row, Spread
from sparse_compile.reporting.report import Report

HOSTILE = "<script>alert('1')</script> & \"quoted\" </style>"


class Page(HTMLParser):
    """Checks that elements are closed in order; collects text and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def row(module, **more):
    row = Row(
        module=module,
        role="ffn",
        shape="16 x 32 -> 64",
        decision="dense",
        reason="too small: because",
        advice="make it larger",
        source=f"/path/model.py:{len(module)}",
        code=f"self.{module}(x)",
        tokens=16,
        in_features=32,
        out_features=64,
        fprop="bf16",
        dense_us=1234.4,
        rewritten_us=1234.4,
    )
    return replace(row, **more)


def page(report, path):
    report.to_html(path)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture
def report():
    rows = [row(f"blocks.{n}.up") for n in range(12)]
    rows += [row("down", fprop="2:4 fp8", dgrad="fp8", wgrad="2:4 fp8", decision="s-ste", rewritten_us=99.0)]
    rows[-1] = replace(rows[-1], reason="", advice="")
    return Report([GraphReport(rows=tuple(rows), execution="kernels", origin="GPT.forward", calls=3)], device="a GPU")


def test_each_row_is_there(report, tmp_path):
    shown = page(report, tmp_path / "report.html")
    for linear in report.rows:
        assert linear.module in shown.text
        assert f"{linear.source.rsplit('/')[-1]}: {linear.code}" in shown.text
    assert "blocks.*.up (12)" in shown.text
    for text in ("1234", "99", "too small: because", "make it larger", "GPT.forward", "3 calls", "a GPU"):
        assert text in shown.text
    assert ("data-label", "reason and advice") in shown.attributes
    assert shown.text.endswith(" 1234 99"), "a linear with neither reason nor advice has an empty cell"
    assert "2:4 fp8 13 %" in shown.text  # 2 of 15 products
    assert "1 of 13 linears rewritten, in 1 graph." in shown.text
    widths = [value for name, value in shown.attributes if name == "style"]
    assert "width:80.00%" in widths  # 12 products in bf16
    assert "width:92.92%" in widths  # predicted: (12 * 1234.4 + 99) / (13 * 1234.4)


def test_nothing_comes_from_outside(report, tmp_path):
    shown = page(report, tmp_path / "report.html")
    assert not {"script", "link", "img", "iframe", "object", "base", "a", "form"} & set(shown.tags)
    assert not {"src", "href", "action", "onload", "onclick"} & {name for name, _ in shown.attributes}
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "://" not in text
    assert "url(" not in text
    assert "@import" not in text
    policy = dict(shown.attributes)["content"]
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in shown.attributes, policy


def test_what_the_user_wrote_is_text(tmp_path):
    texts = {"module": HOSTILE, "role": HOSTILE, "shape": HOSTILE, "reason": HOSTILE, "advice": HOSTILE}
    hostile = replace(row("x"), **texts, code=HOSTILE, source=HOSTILE, fprop=HOSTILE)
    graph = GraphReport(
        rows=(hostile,),
        execution=HOSTILE,
        id=HOSTILE,
        origin=HOSTILE,
        modules=HOSTILE,
        ends=HOSTILE,
        hint=HOSTILE,
        dynamic=(HOSTILE,),
        not_measured=HOSTILE,
    )
    shown = page(Report([graph], device=HOSTILE), tmp_path / "report.html")
    assert "script" not in shown.tags
    assert shown.text.count("alert('1')") > 12
    assert ("title", HOSTILE) in shown.attributes


def test_names_of_weights_are_text(tmp_path):
    samples = [Health(step=step, flips=0.1, zeros=0.5, underflow=0.0, saturated=0.0) for step in (0, 10)]
    samples.append(replace(samples[0], step=20, beta=1.5, beta_source=HOSTILE))
    report = Report(health={HOSTILE: samples}, fallbacks=[HOSTILE], torch=HOSTILE)
    shown = page(report, tmp_path / "report.html")
    assert "script" not in shown.tags
    # With its plot as title and caption, in the table as weight and source; the fallback, and PyTorch's version.
    assert shown.text.count(HOSTILE) == 6
    run = Run(decay=None, elements={"up": 10}, flips={"up": [3, 2]})
    search = DecayTable(recipe=HOSTILE, dense=run, runs=(replace(run, decay=0.1), replace(run, decay=0.2)))
    shown = Page(as_html(search))
    assert "script" not in shown.tags
    assert f"Decay for recipe {HOSTILE}" in shown.text


def test_a_value_that_a_template_misses_is_an_error():
    with pytest.raises(UndefinedError, match="'recipe' is undefined"):
        render("decay_search.html")


def test_measured_times(tmp_path):
    forward, backward = Spread(median=2.0, low=1.9, high=2.1), Spread(median=6.0, low=5.9, high=6.1)
    dense = GraphTiming(forward=forward, backward=backward, peak_bytes=2**20)
    now = GraphTiming(forward=forward, backward=Spread(median=1.5, low=1.4, high=1.6), peak_bytes=2**21)
    measured = Measurement(dense=dense, rewritten=now, rounds=7, weights_ms=0.5, casts_ms=0.25, mvue_ms=None)
    shown = page(Report([GraphReport(rows=(), execution="kernels", measured=measured)]), tmp_path / "report.html")
    assert "of 7 alternating runs" in shown.text
    for text in ("Measured: 2.00x", "8 ms", "1 MiB", "2 MiB", "6 ms (5.9 to 6.1)", "0.25 ms, 6 %"):
        assert text in shown.text
    for text in ("peak memory", "forward backward weights", "0.5 ms, 12 %"):
        assert text in shown.text
    assert ("data-label", "MVUE") not in shown.attributes, "not told, so it has no column"
    widths = [value for name, value in shown.attributes if name == "style"]
    assert widths == [f"width:{width}%" for width in ("25.00", "75.00", "25.00", "18.75", "6.25")]


def test_training_steps_and_several_graphs(tmp_path):
    graphs = [GraphReport(rows=(row(f"up{n}", rewritten_us=617.2),), execution="kernels") for n in range(2)]
    shown = page(Report(graphs, step_ms=[8.0, 9.0, 10.0]), tmp_path / "report.html")
    assert "Training step 9.0 ms a step" in shown.text
    assert "Forward and backward of each graph" in shown.text
    assert "2.00x predicted for 1 linears" in shown.text
    assert "Forward and backward of each graph" not in page(Report(graphs[:1]), tmp_path / "report.html").text


def test_health_as_plots(tmp_path):
    def samples(*flips):
        return [
            Health(step=10 * number, flips=share, zeros=0.5, underflow=0.02, saturated=0.0)
            for number, share in enumerate(flips)
        ]

    report = Report(health={"a": samples(None, 0.1, 0.2), "b": samples(None, 0.3, 0.05)})
    assert over_time(report.health, "flips") == [(10, 0.2, 0.3), (20, 0.125, 0.2)]
    shown = page(report, tmp_path / "report.html")
    assert "flips at step 20: median 12.5 %, largest 20 % in a" in shown.text
    assert "Dashed line: 5 %;" in shown.text
    lines = [value for name, value in shown.attributes if name == "points"]
    assert len(lines) == 9  # three plots with the limit, the largest, the median
    assert lines[1] == "0.0,9.09 1000.0,39.39"  # 0.3 and 0.2 of 1.1 * 0.3
    assert lines[2] == "0.0,39.39 1000.0,62.12"
    assert "saturated at step 20: median 0 %, largest 0 % Kept" in shown.text
    assert "b 20 5 % 50 % 2 % 0 %" in shown.text, "the table of all weights"
    assert ("data-label", "noise") not in shown.attributes
    text = str(Report([GraphReport(rows=(), execution="kernels")], report.health))
    assert "zeros at step 20: 50 %, 50 %\n" in text
    assert "underflow at step 20: 2 %, 2 %, above 1 %" in text
    assert "saturated at step 20: 0 %, 0 %" in text


def test_empty_report(tmp_path):
    assert "No graph was compiled with backend 'sste'." in page(Report(), tmp_path / "report.html").text


@pytest.mark.parametrize("name", ["report.pdf", "report"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"must end in \.txt or \.json or \.html"):
        Report().write(tmp_path / name)
