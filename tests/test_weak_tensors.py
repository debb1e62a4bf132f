"""What is kept of tensors is found by their identity, and goes when they go."""

import torch

from sparse_compile.torch_internals.weak_tensors import OfTensors


def test_each_sequence_of_tensors_has_its_own() -> None:
    kept: OfTensors[str] = OfTensors()
    first, second = [torch.zeros(1), torch.zeros(1)], [torch.zeros(1)]
    kept.put(first, "first")
    kept.put(second, "second")
    kept.put([], "none")
    assert [kept.get(tensors) for tensors in (first, second, [])] == ["first", "second", "none"]
    assert kept.get(first[::-1]) is kept.get(first[:1]) is None
    kept.put(first, "anew")
    assert kept.get(first) == "anew"


def test_a_tensor_in_the_place_of_another_is_another() -> None:
    kept: OfTensors[str] = OfTensors()
    tensor = torch.zeros(1)
    kept.put([tensor], "kept")
    place = id(tensor)
    del tensor
    (found,) = kept._found
    assert found == (place,)
    others = [torch.zeros(1) for _ in range(100)]  # one of them is likely to lie there
    assert all(kept.get([other]) is None for other in others)


def test_of_what_is_gone_nothing_is_kept() -> None:
    kept: OfTensors[int] = OfTensors()
    living = [torch.zeros(1) for _ in range(40)]
    for index, tensor in enumerate(living):
        kept.put([tensor], index)
    for index in range(1000):
        kept.put([living[0], torch.zeros(1)], index)
    assert len(kept._found) <= 4 * len(living)
    assert [kept.get([tensor]) for tensor in living] == [*range(40)]
