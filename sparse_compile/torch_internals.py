"""Every private name of PyTorch that we lean on, in one place.  ``self_test`` says which are missing.

Importing this module imports no ``torch._dynamo``, because ``autoload`` does so while PyTorch is being imported.
"""

import copy
import gc
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from importlib import import_module
from importlib.metadata import EntryPoint
from itertools import takewhile
from operator import attrgetter, is_not
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet, ref

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module, Parameter
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from torch._dynamo import OptimizedModule
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["FakeTensor", "FakeTensorMode", "OptimizedModule", "WeakTensorKeyDictionary"]

_LATE = {
    "FakeTensor": "torch._subclasses.fake_tensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "OptimizedModule": "torch._dynamo",
}

# In the metadata of a checkpointed body: the user's function that makes the contexts of forward and recomputation.
CHECKPOINT_CONTEXTS = "_checkpoint_context_fn"
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in ([^\n]+)\n([^\n]*)')
_GRAPH_MODULE_ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason")


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def self_test() -> list[str]:
    """The private names that this PyTorch lacks; empty on every supported version."""
    missing = []
    for module, name in (
        ("torch", "Tensor._use_count"),
        ("torch", "_TorchCompileInductorWrapper"),
        ("torch", "_transformer_encoder_layer_fwd"),
        ("torch._C", "_current_graph_task_id"),
        ("torch._C", "_is_tracing"),
        ("torch._C", "_set_grad_enabled"),
        ("torch._C._dynamo.eval_frame", "get_eval_frame_callback"),
        ("torch._C._functorch", "peek_interpreter_stack"),
        ("torch._dynamo.external_utils", "wrap_inline"),
        ("torch._dynamo.backends.registry", "_BACKENDS"),
        ("torch._dynamo.symbolic_convert", "tls"),
        ("torch._functorch.config", "ban_recompute_materialized_backward"),
        ("torch._functorch.aot_autograd", "boxed_nop_preserve_node_meta"),
        ("torch._guards", "CompileContext.current_compile_id"),
        ("torch._guards", "detect_fake_mode"),
        ("torch._inductor.compile_fx", "compile_fx"),
        ("torch._inductor.cudagraph_trees", "reset_cudagraph_trees"),
        ("torch._inductor.decomposition", "select_decomp_table"),
        ("torch._higher_order_ops.triton_kernel_wrap", "kernel_side_table.get_kernel"),
        ("torch._logging._internal", "trace_log"),
        ("torch._logging._internal", "trace_structured"),
        ("torch._decomp", "decomposition_table"),
        ("torch._subclasses.fake_tensor", "FakeTensor"),
        ("torch._subclasses.fake_tensor", "FakeTensorMode"),
        ("torch.amp.autocast_mode", "_enter_autocast"),
        ("torch.amp.autocast_mode", "_exit_autocast"),
        ("torch._subclasses.fake_tensor", "FakeTensorMode.from_tensor"),
        ("torch.autograd", "_unsafe_preserve_version_counter"),
        ("torch.distributed.distributed_c10d", "_get_default_store"),
        ("torch.distributed.fsdp._fully_shard._fsdp_param", "FSDPParam.free_unsharded_param"),
        ("torch.fx._symbolic_trace", "_is_fx_tracing_flag"),
        ("torch.fx.experimental.sym_node", "SymNode.hint"),
        ("torch.nn", "Module._compiled_call_impl"),
        ("torch", "ops.aten._unsafe_view.default"),
        ("torch.optim", "Optimizer._patch_step_function"),
        ("torch.optim", "Optimizer.profile_hook_step"),
        ("torch.utils._python_dispatch", "is_in_torch_dispatch_mode"),
    ):
        try:
            attrgetter(name)(import_module(module))
        except (AttributeError, ImportError):
            missing.append(f"{module}.{name}")
    return missing


def register_entry_point(name: str, value: str) -> None:
    """Make ``torch.compile(backend=name)`` work where the package is importable but not installed.

    The same entry as an installation's metadata gives, so that both together register one backend.
    """
    from torch._dynamo.backends import registry

    registry._BACKENDS.setdefault(name, EntryPoint(name=name, value=value, group="torch_dynamo_backends"))


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


