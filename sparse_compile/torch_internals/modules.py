"""Modules and their calls: put a call in front of theirs, tell compiled, traced and plain ones apart."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch.fx import GraphModule
from torch.nn import Module, Parameter

from sparse_compile.torch_internals.heap import instances_of


def intercept_module_calls(instead: Callable[[Module], Callable[..., Any] | None]) -> None:
    """Let every call of a module that is not compiled first ask what to call instead; None for the module itself."""

    class AskedAtEachCall:
        def __get__(self, module: Module | None, owner: type) -> Callable[..., Any] | None:
            # The first question is for dynamo, which may trace this and knows the answer; the last one is whether this
            # call comes between the graphs of something compiled.
            if torch.compiler.is_compiling() or module is None or eval_frame.get_eval_frame_callback() is not None:
                return None
            return instead(module)

    eval_frame = torch._C._dynamo.eval_frame
    Module._compiled_call_impl = AskedAtEachCall()  # type: ignore[assignment]


def call_instead(module: Module, call: Callable[..., Any]) -> None:
    """Let calls of the module go to ``call``, as Module.compile does: copies and pickles of the module lose it."""
    module._compiled_call_impl = call


def is_compiled_in_place(module: Module) -> bool:
    """Whether its calls go to what ``Module.compile``, or ``call_instead``, has put there."""
    return vars(module).get("_compiled_call_impl") is not None


def is_compiled_wrapper(module: Module) -> bool:
    """Whether it is what torch.compile makes of a module, which it holds as ``_orig_mod``."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and issubclass(type(module), dynamo.OptimizedModule)


def with_frame_of_its_own(module: Module) -> Callable[..., Any]:
    """The call of a module, hooks included, as Module.compile compiles it.

    Dynamo does not trace the forward of PyTorch's own containers if it is the outermost: there one is put around it.
    """
    call: Callable[..., Any] = module._call_impl
    if is_pytorchs(module):
        return import_module("torch._dynamo.external_utils").wrap_inline(call)  # type: ignore[no-any-return]
    return call


def is_pytorchs(module: Module) -> bool:
    """Whether its forward is one of PyTorch's own, of which dynamo traces none that is the outermost frame."""
    return type(module).forward.__module__.startswith("torch.nn.modules.")


def called_plainly() -> bool:
    """Whether this is not a call within a trace, a transform or a backward."""
    from torch.fx import _symbolic_trace
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode

    return not (
        torch._C._current_graph_task_id() != -1  # checkpointed regions run again in backward
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._is_tracing()
        or _symbolic_trace._is_fx_tracing_flag
        or is_in_torch_dispatch_mode()
    )


def is_lazy(parameter: Parameter) -> bool:
    """Whether its shape is not known before the first call."""
    return torch.nn.parameter.is_lazy(parameter)


def is_trace(module: Module) -> bool:
    """Whether it stands for another module that was traced or exported, and holds that one's parameters."""
    export = sys.modules.get("torch.export.unflatten")
    exported = (export.InterpreterModule, export.UnflattenedModule) if export is not None else ()
    return issubclass(type(module), (GraphModule, torch.jit.ScriptModule, *exported))


def bare_modules_of(trace: Module) -> Iterator[Module]:
    """The modules without a class that a trace makes to hold parameters by their names."""
    if issubclass(type(trace), GraphModule):
        yield from (module for module in trace.modules() if type(module) is Module)


def compiled_modules() -> list[tuple[Module, object]]:
    """Modules that torch.compile or Module.compile was called with, each with its backend: a walk over the heap.

    None where a module was compiled in place, which does not tell.
    """
    found: dict[int, tuple[Module, object]] = {}
    for module in instances_of(Module):
        if is_compiled_wrapper(module):
            found[id(module._orig_mod)] = module._orig_mod, _backend_of(module)
        elif is_compiled_in_place(module):
            found.setdefault(id(module), (module, None))
    return list(found.values())


def _backend_of(wrapper: Any) -> object:
    """What torch.compile was given."""
    found = wrapper.dynamo_ctx.callback
    while inner := getattr(found, "_torchdynamo_orig_backend", None):
        found = inner
    return getattr(found, "compiler_fn", found)  # it is held with its options
