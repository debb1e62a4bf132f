"""Selective activation checkpointing: a policy that names aten.mm is obeyed for the rewritten linears."""

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import experts_training
from sparse_compile.kernels import grouped_ops, ops
from sparse_compile.torch_internals import inductor

OPTIONS = {"sste.executor": "eager", "sste.when": "always"}


def saves(*names):
    """A policy that saves the results of these operations."""

    def policy(context, op, *arguments, **named):
        saved = op in names
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


@pytest.fixture
def run(small_gpt, batch, monkeypatch):
    """Gradients of a checkpointed model under a policy, and the calls of each operation in its backward graph."""

    def go(policy, experts=False):
        graphs = []
        run_eagerly = inductor._run_eagerly

        def keep(graph_module, inputs, **kwargs):
            graphs.append(graph_module)
            return run_eagerly(graph_module, inputs, **kwargs)

        contexts = partial(create_selective_checkpoint_contexts, policy)
        model = experts_training.Model() if experts else small_gpt()
        given = next(experts_training.batches()) if experts else batch
        kwargs = {} if policy is None else {"context_fn": contexts}
        block = partial(checkpoint, use_reentrant=False, **kwargs)

        def forward(ids, targets):
            x = model.embedding(ids)
            for layer in model.blocks:
                x = block(layer, x)
            logits = model.head(model.norm(x))
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

        def of_experts(x, ids):
            return block(model, x, ids).float().square().mean()

        with monkeypatch.context() as patch:
            patch.setattr(inductor, "_run_eagerly", keep)
            loss = torch.compile(of_experts if experts else forward, backend="sste", options=OPTIONS)(*given)
            torch.manual_seed(1)
            loss.backward()
        _, backward = graphs
        calls = Counter(node.target for node in backward.graph.nodes)
        return [parameter.grad for parameter in model.parameters()], calls

    return go


def test_products_are_saved_where_the_policy_saves_mm(run):
    torch.manual_seed(0)
    gradients, everything = run(None)
    torch.manual_seed(0)
    same, selected = run(saves(torch.ops.aten.mm.default))
    # wgrad of two linears in 2:4; dgrad of all four and the head, and wgrad of the others, in dense FP8.
    assert (selected[ops.sparse_mm], selected[ops.scaled_mm]) == (2, 5 + 3)
    # What the last layer of a block makes is not needed again.
    assert everything[ops.sparse_mm] > selected[ops.sparse_mm]
    assert everything[ops.scaled_mm] > selected[ops.scaled_mm]
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


@pytest.mark.nightly
def test_products_of_experts_are_saved_where_the_policy_saves_grouped_mm(run):
    torch.manual_seed(0)
    gradients, everything = run(None, experts=True)
    torch.manual_seed(0)
    same, selected = run(saves(torch.ops.aten._grouped_mm.default), experts=True)
    # dgrad of both; the product whose result the loss reads is needed again without the policy, and the one before it.
    assert selected[grouped_ops.grouped_scaled_mm] == everything[grouped_ops.grouped_scaled_mm] == 2
    assert (everything[grouped_ops.grouped_sparse_mm], selected[grouped_ops.grouped_sparse_mm]) == (2, 0)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


@pytest.mark.nightly
def test_other_operations_are_asked_for_by_their_names(run):
    asked = set()

    def policy(context, op, *arguments, **named):
        asked.add(op)
        return CheckpointPolicy.PREFER_RECOMPUTE

    run(policy)
    assert torch.ops.aten.mm.default in asked
    assert not {ops.sparse_mm, ops.scaled_mm} & asked
    assert torch.ops.aten.amax.default in asked
