"""Fused activation functions in Triton, as libraries write them, leave an FFN an FFN."""

import pytest
import torch
import triton
import triton.language as tl
from torch.fx import Graph, GraphModule

from sparse_compile.passes.flow import Flow
from sparse_compile.passes.record_operations import Effect
from sparse_compile.passes.triton_kernels import is_elementwise


@triton.jit
def silu(x):
    return x * tl.sigmoid(x)


@triton.jit
def swiglu(gate, up, out, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(gate + offsets, mask=offsets < count)
    tl.store(out + offsets, silu(x.to(tl.float32)) * tl.load(up + offsets, mask=offsets < count), mask=offsets < count)


@triton.jit
def normalise(x, BLOCK: tl.constexpr):
    return x / tl.sum(x, axis=0)


@triton.jit
def norm(gate, up, out, count, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, normalise(tl.load(gate + offsets), BLOCK))


@triton.jit
def running(gate, up, out, count, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(count):
        total += tl.load(gate + row * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.arange(0, BLOCK), total)


@triton.jit
def scattered(gate, up, out, count, BLOCK: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, BLOCK) % 2, tl.load(gate + tl.arange(0, BLOCK)))


KERNELS = {swiglu: True, norm: False, running: False, scattered: False}


@pytest.mark.parametrize(("kernel", "expected"), KERNELS.items(), ids=lambda value: getattr(value, "__name__", None))
def test_what_keeps_elements_apart(kernel, expected):
    assert is_elementwise(kernel) == expected


def test_what_is_no_kernel_is_not_elementwise():
    assert not is_elementwise(object())


OUTPUTS = {
    "the tensor": lambda out: (out, out),
    "a view of it is written": lambda out: (out.view(-1), out),
    "a view of it is returned": lambda out: (out, out.view(-1)),
}


@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=OUTPUTS.keys())
@pytest.mark.parametrize(("kernel", "expected"), [(swiglu, Effect.COMPUTES), (norm, Effect.MIXES)])
def test_a_launch_in_a_graph(kernel, expected, outputs):
    """Dynamo traces launches on a GPU alone, so the node is made by hand."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    def launch(gate, up):
        written, returned = outputs(torch.empty_like(gate))
        triton_kernel_wrapper_mutation(
            kernel_idx=kernel_side_table.add_kernel(kernel),
            constant_args_idx=kernel_side_table.add_constant_args({"BLOCK": 64, "count": 512}),
            grid=[(8, 1, 1)],
            tma_descriptor_metadata={},
            kwargs={"gate": gate, "up": up, "out": written},
        )
        return returned

    graph = Graph()
    inputs = [graph.placeholder(name) for name in ("gate", "up")]
    for node in inputs:
        node.meta["example_value"] = torch.empty(8, 64)
    call = graph.call_function(launch, tuple(inputs))
    call.meta["example_value"] = torch.empty(8, 64)
    graph.output(call)
    effect = Flow(GraphModule(torch.nn.Module(), graph)).effect(call)
    assert (effect.unknown, effect.effect, effect.sources) == ("", expected, frozenset((0, 1)))
