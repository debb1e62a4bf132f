"""The zoo: ``bash scripts/nightly.sh`` runs all of it, the default run a sample."""

import pytest

import zoo_torch
import zoo_transformers
from libraries import library
from zoo import OUTCOMES, Architecture, Outcome, examine

ARCHITECTURES = [*zoo_transformers.ARCHITECTURES, *zoo_torch.ARCHITECTURES]


# The default run has these, too, which differ in how an FFN is written, and are quickly compiled.  Other tests of it
# train GPT-2, Llama and encoders of torch.nn.
SAMPLE = ("ConvNeXt blocks", "FFN repeated")


def marked(architecture: Architecture) -> object:
    marks = () if architecture.name in SAMPLE else (pytest.mark.nightly,)
    return pytest.param(architecture, id=architecture.name, marks=marks)


@pytest.mark.by_day(1)
@pytest.mark.parametrize("architecture", [marked(architecture) for architecture in ARCHITECTURES])
def test_architecture(architecture: Architecture, request: pytest.FixtureRequest) -> None:
    """It trains with the gradients of its projected weights; its FFNs are found, its products are in the report."""
    library(architecture.library)
    outcome = Outcome(name=architecture.name)
    request.config.stash[OUTCOMES].append(outcome)
    examine(architecture, outcome)
    assert not outcome.faults, "\n".join(outcome.faults)


def test_of_what_it_is_made() -> None:
    """Sixty architectures at least, two of them in the default run, each name once."""
    names = [architecture.name for architecture in ARCHITECTURES]
    assert len(set(names)) == len(names) >= 60
    assert len(SAMPLE) == 2
    assert set(SAMPLE) <= set(names)
