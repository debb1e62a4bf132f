"""``python -m sparse_compile doctor``: whether the backend works on this machine, and what to do if it does not."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparse_compile.doctor.checks import Finding

_DESCRIPTION = """\
Check that the backend works on this machine: package versions, GPUs and their kernels, a C++ compiler, the cache
folder, the results of each kernel, the speed of three GEMMs against cuBLAS, and which kernel attention uses.

The exit status is 1 if something keeps the backend from working; the output then says how to fix it.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "doctor",
        help="check whether the backend works on this machine",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(execute=examine)


def examine(args: argparse.Namespace) -> None:
    """Print what the checks find, and exit with the status that the description promises."""
    from sparse_compile.doctor.checks import Status

    start = perf_counter()
    found = []
    for finding in findings():
        found.append(finding)
        if not args.json:
            sys.stdout.write(f"{_as_text(finding)}\n")
            sys.stdout.flush()
    broken = any(finding.status is Status.PROBLEM for finding in found)
    if args.json:
        lines = [asdict(finding) | {"status": finding.status.value} for finding in found]
        sys.stdout.write(json.dumps({"works": not broken, "findings": lines}, indent=1) + "\n")
    else:
        verdict = "the backend does not work here" if broken else "the backend works"
        sys.stdout.write(f"\n{verdict} ({perf_counter() - start:.0f} s)\n")
    sys.exit(int(broken))


def findings() -> "Iterator[Finding]":
    """What all checks find, in the order in which one needs the other."""
    import torch

    from sparse_compile.doctor import checks
    from sparse_compile.kernels import ops

    for check in (checks.versions, checks.backend, checks.devices, checks.compiler):
        yield from _safely(check.__name__, check)
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    device = next((device for device in devices if ops.missing_kernels(device) is None), None)
    yield from _safely("cache", partial(checks.cache, device))
    on_gpu: tuple[Callable[[torch.device], Iterator[Finding]], ...]
    on_gpu = (checks.kernels, checks.training_step, checks.speed, checks.attention)
    for check_on in on_gpu:
        what = check_on.__name__.replace("_", " ")
        if device is None:
            yield checks.Finding(what, checks.Status.SKIPPED, "no GPU here has kernels")
        else:
            yield from _safely(what, partial(check_on, device))


def _safely(what: str, check: "Callable[[], Iterator[Finding]]") -> "Iterator[Finding]":
    """What a check finds; a problem if it fails, whatever the error: that is what is looked for."""
    from sparse_compile.doctor.checks import Finding, Status

    try:
        yield from check()
    except Exception as error:  # noqa: BLE001
        remedy = "report this with the output of python -m torch.utils.collect_env"
        yield Finding(what, Status.PROBLEM, f"the check failed: {type(error).__name__}: {error}", remedy)


def _as_text(finding: "Finding") -> str:
    remedy = f"\n{'':10} {'':20} -> {finding.remedy}" if finding.remedy else ""
    return f"{finding.status.value:10} {finding.what:20} {finding.text}{remedy}"
