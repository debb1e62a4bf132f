"""The benchmark programs without a GPU: their arithmetic, their checks and their tables; times are made up."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import all_kernels
import bench_gemm
import bench_inference
import bench_kernels
import gemm_libraries
import harness
import shared_gpu

from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3

CPU = torch.device("cpu")
FPROP, WGRAD = gemm_libraries.fprop(256, 96, tokens=128), gemm_libraries.wgrad(256, 96, tokens=128)


class EagerGraph:
    """Instead of a CUDA graph: its calls have run already."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.outputs = [call() for call in calls]

    def replay(self) -> None:
        pass


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(calls: Sequence[Callable[[], Any]], count: int) -> tuple[EagerGraph, list[Any]]:
        assert count % len(calls) == 0, "as many calls of each set"
        graph = EagerGraph(calls)
        return graph, graph.outputs

    def interleave(candidates: Mapping[Any, Any], rounds: int, calls: int) -> dict[Any, harness.Timing]:
        """Later candidates are slower."""
        times = {name: 1.0 + index for index, name in enumerate(candidates)}
        return {name: harness.Timing(median=t, low=t, high=t, rounds=rounds) for name, t in times.items()}

    monkeypatch.setattr(harness, "capture", capture)
    monkeypatch.setattr(harness, "interleave", interleave)
    # The small problems here would need thousands.
    monkeypatch.setattr(gemm_libraries, "set_count", lambda size: 2)
    monkeypatch.setattr(bench_kernels, "set_count", lambda size: 2)
    monkeypatch.setattr(harness, "provenance", lambda: {"device": "none"})


@pytest.mark.parametrize(("n", "k"), bench_gemm.SHAPES)
def test_problems_are_those_of_a_linear(n: int, k: int) -> None:
    for problem in (gemm_libraries.fprop(n, k), gemm_libraries.wgrad(n, k)):
        assert problem.flop == 2 * 16384 * n * k
        assert problem.rows == n
        assert problem.calls % problem.sets == 0
        assert 2e12 < problem.calls * problem.flop < 8e12


@pytest.mark.parametrize("shift", [0.0, 0.2], ids=["right", "wrong"])
def test_a_wrong_element_is_noticed(shift: float) -> None:
    expected = torch.randn(64, 64)
    actual = expected.clone()
    actual[3, 5] = expected[3, 5] * 1.05 + shift * expected[3, 5].sign()
    if shift:
        with pytest.raises(harness.WrongResultError, match="1 of 4096 elements are wrong"):
            harness.require_close(actual, expected)
    else:
        harness.require_close(actual, expected)
    actual[0, 0] = float("nan")
    with pytest.raises(harness.WrongResultError):
        harness.require_close(actual, expected)


@pytest.mark.usefixtures("on_cpu")
def test_what_fails_is_a_message_and_the_others_are_timed() -> None:
    def broken() -> list[Callable[[], Tensor]]:
        raise RuntimeError("no such algorithm")

    def check(outputs: Sequence[int]) -> None:
        if outputs != [1, 2]:
            raise harness.WrongResultError(f"{outputs}")

    def returning(*values: int) -> Callable[[], list[Callable[[], int]]]:
        return lambda: [partial(int, value) for value in values]

    results = harness.measure(
        {
            "broken": harness.Candidate(prepare=broken, check=check),
            "wrong": harness.Candidate(prepare=returning(1, 3), check=check),
            "right": harness.Candidate(prepare=returning(1, 2), check=check),
        },
        calls=4,
        rounds=5,
    )
    assert results["broken"] == "RuntimeError: no such algorithm"
    assert results["wrong"] == "WrongResultError: [1, 3]"
    assert isinstance(results["right"], harness.Timing)


