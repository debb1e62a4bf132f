"""Random models, and random scripts over them, against an oracle of their own.

``bash scripts/fuzz.sh`` tries more of them.
"""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fuzz.oracle import RECIPES
from fuzz.programs import DTYPES, Program, programs
from fuzz.scripts import Script, check, scripts
from fuzz.session import Kind

# Most in what tells one arithmetic from another.
BY_DAY = ("float32", "float32", "float32", *DTYPES)
SETTINGS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


@settings(SETTINGS, max_examples=5)
@given(
    program=programs(sorted(RECIPES), BY_DAY, most=2, small=True), mvue=st.booleans(),
    scripts=st.lists(scripts(most=2, small=True), min_size=20, max_size=20),
)  # fmt: skip
def test_small_ones(program: Program, scripts: list[Script], mvue: bool) -> None:
    """Twenty scripts over each of five graphs."""
    check(program, scripts, Kind(), mvue)


@pytest.mark.nightly
@settings(SETTINGS, max_examples=30, derandomize=False, print_blob=True)
@given(program=programs(sorted(RECIPES)), mvue=st.booleans(), scripts=st.lists(scripts(), min_size=3, max_size=3))
def test_large_ones(program: Program, scripts: list[Script], mvue: bool) -> None:
    """Others each time."""
    check(program, scripts, Kind(), mvue)
