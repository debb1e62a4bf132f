"""What is derived from the weights of a model: to look at, and to make anew."""

from torch.nn import Module

# The functions import ``state`` when they are called: importing it begins to watch optimizers.


def beta(model: Module) -> dict[str, float]:
    """The S-STE scale of each weight that is pruned, by the parameter's name.

    Empty before the first step.  ``W~ = beta * S(W)`` is what the forward pass multiplies with (S-STE, arXiv
    2409.09099).
    """
    from sparse_compile.state import beta_of

    betas = {name: beta_of(parameter) for name, parameter in _original(model).named_parameters()}
    return {name: value for name, value in betas.items() if value is not None}


def invalidate(model: Module) -> None:
    """Prune and cast the model's weights again in the next call.

    Needed after a change that cannot be seen: through ``.data`` or from another library, between two steps of an
    optimizer that owns the weight.  Between a forward and its backward it makes that backward fail, as the change of a
    dense weight would.
    """
    from sparse_compile.state import forget

    for parameter in _original(model).parameters():
        forget(parameter)


def _original(model: Module) -> Module:
    """The module that torch.compile wrapped."""
    original = getattr(model, "_orig_mod", model)
    return original if isinstance(original, Module) else model
