"""The way out: weights that were trained pruned become 2:4 themselves."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module

from sparse_compile.errors import SparseCompileError
from sparse_compile.recipe import SSTE
from sparse_compile.weights import original, plain_name
from sparse_compile.weights.pattern_24 import in_features_dim, is_24
from sparse_compile.weights.projection import ProjectionState
from sparse_compile.weights.record import Phase, WeightRecord

# ``registry`` is imported in calls: importing it begins to watch optimizers.


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weight:
    """A weight that is pruned, and how it lies."""

    name: str
    parameter: Tensor
    record: WeightRecord
    state: ProjectionState
    transposed: bool

    @property
    def dim(self) -> int:
        """Of in_features."""
        return -2 if self.transposed else -1

    def projected(self) -> Tensor:
        return self.state.project(self.parameter, transposed=self.transposed)


@torch.no_grad()
def finalize(model: Module) -> list[str]:
    """Write what training multiplied with, ``beta * S(W)``, into the weights that it pruned, which makes them 2:4.

    Afterwards each group of four elements along in_features of these weights holds at most two that are not zero, and
    the model computes without the backend what it computed with it, up to the rounding of FP8: the weight in training
    was ``e4m3(S(W) * 2**e) * (beta * 2**-e)``, and now is ``beta * S(W)``, in its own dtype.  Call it when training
    is over, then save the model as ever.  A second call changes nothing.

    S(W) = W for a weight that is 2:4, so beta is 1 from now on, and the model may be used with the backend, too.
    Training that goes on with the backend moves weights off the pattern while they are projected onto it, as before;
    then call this again at its end.

    Args:
        model: the model, compiled or wrapped or not, whose weights were pruned in this process; or a copy of it with
            the scales of ``set_beta``; or a model whose optimizer holds them, after ``optimizer.load_state_dict``.

    Returns:
        The names of the weights that are 2:4 now.

    Raises:
        ValueError: no weight was trained pruned; or one is sharded, shared, holds NaN or infinite values, or was
            changed after an earlier call without the backend, which then never computed with its projection.  No
            weight is changed then.
    """
    weights = _pruned_weights(model)
    if not weights:
        raise ValueError(
            "no weight of this model was trained pruned in this process, so there is nothing to finalize. Call "
            "finalize in the process that trained the model with backend 'sste', or after optimizer.load_state_dict of "
            "that run, or after sparse_compile.set_beta with its scales. A model that was saved 2:4 needs no finalize"
        )
    # First only looked at, so that an error leaves all as they were, without a second copy of the model.
    for weight in weights:
        _check(weight)
    for weight in weights:
        if weight.state.finalized:
            continue
        projected = weight.projected()
        if not torch.equal(projected, weight.parameter):
            weight.parameter.copy_(projected)
        if not is_24(weight.parameter, weight.dim):
            raise SparseCompileError("finalize", weight.name, "the projected weight is not 2:4")
        weight.record.finalize()
    return [weight.name for weight in weights]


def _pruned_weights(model: Module) -> list[_Weight]:
    from sparse_compile.weights.registry import find_record, read_unread

    read_unread()
    names: dict[int, list[str]] = {}
    for name, parameter in original(model).named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    weights = []
    for parameter in original(model).parameters():
        record = find_record(parameter)
        state = None if record is None else _projection_state(record)
        if record is None or state is None:
            continue
        name, *others = (plain_name(name) for name in names[id(parameter)])
        if type(parameter.data) is not Tensor:
            raise ValueError(
                f"{name!r} is a {type(parameter.data).__name__}; only a whole weight can be finalized. Gather the "
                "model's full state_dict into a plain model (torch.distributed.checkpoint.state_dict), call "
                "sparse_compile.set_beta(plain, sparse_compile.beta(model)), and finalize the plain model"
            )
        if others:
            raise ValueError(
                f"{name!r} was trained pruned and is now shared with {', '.join(map(repr, others))}; untie them first"
            )
        if record.target is None and record.operands:
            raise ValueError(
                f"{name!r} was given a scale, but its linear stays dense: leave it out of sparse_compile.set_beta, or "
                "name it in 'sste.targets'"
            )
        transposed = state.transposed if state.transposed is not None else _stored_transposed(model, name)
        weights.append(_Weight(name=name, parameter=parameter, record=record, state=state, transposed=transposed))
    return weights


def _projection_state(record: WeightRecord) -> ProjectionState | None:
    """How a weight is pruned; None if no linear computes with it so."""
    if not record.computed_pruned:
        return None
    return ProjectionState(
        projection=SSTE.projection if record.target is None else record.target.projection,
        beta=None if record.current_beta is None else record.current_beta.value,
        masks=record.masks,
        transposed=None if record.target is None else record.target.transposed,
        finalized=record.phase is Phase.FINALIZED,
    )


def _stored_transposed(model: Module, name: str) -> bool:
    """Of a weight that no call has used."""
    owner = name.rpartition(".")[0]
    modules = {plain_name(f"{path}.").removesuffix("."): module for path, module in original(model).named_modules()}
    dim = in_features_dim(modules[owner])
    if dim is None:
        raise ValueError(
            f"the dimension along which {name!r} of a {type(modules[owner]).__name__} is pruned is not known; call the "
            "compiled model once, then finalize"
        )
    return dim == -2


def _check(weight: _Weight) -> None:
    if weight.state.finalized:
        if not is_24(weight.parameter, weight.dim):
            raise ValueError(
                f"{weight.name!r} was finalized, then changed without the backend, and is no longer 2:4. To prune it "
                "again would change what the model computes. Load the finalized weights, or train with the backend, or "
                f"accept the pruning with sparse_compile.set_beta(model, {{{weight.name!r}: 1.0}}), then finalize"
            )
    elif not bool(weight.projected().isfinite().all()):
        raise ValueError(f"the projection of {weight.name!r} to {weight.parameter.dtype} holds NaN or infinite values")
