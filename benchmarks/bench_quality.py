"""Do the kernels train as their eager definitions do?  The same run through both, from the same seed.

python benchmarks/bench_quality.py loss     300 steps of a GPT-2-small shape, byte by byte
"""

import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_gpt
from harness import Report, run_parts

import sparse_compile
from sparse_compile.kernels import ops

DEVICE = torch.device("cuda")
STEPS = 300
TOLERANCE = 0.02


def loss_part() -> Report:
    """Losses of the same training run, once through the kernels and once through their eager definitions."""
    model_config, config = train_gpt.PRESETS["gpt2-small"]
    config = replace(config, steps=STEPS, batch=8)
    data = train_gpt.corpus()
    runs = {}
    for name in ("kernels", "reference"):
        with ops.force_reference() if name == "reference" else nullcontext():
            runs[name] = train_gpt.train(
                name, model_config, config, data, DEVICE, lambda model: train_gpt.sste_step(model, DEVICE, "s-ste")
            )
    difference = runs["kernels"].training_loss - runs["reference"].training_loss
    validation = runs["kernels"].validation_loss - runs["reference"].validation_loss
    marks = train_gpt.milestones(STEPS)
    rows = [(f"loss at step {mark + 1}", *(run.losses[mark] for run in runs.values())) for mark in marks]
    rows.append(("training loss, last tenth", *(run.training_loss for run in runs.values())))
    rows.append(("validation loss", *(run.validation_loss for run in runs.values())))
    rows = [(name, kernels, reference, kernels - reference) for name, kernels, reference in rows]
    headers = ("", "kernels", "reference", "difference")
    table = tabulate(rows, headers=headers, floatfmt=("", ".4f", ".4f", "+.4f"), tablefmt="github")
    executions = [graph.execution for graph in sparse_compile.report().graphs]
    failed = [] if any(execution == "kernels" for execution in executions) else [f"no kernels ran: {executions}"]
    # Not "difference > tolerance": NaN must fail.
    if not max(abs(difference), abs(validation)) <= TOLERANCE:
        failed.append(f"losses differ by more than {TOLERANCE}: {difference}, {validation}")
    results = {
        "model": asdict(model_config),
        "training": asdict(config),
        "difference": {"training": difference, "validation": validation},
        "runs": {name: asdict(run) for name, run in runs.items()},
        "failed": failed,
    }
    return results, table


if __name__ == "__main__":
    run_parts("bench_quality", __doc__, {"loss": loss_part})