@pytest.mark.parametrize("problem", [FPROP, WGRAD], ids=lambda problem: problem.name)
@pytest.mark.usefixtures("on_cpu")
def test_comparison_of_a_problem(problem: gemm_libraries.Problem) -> None:
    layout = problem.name == "fprop"
    gemms = [gemm_libraries.ours(E4M3, (layout,)), *gemm_libraries.FP8_LIBRARIES, gemm_libraries.CUBLAS]
    rows = bench_gemm.compare(problem, gemms, CPU)
    found = {row["name"]: row for row in rows}
    assert found[gemm_libraries.OURS]["errors"] == []
    assert found["cuBLAS bf16"]["errors"] == []
    assert found["cuBLAS bf16"]["layout"] == "[R, D]", "the faster of both"
    assert found["cuSPARSELt fp8"]["tflops"] is None
    assert len(found["cuSPARSELt fp8"]["errors"]) == 2
    assert bench_gemm.failures(rows) == []

    ratio = bench_gemm.against_libraries(rows, gemm_libraries.OURS, ["cuSPARSELt fp8", "cuBLAS bf16"])
    assert ratio["best_library"] == "cuBLAS bf16"
    assert ratio["ratio"] == found[gemm_libraries.OURS]["tflops"] / found["cuBLAS bf16"]["tflops"] > 1
    table = bench_gemm.shapes_table(rows, [ratio])
    assert "cuSPARSELt fp8: [R, D] " in table
    assert f"{ratio['ratio']:.3f}" in table


@pytest.mark.usefixtures("on_cpu")
def test_table_of_both_products() -> None:
    own = {"fprop": [gemm_libraries.ours(E4M3, (True,))]}
    own["wgrad"] = [gemm_libraries.ours(E4M3, (False,), use_fast_accum=fast) for fast in (False, True)]
    rows, ratios = [], []
    for problem in (FPROP, WGRAD):
        compared = bench_gemm.compare(problem, [*own[problem.name], gemm_libraries.CUBLAS], CPU)
        ratios += [bench_gemm.against_libraries(compared, gemm.name, ["cuBLAS bf16"]) for gemm in own[problem.name]]
        rows += compared
    lines = bench_gemm.shapes_table(rows, ratios).splitlines()
    assert [line.split("|")[1].strip() for line in lines if "cuBLAS bf16" in line][1:4] == ["fprop", "wgrad", "wgrad"]


@pytest.mark.usefixtures("on_cpu")
def test_products_of_ours_in_bf16_are_right() -> None:
    rows = bench_gemm.compare(FPROP, [gemm_libraries.ours(torch.bfloat16, (False, True))], CPU)
    assert bench_gemm.failures(rows) == []


@pytest.mark.usefixtures("on_cpu")
def test_choice_against_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(problem: Any, candidates: Any, device: torch.device) -> dict[Any, float]:
        return {config: 8.0 if config.block_d == 192 else 10.0 for config in candidates}

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(bench_gemm.tuning, "measure", measure)
    results, table = bench_gemm.choice_part()
    assert len(results["rows"]) == 20
    assert {row["fastest"] for row in results["rows"]} == {"128 x 192"}
    slow = [row for row in results["rows"] if "192" not in row["chosen"]]
    assert slow
    assert all(row["loss"] == 0.25 for row in slow)
    assert f"{20 - len(slow)} of 20 within" in table


@pytest.mark.usefixtures("on_cpu")
def test_a_wrong_product_of_ours_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: gemm_libraries.Inputs) -> Tensor:
        out = x.b.float() @ x.sparse.float().t() * x.scale_inv
        return (out * x.column_scale_inv[:, None] if x.column_scale_inv is not None else out).roll(1, 0)

    gemm = gemm_libraries.Gemm(
        name=gemm_libraries.OURS, dtype=E4M3, prepare=lambda sets, transpose: [partial(wrong, x) for x in sets],
        sparse=True, scaled=True, layouts=(True,),
    )  # fmt: skip
    rows = bench_gemm.compare(FPROP, [gemm, gemm_libraries.CUBLAS], CPU)
    (failure,) = bench_gemm.failures(rows)
    assert "WrongResultError" in failure
    ratio = bench_gemm.against_libraries(rows, gemm_libraries.OURS, ["cuBLAS bf16"])
    assert ratio["ratio"] is None
    assert "WrongResultError" in bench_gemm.shapes_table(rows, [ratio])


def test_operands_in_bf16_have_the_mask_of_those_in_fp8() -> None:
    inputs = gemm_libraries.make_inputs(FPROP, torch.bfloat16, CPU)
    assert inputs.values.shape == (256, 64), "padded to 128 columns"
    kept = inputs.sparse != 0
    assert kept.view(256, 24, 4).sum(-1).unique().tolist() == [2]
    assert torch.equal(inputs.sparse[kept].view(256, 48), inputs.values[:, :48])


