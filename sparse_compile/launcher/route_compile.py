"""Routes torch.compile to this backend in this process, without changes to the script.

Imports no ``torch._dynamo``: ``autoload`` imports this file while PyTorch is being imported.
"""

import atexit
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.nn import Module
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparse_compile.launcher.accelerate_patch import accept_in_accelerate
from sparse_compile.launcher.auto_compile import AutoCompile
from sparse_compile.reporting.process_report import recorded, write_to
from sparse_compile.torch_internals.inductor import mode_options

# The backends of a script that names none in particular.
_DEFAULTS = (None, "inductor")


@dataclass(slots=True)
class _Seen:
    """What happened in this process, for the warning at its end."""

    launched: bool  # by our launcher; if not, the process may not train at all, such as torchrun's own
    backends: list[str] = field(default_factory=list)  # of the calls of torch.compile
    stepped: bool = False

    def trains(self) -> bool:
        return self.launched or self.stepped or recorded() > 0


def route(
    *,
    auto: bool,
    options: Mapping[str, Any] | None = None,
    overrides: Mapping[str, Any] | None = None,
    report_file: Path | None = None,
    launched: bool,
) -> None:
    """Make torch.compile use this backend if its caller names none, until the process ends.

    Args:
        auto: compile models that the script does not compile, at their first call in training.
        options: for every compilation by this backend; the script's own options take precedence.
        overrides: options that take precedence over the script's own.
        report_file: where to write the report when the process ends.
        launched: whether this process is known to run a training script.
    """
    seen = _Seen(launched)
    compile = torch.compile
    given, forced = dict(options or {}), dict(overrides or {})
    automatic = AutoCompile(lambda call: compile(call, backend="sste", options=given | forced)) if auto else None
    torch.compile = _routed(compile, given, seen, automatic, forced)
    accept_in_accelerate()

    def on_step(*_: Any) -> None:
        seen.stepped = True

    register_optimizer_step_post_hook(on_step)
    # Handlers run in reverse: the warning comes after the report.
    atexit.register(_warn_if_nothing, seen, automatic)
    if report_file is not None:
        write_to(report_file, when=seen.trains)


def _routed(
    compile: Callable[..., Any],
    options: dict[str, Any],
    seen: _Seen,
    automatic: AutoCompile | None,
    overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Callable[..., Any]:
    """torch.compile with backend "sste" if its caller names none, or "inductor"; others are kept."""

    @wraps(compile)
    def routed(model: Any = None, **named: Any) -> Any:
        if model is None:  # a decorator
            return lambda model: routed(model, **named)
        if named.get("backend") in _DEFAULTS:
            named["backend"] = "sste"
        if (options or overrides) and named["backend"] == "sste":
            # torch.compile takes a mode or options, not both.
            mode, own = mode_options(named.pop("mode", None)), named.get("options") or {}
            named["options"] = {**mode, **options, **own, **overrides}
        seen.backends.append(str(named["backend"]))
        if automatic is not None and isinstance(getattr(model, "__self__", model), Module):
            automatic.stop()
        return compile(model, **named)

    return routed


def _warn_if_nothing(seen: _Seen, automatic: AutoCompile | None) -> None:
    if recorded() > 0 or not seen.trains():
        return
    others = sorted(set(seen.backends) - {"sste"})
    if "sste" in seen.backends or (automatic is not None and automatic.compiled):
        reason = "no compiled function was called, or none had a graph to trace"
    elif others:
        reason = f"torch.compile was called only with other backends, which are kept: {', '.join(others)}"
    elif automatic is not None:
        reason = "no module with parameters that require gradients was called in training mode with gradients enabled"
    else:
        reason = (
            "the script calls neither torch.compile nor Module.compile; to compile its model, use "
            "`python -m sparse_compile --auto` or SPARSE_COMPILE=auto"
        )
    sys.stderr.write(f"sparse_compile: nothing was compiled with backend 'sste' in this process: {reason}\n")
