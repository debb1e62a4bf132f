"""What checkpoints hold of a weight, beside what its optimizer keeps of it: scale, phase, steps, masks.

The model's ``state_dict`` stays as it is.  An optimizer's ``state_dict`` holds numbers under the weight where the
optimizer keeps something of the weight, and else in the weight's parameter group, under ``"sste"``, by its place in the
group: most optimizers initialise what they keep of a weight when they find nothing, so nothing may come first.  The
optimizer itself holds none of it.  A weight of experts has a list of scales, one for each.  SGD initialises nothing, so
its numbers are under the weight.  Without momentum these are all there is, and torch.distributed.checkpoint wants an
entry for every weight or for none: where one weight has numbers, the others have empty entries.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import SGD, Optimizer

from sparse_compile.weights.operand_set import OperandSet
from sparse_compile.weights.optimizer_watch import watch
from sparse_compile.weights.record import Beta, BetaSource, WeightRecord

BETA = "sste_beta"
STEPS = "sste_steps"  # of the optimizer with this weight
PRUNED = "sste_pruned"  # 1 if the weight was trained pruned, and is not dense since
PRIOR_STEPS = "sste_prior_steps"  # with the prior for a scale
PRIOR = "sste_prior"  # of the projection that the scale belongs to
_NUMBERS = frozenset((BETA, STEPS, PRUNED, PRIOR_STEPS, PRIOR))
Number = float | list[float]  # a list of experts, one for each
GROUP = "sste"
_MASKS = "masks"  # transposable ones, and the optimizer steps since they were found
_MASK_STEPS = "mask_steps"


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a checkpoint holds of a weight."""

    numbers: Mapping[str, Number]
    masks: tuple[Tensor, int] | None = None

    @property
    def steps(self) -> int:
        """Of the optimizer with this weight."""
        return int(_one(self.numbers.get(STEPS, 0)))

    @property
    def pruned(self) -> bool:
        """Whether the weight was trained pruned, and is not dense since."""
        return bool(self.numbers.get(PRUNED, BETA in self.numbers))

    @property
    def lacks_beta(self) -> bool:
        """Whether the weight was trained pruned without a scale, or the scale was lost."""
        return bool(self.numbers.get(PRUNED)) and BETA not in self.numbers

    @classmethod
    def of(
        cls, record: WeightRecord, stepped: Callable[[], bool], edited: Callable[[OperandSet], bool]
    ) -> "SavedState | None":
        """Of a weight that is or will be pruned; None of others, by which they are told from it when they are loaded.

        Args:
            stepped: whether the weight's optimizer has stepped since its operands were made.
            edited: whether something else has changed the weight since then, of which its masks know nothing.
        """
        is_target = record.target is not None or record.schedule is not None or record.loaded
        if not record.pruned and (record.trained_dense or not is_target):
            return None
        numbers: dict[str, Number] = {STEPS: record.steps, PRUNED: int(record.pruned)}
        if record.current_beta is not None:
            value = record.current_beta.value
            numbers[BETA] = list(value) if isinstance(value, tuple) else value
            if record.current_beta.prior is not None:
                numbers[PRIOR] = record.current_beta.prior
        if record.beta is not None and record.beta.source is BetaSource.PRIOR:
            numbers[PRIOR_STEPS] = record.prior_steps
        masks = None
        kept = record.masked_set
        if record.pruned and record.loaded_masks is not None:
            masks = record.loaded_masks  # no call has used them yet
        elif record.pruned and kept is not None and kept.masks is not None and not edited(kept):
            masks = kept.masks, kept.mask_steps + stepped()
        return cls(numbers, masks)

    def to(self, record: WeightRecord) -> None:
        """Let a record go on from here."""
        kept = self.numbers
        beta = None
        if self.pruned and BETA in kept:
            value = kept[BETA]
            scale = tuple(value) if isinstance(value, list) else value
            prior = float(_one(kept[PRIOR])) if PRIOR in kept else None
            beta = Beta(scale, BetaSource.PRIOR if PRIOR_STEPS in kept else BetaSource.CHECKPOINT, prior)
        prior_steps = int(_one(kept.get(PRIOR_STEPS, 0)))
        record.load(steps=self.steps, pruned=self.pruned, beta=beta, prior_steps=prior_steps, masks=self.masks)
        record.loaded = True


