"""torchtitan's own trainer, compiled by its inductor and, through the launcher, by sste: losses, speed and memory.

    python benchmarks/bench_torchtitan.py
    python benchmarks/bench_torchtitan.py --flavors debugmodel debugmodel_flex_attn --steps 10

It needs torchtitan 0.2.2, and trains on the sources of Python's standard library; both runs see the same tokens.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from statistics import mean, median
from typing import Any

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import RESULTS, Report, keep_parts
from source_text import texts

from sparse_compile.reporting.model import DENSE

TRAINER = Path(__file__).with_name("titan_train.py")
BASE = "inductor"
# By name: arguments of the launcher; None runs the trainer as it is.
KINDS: Mapping[str, Sequence[str] | None] = {
    BASE: None,
    "sste": (),
    "sste, transposable, all linears": ("--option", "sste.recipe=s-ste-transposable", "--option", "sste.targets=all"),
}
# Sequences of a step and their length.
BATCHES = {"debugmodel": (8, 2048), "debugmodel_flex_attn": (8, 2048), "1B": (8, 2048)}
# Of the others nothing would be faster: what they show is that they are right.
LARGE = ("1B",)
_WARM = 5  # steps that compile and measure
_VOCABULARY = 2000
_FILES = 400
# Of the loss of the first step, which the same weights and tokens give, and of the mean of the last ones.
FIRST_TOLERANCE, LAST_TOLERANCE = 0.05, 0.2
_LAST = 5
_LAST_LOSSES = f"mean of the last {_LAST}"
# At torchtitan's own 8e-4, which it expects to warm up to in 200 steps, losses jump in all runs and compare nothing.
_LEARNING_RATE = 1e-4
_LINE = re.compile(
    r"step:\s*(?P<step>\d+)\s+loss:\s*(?P<loss>[\d.]+|nan).*?memory:\s*(?P<gib>-?[\d.]+)GiB.*?tps:\s*(?P<tps>[\d,]+)"
)


def make_assets(folder: Path) -> None:
    """A tokenizer and texts, in the formats in which torchtitan reads them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = texts()[:_FILES]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    tokenizer.train_from_iterator(
        found, trainers.BpeTrainer(vocab_size=_VOCABULARY, special_tokens=special, show_progress=False)
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": special[0], "eos_token": special[1], "add_bos_token": True, "add_eos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    data = folder / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(f"{json.dumps({'text': text})}\n" for text in found))


def train(
    flavor: str, kind: str, steps: int, gpus: int, batch: tuple[int, int], folder: Path, launch: Sequence[str]
) -> dict[str, Any]:
    """A run of the trainer: its losses, tokens a second of a GPU, memory, and what the report says."""
    sequences, length = batch
    report = folder / f"{flavor}-{kind}.json".replace(" ", "-")
    launcher = KINDS[kind]
    if launcher is not None and flavor not in LARGE:
        launcher = (*launcher, "--option", "sste.when=always")
    command = [*launch, f"--nproc-per-node={gpus}"]
    command += [] if launcher is None else ["-m", "sparse_compile", *launcher, "--report", str(report)]
    command += [
        str(TRAINER), "--model.name", "llama3", "--model.flavor", flavor, "--model.hf_assets_path", str(folder),
        "--training.dataset", "c4_test", "--training.dataset_path", str(folder / "data"),
        "--training.local_batch_size", str(sequences), "--training.seq_len", str(length),
        "--training.steps", str(steps), "--optimizer.lr", str(_LEARNING_RATE), "--metrics.log_freq", "1",
        "--debug.seed", "0", "--compile.enable",
        "--job.dump_folder", str(folder / "out"), "--metrics.disable_color_printing",
    ]  # fmt: skip
    here = str(Path(__file__).parents[1])
    paths = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    read = read_log(done.stdout + done.stderr)
    if len(read["losses"]) != steps:
        said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        raise SystemExit(f"{' '.join(command)} logged {len(read['losses'])} steps, not {steps}:\n{said}")
    return read | {
        "flavor": flavor, "kind": kind, "rewritten": rewritten(report) if launcher is not None else None
    }  # fmt: skip


