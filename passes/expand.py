"""EXPAND: an operation of PyTorch that multiplies by several weights becomes linears, attention and what lies between.

Before: ``%y = _transformer_encoder_layer_fwd(%x, 512, 8, %in_proj_weight, ...)``
After:  ``%qkv = linear(%x, %in_proj_weight, %in_proj_bias)``, ..., ``%y = layer_norm(%sum, ...)``

``F.multi_head_attention_forward`` is what nn.MultiheadAttention calls.  ``torch._transformer_encoder_layer_fwd`` is the
fast path of nn.TransformerEncoderLayer, which is taken without gradients only: there, too, weights must be multiplied
with as they are in training.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node, Proxy, map_arg
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import Parameter

from sparse_compile.errors import SparseCompileError
from sparse_compile.torch_internals.fake import is_fake, symbolic
from sparse_compile.torch_internals.graph import (
    checkpoint_body,
    example_value,
    is_checkpoint,
    modes_at,
    module_name,
    real_parameter,
)
from sparse_compile.torch_internals.operations import encoder_layer_fast_path


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``F.multi_head_attention_forward``: the same arguments and results, of arguments that it accepts."""
    if use_separate_proj_weight:
        weights: Sequence[Any] = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = map(F.linear, (query, key, value), weights, _thirds(in_proj_bias))
    elif query is key and key is value:
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)  # type: ignore[arg-type]
    elif in_proj_weight is not None and key is value:
        # As F does: one product for both, which read the same.
        w_q, w_kv = in_proj_weight.tensor_split((embed_dim_to_check,))
        b_q, b_kv = (None, None) if in_proj_bias is None else in_proj_bias.tensor_split((embed_dim_to_check,))
        q, (k, v) = F.linear(query, w_q, b_q), F.linear(key, w_kv, b_kv).chunk(2, -1)
    else:
        q, k, v = map(F.linear, (query, key, value), _thirds(in_proj_weight), _thirds(in_proj_bias))
    is_batched = query.ndim == 3
    if not is_batched:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat((x, bias.expand(-1, x.size(1), -1))) for x, bias in ((k, bias_k), (v, bias_v)))
    # [batch, heads, tokens, features of a head]
    q, k, v = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
    k = k if static_k is None else static_k.unflatten(0, (-1, num_heads))
    v = v if static_v is None else static_v.unflatten(0, (-1, num_heads))
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))

    if is_causal and key_padding_mask is None and not need_weights:
        mask = None
    else:
        is_causal = is_causal and key_padding_mask is None
        mask = _added_to_scores(attn_mask, key_padding_mask, num_heads, query.dtype)
    added_keys = (bias_k is not None) + add_zero_attn
    if mask is not None and added_keys:
        mask = F.pad(mask, (0, added_keys))
    dropout_p = dropout_p if training else 0.0
    if need_weights:
        attended, probabilities = _attend(q, k, v, mask, sqrt(num_heads / embed_dim_to_check), dropout_p)
        probabilities = probabilities.mean(1) if average_attn_weights else probabilities
    else:
        attended, probabilities = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal), None
    out = F.linear(attended.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if is_batched:
        return out, probabilities
    return out.squeeze(1), None if probabilities is None else probabilities.squeeze(0)


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """``torch._transformer_encoder_layer_fwd``, as nn.TransformerEncoderLayer computes where it trains.

    Masks are added to the scores: the fused operation takes every mask for one of zeros and minus infinity.

    Args:
        src: ``[batch, tokens, features]``.
        mask_type: 0 of a mask ``[tokens, tokens]``, 1 of keys ``[batch, tokens]``, 2 of all heads' scores.
    """

    def attention(x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        projections = (qkv_weight, qkv_bias, None, None, False, 0.0, proj_weight, proj_bias)
        of_heads = mask.flatten(0, 1) if mask is not None and mask_type == 2 else mask
        masks: dict[str, Any] = {"key_padding_mask" if mask_type == 1 else "attn_mask": of_heads}
        out, _ = multi_head_attention(x, x, x, embed_dim, num_heads, *projections, need_weights=False, **masks)
        return out.transpose(0, 1)

    def ffn(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        src = src + attention(norm_1(src))
        return src + ffn(norm_2(src))
    src = norm_1(src + attention(src))
    return norm_2(src + ffn(src))


_COMPOSITIONS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention,
    encoder_layer_fast_path: encoder_layer,
}


def expand(
    graph_module: GraphModule,
    is_pruned: Callable[[Parameter], bool] = lambda _: False,
    calls: Sequence[Node] = (),
) -> None:
    """Replace each such operation of the graph and of its checkpointed bodies, unless it runs on no ordinary tensors.

    Args:
        is_pruned: whether a weight has been pruned in training.
        calls: of checkpointed regions around the graph, the outermost first.

    Raises:
        ValueError: an operation that can't be replaced would compute densely with a weight trained pruned.
    """
    for node in list(graph_module.graph.nodes):
        if is_checkpoint(node):
            expand(checkpoint_body(graph_module, node), is_pruned, (*calls, node))
        elif node.op == "call_function" and node.target in _COMPOSITIONS:
            obstacle = _obstacle(node)
            if obstacle is None:
                _replace(node, calls)
            elif any(is_pruned(weight) for weight in map(real_parameter, node.all_input_nodes) if weight is not None):
                raise ValueError(
                    f"{_name(node)} of {module_name(node)!r} multiplies densely with weights that were trained pruned, "
                    f"and can't be replaced by linears, because {obstacle}. Call "
                    "torch.backends.mha.set_fastpath_enabled(False), which makes modules avoid it."
                )
    graph_module.recompile()


def _obstacle(node: Node) -> str | None:
    """Why an operation can't be replaced."""
    for argument in node.all_input_nodes:
        value = example_value(argument)
        if isinstance(value, Tensor) and value.is_nested:
            return f"its input {argument.name} is a nested tensor"
        if not is_fake(value):
            return f"its input {argument.name} is a {type(value).__name__}, no ordinary tensor"
    if isinstance(example_value(node), tuple) and any(_name(user) != "getitem" for user in node.users):
        return "its results are used together"
    return None


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _replace(node: Node, calls: Sequence[Node]) -> None:
    tracer = _Tracer(node)
    handed = {argument: tracer.proxy(argument) for argument in node.all_input_nodes}
    args, kwargs = map_arg((node.args, node.kwargs), cast(Any, handed.__getitem__))
    with modes_at(node, calls), node.graph.inserting_before(node):
        result = _COMPOSITIONS[node.target](*args, **kwargs)
    if isinstance(result, tuple):
        for user in list(node.users):
            _substitute(user, result[cast(int, user.args[1])])
        node.graph.erase_node(node)
    else:
        _substitute(node, result)


def _substitute(node: Node, result: Proxy | None) -> None:
    """Let what reads the node read the result, which must look the same."""
    expected = example_value(node)
    if result is None:
        for user in list(node.users):
            user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda other: None if other is node else other)
    else:
        actual = example_value(result.node)
        for attribute in ("shape", "dtype", "device", "requires_grad"):
            before, after = getattr(expected, attribute), getattr(actual, attribute)
            if before != after:
                raise SparseCompileError("expand", node.name, f"output {attribute} was {before}, is {after}")
        node.replace_all_uses_with(result.node)
    node.graph.erase_node(node)


class _Tracer(GraphAppendingTracer):
    """Writes a composition into the graph, each node with what dynamo would have recorded of it."""

    def __init__(self, replaced: Node) -> None:
        super().__init__(replaced.graph)
        self._meta = {name: value for name, value in replaced.meta.items() if name != "example_value"}
        self._fake_mode = next(example_value(node).fake_mode for node in replaced.all_input_nodes)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Node:
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        values, named = map_arg((args, kwargs), example_value)
        with symbolic(self._fake_mode):
            call = getattr(type(values[0]), target) if kind == "call_method" else target
            value = call(*values, **named)
        node.meta = {**self._meta, "example_value": value}
        return node

    def proxy(self, node: Node) -> Proxy:
        return _TensorProxy(node, self)

    def iter(self, obj: Any) -> Any:
        return iter([obj[i] for i in range(len(example_value(obj.node)))])


class _TensorProxy(Proxy):
    """A proxy that knows what the composition asks of a tensor while it is traced."""

    @property
    def ndim(self) -> int:
        return int(example_value(self.node).ndim)

    @property
    def dtype(self) -> torch.dtype:
        return example_value(self.node).dtype  # type: ignore[no-any-return]


def _thirds(projection: Tensor | None) -> Sequence[Any]:
    """Of a matrix or vector that holds those of query, key and value."""
    return (None, None, None) if projection is None else projection.chunk(3)


def _added_to_scores(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, num_heads: int, dtype: torch.dtype
) -> Tensor | None:
    """One mask, broadcastable to ``[batch, heads, queries, keys]``."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, num_heads)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    added = [mask if mask.dtype is not torch.bool else _minus_infinity_where(mask, dtype) for mask in masks]
    return sum(added[1:], added[0]) if added else None


def _minus_infinity_where(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """What is attended, and the probabilities ``[batch, heads, queries, keys]``, rounded where PyTorch rounds them."""
    batch, heads = q.size(0), q.size(1)
    scaled, transposed = (q * scale).flatten(0, 1), k.transpose(-2, -1).flatten(0, 1)
    if mask is None:
        scores = torch.bmm(scaled, transposed)
    else:
        scores = torch.baddbmm(mask.expand(batch, heads, q.size(2), k.size(2)).flatten(0, 1), scaled, transposed)
    probabilities = F.softmax(scores, dim=-1)
    if dropout_p > 0:
        probabilities = F.dropout(probabilities, p=dropout_p)
    attended = torch.bmm(probabilities, v.flatten(0, 1))
    return attended.unflatten(0, (-1, heads)), probabilities.unflatten(0, (-1, heads))
