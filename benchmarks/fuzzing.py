"""Many random graphs and scripts, in several processes: ``python benchmarks/fuzzing.py EXAMPLES`` (scripts/fuzz.sh).

An example is a script that runs over a graph, which is compiled once for several of them; of kernels alone, a call.
"""

import argparse
import gc
import math
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from secrets import randbelow
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tabulate import tabulate
from torch._inductor import config as inductor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import RESULTS, write

import warm
from fuzz.kernels import KERNELS
from fuzz.kernels import check as check_kernel
from fuzz.oracle import RECIPES
from fuzz.programs import DTYPES, LEADING, WIDTHS, Program, programs
from fuzz.scripts import Script, check, scripts
from fuzz.session import Kind

# One graph, and so many scripts over it; small ones change little but the weights, and compile nothing more.
SCRIPTS, SMALL_SCRIPTS = 4, 30
GRAPHS = 6  # of a batch, which is what a process does at a time: a campaign that is stopped loses those that run
CALLS = 480  # of kernels alone, in a batch
SIXTEEN_BITS = tuple(dtype for dtype in DTYPES if dtype != "float32")


@dataclass(frozen=True)
class Part:
    """What is drawn, and how it runs.

    Args:
        small: graphs of one or two linears, and many short scripts over each.
        kernels: calls of kernels alone, of no graph.
    """

    kind: Kind
    dtypes: tuple[str, ...] = DTYPES
    small: bool = False
    kernels: bool = False
    widths: tuple[int, ...] = WIDTHS
    shapes: Mapping[int, Sequence[tuple[int, ...]]] = field(default_factory=lambda: LEADING)

    @property
    def scripts(self) -> int:
        """Over each graph."""
        return SMALL_SCRIPTS if self.small else SCRIPTS

    @property
    def batch(self) -> int:
        """Examples of a batch."""
        return CALLS if self.kernels else GRAPHS * self.scripts


# Sizes at which 2:4 may be faster than dense; few, since each is measured.
_LARGE = {"widths": (1024, 2048), "shapes": {1: ((4096,), (1000,)), 2: ((2, 2048),)}}
# Tensor cores sum with 14 bits, and Inductor rounds less often than the oracle.
_GPU = Kind(device="cuda", executor="inductor", tolerance=0.03, rounding=2.0**-14)
PARTS = {
    "small, fp32": Part(Kind(), ("float32",), small=True),
    "small, 16 bits": Part(Kind(), SIXTEEN_BITS, small=True),
    "fp32": Part(Kind(), ("float32",)),
    "16 bits": Part(Kind(), SIXTEEN_BITS),
    "gpu, small": Part(_GPU, small=True),
    "gpu, always": Part(_GPU),
    "gpu, faster": Part(replace(_GPU, priced=True), **_LARGE),
    "gpu, reduce-overhead": Part(replace(_GPU, mode="reduce-overhead")),
    "gpu, kernels": Part(_GPU, kernels=True),
}


@dataclass
class Batch:
    """What came of some graphs and the scripts over them."""

    part: str
    seed: int
    graphs: int = 0
    scripts: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    failure: str | None = None


def batch(part: str, number: int, shrink: bool) -> Batch:
    """So many graphs, drawn by a seed; the first that fails ends it."""
    torch.set_num_threads(1)
    # Without processes for them, kernels of equal source are one object, which PyTorch tunes anew for each graph that
    # has it: while another is captured, that fails.
    inductor.compile_threads = 1 if PARTS[part].kind.mode is None else 2
    done = Batch(part, number)
    what = PARTS[part]
    if what.kernels:
        call_kernels(done)
        return done
    most, steps = (2, 2) if what.small else (8, 6)  # linears of a graph, actions of a script
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]

    @seed(number)
    @settings(max_examples=GRAPHS, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck))
    @given(
        program=programs(sorted(RECIPES), what.dtypes, most, what.small, what.widths, what.shapes), mvue=st.booleans(),
        scripts=st.lists(scripts(steps, what.small), min_size=what.scripts, max_size=what.scripts),
    )  # fmt: skip
    def examples(program: Program, scripts: list[Script], mvue: bool) -> None:
        compared = check(program, scripts, what.kind, mvue)
        done.scripts.update(compared)
        done.graphs += bool(compared)  # what the dense model may not do is no example
        done.kinds[program.recipe] += sum(compared.values())

    try:
        examples()
    except Exception as error:  # noqa: BLE001 - whatever is raised is what was looked for
        done.failure = "".join(traceback.format_exception(error))
    gc.collect()
    return done


