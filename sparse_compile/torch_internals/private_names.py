"""PyTorch's private names that the package uses, and whether the installed PyTorch has them."""

from importlib import import_module
from operator import attrgetter

# Module, name.
PRIVATE_NAMES = (
    ("torch", "Tensor._base"),
    ("torch", "Tensor._use_count"),
    ("torch", "_TorchCompileInductorWrapper"),
    ("torch", "_fused_sdp_choice"),
    ("torch", "_grouped_mm"),
    ("torch", "_transformer_encoder_layer_fwd"),
    ("torch", "ops.aten._unsafe_view.default"),
    ("torch._C", "_DisableAutocast"),
    ("torch._C", "_current_graph_task_id"),
    ("torch._C", "_is_tracing"),
    ("torch._C", "_set_grad_enabled"),
    ("torch._C", "_storage_Use_Count"),
    ("torch._C._dynamo.eval_frame", "get_eval_frame_callback"),
    ("torch._C._functorch", "peek_interpreter_stack"),
    ("torch._decomp", "core_aten_decompositions"),
    ("torch._decomp", "decomposition_table"),
    ("torch._dispatch.python", "enable_python_dispatcher"),
    ("torch._dynamo", "OptimizedModule"),
    ("torch._dynamo.backends.registry", "_BACKENDS"),
    ("torch._dynamo.config", "skip_tensor_guards_with_matching_dict_tags"),
    ("torch._dynamo.external_utils", "wrap_inline"),
    ("torch._dynamo.symbolic_convert", "tls"),
    ("torch._functorch.config", "ban_recompute_materialized_backward"),
    ("torch._guards", "CompileContext.current_compile_id"),
    ("torch._guards", "detect_fake_mode"),
    ("torch._higher_order_ops.triton_kernel_wrap", "kernel_side_table.get_kernel"),
    ("torch._inductor", "list_mode_options"),
    ("torch._inductor.compile_fx", "compile_fx"),
    ("torch._inductor.compile_fx", "compile_fx_inner"),
    ("torch._inductor.config", "get_config_copy"),
    ("torch._inductor.config", "triton.cudagraphs"),
    ("torch._inductor.cudagraph_trees", "CUDAGraphTreeManager.new_graph_id"),
    ("torch._inductor.cudagraph_trees", "get_container"),
    ("torch._inductor.cudagraph_trees", "reset_cudagraph_trees"),
    ("torch._inductor.decomposition", "select_decomp_table"),
    ("torch._logging._internal", "trace_log"),
    ("torch._logging._internal", "trace_structured"),
    ("torch._ops", "HigherOrderOperator"),
    ("torch._subclasses.fake_tensor", "FakeTensor"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode"),
    ("torch._subclasses.fake_tensor", "FakeTensorMode.from_tensor"),
    ("torch.amp.autocast_mode", "_enter_autocast"),
    ("torch.amp.autocast_mode", "_exit_autocast"),
    ("torch.autograd", "_unsafe_preserve_version_counter"),
    ("torch.compiler._cache", "CacheArtifact"),
    ("torch.compiler._cache", "CacheArtifactFactory.register"),
    ("torch.compiler._cache", "CacheArtifactManager.record_artifact"),
    ("torch.distributed.checkpoint.state_dict", "_init_optim_state"),
    ("torch.distributed.distributed_c10d", "_get_default_store"),
    ("torch.distributed.fsdp._fully_shard._fsdp_param", "FSDPParam"),
    ("torch.distributed.fsdp._fully_shard._fsdp_param", "FSDPParam.free_unsharded_param"),
    ("torch.distributed.tensor._utils", "compute_local_shape_and_global_offset"),
    ("torch.fx._symbolic_trace", "_is_fx_tracing_flag"),
    ("torch.fx.experimental.sym_node", "SymNode.hint"),
    ("torch.nn", "Module._compiled_call_impl"),
    ("torch.optim", "Optimizer._patch_step_function"),
    ("torch.optim", "Optimizer.profile_hook_step"),
    ("torch.utils._python_dispatch", "TorchDispatchMode"),
    ("torch.utils._python_dispatch", "is_in_torch_dispatch_mode"),
    ("torch.utils._pytree", "tree_flatten"),
    ("torch.utils._pytree", "tree_map_only"),
)


def self_test() -> list[str]:
    """The private names that this PyTorch lacks; empty on every supported version."""
    missing = []
    for module, name in PRIVATE_NAMES:
        try:
            attrgetter(name)(import_module(module))
        except (AttributeError, ImportError):
            missing.append(f"{module}.{name}")
    return missing
