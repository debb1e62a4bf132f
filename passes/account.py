"""ACCOUNT: the products that are no linear to be rewritten: with a parameter, and why not, or without one."""

from collections import Counter
from collections.abc import Callable

from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.flow import Flow, Kind, Origin
from sparse_compile.passes.match_linear import LinearPattern, read_linear, target_name
from sparse_compile.passes.record_operations import Product
from sparse_compile.passes.roles import Role
from sparse_compile.passes.sites import Reason, Rejection
from sparse_compile.reporting.model import ATTENTION, PRODUCTS_OF_ACTIVATIONS
from sparse_compile.torch_internals.fake import is_fake
from sparse_compile.torch_internals.graph import example_value, module_name

GROUPED_ADVICE = (
    "experts are rewritten where torch.nn.functional.grouped_mm multiplies tokens that are sorted by expert; "
    "transformers: model.set_experts_implementation('grouped_mm')"
)


def account(flow: Flow, node: Node, name_of: Callable[[Node], str]) -> tuple[list[Rejection], Counter[str]]:
    """What a node multiplies: rejections where a parameter is in it; of the rest the FLOPs of a step, by what they are.

    Args:
        node: any that is no linear with a parameter for a weight.
        name_of: the model's own name of a parameter, by its placeholder.
    """
    effect, pattern = flow.effect(node), read_linear(node)
    times = flow.forwards(node)
    forward = sum(product.flops or 0 for product in effect.products)
    backward = effect.backward_flops if flow.has_backward(node) else 0
    rejections: list[Rejection] = []
    others: Counter[str] = Counter()
    for product in effect.products:
        # The backward of a node's products is counted as a whole: to each falls its share of the forward.
        share = (product.flops or 0) / forward if forward else 0.0
        flops = None if product.flops is None else round(product.flops * times + backward * share)
        origins = [flow.operand(node, positions) for positions in product.operands]
        weights = [index for index, origin in enumerate(origins) if origin.weights]
        # Where no kernel of its own serves, attention is made of plain products.
        if "attention" in product.op or target_name(node) == "scaled_dot_product_attention":
            others[ATTENTION] += flops or 0
        elif weights and (product.flops is not None or len(weights) < len(origins)):
            # Of more than two operands nobody knows which are multiplied with which: each parameter has a row.
            among = [[index] for index in weights] if len(origins) > 2 else [weights]
            rejections += [
                _refused(flow, node, product, operands, origins[operands[-1]], pattern, flops, name_of)
                for operands in among
            ]
        elif pattern is not None and target_name(node) == "linear":
            rejections.append(_without_parameter(node, flops))
        else:
            others[PRODUCTS_OF_ACTIVATIONS] += flops or 0
    if effect.unknown:
        rejections += _not_understood(flow, node, effect.unknown, name_of)
    return rejections, others


def _refused(
    flow: Flow,
    node: Node,
    product: Product,
    operands: list[int],
    origin: Origin,
    pattern: LinearPattern | None,
    flops: int | None,
    name_of: Callable[[Node], str],
) -> Rejection:
    """The row of a product with a parameter.

    Args:
        operands: those of the product that are made of parameters; ``origin`` is the last one's.
    """
    index = operands[-1]
    weight = min(origin.weights, key=list(flow.nodes).index)
    target, shape = target_name(node), tuple(example_value(weight).shape)
    as_linear = "write it as F.linear"
    kind = type(example_value(weight))
    if not is_fake(example_value(weight)) and kind is not Tensor:
        reason, detail = Reason.NOT_PLAIN, f"weight is a {kind.__name__}"
        advice = "leave it out of tensor and expert parallelism"
    elif "conv" in product.op:
        reason, detail, advice = Reason.CONVOLUTION, "convolutions are not rewritten", ""
    elif len(operands) > 1:
        reason, detail, advice = Reason.UNSUPPORTED_FORM, "both operands are parameters", ""
    elif origin.kind is Kind.GATHERED:
        reason, detail = Reason.NOT_2D, f"data choose a matrix of {shape} for each token"
        advice = GROUPED_ADVICE
    elif product.computed[index] or origin.computed:
        reason, detail = (
            Reason.NOT_A_PARAMETER,
            f"it is computed in the graph, for instance by a parametrization, from {name_of(weight)}",
        )
        advice = "give the linear a parameter itself: what changes in a step can't be pruned once"
    elif len(shape) < 2:
        reason, detail, advice = Reason.NOT_2D, f"it has shape {shape}; only [N, K] is a linear's", ""
    elif len(shape) > 2:
        reason, detail = Reason.NOT_2D, f"{target} multiplies by the matrices of one parameter {shape}"
        advice = GROUPED_ADVICE
    elif index == 0 and len(product.operands) == 2:
        reason, detail, advice = Reason.UNSUPPORTED_FORM, f"the weight is the left operand of {target}", as_linear
    elif pattern is not None:
        reason, detail = Reason.UNSUPPORTED_FORM, "a part, another shape, a lossy cast or a detached copy is multiplied"
        advice = f"{as_linear} of the whole parameter"
    else:
        reason, detail, advice = Reason.UNSUPPORTED_FORM, f"{target} is not rewritten yet", as_linear
    return Rejection(
        name=name_of(weight),
        role=Role.OTHER,
        shape=f"weight {shape}",
        reason=reason,
        detail=detail,
        advice=advice,
        node=node,
        weights=frozenset(origin.weights) if len(operands) == 1 else frozenset(),
        flops=flops,
    )


def _without_parameter(node: Node, flops: int | None) -> Rejection:
    """F.linear whose weight is no parameter, nor made of any alone."""
    return Rejection(
        name=module_name(node),
        role=Role.OTHER,
        shape="",
        reason=Reason.NOT_A_PARAMETER,
        detail="it is computed in the graph, for instance by a parametrization, or is a buffer or an input",
        advice=(
            "give the linear a parameter itself (FSDP: fully_shard does): what changes in a step can't be pruned once"
        ),
        node=node,
        flops=flops,
    )


def _not_understood(flow: Flow, node: Node, error: str, name_of: Callable[[Node], str]) -> list[Rejection]:
    """A node that could not be run on fake tensors, and that may multiply a parameter with something."""
    matrices = [source for source in node.all_input_nodes if _is_matrix(source)]
    weights = [weight for source in matrices for weight in flow.origin(source).weights]
    if len(matrices) < 2:
        return []
    return [
        Rejection(
            name=name_of(weight),
            role=Role.OTHER,
            shape=f"weight {tuple(example_value(weight).shape)}",
            reason=Reason.UNSUPPORTED_FORM,
            detail=f"what {target_name(node)} computes can't be told ({error})",
            advice="write it as F.linear",
            node=node,
        )
        for weight in dict.fromkeys(weights)
    ]


def _is_matrix(node: Node) -> bool:
    value = example_value(node)
    return isinstance(value, Tensor) and value.ndim >= 2 and value.is_floating_point()
