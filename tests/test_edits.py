"""Edits that no version shows: a sample of each weight is compared with what it was."""

import pytest
import torch

from sparse_compile.weights.edit_detection import find_edited, take_samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 16), (48, 1000), (1000, 64)])
def test_the_edited_weights_are_found(shape, dtype):
    weights = [torch.randn(shape, dtype=dtype), torch.randn(64, 64), torch.randn(*reversed(shape), dtype=dtype).t()]
    samples = take_samples(weights)
    assert max(sample.numel() for sample in samples) <= 1024
    assert find_edited(weights, samples) == []
    for index, weight in enumerate(weights):
        before = weight.clone()
        weight.data.mul_(1.125)
        assert find_edited(weights, samples) == [index]
        weight.data.copy_(before)
    assert find_edited(weights, take_samples(weights)) == []


def test_samples_reach_every_part():
    """An edit of a quarter of the rows or columns is found wherever it is."""
    for shape in [(48, 1000), (1000, 48)]:
        weight = torch.randn(shape)
        for dimension in (0, 1):
            for quarter in range(4):
                samples = take_samples([weight])
                weight.chunk(4, dim=dimension)[quarter].neg_()
                assert find_edited([weight], samples) == [0]


def test_no_weights():
    assert take_samples([]) == find_edited([], []) == []
