"""The choice of the sparse GEMM's configuration: what is asked for, what is timed, what is kept on disk."""

import json
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shared_graphs
from sparse_compile import backend
from sparse_compile.errors import SparseCompileError
from sparse_compile.kernels import ops
from sparse_compile.kernels.formats import E4M3, E5M2, padded
from sparse_compile.kernels.sparse_gemm import launch, tuning
from sparse_compile.kernels.sparse_gemm import plan as plan_module
from sparse_compile.kernels.sparse_gemm.configs import Config, configs
from sparse_compile.kernels.sparse_gemm.problem import Problem
from sparse_compile.kernels.sparse_gemm.tuning import lookup, tune
from sparse_compile.kernels.timing import gpu_times
from sparse_compile.recipe import SSTE, T_SR_STE, Gemm, GradFormat

uncompiled = shared_graphs.uncompiled

DEVICE = torch.device("cuda", 0)
PROBLEM = Problem(
    rows=4096, columns=1000, contraction=512, dtype=E4M3, dense_dtype=E4M3, out_dtype=torch.bfloat16, scaled=True,
    transpose=True, use_fast_accum=True,
)  # fmt: skip
FAST, SLOW = Config(block_d=192, cluster=2), Config(block_d=128, cluster=1)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The cache of a process that starts with an empty one."""
    monkeypatch.setenv("SPARSE_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    gpu_times.folder.cache_clear()
    yield tmp_path / "cache"
    gpu_times.folder.cache_clear()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of GPUs that are not there."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H{100 + 100 * device.index} / HBM")


class Bench:
    """Stands for the check and the clock of configurations."""

    def __init__(self) -> None:
        self.times = {FAST: 50.0}
        self.checked: list[Config] = []
        self.timed: list[Config] = []

    def check(self, config: Config, problem: Problem, device: torch.device) -> None:
        assert not self.timed, "all are checked before any is timed"
        self.checked.append(config)

    def clock(self, problem: Problem, candidates: list[Config], device: torch.device) -> dict[Config, float]:
        self.timed += candidates
        return {config: self.times.get(config, 100.0) for config in candidates}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, folder: Path, gpus: None) -> Bench:
    bench = Bench()
    monkeypatch.setattr(tuning, "check_variant", bench.check)
    monkeypatch.setattr(tuning, "measure", bench.clock)
    return bench


class TestBuckets:
    def test_sizes_of_a_bucket_differ_by_at_most_an_eighth(self) -> None:
        smallest: dict[int, int] = {}
        for size in range(1, 5000):
            top = gpu_times.round_up(size)
            assert top >= size
            assert gpu_times.round_up(top) == top, "a bucket holds its own top"
            smallest.setdefault(top, size)
            assert size <= smallest[top] * 1.125
            assert top % (1 << max(0, top.bit_length() - 4)) == 0, "four significant bits"
        assert list(smallest) == sorted(smallest), "buckets are intervals"

    def test_three_bits_below_the_leading_one(self) -> None:
        tops = {gpu_times.round_up(size) for size in range(1025, 2049)}
        assert tops == {1024 + 128 * eighth for eighth in range(1, 9)}

    def test_each_size_and_kind_counts(self, folder, gpus) -> None:
        path = tuning._path(PROBLEM, DEVICE)
        assert path == tuning._path(replace(PROBLEM, columns=1024), DEVICE)
        bf16 = replace(PROBLEM, dtype=torch.bfloat16, dense_dtype=torch.bfloat16)
        assert tuning._path(bf16, DEVICE) == tuning._path(replace(bf16, use_fast_accum=False), DEVICE)
        others = [
            replace(PROBLEM, rows=4097), replace(PROBLEM, columns=1025), replace(PROBLEM, contraction=513), bf16,
            replace(PROBLEM, out_dtype=torch.float32), replace(PROBLEM, scaled=False),
            replace(PROBLEM, transpose=False), replace(PROBLEM, use_fast_accum=False), replace(PROBLEM, dtype=E5M2),
            replace(PROBLEM, dense_dtype=E5M2),
        ]  # fmt: skip
        assert len({path, *(tuning._path(problem, DEVICE) for problem in others)}) == 11


class TestTune:
    def test_the_fastest_is_kept(self, bench) -> None:
        assert lookup(PROBLEM, DEVICE) is None
        assert tune(PROBLEM, DEVICE) == FAST
        assert bench.checked == bench.timed == list(configs())
        assert lookup(PROBLEM, DEVICE) == FAST
        assert lookup(replace(PROBLEM, columns=1024), DEVICE) == FAST
        assert lookup(replace(PROBLEM, columns=1025), DEVICE) is None
        bench.times, bench.timed = {SLOW: 1.0}, []
        assert tune(PROBLEM, DEVICE) == lookup(PROBLEM, DEVICE) == SLOW

    def test_a_wrong_candidate_ends_it(self, bench, monkeypatch) -> None:
        def check(config: Config, problem: Problem, device: torch.device) -> None:
            if config == SLOW:
                raise SparseCompileError("the check", "it", "wrong")

        monkeypatch.setattr(tuning, "check_variant", check)
        with pytest.raises(SparseCompileError):
            tune(PROBLEM, DEVICE)
        assert lookup(PROBLEM, DEVICE) is None

    def test_it_is_logged(self, bench, monkeypatch) -> None:
        messages: list[str] = []
        monkeypatch.setattr(logging.Logger, "info", lambda self, text, *values: messages.append(text % values))
        monkeypatch.setattr(tuning, "perf_counter", iter([10.0, 12.5]).__next__)
        tune(PROBLEM, DEVICE)
        assert messages == [
            f"tuned 4096x1000x512 float8_e4m3fn to bfloat16 scaled transposed in 2.5 s: {FAST}, 50.0 us"
        ]


class FakeCuda:
    """As much of CUDA as a measurement needs, on the CPU: a launch takes as long as ``microseconds`` says, in turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.captured: list[Callable[[], float]] | None = None
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = cuda.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: "Event") -> float:
                return (end.time - self.time) / 1000

        class Graph:
            def replay(self) -> None:
                cuda.now += sum(launch() for launch in self.launches)

        @contextmanager
        def capture(graph: Graph, *, capture_error_mode: str) -> Iterator[None]:
            assert capture_error_mode == "thread_local"
            cuda.captured = graph.launches = []
            yield
            cuda.captured = None

        replacements = {"device": lambda device: nullcontext(), "Event": Event, "CUDAGraph": Graph, "graph": capture}
        for name, replacement in replacements.items():
            monkeypatch.setattr(torch.cuda, name, replacement)

    def launch(self, microseconds: Callable[[], float]) -> None:
        assert self.captured is not None
        self.captured.append(microseconds)


