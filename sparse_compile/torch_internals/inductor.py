"""Inductor: its options, and the compilation of a graph with it."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch.fx import GraphModule


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
    patched = {"ban_recompute_materialized_backward": False} if recompute else {}
    if not generate_code:
        how = {"inner_compile": _run_eagerly, "decompositions": _eager_decompositions()}
        # A cache keeps generated code alone; its key, of all sources of PyTorch and Triton, would be made for nothing.
        patched["enable_autograd_cache"] = False
    # AOTAutograd caches graphs that call a python function only if told what stands for the function's code.
    marked = {} if cacheable_function is None else {cacheable_function: _sources_hash()}
    cacheable = {"unsafe_marked_cacheable_functions": marked} if marked else {}
    with config.patch(patched):
        return cast(
            Callable[..., Any],
            compile_fx(graph_module, list(inputs), config_patches={**patches, **cacheable}, **how),
        )


@cache
def _sources_hash() -> str:
    """Hash of the package's sources: a changed package must miss the compiler's caches."""
    folders = os.walk(Path(__file__).parents[1], followlinks=True)
    sources = sorted(Path(folder, name) for folder, _, names in folders for name in names if name.endswith(".py"))
    return sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _eager_decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's, but those whose result only generated code can be: a view that is none, places in uint16."""
    from torch._inductor.decomposition import select_decomp_table

    aten = torch.ops.aten
    left = {aten._unsafe_view.default, aten.eye.default, aten.eye.m}
    return {op: decomposed for op, decomposed in select_decomp_table().items() if op not in left}


def _run_eagerly(graph_module: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    def run(inputs: list[Any]) -> Any:
        return torch.fx.Interpreter(graph_module).boxed_run(inputs)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def recorded_cuda_graphs(device: torch.device) -> int:
    """How many CUDA graphs Inductor has recorded on a device; each question counts as one, too."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None or device.type != "cuda":
        return 0
    manager = trees.get_container(device.index).tree_manager
    return 0 if manager is None else int(manager.new_graph_id().id)


def reset_cuda_graphs() -> None:
    # What was never imported holds no graphs; and dynamo, which calls this, cannot stand what an import may compile.
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()
