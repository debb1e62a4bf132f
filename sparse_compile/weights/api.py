"""What is derived from the weights of a model: to look at, and to make anew."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from math import isfinite

from torch.nn import Embedding, EmbeddingBag, Module, Parameter
from torch.optim import Optimizer

# The functions import ``registry`` when they are called: importing it begins to watch optimizers.


def beta(model: Module) -> dict[str, float | list[float]]:
    """The S-STE scale of each pruned weight, by the parameter's name; of experts a list, one for each matrix.

    The forward pass multiplies with ``W~ = beta * S(W)`` (S-STE, Hu et al., NeurIPS 2024, arXiv 2409.09099).

    Args:
        model: the model, compiled or wrapped or not.

    Returns:
        Positive numbers without a unit.  Empty before the first call.  Until a weight is trained, its scale is the one
        that the weight would begin with.  Recipes that keep the largest elements as they are, such as ``ste``, have no
        scale: their weights are not listed.
    """
    from sparse_compile.weights.registry import find_record

    records = {name: find_record(parameter) for name, parameter in original(model).named_parameters()}
    scales = {name: record.current_beta for name, record in records.items() if record is not None}
    values = {name: scale.value for name, scale in scales.items() if scale is not None}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def set_beta(model: Module, betas: Mapping[str, float | Sequence[float]]) -> None:
    """Give weights the S-STE scales that ``beta`` returned for another model, before or after the first step.

    A parameter keeps its scale, and an optimizer's ``state_dict`` brings it back.  In a copy of a trained model, or in
    one from a checkpoint without its optimizer, it would be computed from the trained weights, and the linears would
    not compute what they were trained to.  Matrices that are left out are taken for trained dense, until they are
    trained otherwise::

        sparse_compile.set_beta(average, sparse_compile.beta(model))

    Args:
        model: the model, compiled or wrapped or not.
        betas: scales by the parameters' names, with or without what wrappers put in front or between.

    Raises:
        ValueError: a name that no parameter has, or whose parameter can have no scale: no matrix, an embedding, one
            whose recipe has none or whose linear is dense; or a scale that is not a positive, finite number, or no
            list of as many as a weight has experts.  Nothing is changed then.
    """
    from sparse_compile.weights.registry import record_of

    named = _by_name(model)
    told = []
    for name, value in betas.items():
        found = named.get(name) or named.get(plain_name(name)) or named.get(_bare(name))
        if not found:
            nearest = get_close_matches(plain_name(name), named, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"no parameter of the model is named {name!r}{hint}")
        if len(found) > 1:
            raise ValueError(f"{name!r} matches several parameters of the model; give the full name")
        values = value if isinstance(value, Sequence) else (value,)
        if any(isinstance(one, bool) or not (isfinite(one) and one > 0) for one in values):
            raise ValueError(f"the scale of {name!r} is {value}; it must be a positive, finite number")
        reason = _why_not_pruned(name, *found[0])
        if reason is not None:
            raise ValueError(f"{reason}; only weights that an 's-ste' recipe prunes have one")
        shape = found[0][1].shape
        if isinstance(value, Sequence) != (len(shape) == 3) or len(values) != shape[:-2].numel():
            needed = "one number" if len(shape) == 2 else f"a list of {shape[0]}, one for each expert"
            raise ValueError(f"the scale of {name!r} is {value}; needed is {needed}")
        told.append((found[0][1], tuple(map(float, values)) if len(shape) == 3 else float(values[0])))
    for parameter, value in told:
        record_of(parameter).tell(value)
    # What has no scale in a model whose other weights have one was trained dense.
    known = {id(parameter) for parameter, _ in told}
    for parameter in original(model).parameters() if told else ():
        if parameter.ndim > 1 and id(parameter) not in known:
            record_of(parameter).was_trained_dense()


def attach(model: Module, optimizer: Optimizer) -> None:
    """Say that an optimizer trains a model, if the backend cannot find that out by itself.

    Known are the optimizers that were made after this package was imported, and those that the garbage collector lists.
    Call it after ``optimizer.load_state_dict`` and before the first step if the script freezes the garbage collector,
    or sets the optimizer's state without ``load_state_dict``.

    Args:
        model: the model, compiled or wrapped or not.
        optimizer: a ``torch.optim.Optimizer`` that holds parameters of the model.

    Raises:
        ValueError: it is no optimizer of PyTorch, or holds no parameter of the model.
    """
    from sparse_compile.weights.optimizer_watch import held_by, watch
    from sparse_compile.weights.registry import owned_by_optimizer, read_now

    if "param_groups" not in getattr(optimizer, "__dict__", {}):
        raise ValueError(
            f"the optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer; give the one that it wraps"
        )
    held = {id(weight) for weight in held_by(optimizer)}
    if not any(id(owned_by_optimizer(parameter)) in held for parameter in original(model).parameters()):
        raise ValueError("the optimizer holds no parameter of the model; give the one that trains it")
    watch.meet(optimizer)
    read_now(optimizer)


def invalidate(model: Module) -> None:
    """Prune and cast the model's weights again in the next call.

    Needed after a change of a few elements that cannot be seen: through ``.data`` or from another library, between two
    steps of an optimizer that owns the weight.  Between a forward and its backward it makes that backward fail, as the
    change of a dense weight would.

    Args:
        model: the model, compiled or wrapped or not.
    """
    from sparse_compile.weights.registry import find_record

    for parameter in original(model).parameters():
        record = find_record(parameter)
        if record is not None:
            record.mark_stale()


def original(model: Module) -> Module:
    """The module that torch.compile wrapped."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, Module) else model


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers (torch.compile, AveragedModel, DistributedDataParallel) add."""
    inside = ".".join(part for part in name.split(".") if part not in _INSIDE)
    while inside.startswith("module."):
        inside = inside.removeprefix("module.")
    return inside


# What torch.compile, checkpoint_wrapper and FSDP put into names.
_INSIDE = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def _bare(name: str) -> str:
    """Without every ``module``, which wrappers of parts of a model put in between."""
    return ".".join(part for part in plain_name(name).split(".") if part != "module")


def _by_name(model: Module) -> dict[str, list[tuple[Module, Parameter]]]:
    """The parameters, and the modules that hold them, by their names as they are, plain and bare."""
    named: dict[str, list[tuple[Module, Parameter]]] = {}
    for path, module in original(model).named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}".removeprefix(".")
            for alias in {name, plain_name(name), _bare(name)}:
                named.setdefault(alias, []).append((module, parameter))
    return named


def _why_not_pruned(name: str, module: Module, parameter: Parameter) -> str | None:
    """Why a parameter is no weight that linears could compute with pruned and scaled; None where it may be."""
    from sparse_compile.weights.registry import find_record

    if parameter.ndim not in (2, 3) or not parameter.is_floating_point():
        return f"{name!r} has no scale, because it is not a matrix: its shape is {tuple(parameter.shape)}"
    if isinstance(module, (Embedding, EmbeddingBag)):
        return f"{name!r} of a {type(module).__name__} has no scale"
    record = find_record(parameter)
    if record is not None and record.target is not None and not record.target.projection.has_beta:
        return f"the recipe of {name!r} has no scale"
    if record is not None and record.target is None and record.operands:
        return f"the linear of {name!r} stays dense, without a scale"
    return None
