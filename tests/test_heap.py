"""Finding what is alive, also where the collector does not list it and where a script holds odd objects."""

import gc
import weakref
from collections.abc import Iterator

import pytest
from torch import nn

from sparse_compile.torch_internals.heap import instances_of


class Marked(nn.Linear):
    """Found among all modules that other tests have left."""


def marked() -> list[nn.Module]:
    return [module for module in instances_of(nn.Module) if type(module) is Marked]


class LazyProxy:
    """Pretends to be a module, which it would have to make first."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        raise AssertionError("asked for its class")


@pytest.fixture
def frozen() -> Iterator[None]:
    """All objects that there are by now; what is made later thaws with them."""
    gc.unfreeze()
    yield
    gc.freeze()


@pytest.mark.parametrize("freeze", [pytest.param(False, marks=pytest.mark.nightly), True])
def test_dead_and_lazy_proxies_are_passed_over(frozen: None, freeze: bool) -> None:
    model, referent = Marked(4, 4), Marked(4, 4)
    held = {"model": model, "dead": weakref.proxy(referent), "lazy": LazyProxy()}
    del referent
    gc.collect()
    if freeze:
        gc.freeze()
    found = marked()
    if freeze:
        gc.unfreeze()
    assert [id(module) for module in found] == [id(model)]
    assert held["model"] is model


@pytest.mark.nightly
def test_a_later_freeze_is_noticed_though_fewer_objects_are_frozen(frozen: None) -> None:
    many: list[list[None]] = [[] for _ in range(100_000)]
    gc.freeze()
    assert marked() == []
    before = gc.get_freeze_count()
    many.clear()
    model = Marked(4, 4)
    gc.freeze()
    assert gc.get_freeze_count() < before
    found = marked()
    gc.unfreeze()
    assert [id(module) for module in found] == [id(model)]
