"""Small tasks that are not language modelling: handwritten digits, and telling the package of a piece of source.

Both are classified by one encoder, trained with each recipe from the same weights on the same batches.  Graphs run
operator by operator, with the backend's kernels, or their definitions where there is no GPU: what is compared is how
the recipes learn, not their speed.
"""

import math
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from statistics import mean

import recipe_runs
import torch
import torch.nn.functional as F
from harness import Run, latest, side_by_side
from tabulate import tabulate
from torch import Tensor, nn

_BATCH, _LEARNING_RATE = 256, 1e-3
_WINDOW = 128  # bytes of source that are classified
_PACKAGES = (
    "asyncio",
    "concurrent",
    "ctypes",
    "email",
    "encodings",
    "http",
    "importlib",
    "json",
    "multiprocessing",
    "xml",
)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification.

    Args:
        embed: makes the module from an example to its vectors ``[batch, length, width]``, given the width.
        length: vectors of an example.
        classes: how many there are.
        train, test: examples and their classes, int64.
        steps: of the optimizer.
    """

    embed: Callable[[int], nn.Module]
    length: int
    classes: int
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    steps: int


class Encoder(nn.Module):
    """A pre-norm transformer encoder; the class is read off the mean of its outputs."""

    def __init__(self, task: Task, width: int = 128, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.embed = task.embed(width)
        self.position = nn.Parameter(torch.randn(task.length, width) * 0.02)
        layer = partial(
            nn.TransformerEncoderLayer, width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True,
            norm_first=True,
        )  # fmt: skip
        self.layers = nn.ModuleList(layer() for _ in range(layers))
        self.norm, self.classify = nn.LayerNorm(width), nn.Linear(width, task.classes)

    def forward(self, examples: Tensor) -> Tensor:
        x = self.embed(examples) + self.position
        for layer in self.layers:
            x = layer(x)
        classes: Tensor = self.classify(self.norm(x).mean(dim=1))
        return classes


def digits() -> Task:
    """The 8x8 images that scikit-learn ships, in patches of 2x2; every fifth is held out."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    patches = (
        torch.tensor(images, dtype=torch.float32).view(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4) / 16
    )
    train, test = _split(patches, torch.tensor(classes))
    return Task(embed=partial(nn.Linear, 4), length=16, classes=10, train=train, test=test, steps=400)


def packages() -> Task:
    """Pieces of the standard library's sources, and the package that each is from.

    Every fifth file is held out, but for those of its pieces that another file has, too, as tables of encodings do.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    pieces: dict[bool, list[tuple[Tensor, int]]] = {True: [], False: []}
    for number, package in enumerate(_PACKAGES):
        for index, file in enumerate(sorted((root / package).rglob("*.py"))):
            text = torch.frombuffer(bytearray(file.read_bytes() or b" "), dtype=torch.uint8)
            whole = text[: len(text) // _WINDOW * _WINDOW].view(-1, _WINDOW).int()
            pieces[index % 5 == 4] += [(piece, number) for piece in whole]
    seen = {piece.numpy().tobytes() for piece, _ in pieces[False]}
    pieces[True] = [(piece, number) for piece, number in pieces[True] if piece.numpy().tobytes() not in seen]
    train, test = (
        (torch.stack([piece for piece, _ in of_split]), torch.tensor([number for _, number in of_split]))
        for of_split in (pieces[False], pieces[True])
    )
    embed = partial(nn.Embedding, 256)
    return Task(embed=embed, length=_WINDOW, classes=len(_PACKAGES), train=train, test=test, steps=600)


def _split(examples: Tensor, classes: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    held_out = torch.arange(len(examples)) % 5 == 4
    return (examples[~held_out], classes[~held_out]), (examples[held_out], classes[held_out])


TASKS: Mapping[str, Callable[[], Task]] = {"digits": digits, "packages": packages}


def train_tasks(
    arms: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], device: torch.device, jobs: int
) -> Iterator[Run]:
    """Test loss and accuracy of each arm and seed on each task, ``jobs`` at a time, each in a process of its own."""
    wanted = [(name, arm, seed, device) for name, seed, arm in product(tasks, seeds, arms)]
    for run in side_by_side(run_task, wanted, jobs):
        print("{task}, {arm}, seed {seed}: {loss:.4f}, {accuracy:.2%}".format(**run), flush=True)
        yield run


def run_task(name: str, arm: str, seed: int, device: torch.device) -> Run:
    """One run; without a GPU the kernels are emulated by their eager definitions."""
    loss, accuracy = _train(TASKS[name](), arm, seed, device)
    return {"task": name, "device": device.type, "arm": arm, "seed": seed, "loss": loss, "accuracy": accuracy}


def merged(old: Sequence[Run], new: Sequence[Run]) -> list[Run]:
    """The new runs in place of old ones of the same task, device, arm and seed."""
    fields = ("task", "device", "arm", "seed")
    return sorted(latest(old, new, fields), key=itemgetter(*fields))


def _train(task: Task, arm: str, seed: int, device: torch.device) -> tuple[float, float]:
    torch.compiler.reset()
    torch.manual_seed(seed)
    model = Encoder(task).to(device)
    run: Callable[[Tensor], Tensor] = model
    if arm != recipe_runs.DENSE:
        options = {"sste.when": "always", "sste.executor": "eager", **recipe_runs.ARMS[arm](task.steps)}
        run = torch.compile(model, backend="sste", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / task.steps)
    )
    generator = torch.Generator().manual_seed(seed)
    examples, classes = (tensor.to(device) for tensor in task.train)
    for _ in range(task.steps):
        chosen = torch.randint(len(examples), (_BATCH,), generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(run(examples[chosen]).float(), classes[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    model.eval()
    held_out, expected = (tensor.to(device) for tensor in task.test)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        answers = torch.cat([run(part).float() for part in held_out.split(_BATCH)])
    return F.cross_entropy(answers, expected).item(), (answers.argmax(dim=1) == expected).float().mean().item()


def table(runs: Sequence[Run]) -> str:
    """Means over the seeds."""
    rows = []
    for task, device, arm in dict.fromkeys((run["task"], run["device"], run["arm"]) for run in runs):
        found = [run for run in runs if (run["task"], run["device"], run["arm"]) == (task, device, arm)]
        accuracies = [run["accuracy"] for run in found]
        spread = f"{min(accuracies):.2%} to {max(accuracies):.2%}"
        rows.append(
            (task, device, arm, len(found), mean(run["loss"] for run in found), f"{mean(accuracies):.2%}", spread)
        )
    headers = ("task", "device", "arm", "seeds", "test loss", "accuracy", "lowest to highest")
    return tabulate(rows, headers=headers, floatfmt=".4f", tablefmt="github")