class Loaded(NamedTuple):
    """What an optimizer has loaded of a weight."""

    weight: Tensor
    saved: SavedState | None
    keeps_state: bool  # whether the optimizer keeps something of its own of it


def connect(
    optimizer: Optimizer,
    saved_of: Callable[[Tensor], SavedState | None],
    load: Callable[[Optimizer, list[Loaded]], None],
    found: Callable[[Optimizer, list[Loaded]], None],
) -> None:
    """Let every ``state_dict`` of the optimizer hold what is kept of its weights, and what it loads be taken over.

    Args:
        saved_of: what is to be saved of a weight.
        load: called with what the optimizer has loaded of its weights.
        found: the same, now, of what the optimizer holds: it may have been loaded before.
    """

    def read_loaded(optimizer: Optimizer) -> None:
        load(optimizer, read(optimizer))

    found(optimizer, read(optimizer))
    optimizer.register_state_dict_post_hook(partial(write, saved_of=saved_of))
    optimizer.register_load_state_dict_post_hook(read_loaded)


def write(
    optimizer: Optimizer, state_dict: dict[str, Any], saved_of: Callable[[Tensor], SavedState | None]
) -> dict[str, Any]:
    """A ``state_dict`` of the optimizer, or what it pickles, with what is kept of its weights.

    Args:
        saved_of: what is to be saved of a weight.
    """
    state, groups = dict(state_dict["state"]), []
    empty: dict[Any, dict[str, Any]] = {}
    for group, packed in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        apart: dict[str, Any] = {}
        for place, (weight, index) in enumerate(zip(group["params"], packed["params"], strict=True)):
            saved = saved_of(weight)
            if saved is None:
                empty[index] = {}
                continue
            if state.get(index) or isinstance(optimizer, SGD):
                state[index] = {**_without_numbers(state.get(index, {})), **saved.numbers}
            elif saved.numbers.get(PRUNED) or saved.numbers.get(STEPS) or watch.has_stepped(optimizer):
                apart.setdefault(str(place), {}).update(saved.numbers)
            if saved.masks is not None:  # as they are: tensors under a weight are cast to its dtype
                masks, steps = saved.masks
                apart.setdefault(str(place), {}).update({_MASKS: masks.clone(), _MASK_STEPS: steps})
        groups.append({key: value for key, value in packed.items() if key != GROUP})
        if apart:
            groups[-1][GROUP] = apart
    if isinstance(optimizer, SGD) and any(_NUMBERS.intersection(kept) for kept in state.values()):
        state = empty | state
    return {**state_dict, "state": state, "param_groups": groups}


def read(optimizer: Optimizer) -> list[Loaded]:
    """Take what an optimizer has loaded out of it."""
    loaded = []
    # In the middle of its initialiser it has no groups.
    for group in vars(optimizer).get("param_groups", ()):
        apart = group.pop(GROUP, None) or {}
        for place, weight in enumerate(group["params"]):
            kept = optimizer.state.get(weight)
            numbers = {key: _number(kept.pop(key)) for key in _NUMBERS if kept and key in kept}
            if not kept and (numbers or isinstance(optimizer, SGD)):
                optimizer.state.pop(weight, None)
            beside = dict(apart.get(str(place), {}))
            masks = beside.pop(_MASKS, None)
            steps = int(beside.pop(_MASK_STEPS, 0))
            numbers |= {key: _number(value) for key, value in beside.items()}
            saved = SavedState(numbers, None if masks is None else (masks, steps)) if numbers else None
            loaded.append(Loaded(weight, saved, bool(kept)))
    return loaded


def writes_its_own(optimizer: Optimizer) -> bool:
    """Whether its ``state_dict`` is made without that of PyTorch, and so without what is kept here."""
    method = type(optimizer).state_dict
    code = getattr(method, "__code__", None)
    return method is not Optimizer.state_dict and code is not None and "state_dict" not in code.co_names


def _number(value: Any) -> Number:
    """As it was saved: whoever moves a state between processes may make tensors of numbers."""
    return [float(one) for one in value] if isinstance(value, (list, tuple)) else float(value)


def _one(number: Number) -> float:
    return number[0] if isinstance(number, list) else number


def _without_numbers(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in kept.items() if key not in _NUMBERS}