def test_summary() -> None:
    def ratio(role: str, name: str, best: str, value: float | None) -> dict[str, Any]:
        return {"name": name, "problem": {"name": role}, "best_library": best, "ratio": value}

    fast, accurate = gemm_libraries.OURS, gemm_libraries.OURS_ACCURATE
    ratios = [
        ratio("fprop", fast, "a", 2.0), ratio("fprop", fast, "b", 0.5),
        ratio("wgrad", accurate, "a", 4.0), ratio("wgrad", fast, "a", 8.0), ratio("wgrad", accurate, "a", None),
    ]  # fmt: skip
    fprop, wgrad, wgrad_fast, both, both_fast = bench_gemm.summary(ratios)
    assert (fprop["geometric_mean"], fprop["minimum"], fprop["best_libraries"]) == (1.0, 0.5, {"a": 1, "b": 1})
    assert (wgrad["shapes"], wgrad["minimum"]) == (1, 4.0)
    assert (wgrad_fast["shapes"], wgrad_fast["minimum"]) == (1, 8.0)
    assert both["geometric_mean"] == pytest.approx(4.0 ** (1 / 3))
    assert both_fast["geometric_mean"] == pytest.approx(2.0)


@pytest.mark.parametrize("tokens", bench_inference.TOKENS)
@pytest.mark.parametrize(("n", "k"), bench_inference.SHAPES.values())
def test_graphs_of_few_tokens_are_bounded_by_what_they_move(n: int, k: int, tokens: int) -> None:
    problem = gemm_libraries.fprop(n, k, tokens=tokens)
    assert problem.calls % problem.sets == 0
    moved = problem.calls * (problem.input_bytes + 2 * n * tokens)
    assert moved < 1.5e10
    assert problem.calls * problem.flop < 8e12
    assert moved > 0.5e10 or problem.calls * problem.flop > 2e12


@pytest.mark.usefixtures("on_cpu")
def test_inference_of_a_shape() -> None:
    results, table = bench_inference.measure_shapes([(256, 96)], [1, 24], CPU)
    assert results["failed"] == []
    assert [row["errors"] for row in results["rows"]] == [[]] * 8
    assert {row["layout"] for row in results["rows"]} == {"[D, R]"}
    # Made-up times: dense bf16 1 ms, dense fp8 2 ms, 2:4 bf16 3 ms, 2:4 fp8 4 ms.
    assert all(not pair["faster"] for pair in results["crossovers"])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["256", "96", "1", "1000.0", "2000.0", "3000.0", "4000.0", "0.50", "0.33", "0.25"] in cells
    assert ["256", "96", "24", "1000.0", "2000.0", "3000.0", "4000.0", "0.50", "0.33", "0.25"] in cells
    assert [row[-1] for row in cells if row].count("none") == 3


def test_crossover_of_made_up_times() -> None:
    def rows(tokens: int, *milliseconds: float | None) -> list[dict[str, Any]]:
        problem = {"name": "fprop", "rows": 8, "columns": tokens, "contraction": 4}
        return [
            {
                "name": gemm.name, "problem": problem, "layout": "[D, R]", "errors": [] if time else ["[D, R] failed"],
                "ms": {"[D, R]": {"median": time, "low": time, "high": time}} if time else {},
            }
            for gemm, time in zip(bench_inference.GEMMS, milliseconds, strict=True)
        ]  # fmt: skip

    # dense bf16, dense fp8, 2:4 bf16, 2:4 fp8
    measured = [
        *rows(1, 4.0, 2.0, 5.0, 1.0), *rows(16, 4.0, 2.0, 4.0, 1.9), *rows(64, 4.0, 2.0, 3.0, 2.1),
        *rows(256, 4.0, 2.0, 3.0, 1.0), *rows(1024, 4.0, None, 3.0, 1.0),
    ]  # fmt: skip
    crossovers = bench_inference.crossover(measured)
    assert [(pair["sparse"], pair["dense"], pair["faster"]) for pair in crossovers] == [
        ("2:4 fp8", "dense fp8", [[1, 16], [256, 256]]),
        ("2:4 bf16", "dense bf16", [[64, 1024]]),
        ("2:4 fp8", "dense bf16", [[1, 1024]]),
    ]
    table = bench_inference.table(measured, crossovers)
    ends = [line.split("|")[-2].strip() for line in table.splitlines() if "|" in line]
    assert {"1 to 16, 256", "64 to 1024", "all, 1 to 1024"} <= set(ends)
    assert "Did not run:\n\n- fprop 8 x 1024 x 4, dense fp8: [D, R] failed" in table


