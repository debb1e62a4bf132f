"""What the campaign says of what it tried: ``benchmarks/fuzzing.py``."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import fuzzing


def test_a_failure_is_in_the_summary_and_the_rest_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    failing: list[Any] = []

    def check(program: Any, scripts: list[Any], kind: Any, mvue: bool) -> Counter[str]:
        seen.append(len(scripts))
        if len(seen) == 5:
            failing.append((program, scripts))
        if (program, scripts) in failing:  # hypothesis tries it again
            raise AssertionError("a gradient is wrong")
        return Counter(compared=len(scripts) - 1, **{"too large": 1})

    monkeypatch.setattr(fuzzing, "check", check)
    monkeypatch.setattr(fuzzing, "SMALL_SCRIPTS", 5)  # which are drawn in less time than thirty
    batches = [fuzzing.batch("small, fp32", number, shrink=False) for number in (7, 8)]
    found = fuzzing.summary(batches, 1.0)
    graphs = 4 + fuzzing.GRAPHS
    assert seen[:4] == [fuzzing.SMALL_SCRIPTS] * 4
    assert (found["graphs"], found["examples"]) == (graphs, graphs * fuzzing.SMALL_SCRIPTS)
    assert found["compared to their end"] == found["examples"] - graphs
    assert found["failures"] == [{"seed": 7, "error": "AssertionError: a gradient is wrong"}]
    assert "| failures" in fuzzing.table(found)


def test_parts_have_as_many_graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wanted: dict[str, int] = {}

    def campaign(part: str, examples: int, *_: Any) -> Any:
        wanted[part] = examples
        yield fuzzing.Batch(part, 1, graphs=1, scripts=Counter(compared=1))

    monkeypatch.setattr(fuzzing, "campaign", campaign)
    parts = ["small, fp32", "fp32"]
    monkeypatch.setattr(sys, "argv", ["fuzzing.py", "3400", "--parts", *parts, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        fuzzing.main()
    assert ended.value.code == 0
    assert wanted == {"small, fp32": 3000, "fp32": 400}
    assert (tmp_path / "fuzz.json").exists()
