"""Compiles the models of scripts that never call torch.compile, each at its first call in training.

``Module.__call__`` calls ``Module._compiled_call_impl`` if there is one; ``Module.compile`` sets it on an instance.
Here the class gets one that looks at the instance first.  So the first call is already compiled, the module stays as it
is, and modules that are not compiled run as before.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import DataParallel, Module

from sparse_compile.torch_internals.modules import (
    call_instead,
    called_plainly,
    intercept_module_calls,
    is_lazy,
    with_frame_of_its_own,
)


class AutoCompile:
    """Compiles in place each outermost module that is called in training mode with gradients enabled.

    Args:
        compile: compiles a function.
    """

    def __init__(self, compile: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        self.compiled: list[str] = []
        self._compile = compile
        self._active = True
        self._inside = False  # a call of a module that was compiled here; its parts belong to it
        self._refused = False
        intercept_module_calls(self._call_of)

    def stop(self) -> None:
        """Compile nothing more: the script compiles its models itself."""
        self._active = False

    def _call_of(self, module: Module) -> Callable[..., Any] | None:
        """What to call instead of a module that is not compiled; None to call the module itself.

        This changes no state, since not only calls end here: torch.jit looks at every attribute of a module.
        """
        if not self._active or self._inside or not (module.training and torch.is_grad_enabled()):
            return None
        if not called_plainly() or not _trains(module):
            return None
        if isinstance(module, DataParallel) and len(list(module.device_ids)) > 1:
            self._refuse(module)
            return None
        return partial(self._compile_and_call, module)

    def _compile_and_call(self, module: Module, *args: Any, **kwargs: Any) -> Any:
        name = type(module).__name__
        self.compiled.append(name)
        weights = sum(parameter.numel() for parameter in module.parameters())
        sys.stderr.write(f"sparse_compile: compiling {name} ({weights:,} parameters) with backend 'sste'\n")
        compiled = self._compile(with_frame_of_its_own(module))

        def call(*args: Any, **kwargs: Any) -> Any:
            outermost, self._inside = not self._inside, True
            try:
                return compiled(*args, **kwargs)
            finally:
                self._inside = not outermost

        call_instead(module, call)
        return call(*args, **kwargs)

    def _refuse(self, module: Module) -> None:
        if not self._refused:
            self._refused = True
            sys.stderr.write(
                f"sparse_compile: {type(module).__name__} copies the model to several devices at every call, so it is "
                "not compiled; run the script with torchrun and DistributedDataParallel instead\n"
            )


def _trains(module: Module) -> bool:
    """Whether it has parameters to train, and all of its parameters are initialized."""
    parameters = list(module.parameters())
    return any(parameter.requires_grad for parameter in parameters) and not any(
        is_lazy(parameter) or parameter.is_meta for parameter in parameters
    )
