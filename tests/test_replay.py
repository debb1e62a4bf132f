"""``sste.plan``: what one run chose is chosen again, whatever the clocks say by then."""

from functools import partial

import pytest

from sparse_compile import backend
from sparse_compile.options import read_options
from sparse_compile.passes.choose import choose
from sparse_compile.passes.decide import decide
from sparse_compile.passes.find import find
from sparse_compile.passes.flow import Flow
from sparse_compile.passes.parameter_owners import ParameterOwners
from sparse_compile.passes.replay import noting, read_plan
from sparse_compile.recipe import FP8, SSTE
from sparse_compile.reporting.report import Report
from test_choose import clock

SLOW = clock(dense_fprop=1.0, dense_dgrad=1.0, dense_wgrad=1.0)  # beside which everything of ours is


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """As where there are some."""
    monkeypatch.setattr("sparse_compile.kernels.ops.emulation_reason", lambda device: None)


@pytest.fixture(scope="module")
def found():
    """Linears by the number of tokens, which no test changes."""
    return {}


@pytest.fixture
def plans(found, trace, small_gpt, batch):
    """Of a model that is called with so many tokens of each sequence."""

    def make(tokens=16, recipe=SSTE):
        if tokens not in found:
            model = small_gpt()
            found[tokens] = model, find(Flow(trace(model, *(part[:, :tokens] for part in batch)))).sites
        return decide(found[tokens][1], recipe, "ffn", ParameterOwners())[0]

    return make


@pytest.fixture
def saved(tmp_path):
    """Writes the report of a run that chose like this, of plans each with a clock of its own."""

    def save(*runs):
        report = Report()
        for planned, read in runs:
            choose(planned, read, noting(report.choices, lambda question, tokens, answer: answer()))
        report.write(tmp_path / "report.json")
        return tmp_path / "report.json"

    return save


def forbidden(questions):
    pytest.fail("nothing is measured")


def test_choices_are_made_again(plans, saved):
    path = saved((plans(), clock(dense_wgrad=30.0)))
    kept, rejections = choose(plans(), clock(dense_wgrad=30.0))
    assert (kept, rejections) != choose(plans(), SLOW), "the clocks differ"
    again, rejected_again = choose(plans(), forbidden, read_plan(path))
    assert [(plan.site.name, plan.recipe, plan.price) for plan in again] == [
        (plan.site.name, plan.recipe, plan.price) for plan in kept
    ]
    assert [plan.recipe for plan in kept] != []
    assert rejected_again == rejections == []


def test_what_stayed_dense_stays_so(plans, saved):
    path = saved((plans(), SLOW))
    kept, rejections = choose(plans(), forbidden, read_plan(path))
    assert kept == []
    assert {rejection.name for rejection in rejections} == {plan.site.name for plan in plans()}


def test_another_number_of_tokens_runs_as_all_that_were_planned_or_not_at_all(plans, saved):
    path = saved((plans(16), clock()), (plans(8), clock()))
    assert [plan.recipe for plan in choose(plans(5), forbidden, read_plan(path))[0]] == [FP8, FP8, SSTE, SSTE]
    path = saved((plans(16), clock()), (plans(8), SLOW))
    assert choose(plans(8), forbidden, read_plan(path))[0] == []
    assert len(choose(plans(16), forbidden, read_plan(path))[0]) == 4
    with pytest.raises(
        ValueError, match=r"does not say how to run .*with 10 tokens: its choices for 32, 16 tokens differ"
    ):
        choose(plans(5), forbidden, read_plan(path))


def test_another_recipe_is_none_of_the_plan(plans, saved):
    path = saved((plans(), clock()))
    with pytest.raises(
        ValueError, match=r"report.json does not say how to run fp8 of .*: it has no choice for it.*'sste.report'"
    ):
        choose(plans(recipe=FP8), forbidden, read_plan(path))


def test_the_option_and_the_report(plans, saved, monkeypatch, tmp_path):
    """A run notes its choices in the report of its process; with the plan the next one makes them, and notes them."""
    report = Report()
    monkeypatch.setattr(backend, "report_so_far", lambda: report)
    monkeypatch.setattr(backend, "choose", partial(choose, clock=clock()))
    first, _ = backend._choose(plans(), (), read_options(None, None))
    report.write(tmp_path / "first.json")
    noted = dict(report.choices)
    assert len(noted) == len(plans())
    report.choices.clear()
    monkeypatch.setattr(backend, "choose", partial(choose, clock=forbidden))
    second, _ = backend._choose(plans(), (), read_options(None, {"sste.plan": tmp_path / "first.json"}))
    assert [plan.recipe for plan in second] == [plan.recipe for plan in first]
    assert report.choices == noted


def test_a_plan_that_is_none(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(ValueError, match=r"option 'sste.plan' is .*; allowed is the path of a report"):
        read_options(None, {"sste.plan": path})
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"plan.json', which can't be read: this is not a report"):
        read_plan(path)
    with pytest.raises(ValueError, match=r"'sste.plan' has no effect with 'sste.when': 'always'"):
        read_options(None, {"sste.plan": path, "sste.when": "always"})
