"""The model's own names of its parameters, whatever part of it dynamo traced."""

from functools import cached_property

from torch import Tensor
from torch.fx import Node
from torch.nn import Module

from sparse_compile.passes.live_modules import LiveModules
from sparse_compile.torch_internals.graph import parameter_name, real_parameter
from sparse_compile.torch_internals.modules import is_compiled_in_place, is_compiled_wrapper

# Where wrappers keep the module that they wrap: torch.compile, PyTorch's wrapper of activation checkpointing, FSDP.
_WRAPPED = frozenset(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))
# DistributedDataParallel and DataParallel, whose attribute has a name that modules may have, too: ``module``.
_PARALLEL = "torch.nn.parallel."


class ModuleNames:
    """Asks the modules that are alive."""

    def __init__(self, live: LiveModules) -> None:
        self._live = live
        self._names: dict[int, dict[int, str]] = {}  # of a root's parameters, by their identities

    def of(self, placeholder: Node) -> str:
        """``blocks.3.fc`` of the parameter behind a placeholder of dynamo's graph, less a final ``.weight``.

        The name is that of ``named_parameters``, without those of wrappers, of the module that is compiled; where none
        is or several are, as in regional compilation, of the outermost module around them.  Of a parameter that no
        module holds it is the way by which the traced function reaches it.
        """
        parameter = real_parameter(placeholder)
        found = None if parameter is None else self.of_parameter(parameter)
        return parameter_name(placeholder) if found is None else found

    def of_parameter(self, parameter: Tensor) -> str | None:
        """The same; None of a parameter that no module holds."""
        root = self._live.root_of(parameter)
        if root is None:
            return None
        if id(root) not in self._names:
            self._names[id(root)] = self._names_within(root)
        return self._names[id(root)][id(parameter)].removesuffix(".weight")

    def _names_within(self, root: Module) -> dict[int, str]:
        """Each module by the first of its names, as ``named_parameters`` has it."""
        names: dict[int, str] = {}
        compiled: list[str] = []  # the prefixes of modules that are compiled, the outermost alone
        pending, seen = [("", root, False)], set[int]()
        while pending:
            prefix, module, within = pending.pop(0)
            if id(module) in seen:
                continue
            seen.add(id(module))
            if id(module) in self._compiled and not within:
                compiled.append(prefix)
                within = True
            for name, parameter in vars(module)["_parameters"].items():
                names.setdefault(id(parameter), f"{prefix}{name}")
            children = [
                (prefix if _is_wrapper(module, name) else f"{prefix}{name}.", child, within)
                for name, child in vars(module)["_modules"].items()
                if child is not None
            ]
            pending = [*children, *pending]
        if len(compiled) == 1:
            names = {parameter: name.removeprefix(compiled[0]) for parameter, name in names.items()}
        return names

    @cached_property
    def _compiled(self) -> set[int]:
        """The identities of the modules that are compiled, by torch.compile or in place."""
        modules = self._live.modules
        wrapped = {id(vars(module)["_modules"].get("_orig_mod")) for module in modules if is_compiled_wrapper(module)}
        return wrapped | {id(module) for module in modules if is_compiled_in_place(module)}


def _is_wrapper(module: Module, name: str) -> bool:
    if name in _WRAPPED or is_compiled_wrapper(module):
        return True
    return name == "module" and type(module).__module__.startswith(_PARALLEL)


def name_of_parameter(parameter: Tensor) -> str | None:
    """The name of ``ModuleNames``, of the modules that are alive now; None of a parameter that none holds."""
    return ModuleNames(LiveModules()).of_parameter(parameter)
