"""What dynamo says about a compilation, and what it is told: backends, limits, artifacts, the ends of graphs."""

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import cast

import torch
from torch.fx import GraphModule


def register_entry_point(name: str, value: str) -> None:
    """Make ``torch.compile(backend=name)`` work where the package is importable but not installed.

    The same entry as an installation's metadata gives, so that both together register one backend.
    """
    from torch._dynamo.backends import registry

    registry._BACKENDS.setdefault(name, EntryPoint(name=name, value=value, group="torch_dynamo_backends"))


def guard_frozen_parameters() -> None:
    """Let dynamo see, from the next compilation on, that a parameter was frozen or unfrozen.

    PyTorch 2.11 takes the tensors of a module for unchanged while its dicts are: a parameter that was frozen when it
    was compiled would never get a gradient again.  2.12 looks at each.
    """
    if torch.__version__ < "2.12":
        from torch._dynamo import config

        config.skip_tensor_guards_with_matching_dict_tags = False


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


def compile_id(graph_module: GraphModule) -> str:
    """Dynamo's name of the compilation, ``1/0``: frame and recompilation; empty outside of one."""
    from torch._guards import CompileContext

    found = graph_module.meta.get("dynamo_compile_id") or CompileContext.current_compile_id()
    return "" if found is None else str(found)


def compiled_frame() -> str:
    """Dynamo's number of the function that it is compiling; empty outside of a compilation."""
    from torch._guards import CompileContext

    return str(CompileContext.current_compile_id() or "").partition("/")[0]


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


@dataclass(frozen=True, slots=True)
class RecompileLimit:
    """What dynamo says when it will compile a function no more.

    Attributes:
        function: ``'forward' (file.py:12)``.
        name, value: of the limit, ``recompile limit``.
        frame: the function, as ``compiled_frame`` names it.
    """

    function: str
    name: str
    value: int
    frame: str = ""

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
                call(RecompileLimit(str(function), str(name).replace("_", " "), cast(int, value), compiled_frame()))

    logging.getLogger("torch._dynamo.convert_frame").addHandler(Listener())


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