def read_log(text: str) -> dict[str, Any]:
    """What torchtitan's lines say of the steps; of the speed, the median of those that compile no more."""
    lines = {int(found["step"]): found for found in _LINE.finditer(text)}
    losses = [float(lines[step]["loss"]) for step in sorted(lines)]
    speeds = [float(lines[step]["tps"].replace(",", "")) for step in sorted(lines)][_WARM:]
    return {
        "losses": losses,
        "tokens_per_second": median(speeds) if speeds else None,
        "reserved_gib": max((float(found["gib"]) for found in lines.values()), default=None),
    }


def rewritten(report: Path) -> list[int]:
    """How many linears of the graphs are rewritten, and how many there are."""
    graphs = json.loads(report.read_text())["graphs"]
    rows = [row for graph in graphs for row in graph["rows"]]
    return [sum(row["decision"] != DENSE for row in rows), len(rows)]


def part(
    flavors: Sequence[str], kinds: Sequence[str], steps: int, gpus: int, batches: Mapping[str, tuple[int, int]],
    launch: Sequence[str],
) -> Report:  # fmt: skip
    """One run of each; what differs in its losses by more than it may is a failure."""
    rows, failed = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_assets(folder)
        for flavor in flavors:
            for kind in kinds:
                row = train(flavor, kind, steps, gpus, batches[flavor], folder, launch)
                rows.append(row)
                print(f"{flavor}, {kind}: {row}", flush=True)
            base = rows[-len(kinds)]
            for row in rows[1 - len(kinds) :]:
                failed += wrong(base, row)
    return {"torchtitan": version("torchtitan"), "gpus": gpus, "rows": rows, "failed": failed}, table(rows)


def wrong(base: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a run beside that of ``inductor``."""
    name = f"{row['flavor']}, {row['kind']}"
    problems = []
    for when, loss, limit in (("first loss", itemgetter(0), FIRST_TOLERANCE), (_LAST_LOSSES, _last, LAST_TOLERANCE)):
        found, expected = loss(row["losses"]), loss(base["losses"])
        # Not "difference > limit": NaN must fail.
        if not abs(found - expected) <= limit:
            problems.append(f"{name}: the {when} is {found:.4f}, not {expected:.4f}")
    if not row["rewritten"] or not row["rewritten"][0]:
        problems.append(f"{name}: no linear is rewritten")
    return problems


def _last(losses: Sequence[float]) -> float:
    """One step's depends on its batch."""
    return mean(losses[-_LAST:])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines, base = [], None
    for row in rows:
        base = row if row["kind"] == BASE else base
        speed = row["tokens_per_second"]
        ratio = speed / base["tokens_per_second"] if base is not None and speed and base["tokens_per_second"] else None
        found = "/".join(map(str, row["rewritten"])) if row["rewritten"] else None
        losses = row["losses"][0], _last(row["losses"])
        lines.append((row["flavor"], row["kind"], *losses, speed, ratio, row["reserved_gib"], found))
    headers = (
        "model", "compiled by", "first loss", _LAST_LOSSES, "tokens a second of a GPU", f"x {BASE}",
        "reserved GiB", "linears rewritten",
    )  # fmt: skip
    formats = ("", "", ".4f", ".4f", ",.0f", ".3f", ".1f", "")
    return tabulate(lines, headers=headers, floatfmt=formats, missingval="-", tablefmt="github")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavors", nargs="+", choices=BATCHES, default=[*BATCHES])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[BASE, "sste"], help="the first is inductor")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = partial(part, args.flavors, args.kinds, args.steps, args.gpus, BATCHES, launch)
    keep_parts("bench_torchtitan", {"one GPU" if args.gpus == 1 else f"{args.gpus} GPUs": run}, args.out)


if __name__ == "__main__":
    main()
