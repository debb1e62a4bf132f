"""The model's own names of its parameters, whatever part of it dynamo traced."""

from functools import cached_property

from torch.fx import GraphModule, Node
from torch.nn import Module, Parameter

from sparse_compile.torch_internals.graph import parameter_name, real_parameter
from sparse_compile.torch_internals.heap import instances_of
from sparse_compile.torch_internals.modules import OptimizedModule, is_compiled_in_place

# Where wrappers keep the module that they wrap: torch.compile, PyTorch's wrapper of activation checkpointing, FSDP.
_WRAPPED = frozenset(("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"))
# DistributedDataParallel and DataParallel, whose attribute has a name that modules may have, too: ``module``.
_PARALLEL = "torch.nn.parallel."


class ModuleNames:
    """Looks every live module up once, at the first question: a walk over the heap, about 0.1 s for a large model."""

    def __init__(self) -> None:
        self._names: dict[int, dict[int, str]] = {}  # of a root's parameters, by their identities

    def of(self, placeholder: Node) -> str:
        """``blocks.3.fc`` of the parameter behind a placeholder of dynamo's graph, less a final ``.weight``.

        The name is that of ``named_parameters``, without those of wrappers, of the module that is compiled; where none
        is or several are, as in regional compilation, of the outermost module around them.  Of a parameter that no
        module holds it is the way by which the traced function reaches it.
        """
        parameter = real_parameter(placeholder)
        root = None if parameter is None else self._root(parameter)
        if root is None:
            return parameter_name(placeholder)
        if id(root) not in self._names:
            self._names[id(root)] = self._names_within(root)
        return self._names[id(root)][id(parameter)].removesuffix(".weight")

    def _root(self, parameter: Parameter) -> Module | None:
        root, seen = self._holders.get(id(parameter)), set()
        while root is not None and (parent := self._parents.get(id(root))) is not None and id(root) not in seen:
            seen.add(id(root))
            root = parent
        return root

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
        wrapped = {
            id(vars(module)["_modules"].get("_orig_mod"))
            for module in self._modules
            if issubclass(type(module), OptimizedModule)
        }
        return wrapped | {id(module) for module in self._modules if is_compiled_in_place(module)}

    @cached_property
    def _modules(self) -> list[Module]:
        # Dynamo's own graphs hold parameters and modules, too.
        live = (module for module in instances_of(Module) if not issubclass(type(module), GraphModule))
        return [module for module in live if "_modules" in vars(module)]

    @cached_property
    def _holders(self) -> dict[int, Module]:
        """By a parameter's identity, the first module that holds it."""
        holders: dict[int, Module] = {}
        for module in self._modules:
            for parameter in vars(module)["_parameters"].values():
                holders.setdefault(id(parameter), module)
        return holders

    @cached_property
    def _parents(self) -> dict[int, Module]:
        """By a module's identity, the first that holds it."""
        parents: dict[int, Module] = {}
        for module in self._modules:
            for child in vars(module)["_modules"].values():
                parents.setdefault(id(child), module)
        return parents


def _is_wrapper(module: Module, name: str) -> bool:
    if name in _WRAPPED or issubclass(type(module), OptimizedModule):
        return True
    return name == "module" and type(module).__module__.startswith(_PARALLEL)
