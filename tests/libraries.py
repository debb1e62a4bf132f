"""Libraries that tests use where they are there."""

from typing import Any

import pytest
import torch


def library(name: str) -> Any:
    """A library; the test is skipped where it is not installed, or not built for the PyTorch that is."""
    try:
        return pytest.importorskip(name)
    except RuntimeError as error:  # torchvision, for another build of PyTorch
        return pytest.skip(f"{name} does not run with torch {torch.__version__}: {error}")
