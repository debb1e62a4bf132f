"""The check of each variant of the sparse GEMM: it passes a right product and no wrong one."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_compile.errors import SparseCompileError
from sparse_compile.kernels.formats import E4M3, E5M2
from sparse_compile.kernels.reference import decompress24, sparse_mm
from sparse_compile.kernels.sparse_gemm import plan as plan_module
from sparse_compile.kernels.sparse_gemm import selfcheck
from sparse_compile.kernels.sparse_gemm.configs import BLOCK_R, CARRY_STAGES, STAGE_BYTES, Config, configs
from sparse_compile.kernels.sparse_gemm.problem import Problem
from sparse_compile.kernels.sparse_gemm.selfcheck import check_variant
from sparse_compile.testing import SPARSE_INSTRUCTION, tensor_core_product

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CONFIG = Config(block_d=128, cluster=2)
PROBLEM = Problem(
    rows=4096, columns=1001, contraction=2**20, dtype=E4M3, dense_dtype=E4M3, out_dtype=torch.bfloat16, scaled=True,
    transpose=True, use_fast_accum=False,
)  # fmt: skip
VARIANTS = [
    (config, replace(PROBLEM, dtype=dtype, dense_dtype=dense_dtype, use_fast_accum=fast))
    for dtype, dense_dtype, fast in (
        (E4M3, E4M3, False),
        (E4M3, E4M3, True),
        (E5M2, E4M3, False),
        (E4M3, E5M2, True),
        (torch.bfloat16, torch.bfloat16, False),
    )
    for config in configs()
]


def name(x: Config | Problem) -> str:
    return f"128x{x.block_d}x{x.cluster}" if isinstance(x, Config) else str(x)


# Changes the operands before the product, or the result after it, on launch 0 and 1.
Mistake = Callable[[dict[str, Any], int], None]


class Kernel:
    """A kernel that makes a mistake; counts its plans and launches."""

    def __init__(
        self,
        mistake: Mistake | None = None,
        launches: tuple[int, ...] = (0, 1),
        after: bool = False,
        multiply: Callable[..., Tensor] = sparse_mm,
    ) -> None:
        self.multiply = multiply
        self.mistake, self.wrong_launches, self.after = mistake, launches, after
        self.plans: list[dict[str, Any]] = []
        self.launches = 0

    def plan(self, config: Config, accurate: bool, *arguments: Any) -> Callable[..., None]:
        names = ("values", "metadata", "dense", "scale_inv", "dense_scale_inv", "out", "transpose", "waves")
        given = dict(zip(names, arguments, strict=True))
        self.plans.append({"config": config, "accurate": accurate, **given})

        def multiply(*addresses: int | None) -> None:
            assert addresses == tuple(None if t is None else t.data_ptr() for t in arguments[:-2])
            number = self.launches % 2
            self.launches += 1
            wrong = self.mistake is not None and number in self.wrong_launches
            used = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
            used["out"] = given["out"]
            if wrong and not self.after:
                self.mistake(used, number)
            operands = [used[name] for name in names[:5]]
            product = self.multiply(*operands, used["out"].dtype, used["transpose"], not accurate)
            used["out"].copy_(product)
            if wrong and self.after:
                self.mistake(used, number)

        return multiply


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Kernel], Kernel]]:
    monkeypatch.setattr(selfcheck, "passed", set())
    properties = SimpleNamespace(multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def install(kernel: Kernel) -> Kernel:
        monkeypatch.setattr(plan_module, "plan_gemm", kernel.plan)
        return kernel

    return install


def zeros(values: Tensor, _: Tensor, dense: Tensor, *others: Any) -> Tensor:
    """Where the product itself does not matter."""
    shape = (dense.shape[0], values.shape[0])
    return torch.zeros(shape if others[3] else shape[::-1], dtype=others[2])


def test_a_right_product_passes_once_per_variant(use, monkeypatch) -> None:
    kernel = use(Kernel())
    check_variant(CONFIG, PROBLEM, CPU)
    assert (len(kernel.plans), kernel.launches) == (4, 4)
    assert [plan["waves"] for plan in kernel.plans] == [1, 2] * 2
    check_variant(CONFIG, PROBLEM, CPU)
    # Aligned alike: the same code.
    check_variant(CONFIG, replace(PROBLEM, rows=8, columns=7, contraction=16), CPU)
    assert kernel.launches == 4
    others = (
        {"out_dtype": torch.float16}, {"scaled": False}, {"transpose": False}, {"columns": 1004}, {"rows": 2},
        {"dtype": torch.bfloat16, "dense_dtype": torch.bfloat16}, {"use_fast_accum": True}, {"dtype": E5M2},
        {"dense_dtype": E5M2},
    )  # fmt: skip
    monkeypatch.setattr(selfcheck, "sparse_mm", zeros)
    kernel.multiply = zeros
    for number, other in enumerate(others, 2):
        check_variant(CONFIG, replace(PROBLEM, **other), CPU)
        assert kernel.launches == 4 * number
    assert [plan["accurate"] for plan in kernel.plans[::4]] == [True] * 6 + [False] * 2 + [True] * 2
    check_variant(Config(block_d=128, cluster=1), PROBLEM, CPU)
    assert kernel.launches == 4 * 11


def test_a_wrong_variant_is_never_taken_for_checked(use) -> None:
    use(Kernel(lambda x, _: x["out"].zero_(), after=True))
    for _ in range(2):
        with pytest.raises(SparseCompileError):
            check_variant(CONFIG, PROBLEM, CPU)


@pytest.mark.by_day(6)
@pytest.mark.parametrize(
    ("config", "problem"),
    [
        # Sizes are the same for both formats of FP8.
        pytest.param(config, problem, marks=pytest.mark.nightly if E5M2 in (problem.dtype, problem.dense_dtype) else ())
        for config, problem in VARIANTS
    ],
    ids=name,
)
def test_the_product_has_tails_and_fills_what_it_should(use, monkeypatch, config, problem) -> None:
    monkeypatch.setattr(selfcheck, "sparse_mm", zeros)
    kernel = use(Kernel(multiply=zeros))
    for rows, columns in ((4096, 1001), (3, 8), (6, 12)):
        kernel.plans.clear()
        check_variant(config, replace(problem, rows=rows, columns=columns), CPU)
        counts = set()
        for plan in kernel.plans:
            (d, c), r = plan["dense"].shape, plan["values"].shape[0]
            # Alignments that choose the compiled kernel are the caller's.
            assert [r % m == 0 for m in (2, 4, 8)] == [rows % m == 0 for m in (2, 4, 8)]
            assert [d % m == 0 for m in (2, 4, 8)] == [columns % m == 0 for m in (2, 4, 8)]
            assert r % (BLOCK_R * config.cluster) != 0
            assert d % config.block_d != 0
            row_bytes = c * problem.dtype.itemsize
            assert row_bytes % 16 == 0
            assert row_bytes % STAGE_BYTES != 0
            num_k = -(-row_bytes // STAGE_BYTES)
            assert num_k > config.stages
            assert num_k > CARRY_STAGES or not plan["accurate"]
            counts.add(num_k % 2)
            rows_of_clusters = -(-r // (BLOCK_R * config.cluster))
            assert rows_of_clusters > config.group
            assert config.tiles(r, d) >= 3 * (4 // config.cluster)
        assert counts == {0, 1}


@pytest.mark.by_day(1)
@pytest.mark.parametrize("fast", [False, True], ids=["accurate", "fast"])
def test_sums_are_exact_also_with_14_bits(use, fast) -> None:
    """As FP8 tensor cores add them up."""
    kernel = use(Kernel())
    check_variant(CONFIG, replace(PROBLEM, use_fast_accum=fast), CPU)
    for x in kernel.plans:
        a = decompress24(x["values"][:64], x["metadata"][:, :4]).float()
        b = torch.nn.functional.pad(x["dense"][:32].float(), (0, a.shape[1] - x["dense"].shape[1]))
        assert torch.equal(tensor_core_product(a, b, SPARSE_INSTRUCTION), a @ b.t())
        # Scaled, in fp32, in any order.
        scale, scale_inv = x["dense_scale_inv"][:32], x["scale_inv"]
        exact = (a.double() @ b.double().t()) * scale.double() * scale_inv.double()
        assert torch.equal(((a @ b.t()) * (scale * scale_inv)).double(), exact)
        assert torch.equal((((a @ b.t()) * scale_inv) * scale).double(), exact)


def another_row_of_a(x: dict[str, Any], _: int) -> None:
    x["values"][5] = x["values"][6]


def a_row_of_metadata(x: dict[str, Any], _: int) -> None:
    x["metadata"][2, 3] = x["metadata"][2, 4]


def another_row_of_b(x: dict[str, Any], _: int) -> None:
    x["dense"][7] = x["dense"][8]


def a_scale_of_b(x: dict[str, Any], _: int) -> None:
    x["dense_scale_inv"][7] = x["dense_scale_inv"][8]


def the_scale(x: dict[str, Any], _: int) -> None:
    x["scale_inv"] *= 1.01


def the_last_element(x: dict[str, Any], _: int) -> None:
    """Of the contraction, for one row."""
    x["dense"].view(torch.uint8)[-1, -1] ^= 2


def a_stage(x: dict[str, Any], _: int) -> None:
    x["dense"].view(torch.uint8)[:, 128:256] = 0


def beyond_the_contraction(x: dict[str, Any], _: int) -> None:
    """What lies beyond B counts as something else than zero: A's padding times B's next row."""
    c = x["dense"].shape[1]
    a = decompress24(x["values"], x["metadata"])[:, c:].float()
    extra = x["dense"][1:, : a.shape[1]].float() @ a.t()
    x["out"][:-1] += (extra * 0.75 * x["dense_scale_inv"][:-1, None]).to(x["out"].dtype)


def a_missing_tile(x: dict[str, Any], _: int) -> None:
    x["out"][-33:, -65:] = float("nan")


def one_element(x: dict[str, Any], launch: int) -> None:
    x["out"][launch, 3] += 1


def elements_before(x: dict[str, Any], _: int) -> None:
    storage = x["out"].new_empty(0).set_(x["out"].untyped_storage())
    storage[1000] = 0


def elements_behind(x: dict[str, Any], _: int) -> None:
    storage = x["out"].new_empty(0).set_(x["out"].untyped_storage())
    storage[-1] = 0


@pytest.mark.parametrize(
    "mistake",
    [another_row_of_a, a_row_of_metadata, another_row_of_b, a_scale_of_b, the_scale, the_last_element, a_stage],
    ids=lambda mistake: mistake.__name__,
)
def test_wrong_operands_are_caught(use, mistake) -> None:
    use(Kernel(mistake))
    with pytest.raises(
        SparseCompileError, match=r"on the first launch, \d+ of \d+ elements are wrong, the first at \[\d+, \d+\]"
    ):
        check_variant(CONFIG, PROBLEM, CPU)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (beyond_the_contraction, "elements are wrong"),
        (a_missing_tile, r"2145 of \d+ elements are wrong, the first at \[\d+, \d+\]: nan instead of"),
        (one_element, r"1 of \d+ elements are wrong, the first at \[0, 3\]"),
        (elements_before, "1 elements next to the result were written"),
        (elements_behind, "1 elements next to the result were written"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_wrong_results_are_caught(use, mistake, message) -> None:
    use(Kernel(mistake, after=True))
    with pytest.raises(SparseCompileError, match=message):
        check_variant(CONFIG, PROBLEM, CPU)


def test_a_second_launch_that_differs_is_caught(use) -> None:
    use(Kernel(one_element, launches=(1,), after=True))
    with pytest.raises(
        SparseCompileError, match=r"on the second launch, 1 of \d+ elements are wrong, the first at \[1, 3\]"
    ):
        check_variant(CONFIG, PROBLEM, CPU)


def test_the_error_says_what_and_what_to_do(use) -> None:
    use(Kernel(one_element, after=True))
    with pytest.raises(SparseCompileError) as caught:
        check_variant(CONFIG, PROBLEM, CPU)
    for part in (
        "float8_e4m3fn to bfloat16 scaled transposed accurate",
        str(CONFIG),
        '"sste.recipe": "fp8"',
        "report it",
    ):
        assert part in str(caught.value)


def test_an_unchecked_variant_is_refused_under_capture(use, monkeypatch) -> None:
    kernel = use(Kernel())
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.raises(RuntimeError, match="run one step with the same shapes before the capture"):
            check_variant(CONFIG, PROBLEM, CPU)
    assert kernel.launches == 0
    check_variant(CONFIG, PROBLEM, CPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check_variant(CONFIG, PROBLEM, CPU)
    assert kernel.launches == 4


def test_the_callers_modes_and_randomness_are_left_alone(use) -> None:
    seen = []

    class Watching(Kernel):
        def plan(self, config: Config, accurate: bool, *arguments: Any) -> Callable[..., None]:
            modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))
            seen.append((*modes, arguments[5].is_inference()))
            return super().plan(config, accurate, *arguments)

    use(Watching())
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        check_variant(CONFIG, PROBLEM, CPU)
        assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        check_variant(CONFIG, replace(PROBLEM, scaled=False), CPU)
        assert torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert set(seen) == {(False, False, False, False)}
    assert torch.equal(torch.get_rng_state(), state)


def test_random_metadata_is_legal_and_holds_every_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    elements = torch.ones(selfcheck.ELEMENTS).to(E4M3)
    problem = replace(PROBLEM, rows=100, columns=40, contraction=400)
    values, metadata, dense = selfcheck.random_operands(problem, elements, generator)
    nibbles = metadata.long()[..., None] >> torch.arange(0, 32, 4) & 15
    assert set(nibbles.flatten().tolist()) == {0x4, 0x8, 0xC, 0x9, 0xD, 0xE}
    assert (decompress24(values, metadata).float().reshape(100, -1, 4).sum(-1) == 2).all()
    assert dense.shape == (40, 400)


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "problem"), VARIANTS, ids=name)
@pytest.mark.parametrize(
    "form",
    [
        {"rows": 8, "columns": 8, "scaled": True, "transpose": True, "out_dtype": torch.bfloat16},
        {"rows": 1, "columns": 1, "scaled": False, "transpose": False, "out_dtype": torch.float32},
    ],
    ids=["fprop", "odd sizes in fp32"],
)
def test_every_config_on_the_gpu(monkeypatch, config, problem, form) -> None:
    monkeypatch.setattr(selfcheck, "passed", set())
    check_variant(config, replace(problem, **form), GPU)


@pytest.mark.gpu
def test_a_wrong_kernel_is_caught_on_the_gpu(monkeypatch) -> None:
    monkeypatch.setattr(selfcheck, "passed", set())
    plan = plan_module.plan_gemm

    def one_stage_fewer(
        config: Config, accurate: bool, values: Tensor, metadata: Tensor, dense: Tensor, *others: Any
    ) -> Any:
        shorter = dense[:, :-128].contiguous()
        run = plan(config, accurate, values, metadata, shorter, *others)
        return lambda values, metadata, dense, *others: run(values, metadata, shorter.data_ptr(), *others)

    monkeypatch.setattr(plan_module, "plan_gemm", one_stage_fewer)
    with pytest.raises(SparseCompileError, match="elements are wrong"):
        check_variant(CONFIG, PROBLEM, GPU)


@pytest.mark.gpu
def test_capture_is_noticed_on_the_gpu(monkeypatch) -> None:
    monkeypatch.setattr(selfcheck, "passed", set())
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(RuntimeError, match="before the capture"):
        check_variant(CONFIG, PROBLEM, GPU)


@pytest.mark.gpu
def test_memory_is_given_back_on_the_gpu(monkeypatch) -> None:
    check_variant(CONFIG, PROBLEM, GPU)  # the workspace of cuBLAS stays
    monkeypatch.setattr(selfcheck, "passed", set())
    before, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    check_variant(CONFIG, PROBLEM, GPU)
    assert torch.cuda.memory_allocated() == before
    assert torch.equal(torch.cuda.get_rng_state(), state)
