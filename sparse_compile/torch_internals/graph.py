"""Dynamo's graphs: what it recorded of their nodes, checkpointed regions, copies, new inputs."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from operator import is_not
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

# In the metadata of a checkpointed body: the user's function that makes the contexts of forward and recomputation.
CHECKPOINT_CONTEXTS = "_checkpoint_context_fn"
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in ([^\n]+)\n([^\n]*)')
# Some of its functions are Python of which dynamo records the lines.
_FUNCTIONAL = torch.nn.functional.__file__
_GRAPH_MODULE_ATTRIBUTES = ("_param_name_to_source", "_source_to_user_stacks", "compile_subgraph_reason")


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
    found = [frame for frame in _FRAME.findall(node.meta.get("stack_trace") or "") if frame[0] != _FUNCTIONAL]
    return [(file, int(line), function, code.strip()) for file, line, function, code in found]


def mutated(node: Node) -> bool:
    """Whether dynamo, when it traced the graph, saw the tensor of a placeholder change."""
    value = example_value(node)
    return isinstance(value, torch.Tensor) and value._version > 0


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
