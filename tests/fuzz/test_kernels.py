"""Kernels alone, with random shapes, strides, offsets and values; what watches them is watched on a CPU."""

import pytest
import torch

from fuzz.kernels import HUGE_CHECKS, KERNELS, Call, check, define

CALLS = 30


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.gpu
def test_kernels(kernel: str) -> None:
    for seed in range(CALLS):
        check(kernel, seed, "cuda")


@pytest.mark.parametrize("kernel", HUGE_CHECKS)
@pytest.mark.gpu
@pytest.mark.nightly
def test_more_than_2_to_the_31_elements(kernel: str) -> None:
    HUGE_CHECKS[kernel]()


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_right_is_found_right(kernel: str) -> None:
    """The definitions, in place of the kernels."""
    for seed in range(6):
        check(kernel, seed, "cpu", define, largest=144)


def beyond(call: Call) -> None:
    """The byte behind an output."""
    define(call)
    output = call.outputs[0]
    behind = output.untyped_storage().nbytes() - output.storage_offset() * output.element_size() - output.nbytes
    assert behind > 0
    storage = torch.empty(0, dtype=torch.uint8).set_(output.untyped_storage())
    storage[output.storage_offset() * output.element_size() + output.nbytes] = 3


def unwritten(call: Call) -> None:
    """The last element of each output."""
    for output, expected in zip(call.outputs, call.expected, strict=True):
        if output is None:
            continue
        if output.numel() > 1:
            output.view(-1)[:-1] = expected.contiguous().view(-1)[:-1]
        else:
            output.copy_(expected)


def into_an_input(call: Call) -> None:
    define(call)
    call.arguments[0].view(torch.uint8 if call.arguments[0].is_contiguous() else call.arguments[0].dtype)[0, 0] = 77


@pytest.mark.parametrize("fault", [beyond, unwritten, into_an_input], ids=lambda fault: fault.__name__)
def test_what_is_wrong_is_found(fault: object) -> None:
    for seed in range(12):
        with pytest.raises(AssertionError, match=f"prune_weight, seed {seed}:"):
            check("prune_weight", seed, "cpu", fault, largest=80)  # type: ignore[arg-type]
