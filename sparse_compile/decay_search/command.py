"""``python -m sparse_compile tune-decay SCRIPT``: finds the decay of ``sr-ste`` or ``t-sr-ste`` for a script."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sparse_compile.decay_search.html import as_html
from sparse_compile.decay_search.run_files import Request, Result
from sparse_compile.decay_search.table import HIGHEST, LOWEST, DecayTable, Run, check_decays
from sparse_compile.from_json import from_json
from sparse_compile.launcher.arguments import add_script, read_script
from sparse_compile.reporting.report_file import check_file

_DESCRIPTION = f"""\
Find a good decay for a recipe by measuring flip rates (T-SR-STE, arXiv 2404.01847).

The script runs once dense, to record the masks that pruning would choose, and once with each decay. Each run stops
after --steps optimizer steps, and its output is hidden. mu is the share of mask bits that flip per step, divided by the
same share in the dense run; both are means over the second half of the steps. A decay is accepted if its mu is in
[{LOWEST:.2f}, {HIGHEST:.2f}].

The exit status is 0 if a decay is accepted, and 1 if none is accepted or a run fails.
"""
_RECIPES = ("sr-ste", "t-sr-ste")
_DECAYS = "2e-6,6e-6,2e-5,6e-5,2e-4,6e-4,2e-3,6e-3"
# Options that each run sets itself, over the script's own.
_OURS = (
    "sste.recipe", "sste.decay", "sste.warmup", "sste.tail", "sste.total_steps", "sste.when", "sste.report",
)  # fmt: skip
_WITHOUT_END = 2**40  # optimizer steps
_LAST_LINES = 20


class RunFailed(Exception):
    """The script failed; the message has the last lines of its output."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "tune-decay",
        help=f"find a good decay for recipe {' or '.join(_RECIPES)} and a training script",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", choices=_RECIPES, default=_RECIPES[0], help=f"default: {_RECIPES[0]}")
    parser.add_argument(
        "--decays", type=_decays, default=_DECAYS, metavar="A,B,...", help=f"decays to try; default: {_DECAYS}"
    )
    parser.add_argument(
        "--steps", type=_steps, default=50, metavar="N", help="optimizer steps of each run; default: %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, action="append", default=[], metavar="FILE",
        help="also write the result to FILE: .json for all numbers, .html for plots; can be repeated",
    )  # fmt: skip
    add_script(parser)
    parser.set_defaults(parser=parser, execute=tune_decay)


def tune_decay(args: argparse.Namespace) -> None:
    """Print the table and what follows from it, and exit with the status that the description promises."""
    script = read_script(args)
    try:
        for file in args.out:
            check_file(file, [".json", ".html"])
        _check_options(script.options, args.recipe)
    except ValueError as error:
        args.parser.error(str(error))

    def run(decay: float | None) -> Run:
        own = {"sste.warmup": _WITHOUT_END} if decay is None else {"sste.warmup": 0, "sste.decay": decay}
        overrides = {"sste.tail": 0, "sste.total_steps": 0, "sste.when": "always", "sste.report": None}
        request = Request(
            steps=args.steps,
            auto=script.auto,
            module=script.module,
            options=script.options,
            overrides=overrides | own | {"sste.recipe": args.recipe},
        )
        return run_script(decay, request, [script.name, *script.arguments])

    try:
        table = search(args.recipe, args.decays, run)
    except (ValueError, RunFailed) as error:
        sys.stderr.write(f"sparse_compile: {error}\n")
        sys.exit(1)
    for file in args.out:
        _write(table, file)
    sys.stdout.write(f"{table}\n")
    if table.recommended() is None:
        sys.exit(1)


def search(recipe: str, decays: Sequence[float], run: Callable[[float | None], Run]) -> DecayTable:
    """Run dense, and with each decay.

    Args:
        run: one run with a decay, or dense for None.

    Raises:
        ValueError: a wrong grid, or runs that cannot be compared, see ``DecayTable``; after the first of them.
    """
    check_decays(decays)
    runs: list[float | None] = [None, *sorted(decays)]
    table: DecayTable | None = None
    for number, decay in enumerate(runs, 1):
        name = "dense" if decay is None else f"decay {decay:g}"
        sys.stderr.write(f"sparse_compile: run {number} of {len(runs)}, {name}\n")
        done = run(decay)
        table = DecayTable(recipe=recipe, dense=done) if table is None else replace(table, runs=(*table.runs, done))
    assert table is not None
    return table


def run_script(decay: float | None, request: Request, command: Sequence[str]) -> Run:
    """One run, in a process of its own.

    Args:
        command: the script and its arguments.

    Raises:
        RunFailed: the script ended before it was measured, or nothing was pruned.
    """
    name = "dense run" if decay is None else f"run with decay {decay:g}"
    with TemporaryDirectory() as folder:
        written, output = Path(folder, "result.json"), Path(folder, "output.txt")
        asked = [str(written), json.dumps(asdict(request)), *command]
        with output.open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-m", "sparse_compile.decay_search.run", *asked], stdout=log, stderr=log, check=False
            )
        last = "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])
        if not written.exists():
            raise RunFailed(f"the {name} failed, {_status(done.returncode)}; its last output was:\n{last}")
        # Errors while a stopped script ends do not matter.
        result = from_json(Result, written.read_text(encoding="utf-8"))
    if not result.weights:
        raise RunFailed(f"no weight is or would be pruned in the {name}; its last output was:\n{last}")
    return Run(
        decay=decay,
        elements={name: elements for name, (elements, _) in result.weights.items()},
        flips={name: flips for name, (_, flips) in result.weights.items()},
        stopped=result.stopped,
    )


def _status(code: int) -> str:
    return f"ended by signal {-code}" if code < 0 else f"exit status {code}"


def _check_options(options: Mapping[str, Any], recipe: str) -> None:
    from sparse_compile.options import read_options

    for name in options:
        if name in _OURS:
            instead = {"sste.recipe": "; use --recipe", "sste.decay": "; use --decays"}.get(name, "")
            raise ValueError(f"each run sets its own {name!r}{instead}")
    read_options(None, {**options, "sste.recipe": recipe})


def _decays(text: str) -> list[float]:
    try:
        decays = [float(decay) for decay in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 2e-5,6e-5,2e-4") from None
    try:
        check_decays(decays)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return decays


def _steps(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of optimizer steps from 2 up")
    return int(text)


def _write(table: DecayTable, file: Path) -> None:
    """As JSON or as one HTML file, by the ending of its name."""
    text = json.dumps(table.to_dict(), indent=1) if file.suffix == ".json" else as_html(table)
    file.write_text(text, encoding="utf-8")
