"""JSON as dataclasses: what is built, and what a wrong value is called."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

import pytest

from sparse_compile.from_json import build, from_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    name: str
    tokens: int | None = None
    share: float = 0.5

    def __post_init__(self):
        if self.share > 1:
            raise ValueError(f"a share of {self.share}")


@dataclass(slots=True)
class Graph:
    rows: tuple[Row, ...]
    first: Row | None = None
    pair: tuple[int, str] = (1, "one")
    times: list[float] = field(default_factory=list)
    samples: dict[str, list[Row]] = field(default_factory=dict)
    known: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    mixed: Optional[int | str] = None  # noqa: UP045
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Inherited(Graph):
    """Annotations of its parent count."""

    id: str = ""


GRAPH = Graph(
    rows=(Row(name="a"), Row(name="b", tokens=3)),
    first=Row(name="c", share=1),
    pair=(2, "two"),
    times=[1.0, 2],
    samples={"x.0": [Row(name="d")], "y": []},
    known={"z": [True, False]},
    mixed="m",
    options={"anything": [1, None, {"a": 2.0}]},
)


@pytest.mark.parametrize("graph", [GRAPH, Graph(rows=()), Inherited(rows=(), id="x", mixed=1)])
def test_what_is_written_is_read(graph):
    assert from_json(type(graph), json.dumps(asdict(graph))) == graph


def test_what_has_a_default_may_be_missing():
    assert build(Graph, {"rows": [{"name": "a"}]}) == Graph(rows=(Row(name="a"),))
    assert from_json(dict[str, float], b'{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rows": [{"name": "a"}, {"name": "b", "tokens": "x"}]}, "rows[1].tokens: expected int or null, got 'x'"),
        ({"rows": [{"tokens": 1}]}, "rows[0]: 'name' is missing"),
        ({"rows": [{"name": "a", "title": 1}]}, "rows[0]: Row has no field 'title'"),
        ({"rows": {}}, "rows: expected list, got {}"),
        ({"rows": None}, "rows: expected list, got None"),
        ({"rows": [[]]}, "rows[0]: expected object, got []"),
        ({"first": {"name": 1}}, "first.name: expected string, got 1"),
        ({"first": {"name": "a", "share": 1.5}}, "first: a share of 1.5"),
        ({"first": 3}, "first: expected object or null, got 3"),
        ({"pair": [1]}, "pair: expected 2 items, got 1"),
        ({"pair": [1, 2]}, "pair[1]: expected string, got 2"),
        ({"times": [1, "x"]}, "times[1]: expected float, got 'x'"),
        ({"times": [True]}, "times[0]: expected float, got True"),
        ({"samples": {"x.0": [{"name": 1.0}]}}, "samples['x.0'][0].name: expected string, got 1.0"),
        ({"rows": [{"name": "a", "tokens": 1.0}]}, "rows[0].tokens: expected int or null, got 1.0"),
        ({"samples": []}, "samples: expected object, got []"),
        ({"known": {"z": [0]}}, "known['z'][0]: expected bool, got 0"),
        ({"mixed": []}, "mixed: expected int or string or null, got []"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_by_its_path(more, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole message is compared
        build(Graph, {"rows": []} | more)
    assert str(raised.value) == message


def test_at_the_top():
    with pytest.raises(ValueError, match=r"^'rows' is missing$"):
        build(Graph, {})
    with pytest.raises(ValueError, match=r"^expected object, got 3$"):
        build(Graph, 3)
    with pytest.raises(ValueError, match="Expecting value"):
        from_json(Graph, "")
    with pytest.raises(ValueError, match=r"^expected object, got \['x+\.\.\.x+'\]$"):
        build(Graph, ["x" * 1000])


def test_other_annotations_are_refused():
    with pytest.raises(TypeError, match=r"set.* is not read from JSON"):
        build(set[int], [1])
