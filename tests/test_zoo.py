"""The zoo: ``bash scripts/nightly.sh`` runs all of it, the default run the entries that are a sample."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tabulate import tabulate

import zoo_torch
import zoo_transformers
from libraries import library
from zoo import Architecture, Outcome, examine

ARCHITECTURES = [*zoo_transformers.ARCHITECTURES, *zoo_torch.ARCHITECTURES]


def marked(architecture: Architecture) -> object:
    marks = () if architecture.sample else (pytest.mark.nightly,)
    return pytest.param(architecture, id=architecture.name, marks=marks)


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Iterator[list[Outcome]]:
    """What was found; printed and written at the end of a nightly run."""
    found: list[Outcome] = []
    yield found
    if not request.config.getoption("--nightly"):
        return
    rows = [
        {
            "model": o.name,
            "seconds": f"{o.seconds:.0f}",
            "rewritten": f"{o.rewritten} of {o.linears}",
            "FFN found": f"{o.ffn_found} of {o.ffn}",
            "cosine": f"{o.cosine:.3f} ({o.lowest_cosine:.3f})",
            "FLOPs in training": share(o.training_reported, o.training_counted),
            "in evaluation": share(o.evaluation_reported, o.evaluation_counted),
            "faults": "; ".join(fault.partition(":")[0] for fault in o.faults),
        }
        for o in found
    ]
    terminal = request.config.pluginmanager.getplugin("terminalreporter")
    terminal.write_line(f"\n{tabulate(rows, headers='keys', disable_numparse=True)}\n")
    file = request.config.getoption("--zoo-results")
    if file:
        results = {"torch": torch.__version__, "architectures": [asdict(outcome) for outcome in found]}
        Path(file).write_text(json.dumps(results, indent=1) + "\n")


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


@pytest.mark.parametrize("architecture", map(marked, ARCHITECTURES))
def test_architecture(architecture: Architecture, outcomes: list[Outcome]) -> None:
    """It trains with the gradients of its projected weights; its FFNs are found, its products are in the report."""
    library(architecture.library)
    outcomes.append(Outcome(name=architecture.name))
    examine(architecture, outcomes[-1])
    assert not outcomes[-1].faults, "\n".join(outcomes[-1].faults)


def test_of_what_it_is_made() -> None:
    """Sixty architectures at least, a dozen of them in the default run, each name once."""
    names = [architecture.name for architecture in ARCHITECTURES]
    assert len(set(names)) == len(names) >= 60
    assert 10 <= sum(architecture.sample for architecture in ARCHITECTURES) <= 16