def call_kernels(done: Batch) -> None:
    """A batch of calls, of each kernel in turn."""
    for number in range(done.seed * CALLS, (done.seed + 1) * CALLS):
        kernel = list(KERNELS)[number % len(KERNELS)]
        try:
            check_kernel(kernel, number, "cuda")
        except Exception as error:  # noqa: BLE001 - whatever is raised is what was looked for
            done.failure = (done.failure or "") + "".join(traceback.format_exception(error))
        done.scripts["compared"] += 1
        done.kinds[kernel] += 1


def ready() -> None:
    """A process that compiles; what it says of what it compiled is of no interest."""
    warm.compile_quickly()
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def campaign(
    part: str, examples: int, processes: int, first: int, shrink: bool, until: float = math.inf
) -> Iterator[Batch]:
    """Batches as they end, until so many examples ran, or no later than a time, but for those that run then."""
    numbers = range(first, first + -(-examples // PARTS[part].batch))
    # Each in a process of its own: what a compiler keeps for each graph grows.
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=ready, max_tasks_per_child=1
    ) as pool:
        started = [pool.submit(batch, part, number, shrink) for number in numbers]
        for future in as_completed(started):
            if not future.cancelled():
                yield future.result()
            if time.monotonic() > until:
                for other in started:
                    other.cancel()


def summary(batches: list[Batch], seconds: float) -> dict[str, Any]:
    scripts, kinds = Counter[str](), Counter[str]()
    for done in batches:
        scripts.update(done.scripts)
        kinds.update(done.kinds)
    failures = [{"seed": done.seed, "error": last_line(done.failure)} for done in batches if done.failure]
    return {
        "examples": sum(scripts.values()), "compared to their end": scripts["compared"],
        "too large to be compared": scripts["too large"], "graphs": sum(done.graphs for done in batches),
        "examples by kind": dict(sorted(kinds.items())), "seconds": round(seconds, 1),
        "seeds": [min(done.seed for done in batches), max(done.seed for done in batches)],
        "failures": failures,
    }  # fmt: skip


def last_line(failure: str) -> str:
    """What was wrong, before the example that hypothesis adds."""
    errors = [line for line in failure.splitlines() if re.match(r"[\w.]+: ", line)]
    return errors[0] if errors else failure.splitlines()[-1]


def table(results: dict[str, Any]) -> str:
    rows = [(name, value) for name, value in results.items() if not isinstance(value, (dict, list))]
    rows += [("failures", len(results["failures"]))]
    return tabulate([*rows, *results["examples by kind"].items()], tablefmt="github", headers=("", "number"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    available = [name for name, part in PARTS.items() if (part.kind.device == "cuda") == torch.cuda.is_available()]
    parser.add_argument("examples", type=int, help="of all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=available)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=math.inf, help="of each part, at most (default: no limit)")
    parser.add_argument("--seed", type=int, help="the first; each batch has the next (default: any)")
    parser.add_argument("--shrink", action="store_true", help="look for the smallest example that fails, for minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    first, failed = randbelow(2**31) if args.seed is None else args.seed, 0
    over_each = sum(PARTS[part].scripts for part in args.parts)
    for part in args.parts:
        begin, batches = time.perf_counter(), []
        wanted = -(-args.examples * PARTS[part].scripts // over_each)  # so that each has as many graphs
        with tqdm(total=wanted, desc=part, unit="example") as bar:
            until = time.monotonic() + 60 * args.minutes
            for done in campaign(part, wanted, args.processes, first, args.shrink, until):
                batches.append(done)
                bar.update(sum(done.scripts.values()))
                if done.failure:
                    failed += 1
                    bar.write(f"seed {done.seed} of {part}:\n{done.failure}")
                # Each time: a campaign that is stopped leaves what it found.
                results = summary(batches, time.perf_counter() - begin)
                write("fuzz", part, results, table(results), args.out)
        print(table(results), flush=True)
    raise SystemExit(f"{failed} batches failed" if failed else 0)


if __name__ == "__main__":
    main()