@pytest.mark.parametrize(
    ("dtype", "dense_dtype"), [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (torch.bfloat16, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("transpose", [False, True], ids=["", "transpose"])
def test_times_are_of_one_launch_of_each_configuration(monkeypatch, dtype, dense_dtype, scaled, transpose) -> None:
    cuda, cpu = FakeCuda(monkeypatch), torch.device("cpu")
    problem = replace(
        PROBLEM, rows=144, columns=100, contraction=400, dtype=dtype, dense_dtype=dense_dtype, scaled=scaled,
        transpose=transpose, use_fast_accum=False,
    )  # fmt: skip
    turns: list[Config] = []
    launched: dict[Config, list[tuple[int | None, ...]]] = {SLOW: [], FAST: []}

    def plan(config: Config, accurate: bool, *arguments: Any) -> Callable[..., None]:
        assert accurate == (dtype != torch.bfloat16)
        *tensors, transposed = arguments
        assert transposed == transpose
        values, metadata, dense, scale_inv, dense_scale_inv, out = tensors
        launch._check(values, metadata, dense, scale_inv, dense_scale_inv, out, transpose)
        assert (values.shape[0], *dense.shape) == (144, 100, 400)
        assert (values.dtype, dense.dtype) == (dtype, dense_dtype)
        assert (dense_scale_inv is not None) == scaled
        for operand in (values.float(), dense.float()):
            assert (operand != 0).float().mean() > 0.95
            assert operand.abs().max() <= 448

        def microseconds() -> float:
            if not turns or turns[-1] != config:
                turns.append(config)
            # A disturbed round decides nothing.
            return 900.0 if config == FAST and turns.count(config) == 3 else {FAST: 12.5, SLOW: 25.0}[config]

        def multiply(*addresses: int | None) -> None:
            if not launched[config]:
                assert addresses == tuple(None if x is None else x.data_ptr() for x in tensors)
            launched[config].append(addresses)
            cuda.launch(microseconds)

        return multiply

    monkeypatch.setattr(plan_module, "plan_gemm", plan)
    monkeypatch.setattr(tuning, "set_count", lambda nbytes, device: 4)
    state = torch.get_rng_state()
    assert tuning.measure(problem, [SLOW, FAST], cpu) == {SLOW: pytest.approx(25.0), FAST: pytest.approx(12.5)}
    assert turns == [SLOW, FAST] * tuning._ROUNDS, "they take turns"
    for used in launched.values():
        assert len(used) == tuning._LAUNCHES
        for position in (0, 1, 2, 5):  # values, metadata, dense, out
            assert len({addresses[position] for addresses in used}) == 4, "operands take turns"
    assert torch.equal(torch.get_rng_state(), state)


def tune_many(first: int) -> None:
    for number in range(40):
        tune(replace(PROBLEM, rows=1 << (first + number) % 30), DEVICE)


class TestDisk:
    def test_processes_may_tune_at_the_same_time(self, bench, folder, monkeypatch) -> None:
        monkeypatch.setattr(tuning, "check_variant", lambda *_: None)
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=tune_many, args=(rank,)) for rank in range(3)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
            assert rank.exitcode == 0
        assert {lookup(replace(PROBLEM, rows=1 << number), DEVICE) for number in range(30)} == {FAST}
        assert len(list(folder.glob("*/*/*"))) == 30, "nothing else is left"

    def test_the_file_can_be_read_by_people(self, bench) -> None:
        tune(PROBLEM, DEVICE)
        path = tuning._path(PROBLEM, DEVICE)
        assert path.name == "4096x1024x512_float8_e4m3fn_to_bfloat16_scaled_transposed.json"
        assert json.loads(path.read_text()) == {"block_d": 192, "cluster": 2}

    @pytest.mark.parametrize(
        "text",
        [
            "", "{", "[]", "3", "{}", "\0\xff", '{"block_d": 100, "cluster": 1}', '{"block_d": 128}',
            '{"block_d": 128, "cluster": 1, "warps": 1}',
        ],
    )  # fmt: skip
    def test_a_damaged_file_is_named_and_ignored(self, bench, text) -> None:
        tune(PROBLEM, DEVICE)
        tuning._path(PROBLEM, DEVICE).write_bytes(text.encode("latin-1"))
        with pytest.warns(UserWarning, match=r"4096x1024x512.*\.json is damaged .* and ignored"):
            assert lookup(PROBLEM, DEVICE) is None

    def test_where_there_can_be_no_folder(self, bench, folder, monkeypatch) -> None:
        folder.write_text("a file where the folder should be")
        assert lookup(PROBLEM, DEVICE) is None
        monkeypatch.setattr(gpu_times, "_unwritten", {})
        with pytest.warns(UserWarning, match="can't be written"):
            assert tune(PROBLEM, DEVICE) == FAST
        assert lookup(PROBLEM, DEVICE) == FAST, "in this process"

    def test_folders(self, folder, gpus, monkeypatch, tmp_path) -> None:
        def parent() -> Path:
            gpu_times.folder.cache_clear()
            return gpu_times.folder(DEVICE).parent

        assert parent() == folder
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert parent() == folder
        monkeypatch.delenv("SPARSE_COMPILE_CACHE_DIR")
        assert parent() == tmp_path / "xdg/sparse_compile"
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert parent() == tmp_path / "home/.cache/sparse_compile"
        assert lookup(PROBLEM, DEVICE) is None
        assert not list(tmp_path.iterdir()), "nothing is made before something is tuned"

    def test_a_folder_per_device_version_and_source(self, folder, gpus, monkeypatch) -> None:
        def name(index: int = 0) -> str:
            gpu_times.folder.cache_clear()
            return gpu_times.folder(torch.device("cuda", index)).name

        assert name().startswith(f"NVIDIA_H100___HBM-{torch.__version__}-")
        names = {name(), name(index=1)}
        monkeypatch.setattr(torch, "__version__", "2.99.0")
        names.add(name())
        monkeypatch.setattr(gpu_times, "version", lambda package: "9.9")
        names.add(name())
        for source in ("configs.py", "ptx.py", "cast_mvue.py"):
            monkeypatch.setattr(gpu_times, "_NO_KERNELS", (*gpu_times._NO_KERNELS, source))
            names.add(name())
        assert len(names) == 4 + 3


# Each value once.
BY_DAY = {(0, 1, 1, 1), (1, 0, 0, 0)}


def pairs_by_day() -> Iterator[Any]:
    """Combinations of gradients' format, stored layout, checkpoint and autocast."""
    names = (("e4m3", "e5m2"), ("linear", "conv1d"), ("", "checkpoint"), ("", "autocast"))
    for choice in product((0, 1), repeat=4):
        grad_format, stored, checkpoint, autocast = (pair[index] for pair, index in zip(names, choice, strict=True))
        marks = () if choice in BY_DAY else pytest.mark.nightly
        name = "-".join((grad_format, stored, checkpoint, autocast))
        yield pytest.param(grad_format, stored, bool(checkpoint), bool(autocast), id=name, marks=marks)


class TestGraph:
    """What the backend asks for, against what the compiled graph multiplies."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
        problems: list[Problem] = []
        monkeypatch.setattr(backend, "choose", lambda plans, **_: (plans, []))  # there is nothing to measure with

        def tune(problem: Problem, device: torch.device) -> None:
            assert device.type == "cpu"
            assert not isinstance(torch.empty(1), torch._subclasses.FakeTensor), "tuning needs real tensors"
            problems.append(problem)

        def lookup(problem: Problem, device: torch.device) -> Config | None:
            return FAST if problem in problems else None

        monkeypatch.setattr(ops, "emulation_reason", lambda device: None)
        monkeypatch.setattr(ops, "missing_kernels", lambda device: None)
        monkeypatch.setattr(tuning, "tune", tune)
        monkeypatch.setattr(tuning, "lookup", lookup)
        return problems

    @pytest.fixture
    def multiplied(self) -> Iterator[set[Problem]]:
        """The 2:4 products that ran."""
        seen: set[Problem] = set()

        def recorded(name: str, call: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
            if name == "sparse_mm":
                values, _, dense, _, dense_scale_inv, out_dtype, transpose, use_fast_accum = arguments
                seen.add(
                    Problem(
                        rows=values.shape[0],
                        columns=dense.shape[0],
                        contraction=dense.shape[1],
                        dtype=values.dtype,
                        dense_dtype=dense.dtype,
                        out_dtype=out_dtype,
                        scaled=dense_scale_inv is not None,
                        transpose=transpose,
                        use_fast_accum=use_fast_accum,
                    )
                )
            return call(*arguments)

        with ops.observed(recorded):
            yield seen

    @pytest.fixture
    def x(self) -> Tensor:
        """Of 144 tokens, which are padded; dgrad of the first linear is computed too."""
        return torch.randn(3, 48, 64, requires_grad=True)

    @pytest.mark.by_day(1)
    @pytest.mark.parametrize(("grad_format", "stored", "checkpoint", "autocast"), list(pairs_by_day()))
    def test_the_products_of_the_graph(
        self, asked, multiplied, ffn, conv1d, x, grad_format, stored, checkpoint, autocast
    ) -> None:
        model = ffn()
        if stored == "conv1d":
            model.up, model.down = conv1d(64, 128), conv1d(128, 64)
        call = partial(torch.utils.checkpoint.checkpoint, model, use_reentrant=False) if checkpoint else model
        options = {
            "sste.executor": "eager",
            "sste.tune": True,
            "sste.recipe": replace(SSTE, grad_format=GradFormat(grad_format)),
        }
        # A sum's gradient would be one number, of stride zero.
        compiled = torch.compile(lambda x: call(x).square().sum(), backend="sste", options=options)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = compiled(x)
        loss.backward()
        # up and down, fprop and wgrad, tokens padded where they are contracted.
        assert len(asked) == 4
        assert set(asked) == multiplied
        assert sorted(problem.contraction for problem in asked) == [64, 128, padded(144), padded(144)]

    @pytest.mark.parametrize("grad_format", [pytest.param("e4m3", marks=pytest.mark.nightly), "e5m2"])
    def test_a_dgrad_that_is_24_by_its_weight(self, asked, multiplied, ffn, x, grad_format) -> None:
        options = {
            "sste.executor": "eager", "sste.tune": True,
            "sste.recipe": replace(T_SR_STE, grad_format=GradFormat(grad_format)),
        }  # fmt: skip
        torch.compile(ffn(), backend="sste", options=options)(x).square().sum().backward()
        assert set(asked) == multiplied
        # Where all operands are e4m3, dgrad of one linear is fprop of the other.
        assert len(asked) == (6 if grad_format == "e5m2" else 4)
        gradients = [problem for problem in asked if E5M2 in (problem.dtype, problem.dense_dtype)]
        assert len(gradients) == (4 if grad_format == "e5m2" else 0)

    @pytest.mark.parametrize(
        ("grad_format", "autocast"),
        [
            ("e5m2", False),
            pytest.param("e4m3", True, marks=pytest.mark.nightly),
            pytest.param("e4m3", False, marks=pytest.mark.nightly),
            pytest.param("e5m2", True, marks=pytest.mark.nightly),
        ],
    )
    def test_a_sampled_dgrad(self, asked, multiplied, ffn, x, grad_format, autocast) -> None:
        """Tokens are its rows, padded, and the scales leave after it."""
        options = {
            "sste.executor": "eager", "sste.tune": True,
            "sste.recipe": replace(SSTE, dgrad=Gemm.MVUE24, grad_format=GradFormat(grad_format)),
        }  # fmt: skip
        compiled = torch.compile(ffn(), backend="sste", options=options)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = compiled(x).square().sum()
        loss.backward()
        assert len(asked) == 6
        assert set(asked) == multiplied
        assert sum(problem.rows == padded(144) and not problem.transpose for problem in asked) == 2

    @pytest.mark.nightly
    def test_symbolic_tokens_use_their_hint(self, asked, ffn, x) -> None:
        options = {"sste.executor": "eager", "sste.tune": True}
        compiled = torch.compile(ffn(), backend="sste", dynamic=True, options=options)
        compiled(x).square().sum().backward()
        first = list(asked)
        assert len(first) == 4
        assert all(type(problem.columns) is int and type(problem.contraction) is int for problem in first)
        assert {problem.columns for problem in first if problem.transpose} == {144}
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(x[:, :44].contiguous()).square().sum().backward()
        assert asked == first

    @pytest.mark.nightly
    def test_a_transformer_has_its_ffns_tuned_alone(self, asked, multiplied, small_gpt, batch) -> None:
        """Its other linears, in dense FP8, ask for nothing."""
        options = {"sste.executor": "eager", "sste.tune": True}
        torch.compile(small_gpt(depth=2), backend="sste", options=options)(*batch).backward()
        assert len(asked) == 4, "two products of two linears; in two FFNs, but tuned once"
        assert set(asked) == multiplied
        assert {problem.contraction for problem in asked} == {64, 256, padded(64)}

    @pytest.mark.usefixtures("uncompiled")
    @pytest.mark.parametrize("options", [{}, {"sste.tune": False}, {"sste.tune": True, "sste.recipe": "fp8"}], ids=str)
    def test_nothing_else_is_asked_for(self, asked, ffn, x, options) -> None:
        options = {"sste.executor": "eager", **options}
        torch.compile(ffn(), backend="sste", options=options)(x).square().sum().backward()
        assert asked == []

    @pytest.mark.usefixtures("uncompiled")
    def test_without_a_hopper_gpu_it_changes_nothing(self, ffn, x, monkeypatch) -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError

        monkeypatch.setattr(tuning, "tune", refuse)
        options = {"sste.executor": "eager", "sste.tune": True}
        torch.compile(ffn(), backend="sste", options=options)(x).square().sum().backward()


@pytest.mark.gpu
class TestOnTheGpu:
    @pytest.mark.parametrize(
        "problem",
        [
            replace(PROBLEM, rows=768, columns=1000, contraction=3072),
            replace(PROBLEM, rows=768, columns=3072, contraction=4096, scaled=False, use_fast_accum=False),
        ],
        ids=str,
    )
    def test_a_small_problem(self, folder, problem) -> None:
        before, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
        assert tune(problem, DEVICE) == lookup(problem, DEVICE)
        assert torch.cuda.memory_allocated() - before < 2**26  # the workspace of cuBLAS
        assert torch.equal(torch.cuda.get_rng_state(), state)
        times = tuning.measure(problem, configs(), DEVICE)
        flop = 2 * problem.rows * problem.columns * problem.contraction
        # No slower than the host could launch it, no faster than the sparse tensor cores.
        assert all(flop / 4e9 <= time <= 200 for time in times.values()), times

    def test_the_option(self, folder, small_gpt: Callable[..., nn.Module], batch) -> None:
        model = small_gpt(width=256).cuda()
        options = {"sste.executor": "eager", "sste.tune": True, "sste.when": "always"}
        compiled = torch.compile(model, backend="sste", options=options)
        compiled(*(ids.cuda() for ids in batch)).backward()
        assert len(list(folder.glob("*/sparse_gemm/*.json"))) == 4