@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_accuracy_of_the_reference_is_that_of_a_sum_in_fp32(mean: float) -> None:
    sparse, dense, fast = bench_gemm.accuracy_rows(512, mean, CPU)
    for row in (sparse, dense, fast):
        assert row["same_payloads"] < 1e-6
        assert row["ratio"] == pytest.approx(1, abs=1e-3)
    assert dense["error"] < sparse["error"], "sampling adds noise"
    assert "2:4" in bench_gemm.accuracy_table([sparse, dense])


@pytest.mark.parametrize(
    ("name", "bytes_an_element"),
    [
        ("prune_weight_", 2 + 0.5 + 0.125 + 1),
        ("prune_weight_, hard", 2 + 0.5 + 0.125 + 1),
        ("prune_weight_bf16_", 2 + 1 + 0.125 + 2),
        ("prune_soft_transposable_", 2 + 2 * (0.5 + 0.125)),
        ("prune_transposable_, search", 2 + 2 * (0.5 + 0.125) + 0.125),
        ("prune_transposable_, kept masks", 2 + 2 * (0.5 + 0.125) + 0.125),
        ("cast_weight_", 2 + 1 + 1),
        ("add_masked_decay_", 2 + 2 + 2),
        ("cast_mvue, exact", 2 + 1 + 0.5 + 0.125),
        ("cast_mvue, approximate", 2 + 1 + 0.5 + 0.125),
        ("cast_mvue, exact, stochastic", 2 + 1 + 0.5 + 0.125),
        ("cast_mvue, exact, e5m2", 2 + 1 + 0.5 + 0.125),
        ("cast_transpose", 2 + 1 + 1),
        ("transpose_tokens", 1 + 1),
    ],
)
@pytest.mark.usefixtures("on_cpu")
def test_bytes_of_an_op_and_its_check(name: str, bytes_an_element: float) -> None:
    op = (bench_kernels.WEIGHT_OPS | bench_kernels.MASK_OPS | bench_kernels.ACTIVATION_OPS)[name]
    row = bench_kernels.compare(name, op, (256, 128), CPU)
    assert row["errors"] == []
    # Scales and the seed are the rest.
    assert 0 <= row["bytes"] - bytes_an_element * 256 * 128 <= 2 * 256 * 4 + 8
    assert row["share_of_copy"] == 2.0
    assert "200%" in bench_kernels.memory_table([row])


@pytest.mark.usefixtures("on_cpu")
def test_wrong_bits_of_an_op_are_an_error() -> None:
    calls = iter(range(100))

    def unsteady(x: Tensor) -> tuple[Tensor]:
        return (x + next(calls),)

    op = bench_kernels.Op(make=lambda *shape: (torch.zeros(shape[:2], device=shape[2]),), run=unsteady)
    row = bench_kernels.compare("unsteady", op, (16, 16), CPU)
    assert row["share_of_copy"] is None
    assert "256 of 256 differ" in row["errors"][0]
    assert "256 of 256 differ" in bench_kernels.memory_table([row])


def test_host_calls_run_and_their_table() -> None:
    for call in bench_kernels.host_calls(CPU).values():
        call()
    rows = [{"op": "one", "host_ms": {"median": 0.02, "low": 0.01, "high": 0.03}}]
    assert "largest 20.0 us" in bench_kernels.host_table(rows)


def test_all_kernels_are_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the GEMM of one weight, which is run in each configuration, and for products that are PyTorch's."""
    monkeypatch.setattr(all_kernels, "DEVICE", CPU)
    seen = set()

    def observer(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        seen.add(name)
        return call(*arguments)

    with ops.observed(observer):
        all_kernels.memory_kernels()
        all_kernels.kernels_of_experts()
    of_pytorch = {"scaled_mm", "grouped_mm", "grouped_wgrad_mm", "grouped_scaled_mm", "grouped_wgrad_scaled_mm"}
    assert seen == ops.defined.keys() - of_pytorch - {"sparse_mm", "materialize"}


@pytest.mark.gpu
def test_products_beside_a_kernel_that_holds_multiprocessors_are_right(monkeypatch) -> None:
    monkeypatch.setattr(shared_gpu, "SHAPES", ((512, 256),))
    results, table = shared_gpu.shared_part(torch.device("cuda"))
    assert [row["held"] for row in results["rows"]] == list(shared_gpu.HELD)
    assert all(timing["median"] > 0 for row in results["rows"] for timing in row["ms"].values())
    assert len(table.splitlines()) == 2 + len(shared_gpu.HELD)
