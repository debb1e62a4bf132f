"""Health: flips, zeros, underflow and saturation against dense masks; samples at steps; listeners."""

import pytest
import torch
from torch import nn

import sparse_compile
from sparse_compile import weight_health as health
from sparse_compile.kernels import ops, reference
from sparse_compile.options import read_options
from sparse_compile.report import Health, record_health

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EAGER = {"sste.executor": "eager", "sste.when": "always"}


@pytest.fixture(autouse=True)
def nothing_watched(monkeypatch):
    health._watched.clear()
    monkeypatch.setattr(health, "_listeners", [])
    monkeypatch.setattr(health, "_every", 0)


def pruned(weight):
    operands = ops.new_pruned_weight(*weight.shape, weight.device)
    ops.prune_weight_(weight, torch.ones(1, device=weight.device), *operands)
    return operands


def kept(weight):
    """Dense mask of the two largest of each group: of a weight without ties the elements that pruning keeps."""
    magnitude = weight.reshape(-1, 4).abs()
    return (magnitude > magnitude.sort(dim=1).values[:, 1:2]).reshape(weight.shape)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 64), (80, 208)])
def test_flips_equal_those_of_dense_masks(device, shape):
    before, noise = torch.randn(2, *shape, device=device)
    after = before + 0.3 * noise
    expected = int((kept(before) != kept(after)).sum())
    assert expected > 0
    assert int(health.mask_flips(pruned(before)[1], pruned(after)[1])) == expected
    assert int(health.mask_flips(pruned(before)[1], pruned(before)[1])) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_bf16_operands_are_sampled_alike(device):
    before, noise = torch.randn(2, 80, 208, device=device)
    before[:, :4] = 0.0
    after = before + 0.3 * noise
    samples = []
    for weight in (before, after):
        operands = ops.new_pruned_weight_bf16(*weight.shape, weight.device)
        ops.prune_weight_bf16_(weight, torch.ones(1, device=device), *operands, True)
        samples.append(operands[:2])
    # Two of four zeros are kept in each row, and the padding.
    assert health._counts(*samples[0], None).tolist() == [-1, 80 * (2 + (256 - 208) // 2), 0]
    flips = int((reference.top2_mask(before) != reference.top2_mask(after)).sum())
    assert health._counts(*samples[1], samples[0][1]).tolist()[0] == flips


def ffn(features=80):
    return nn.Sequential(nn.Linear(features, 160), nn.ReLU(), nn.Linear(160, 64))


@pytest.mark.parametrize("device", DEVICES)
def test_samples_equal_the_pruned_weight(device):
    model = ffn().to(device)
    with torch.no_grad():
        model[0].weight[:, :8] *= 1e7  # the others underflow
    compiled = torch.compile(model.forward, backend="sste", options=EAGER)
    compiled(torch.randn(8, 80, device=device))
    first = sparse_compile.health()
    assert [name.split(".")[-1] for name in first] == ["0", "2"]
    assert {sample.flips for sample in first.values()} == {None}
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    payloads = [reference.prune_weight(weight.cpu(), torch.ones(1))[2].t().float() for weight in weights]
    for sample, payload, weight in zip(first.values(), payloads, weights, strict=True):
        zeros = (payload == 0).sum() / payload.numel()
        assert sample.zeros == pytest.approx(float(zeros))
        lost = (payload == 0) & kept(weight.cpu())
        assert sample.underflow == pytest.approx(float(lost.sum()) / (payload.numel() / 2))
        assert sample.saturated == pytest.approx(float((payload.abs() == 448).sum()) / (payload.numel() / 2))
    assert next(iter(first.values())).underflow > 0.5
    with torch.no_grad():
        model[2].weight.copy_(torch.randn_like(model[2].weight))
    compiled(torch.randn(8, 80, device=device))
    second = list(sparse_compile.health().values())
    flipped = (kept(weights[1]) != kept(model[2].weight.detach())).float().mean()
    assert [sample.flips for sample in second] == [0.0, pytest.approx(float(flipped))]


def test_samples_at_steps_go_to_listeners_and_the_report():
    written = []
    model = ffn(64)
    sparse_compile.on_health(lambda *scalar: written.append(scalar))
    compiled = torch.compile(model.forward, backend="sste", options=EAGER | {"sste.health": 2})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(6):
        compiled(torch.randn(8, 64)).square().sum().backward()
        optimizer.step()
    histories = list(sparse_compile.report().health.values())
    assert [len(history) for history in histories] == [3, 3]
    steps = [sample.step for sample in histories[0]]
    assert [step - steps[0] for step in steps] == [0, 2, 4]
    assert histories[0][0].flips is None
    assert histories[0][1].flips > 0
    names = list(sparse_compile.report().health)
    assert (f"sste/flips/{names[0]}", histories[0][2].flips, steps[2]) in written
    assert (f"sste/zeros/{names[1]}", histories[1][0].zeros, steps[0]) in written
    assert len(written) == 2 * (3 * 4 - 1)  # the first sample has no flips


def test_weights_of_one_name_are_told_apart():
    first, second = ffn(64), ffn(64)

    def function(model, x):
        return model(x)

    compiled = torch.compile(function, backend="sste", options=EAGER)
    for model in (first, second):
        compiled(model, torch.randn(8, 64))
    names = list(sparse_compile.health())
    assert len(set(names)) == 4


@pytest.mark.gpu
def test_a_weight_that_moves_keeps_its_name():
    model = ffn(64)
    compiled = torch.compile(model.forward, backend="sste", options=EAGER)
    names = []
    for device in ("cpu", "cuda", "cpu"):
        model.to(device)
        compiled(torch.randn(8, 64, device=device))
        samples = sparse_compile.health()
        names.append(list(samples))
    assert names[0] == names[1] == names[2]
    assert {sample.flips for sample in samples.values()} == {0.0}


def test_many_samples_are_thinned():
    for step in range(2000):
        record_health("up", Health(step=step, flips=None, zeros=0.5, underflow=0.0, saturated=0.0))
    steps = [sample.step for sample in sparse_compile.report().health["up"]]
    assert steps[0] == 0
    assert steps[-1] == 1999
    assert steps == sorted(steps)
    assert 256 <= len(steps) <= 512


@pytest.mark.parametrize("value", [-1, 2.5, True, "often"])
def test_wrong_option(value):
    with pytest.raises(ValueError, match=r"'sste.health' is .*; allowed is a number of optimizer steps"):
        read_options(None, {"sste.health": value})