def with_frame_of_its_own(module: Module) -> Callable[..., Any]:
    """The call of a module, hooks included, as Module.compile compiles it.

    Dynamo does not trace the forward of PyTorch's own containers if it is the outermost: there one is put around it.
    """
    call: Callable[..., Any] = module._call_impl
    if type(module).forward.__module__.startswith("torch.nn.modules."):
        return import_module("torch._dynamo.external_utils").wrap_inline(call)  # type: ignore[no-any-return]
    return call


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


def mode_options(mode: str | None) -> dict[str, Any]:
    """The options that a mode of torch.compile stands for."""
    if mode in (None, "default"):
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def inductor_patches(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Inductor's configuration for a ``mode`` and ``options`` of torch.compile, validated as Inductor does."""
    config: dict[str, Any] = torch._TorchCompileInductorWrapper(mode, options, None).config
    return config


def uses_cuda_graphs(patches: Mapping[str, Any]) -> bool:
    """Whether Inductor, so configured, runs CUDA graphs."""
    from torch._inductor import config

    return bool(patches.get("triton.cudagraphs", config.triton.cudagraphs))


def inductor_option_names() -> set[str]:
    from torch._inductor import config

    return set(config.get_config_copy())


def compile_graph(
    graph_module: GraphModule,
    inputs: Sequence[Any],
    patches: Mapping[str, Any],
    *,
    generate_code: bool,
    recompute: bool,
    cacheable_function: str | None = None,
) -> Callable[..., Any]:
    """AOTAutograd and Inductor over a pre-grad graph.

    Args:
        generate_code: otherwise the traced graphs run eagerly.
        recompute: let backward compute again what it could fuse up to an operation that it cannot, as a GEMM.
        cacheable_function: the function of ours that the graph calls, if it does.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    # What a process found to be the faster of two kernels it keeps on disk under a key that PyTorch 2.11 cannot make of
    # kernels that come from a cache: the second process would fail.  Without it each process finds out anew.
    os.environ.setdefault("TORCHINDUCTOR_DISABLE_MULTI_KERNEL_CACHE", "1")
    how: dict[str, Any] = {"inner_compile": compile_fx_inner}
    if not generate_code:
        how = {"inner_compile": _run_eagerly, "decompositions": _eager_decompositions()}
    # AOTAutograd caches graphs that call a python function only if told what stands for the function's code.
    marked = {} if cacheable_function is None else {cacheable_function: _sources_hash()}
    cacheable = {"unsafe_marked_cacheable_functions": marked} if marked else {}
    partition = {"ban_recompute_materialized_backward": False} if recompute else {}
    with config.patch(partition):
        return cast(
            Callable[..., Any],
            compile_fx(graph_module, list(inputs), config_patches={**patches, **cacheable}, **how),
        )


@cache
def _sources_hash() -> str:
    """Hash of the package's sources: a changed package must miss the compiler's caches."""
    folders = os.walk(Path(__file__).parent, followlinks=True)
    sources = sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py"))
    return sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _eager_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's, but those that make a view where the result is none: generated code has no views."""
    from torch._inductor.decomposition import select_decomp_table

    unsafe_view = torch.ops.aten._unsafe_view.default
    return {op: decomposed for op, decomposed in select_decomp_table().items() if op is not unsafe_view}


def _run_eagerly(graph_module: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    from torch._functorch.aot_autograd import boxed_nop_preserve_node_meta

    run: Callable[..., Any] = boxed_nop_preserve_node_meta(graph_module, inputs)
    return run


def reset_cuda_graphs() -> None:
    # What was never imported holds no graphs; and dynamo, which calls this, cannot stand what an import may compile.
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


def backend_fake_mode(inputs: Sequence[Any]) -> Any:
    """The FakeTensorMode in which AOTAutograd will trace; not the one of the nodes' ``example_value``."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode(inputs)


def fake_inputs(arguments: Sequence[Any]) -> list[Any]:
    """What stands for a call's arguments when a graph is compiled outside of dynamo: their sizes are fixed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode()
    return [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]


def clone_graph_module(graph_module: GraphModule) -> GraphModule:
    """A copy of dynamo's graph that may be edited, checkpointed bodies included.

    Dynamo reads its own graph again after the backend returns, so that graph must stay as it is.
    """
    clone = GraphModule(graph_module, copy.deepcopy(graph_module.graph), class_name=type(graph_module).__name__)
    clone.meta = dict(graph_module.meta)
    for name in _GRAPH_MODULE_ATTRIBUTES:
        if hasattr(graph_module, name):
            setattr(clone, name, getattr(graph_module, name))
    for old, new in zip(graph_module.graph.nodes, clone.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
        if new.op == "get_attr" and isinstance(getattr(clone, new.target, None), GraphModule):
            setattr(clone, new.target, clone_graph_module(getattr(clone, new.target)))
    return clone


def graph_before_cut(graph_module: GraphModule) -> GraphModule | None:
    """Dynamo's whole graph, of which the backend is given a part, as DDP's buckets cut it; None if it is given all."""
    from torch._dynamo.symbolic_convert import tls

    translator = getattr(tls, "current_tx", None)
    if translator is None or translator.output.graph is graph_module.graph:
        return None
    return cast("GraphModule | None", translator.output.graph.owning_module)


def forget_examples(graph_module: GraphModule) -> GraphModule:
    """The graph without the real tensors that dynamo traced it with, which it would keep alive."""
    for node in graph_module.graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)
    return graph_module


def several_processes() -> bool:
    """Whether others train the same model."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def shared_store() -> Any | None:
    """The store through which the processes of a job found each other; None where there is one process."""
    if not several_processes():
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store()


def is_checkpoint(node: Node) -> bool:
    """Whether the node is an activation-checkpointed region: a call of its body, its first argument."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.tag_activation_checkpoint


def checkpoint_body(caller: GraphModule, call: Node) -> GraphModule:
    """The graph that a checkpointed region runs."""
    return cast(GraphModule, getattr(caller, str(cast(Node, call.args[0]).target)))


def with_checkpoint_bodies(graph_module: GraphModule) -> Iterator[GraphModule]:
    """The graph, and those of the checkpointed regions in it."""
    yield graph_module
    for node in graph_module.graph.nodes:
        if is_checkpoint(node):
            yield from with_checkpoint_bodies(checkpoint_body(graph_module, node))


def example_value(node: Any) -> Any:
    """The fake value that dynamo recorded for a node; None for what is not a node or has none."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


# The fast path of nn.TransformerEncoderLayer.
encoder_layer_fast_path: Callable[..., Any] = torch._transformer_encoder_layer_fwd


@contextmanager
def modes_at(node: Node, calls: Sequence[Node] = ()) -> Iterator[None]:
    """Autocast and grad mode as a graph has set them where it comes to a node, from how they are where it begins.

    Args:
        calls: of the checkpointed regions around the node's graph, the outermost first.
    """
    from torch.amp.autocast_mode import _enter_autocast, _exit_autocast

    entered: dict[Node, Any] = {}
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            for reached in (*calls, node):
                for before in takewhile(partial(is_not, reached), reached.graph.nodes):
                    if before.target is torch._C._set_grad_enabled:
                        torch.set_grad_enabled(before.args[0])
                    elif before.target is _enter_autocast:
                        entered[before] = _enter_autocast(*before.args)
                    elif before.target is _exit_autocast:
                        _exit_autocast(entered.pop(before.args[0]))
            yield
        finally:
            for mode in reversed(entered.values()):
                _exit_autocast(mode)


def is_held(tensor: torch.Tensor) -> bool:
    """Whether something besides Python holds the tensor, such as a backward that is still to come."""
    return bool(tensor._use_count() > 1)  # type: ignore[attr-defined]


def instances_of(kind: type) -> Iterator[Any]:
    """All that are alive, by a walk over the heap; of frozen ones (``gc.freeze``) those that a script can reach."""
    # type(), because isinstance() would wake lazy proxies that pretend to be of the kind.
    listed = [found for found in gc.get_objects() if issubclass(type(found), kind)]
    known = set(map(id, listed))
    yield from listed
    yield from (found for found in _frozen_objects() if issubclass(type(found), kind) and id(found) not in known)


def is_trace(module: Module) -> bool:
    """Whether it stands for another module that was compiled, traced or exported, and holds that one's parameters."""
    export = sys.modules.get("torch.export.unflatten")
    exported = (export.InterpreterModule, export.UnflattenedModule) if export is not None else ()
    dynamo = sys.modules.get("torch._dynamo")
    compiled = (dynamo.OptimizedModule,) if dynamo is not None else ()
    return issubclass(type(module), (GraphModule, torch.jit.ScriptModule, *compiled, *exported))


def bare_modules_of(trace: Module) -> Iterator[Module]:
    """The modules without a class that a trace makes to hold parameters by their names."""
    if issubclass(type(trace), GraphModule):
        yield from (module for module in trace.modules() if type(module) is Module)


_frozen: "list[ref[Any]]" = []
_frozen_count = 0


def _frozen_objects() -> list[Any]:
    """Modules and optimizers that the collector does not list, by a walk from the globals and locals of the script."""
    global _frozen_count
    count = gc.get_freeze_count()
    if count > _frozen_count:
        _frozen[:] = [ref(found) for found in _reachable((Module, torch.optim.Optimizer))]
    _frozen_count = count
    return [found for known in _frozen if (found := known()) is not None]


def _reachable(kinds: tuple[type, ...]) -> list[Any]:
    """What of some classes the running frames and the main module hold, directly or through other objects."""
    pending: list[Any] = list(vars(sys.modules["__main__"]).values())
    for frame in sys._current_frames().values():
        caller: FrameType | None = frame
        while caller is not None:
            pending += caller.f_locals.values()
            caller = caller.f_back
    seen: set[int] = set()
    found = []
    while pending:
        held = pending.pop()
        # What belongs to modules of Python, and its classes, is no script's.
        if id(held) in seen or isinstance(held, (str, bytes, int, float, type, ModuleType, torch.Tensor, FrameType)):
            continue
        seen.add(id(held))
        if isinstance(held, FunctionType):
            pending += held.__closure__ or ()
            continue
        if issubclass(type(held), kinds):
            found.append(held)
        pending += gc.get_referents(held)
    return found


def call_with_new_optimizers(call: Callable[[torch.optim.Optimizer], None]) -> None:
    """Call with each optimizer that is alive, and with each that is made, copied or unpickled from now on.

    All of these pass through one method, which wraps the step for its hooks.
    """
    patch_step_function = torch.optim.Optimizer._patch_step_function

    def patch_and_call(optimizer: torch.optim.Optimizer) -> None:
        patch_step_function(optimizer)
        call(optimizer)

    torch.optim.Optimizer._patch_step_function = patch_and_call  # type: ignore[assignment,method-assign]
    for optimizer in instances_of(torch.optim.Optimizer):
        # Wrappers, as Accelerate's, are optimizers by name, and neither hold parameters nor take hooks.
        if "param_groups" in vars(optimizer):
            call(optimizer)


def nested_optimizer_steps() -> int:
    """How many steps of optimizers are running in this thread, one called by the other; 1 in the outermost.

    Asked of the stack, so that a step that failed leaves nothing behind.
    """
    wrapper = _step_wrapper()
    steps, frame = 0, sys._getframe()
    while (caller := frame.f_back) is not None:
        frame = caller
        # Not by identity: dynamo gives a compiled step other code, of the same name.
        steps += frame.f_code.co_name == wrapper.co_name and frame.f_code.co_filename == wrapper.co_filename
    return steps


@cache
def _step_wrapper() -> CodeType:
    return torch.optim.Optimizer.profile_hook_step(lambda _: None).__code__


_sharders: "WeakSet[Any]" = WeakSet()


def sharded_parameter(weight: torch.Tensor) -> torch.Tensor | None:
    """The parameter that FSDP2 keeps in shards: of its gathered form, or that itself; None if FSDP2 manages neither."""
    sharder = _sharder(weight)
    return None if sharder is None else cast(torch.Tensor, sharder.sharded_param)


def call_when_freed(weight: torch.Tensor, call: Callable[[], None]) -> None:
    """Let FSDP2 make a call each time that it has freed the memory of a gathered weight, which it must manage."""
    sharder = _sharder(weight)
    assert sharder is not None
    free = sharder.free_unsharded_param

    def free_and_call() -> None:
        free()
        call()

    sharder.free_unsharded_param = free_and_call


def _sharder(weight: torch.Tensor) -> Any | None:
    """What of FSDP2 manages a weight, in shards or gathered; the gathered form itself knows nothing of it."""
    module = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_param")
    # Libraries import FSDP without using it; its use makes a class for each class of modules.
    if module is None or not torch.distributed.fsdp.FSDPModule.__subclasses__():
        return None
    _know_sharders(module.FSDPParam)
    return _manager_of(weight, _sharders)


@cache
def _know_sharders(kind: type) -> None:
    """Those that are alive, by one walk over the heap, and those that are made from now on."""
    initialise = kind.__init__  # type: ignore[misc]

    def initialise_and_know(sharder: Any, *args: Any, **kwargs: Any) -> None:
        initialise(sharder, *args, **kwargs)
        _sharders.add(sharder)

    kind.__init__ = initialise_and_know  # type: ignore[misc]
    _sharders.update(instances_of(kind))
    for module in instances_of(torch.distributed.fsdp.FSDPModule):
        state = module._get_fsdp_state()
        # PyTorch 2.11 has one group.
        for group in getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]:
            _sharders.update(group.fsdp_params if group is not None else ())


def _manager_of(weight: torch.Tensor, sharders: Iterable[Any]) -> Any | None:
    for sharder in sharders:
        if weight is sharder.sharded_param or weight is getattr(sharder, "_unsharded_param", None):
            return sharder
    return None


def versions_kept(tensors: Sequence[torch.Tensor]) -> AbstractContextManager[None]:
    """Writing to the tensors does not count as a change: a backward that saved them goes on."""
    return torch.autograd._unsafe_preserve_version_counter(tuple(tensors))  # type: ignore[attr-defined]


def unsafe_view(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """``tensor.view(shape)`` that autograd takes for a tensor of its own: for one that nobody else reads or writes."""
    return cast(torch.Tensor, torch.ops.aten._unsafe_view.default(tensor, shape))


def local_tensor(tensor: Any) -> torch.Tensor:
    """The shard of a DTensor that this process holds; any other tensor itself."""
    module = sys.modules.get("torch.distributed.tensor")
    sharded = module is not None and isinstance(tensor, module.DTensor)
    return cast(torch.Tensor, tensor.to_local() if sharded else tensor)


def is_fake(value: Any) -> bool:
    """Whether an example value stands for an ordinary tensor.

    Tensors of other classes, such as DTensor, hold fake tensors; so do those that torch.func's transforms wrap.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def hint(size: int | torch.SymInt) -> int | None:
    """The size that a symbolic one had when dynamo traced, without a guard on it; None if it depends on data."""
    if isinstance(size, torch.SymInt):
        return cast("int | None", size.node.hint)
    return size


# What stands for a size that depends on data where nodes are run on fake tensors: a number that most sizes divide.
_UNKNOWN_SIZE = 64


def concrete_size(size: Any) -> Any:
    """A number for a symbolic one: what it was when dynamo traced; where it depends on data, one that stands for it."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    known = size.node.hint
    if known is None:
        environment = size.node.shape_env
        # PyTorch 2.11 has the older name only, and newer versions warn of it.
        name = "backed_var_to_val" if hasattr(environment, "backed_var_to_val") else "var_to_val"
        expression = size.node.expr.xreplace(getattr(environment, name))
        known = expression.xreplace(dict.fromkeys(expression.free_symbols, _UNKNOWN_SIZE))
    kind = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(size)]
    return kind(known)


def has_unbacked_size(value: Any) -> bool:
    """Whether a size of a tensor depends on data."""
    return isinstance(value, torch.Tensor) and any(hint(size) is None for size in value.shape)


def storage_key(tensor: torch.Tensor) -> int:
    """The same for tensors that share memory, fake ones too."""
    return int(tensor.untyped_storage()._cdata)


def triton_kernel(index: int) -> Any:
    """The user's Triton kernel that a node of dynamo's graph launches."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    return kernel_side_table.get_kernel(index)


@cache
def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """PyTorch's definitions of operations by others."""
    from torch._decomp import core_aten_decompositions, decomposition_table

    return {**decomposition_table, **core_aten_decompositions()}


def real_parameter(node: Node) -> torch.nn.Parameter | None:
    """The parameter behind a placeholder of dynamo's graph."""
    argument = node.meta.get("grapharg")
    real = argument.example if argument is not None else None
    return real if isinstance(real, torch.nn.Parameter) else None


def is_buffer(node: Node) -> bool:
    """Whether a placeholder of dynamo's graph is a module's buffer."""
    return "_buffers[" in _access_path(node)


def _access_path(node: Node) -> str:
    """How the traced function reaches what a placeholder stands for, ``L['self']._modules['fc']...``; or nothing."""
    name = getattr(getattr(node, "_dynamo_source", None), "name", None)
    text = name() if callable(name) else name
    return text if isinstance(text, str) else ""


def parameter_name(node: Node) -> str:
    """Dotted name of the parameter behind a placeholder, from its access path, less a final ``.weight``."""
    text = _access_path(node)
    if not text:
        return node.name
    parts = re.findall(r"\['?([^']+?)'?\]", text)
    # The module is a local: of its forward, of a decorated forward as Accelerate's, or of dynamo's frame around a call.
    parts = parts[1:] if text.startswith(("L['self']", "L['args']", "L['fn']")) else parts
    return ".".join(parts).removesuffix(".weight") or text


def user_frames(node: Node) -> list[tuple[str, int, str, str]]:
    """``(file, line, function, code)`` of the user's code that a node was traced from, the outermost first."""
    found = _FRAME.findall(node.meta.get("stack_trace") or "")
    return [(file, int(line), function, code.strip()) for file, line, function, code in found]


def compile_id(graph_module: GraphModule) -> str:
    """Dynamo's name of the compilation, ``1/0``: frame and recompilation; empty outside of one."""
    from torch._guards import CompileContext

    found = graph_module.meta.get("dynamo_compile_id") or CompileContext.current_compile_id()
    return "" if found is None else str(found)


def graph_end(graph_module: GraphModule) -> tuple[str, str, str]:
    """Why dynamo ended the graph; ``file:line`` of the user's code there; dynamo's hints, if it is a graph break."""
    end = getattr(graph_module, "compile_subgraph_reason", None)
    if end is None:
        return "dynamo does not say; the buckets of DDP end without a reason", "", ""
    stack = list(end.user_stack or ())
    where = f"{stack[-1].filename}:{stack[-1].lineno}" if stack else ""
    if not end.graph_break:
        return "the function returns" if end.reason == "return_value" else str(end.reason), where, ""
    reason, _, rest = str(end.reason).partition("\n")
    hints = re.findall(r"^ *Hint: (.*)$", rest, re.MULTILINE)
    return f"graph break: {reason}", where, " ".join(hints)


def mutated(node: Node) -> bool:
    """Whether dynamo, when it traced the graph, saw the tensor of a placeholder change."""
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value._version > 0


@dataclass(frozen=True, slots=True)
class RecompileLimit:
    """What dynamo says when it will compile a function no more.

    Attributes:
        function: ``'forward' (file.py:12)``.
        name, value: of the limit, ``recompile limit``.
    """

    function: str
    name: str
    value: int

    @property
    def is_pytorchs(self) -> bool:
        """Whether the function is PyTorch's own, a frame around the user's."""
        return os.path.dirname(torch.__file__) in self.function


def on_recompile_limit(call: Callable[[RecompileLimit], None]) -> None:
    """Call it each time that dynamo reaches a limit, which it tells its log alone."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if str(record.msg).startswith("torch._dynamo hit config.") and isinstance(record.args, tuple):
                name, value, function, *_ = record.args
                call(RecompileLimit(str(function), str(name).replace("_", " "), cast(int, value)))

    logging.getLogger("torch._dynamo.convert_frame").addHandler(Listener())


def compiled_modules() -> list[Module]:
    """Modules that torch.compile or Module.compile was called with: a walk over the heap."""
    from torch._dynamo import OptimizedModule

    found = {}
    for module in instances_of(Module):
        root = module._orig_mod if isinstance(module, OptimizedModule) else module
        if root is not module or vars(module).get("_compiled_call_impl") is not None:
            found[id(root)] = root
    return list(found.values())


def traces_artifacts() -> bool:
    """Whether there is a structured trace."""
    from torch._logging._internal import trace_log

    return bool(trace_log.handlers)


def trace_artifact(name: str, content: Callable[[], str]) -> None:
    """An artifact of the compilation in the structured trace (``TORCH_TRACE``, tlparse), if there is one."""
    from torch._logging._internal import trace_structured

    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=content,
        expect_trace_id=False,
    )


def module_name(node: Node) -> str:
    """Dotted name of the module whose forward called the node; the node's own name outside of modules."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return node.name
    parts = [part for part in re.findall(r"\w+", str(stack[-1][0])) if part not in ("L", "self", "_modules")]
    return ".".join(parts) or node.name


def add_static_input(graph: Graph, name: str, fake: torch.Tensor) -> Node:
    """Append a placeholder whose storage keeps its address between calls, as a parameter does."""
    node = add_input(graph, name, fake)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return node


def add_input(graph: Graph, name: str, fake: torch.Tensor) -> Node:
    """Append a placeholder."""
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.meta = {"example_value": fake}
    node._dynamo_source = None
    return node
