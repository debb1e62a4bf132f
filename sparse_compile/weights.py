"""What is derived from the weights of a model: to look at, and to make anew."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from math import isfinite

from torch.nn import Module

from sparse_compile.report_health import Health

# The functions import ``state`` when they are called: importing it begins to watch optimizers.


def beta(model: Module) -> dict[str, float]:
    """The S-STE scale of each weight that is pruned, by the parameter's name.

    Empty before the first step.  ``W~ = beta * S(W)`` is what the forward pass multiplies with (S-STE, arXiv
    2409.09099).  Recipes that keep the largest elements as they are, such as ``ste``, have no scale: their weights are
    not among these.
    """
    from sparse_compile.state import beta_of

    betas = {name: beta_of(parameter) for name, parameter in original(model).named_parameters()}
    return {name: value for name, value in betas.items() if value is not None}


def set_beta(model: Module, betas: Mapping[str, float]) -> None:
    """Give weights the S-STE scales that ``beta`` returned for another model, before or after the first step.

    A parameter keeps its scale, and an optimizer's ``state_dict`` brings it back.  In a copy of a trained model, or in
    one from a checkpoint without its optimizer, it would be computed from the trained weights, and the linears would
    not compute what they were trained to::

        sparse_compile.set_beta(average, sparse_compile.beta(model))

    Args:
        betas: scales by the parameters' names, with or without the ``module.`` that wrappers put in front.

    Raises:
        ValueError: a name that no parameter has, a weight whose recipe has no scale, or a scale that is not a positive,
            finite number.
    """
    from sparse_compile.state import give_beta, has_no_beta

    parameters = {plain_name(name): parameter for name, parameter in original(model).named_parameters()}
    for name, value in betas.items():
        if plain_name(name) not in parameters:
            nearest = get_close_matches(plain_name(name), parameters, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"no parameter of the model is named {name!r}{hint}")
        if not (isfinite(value) and value > 0):
            raise ValueError(f"the scale of {name!r} is {value}; it must be a positive, finite number")
        if has_no_beta(parameters[plain_name(name)]):
            raise ValueError(f"the recipe of {name!r} has no scale; only the weights of 's-ste' recipes have one")
    for name, value in betas.items():
        give_beta(parameters[plain_name(name)], float(value))


def invalidate(model: Module) -> None:
    """Prune and cast the model's weights again in the next call.

    Needed after a change of a few elements that cannot be seen: through ``.data`` or from another library, between two
    steps of an optimizer that owns the weight.  Between a forward and its backward it makes that backward fail, as the
    change of a dense weight would.
    """
    from sparse_compile.state import forget

    for parameter in original(model).parameters():
        forget(parameter)


def health() -> dict[str, Health]:
    """A sample of every pruned weight that is alive, by the name of its module: see ``Health``.

    The first call, or the first sample of option ``sste.health``, begins: flips are counted from one to the next, and
    the gradients of the optimizer step after a call are compared for the next one.  Weights that FSDP2 holds in shards
    are not among them: the option looks at these before they are given back.  Waits for the GPU.  A graph that several
    blocks share names their weights ``up``, ``up (2)``, ...
    """
    from sparse_compile.weight_health import sample_now

    return sample_now()


def on_health(listener: Callable[[str, float, int], object]) -> None:
    """Hand every sample on: ``listener(tag, value, step)``, as TensorBoard's ``SummaryWriter.add_scalar`` takes it.

    Tags are ``sste/flips/<module>`` and alike, for each quantity of ``Health``.
    """
    from sparse_compile.weight_health import listen

    listen(listener)


def original(model: Module) -> Module:
    """The module that torch.compile wrapped."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, Module) else model


def plain_name(name: str) -> str:
    """A parameter's name without what wrappers (torch.compile, AveragedModel, DistributedDataParallel) add."""
    return name.replace("_orig_mod.", "").removeprefix("module.")
