"""Two processes train as one: DistributedDataParallel, where the backend sees a graph for each bucket, and FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import warm

SCRIPT = Path(__file__).parent / "distributed_steps.py"
PRUNED = 4  # the linears of two FFNs
SHARDED = {"wrap": "fsdp2", "compile": "blocks"}
FSDP2 = {
    "blocks": SHARDED,
    "whole model": {**SHARDED, "compile": "whole"},
    "kept for backward": {**SHARDED, "reshard": False},
    "bf16": {**SHARDED, "bf16": True},
    "checkpointed": {**SHARDED, "checkpoint": "outside"},
    "checkpointed in the graph": {**SHARDED, "checkpoint": "inside"},
    "two microbatches": {**SHARDED, "microbatches": 2},
    "two microbatches, kept": {**SHARDED, "microbatches": 2, "reshard": False, "keep_gathered": True},
    "resumed": {**SHARDED, "resume": True},
}
REPLICATED = {"wrap": "ddp", "compile": "blocks", "width": 256}
# The head lies outside of blocks.
BUCKETS = {**REPLICATED, "compile": "whole", "options": {"sste.head": "dense"}}
DENSE = {"options": {"sste.recipe": "fp8", "sste.head": "dense"}}
DDP = {
    "blocks": REPLICATED,
    "two microbatches": {**REPLICATED, "microbatches": 2},
    "buckets": BUCKETS,
    "buckets, two microbatches": {**BUCKETS, "microbatches": 2},
    "buckets, fp8": {**BUCKETS, **DENSE},
}
ONE = {"wrap": "none", "compile": "blocks"}  # which share a graph


def devices(*few):
    """On GPUs all cases run, with attention; on CPUs these few without it, and all of them in a night."""
    return pytest.mark.parametrize(
        ("device", "few"),
        [
            pytest.param("cpu", few, id="cpu"),
            pytest.param("cpu", None, id="cpu, all", marks=pytest.mark.nightly),
            pytest.param("cuda", None, id="cuda", marks=pytest.mark.gpus2),
        ],
    )


def chosen(cases, few):
    """The cases, and how many linears are rewritten: without attention those that are pruned alone."""
    cases = {name: {**cases[name], "attention": few is None} for name in few or cases}
    return cases, 2 * PRUNED if few is None else PRUNED


def torchrun(processes, *arguments, **more):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, *map(str, arguments)]
    return [subprocess.run(command, capture_output=True, text=True, timeout=500, **more)]


def train(folder, processes, device, cases, launch=warm.group):
    """What each rank has to say of each case."""
    folder.mkdir()
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    done = launch(processes, SCRIPT, device, json.dumps(cases), ".", cwd=folder, env=environment)
    # Not the exit status: the process group's threads may abort while they are torn down, when all is done.
    files = [folder / f"rank{rank}" for rank in range(processes)]
    assert all(file.exists() for file in files), "\n".join(process.stderr[-4000:] for process in done)
    return [json.loads(file.read_text()) for file in files]


def near(expected, device, exact=0.0):
    """Within ``exact`` on a CPU; a GPU adds in any order, and its fused kernels round elsewhere."""
    return pytest.approx(expected, rel=max(exact, 2e-3 if device == "cuda" else 0), abs=0)


@devices("buckets, two microbatches")
def test_ddp_trains_as_one_process(tmp_path, device, few):
    """Losses but for the samples of gradients and reduction order; every rank has the same weights and betas."""
    cases, layers = chosen(DDP, few)
    wide = {**ONE, "width": 256, "attention": few is None}
    dense = {"fp8": {**wide, **DENSE}} if "buckets, fp8" in cases else {}
    (one,) = train(tmp_path / "one", 1, device, {"": wide, **dense})
    two = train(tmp_path / "two", 2, device, cases, launch=warm.group if few else torchrun)
    for name in cases:
        first, second = (rank[name] for rank in two)
        assert first == second, name
        expected = one["fp8" if name.endswith("fp8") else ""]
        assert first["losses"][0] == near(expected["losses"][0], device, 1e-5), name
        assert first["losses"] == pytest.approx(expected["losses"], rel=0.03), name
        assert first["losses"][-1] < first["losses"][0] - 1, name
        assert first["saved"] == first["betas"], name
        assert first["betas"] == expected["betas"], name
        if name.startswith("buckets"):
            assert len(first["rewritten"]) > 1, "the model was meant to be cut"
            assert (sum(first["rewritten"]), first["sparse"]) == (layers, len(first["betas"])), name


@devices("two microbatches", "resumed")
def test_fsdp2_trains_as_one_process(tmp_path, device, few):
    """And keeps of resharded weights no operands; beta is the same on every rank, by the shards' names, and saved."""
    cases, layers = chosen(FSDP2, few)
    (one,) = train(tmp_path / "one", 1, device, {"": {**ONE, "attention": few is None}})
    one = one[""]
    first, second = train(tmp_path / "two", 2, device, cases)
    answers = [rank.pop("answers") for rank in (first, second)]
    assert answers[0]["asked by all"] == answers[1]["asked by all"]
    assert answers[0]["asked by one"] == "rank 0"
    resumed, others = [rank.pop("resumed") for rank in (first, second)], list(first)
    for rank in resumed:
        assert rank["resumed"] == near(rank["uninterrupted"], device)
        assert rank["betas"] == rank["expected"]
        assert len(rank["betas"]) == PRUNED
    for name in others:
        for rank in (first, second):
            result, bf16 = rank[name], name == "bf16"
            assert all(result["rewritten"]), name
            assert result["betas"] == result["saved"] == (result["betas"] if bf16 else one["betas"]), name
            assert result["losses"][0] == near(one["losses"][0], device, 1e-3 if bf16 else 1e-5), name
            assert result["losses"] == pytest.approx(one["losses"], rel=0.02), name
            assert result["losses"][-1] < result["losses"][0] - 0.2, name
        assert first[name]["losses"] == second[name]["losses"], name
        assert first[name]["betas"] == second[name]["betas"], name

    everything = one["after_forward"][0]
    assert everything > 0
    for name in others:
        microbatches = FSDP2[name].get("microbatches", 1)
        result, kept = first[name], not FSDP2[name].get("reshard", True)
        assert set(result["after_forward"]) == {everything if kept else 0}, name
        assert result["after_backward"][microbatches - 1 :: microbatches] == [0] * len(result["losses"]), name
        # Once in each forward and once in each backward, or once while FSDP2 keeps the weights.
        assert set(result["made"]) == {layers if kept else 2 * layers * microbatches}, name
    if few is not None:
        return
    # What backward makes again is what forward had, to the last bit, and so is the recomputed forward.
    for name in ("kept for backward", "checkpointed", "checkpointed in the graph", "whole model"):
        assert first[name]["losses"] == near(first["blocks"]["losses"], device), name
    assert first["two microbatches, kept"]["losses"] == near(first["two microbatches"]["losses"], device)
