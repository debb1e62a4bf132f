"""What a rewritten linear returns is an ordinary tensor: what may be done to a dense one's output may be done to it.

Each program runs with a dense backend and with this one.  Both refuse it, or both give the same values, gradients,
strides, versions and aliases, up to the noise of FP8.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparse_compile
from sparse_compile.linear.function import LinearSpec, linear
from sparse_compile.recipe import FP8, SSTE_BF16, Gemm
from test_linear import operands_of

WIDTH = 64


def tenfold(grad):
    return 10 * grad


def in_no_grad(call):
    with torch.no_grad():
        return call()


def returning(y, *done):
    """``y``, when all that ``done`` stands for was done to it."""
    del done
    return y


def written_by_index(linear, x):
    y = linear(x)
    y[..., 0] = 0
    y[0] = y[1]
    return y


def added_in_place(linear, x):
    y = linear(x)
    y += x
    y *= 0.5
    return y


def written_without_gradients(linear, x):
    y = linear(x)
    in_no_grad(lambda: y.mul_(2))
    return y.sin()


def made_without_gradients(linear, x):
    y = in_no_grad(lambda: linear(x))
    y.mul_(2)
    y[0] = 0
    return y + linear(x)


def view_made_without_gradients(linear, x):
    y = in_no_grad(lambda: linear(x))
    view = in_no_grad(lambda: y[0])
    view.mul_(2)
    return y + linear(x)


def leaf_made_of_it(linear, x):
    y = in_no_grad(lambda: linear(x))
    y.requires_grad_()
    return y * 2 + linear(x)


def written_after_a_hook(linear, x):
    y = linear(x)
    y.register_hook(tenfold)
    y.mul_(2)
    return y


def hook_on_a_view(linear, x):
    y = linear(x)
    view = y[0]
    view.register_hook(tenfold)
    return y * 2 + view


def written_after_it_was_saved(linear, x):
    y = linear(x)
    z = y.sin()
    y.mul_(2)  # the backward of sin needs it
    return y + z


def with_a_bias_changed_before(linear, x):
    in_no_grad(lambda: None if linear.bias is None else linear.bias.add_(1))
    return linear(x)


def with_a_bias_changed_after(linear, x):
    y = linear(x)
    in_no_grad(lambda: None if linear.bias is None else linear.bias.add_(1))
    return y


def of_an_input_written_before(linear, x):
    h = x * 2
    h.mul_(2)
    return linear(h)


PROGRAMS = {
    "relu_": lambda linear, x: F.hardtanh(linear(x).add_(5), -1, 100, inplace=True),
    "silu inplace": lambda linear, x: F.silu(linear(x), inplace=True),
    "dropout inplace": lambda linear, x: F.dropout(linear(x), 0.0, inplace=True),
    "views written": lambda linear, x: returning(
        y := linear(x), y.view(-1).mul_(2), y.transpose(-1, -2).add_(1), y.narrow(-1, 0, 8).zero_()
    ),
    "detached and written": lambda linear, x: returning(y := linear(x), y.detach().mul_(2)) * 1,
    "data written": lambda linear, x: returning(y := linear(x), y.data.mul_(2)) * 1,
    "chunks written": lambda linear, x: returning(y := linear(x), y.chunk(2, -1)[0].add_(1)),
    "out=": lambda linear, x: torch.add(x, 1, out=linear(x)),
    "out= without gradients": lambda linear, x: x + in_no_grad(lambda: torch.add(x, 1, out=linear(x))),
    "set_": lambda linear, x: returning(y := linear(x), y.set_(x * 2)),
    "resize_": lambda linear, x: returning(y := linear(x), y.resize_(2, 2)),
    "retain_grad": lambda linear, x: returning(y := linear(x), y.retain_grad()) * 2,
    "hook": lambda linear, x: returning(y := linear(x), y.register_hook(tenfold)) * 2,
    "returned with its views": lambda linear, x: (y := linear(x), y[0], y.view(-1)),
    "returned twice": lambda linear, x: (y := linear(x), y),
    "a view alone": lambda linear, x: linear(x)[0],
    **{
        program.__name__: program
        for program in (
            written_by_index, added_in_place, written_without_gradients, made_without_gradients,
            view_made_without_gradients, leaf_made_of_it, written_after_a_hook, hook_on_a_view,
            written_after_it_was_saved, with_a_bias_changed_before, with_a_bias_changed_after,
            of_an_input_written_before,
        )
    },
}  # fmt: skip


class Program(nn.Module):
    def __init__(self, program, bias=True):
        super().__init__()
        self.linear, self.program = nn.Linear(WIDTH, WIDTH, bias=bias), program

    def forward(self, x):
        return self.program(self.linear, x)


def ours(recipe="fp8"):
    return {"backend": "sste", "options": {"sste.executor": "eager", "sste.when": "always", "sste.recipe": recipe}}


DENSE = {"backend": "aot_eager"}


def nothing_more(*results):
    return []


def outcome(program, compiler, x, *, bias=True, after=nothing_more):
    """What it gives, its gradients and what ``after`` finds; and how its results lie; or the kind of its error."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = Program(program, bias)
    x = x.detach().requires_grad_()
    try:
        found, loss = after_the_call(results := torch.compile(module, **compiler)(x), after)
        loss.backward()
    except RuntimeError as error:
        # Of a compiler's error the one inside.
        error = error.__cause__ or error
        return str(getattr(error, "inner_exception", error)).split("\n")[0][:60], None
    return all_of(module, x, results, found)


def several(results):
    return results if isinstance(results, tuple) else (results,)


def after_the_call(results, after):
    """What ``after`` finds, and the loss."""
    results = several(results)
    found = after(*results)
    return found, sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in results)


def all_of(module, x, results, found):
    results = several(results)
    values = [*results, x.grad, *(p.grad for p in module.parameters()), *module.parameters(), *found]
    return values, [(y.shape, y.dtype, y.stride(), y._is_view(), y._version, y.is_leaf) for y in results]


def compare(program, x, **arguments):
    assert_alike(outcome(program, ours(), x, **arguments), outcome(program, DENSE, x, **arguments), "it alone")


def assert_alike(actual, wanted, name):
    (values, layouts), (dense, dense_layouts) = actual, wanted
    assert layouts == dense_layouts, (name, dense if dense_layouts is None else values)
    if layouts is None:
        assert values == dense, name
        return
    assert len(values) == len(dense), name
    for value, expected in zip(values, dense, strict=True):
        if expected is None:
            assert value is None, name
        else:
            assert (value - expected).norm() <= 0.1 * expected.norm(), name


class Together(nn.Module):
    """Programs in one graph, which is compiled faster than one for each."""

    def __init__(self, cases):
        super().__init__()
        self.parts = nn.ModuleList(Program(program, bias) for program, _, bias, _ in cases)

    def forward(self, inputs):
        return [part(x) for part, x in zip(self.parts, inputs, strict=True)]


def compare_together(cases):
    """Of each name a program, its input, whether its linear has a bias, and what is asked afterwards."""
    outcomes = []
    for compiler in (ours(), DENSE):
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = Together(cases.values())
        inputs = [x.detach().requires_grad_() for _, x, *_ in cases.values()]
        results = torch.compile(module, fullgraph=True, **compiler)(inputs)
        found, losses = zip(
            *(after_the_call(y, after) for y, (*_, after) in zip(results, cases.values(), strict=True)), strict=True
        )
        sum(losses).backward()
        outcomes.append(list(map(all_of, module.parts, inputs, results, found)))
    for name, actual, wanted in zip(cases, *outcomes, strict=True):
        assert_alike(actual, wanted, name)


LAYOUTS = {
    "no bias-(8,)": (False, (8,)),
    "bias-(8,)": (True, (8,)),
    "bias-(2, 4)": (True, (2, 4)),
    "no bias-(2, 4)": (False, (2, 4)),
}


def in_turn(index, count):
    """Marks of as many values, of which the one whose turn it is runs by day."""
    return [() if index % count == place else pytest.mark.nightly for place in range(count)]


# By day those that are refused, or end a graph, are compiled alone, the others in one graph.
ALONE = (
    "chunks written", "leaf_made_of_it", "out=", "resize_", "retain_grad", "set_", "written_after_a_hook",
    "written_after_it_was_saved",
)  # fmt: skip


@pytest.mark.parametrize(
    ("program", "bias", "lead"),
    [
        pytest.param(program, bias, lead, id=f"{name}-{layout}", marks=marks if name in ALONE else pytest.mark.nightly)
        for index, (name, program) in enumerate(PROGRAMS.items())
        for (layout, (bias, lead)), marks in zip(LAYOUTS.items(), in_turn(index, len(LAYOUTS)), strict=True)
    ],
)
def test_it_behaves_as_a_dense_one(program, bias, lead):
    """With and without a bias, of inputs of two and three dimensions: each pair of them in turn, in a night all."""
    compare(program, torch.randn(*lead, WIDTH), bias=bias)


@pytest.mark.nightly
def test_they_behave_as_dense_ones_side_by_side():
    """Every other one; in a night each alone."""
    together = dict([(name, program) for name, program in PROGRAMS.items() if name not in ALONE][::2])
    layouts = list(LAYOUTS.values())
    cases = {}
    for index, (name, program) in enumerate(together.items()):
        bias, lead = layouts[index % len(layouts)]
        cases[name] = program, torch.randn(*lead, WIDTH), bias, nothing_more
    compare_together(cases)


def with_biases_of_other_shapes(linear, x):
    """All that F.linear broadcasts."""
    b, rows = linear.bias, torch.linspace(0, 1, x.shape[-2])[:, None]
    biases = [b, b[None], b * rows, b[:1], b[0], *([b[:1] * rows] if x.ndim == 2 else [(b * rows).expand(2, -1, -1)])]
    inputs = [x] if x.ndim == 2 else [x, x.transpose(0, 1).contiguous().transpose(0, 1), x[None]]
    return tuple(F.linear(each, linear.weight, bias) for each in inputs for bias in biases)


@pytest.mark.by_day(1)
@pytest.mark.parametrize("lead", [(2, 4), (8,)], ids=str)
def test_a_bias_of_another_shape_is_an_addition(lead):
    compare(with_biases_of_other_shapes, torch.randn(*lead, WIDTH))
    (graph,) = sparse_compile.report().graphs
    assert graph.rewritten == len(graph.rows)


def test_a_bias_of_one_column_may_be_one_of_all_tokens():
    x = torch.randn(2, 4, WIDTH)
    compare(lambda linear, x: F.linear(x, linear.weight, linear.bias[:8, None]), x)
    assert "F.linear adds a column" in sparse_compile.report().rows[0].reason


def written_by_the_caller(y, *views):
    y.mul_(2)
    y[..., 0] = 0
    y.view(-1)[5:9].add_(1)
    for view in views:
        view.mul_(3)
    return [y.detach()]


def watched_by_the_caller(y):
    seen = []
    y.retain_grad()
    y.register_hook(lambda grad: seen.append(grad) or tenfold(grad))
    return seen


CALLERS = {
    "written": (lambda linear, x: linear(x), written_by_the_caller),
    "written through a view": (lambda linear, x: (y := linear(x), y[0]), written_by_the_caller),
    "hooks": (lambda linear, x: linear(x), watched_by_the_caller),
    "detached and written": (lambda linear, x: linear(x), lambda y: [y.detach().zero_(), y.detach()]),
}


@pytest.mark.nightly
@pytest.mark.parametrize(("bias", "lead"), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("program", "after"), CALLERS.values(), ids=CALLERS.keys())
def test_what_a_graph_returns_belongs_to_its_caller(program, after, bias, lead):
    compare(program, torch.randn(*lead, WIDTH), bias=bias, after=after)


def test_what_a_graph_returns_belongs_to_its_caller_side_by_side():
    cases = {}
    for (name, (program, after)), (bias, lead) in zip(CALLERS.items(), LAYOUTS.values(), strict=True):
        cases[name] = program, torch.randn(*lead, WIDTH), bias, after
    compare_together(cases)


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("program", "recipe"),
    [
        pytest.param(PROGRAMS[name], recipe, id=f"{name}-{recipe}", marks=marks)
        for index, name in enumerate(("added_in_place", "written_by_index", "views written"))
        for recipe, marks in zip(("s-ste-bf16", "s-ste", "t-sr-ste"), in_turn(index, 3), strict=True)
    ],
)
def test_pruned_linears_too(program, recipe):
    """Of a weight that is 2:4 already, by all of these masks: the values are those of dense products."""

    def outputs(compiler):
        torch._dynamo.reset()
        torch.manual_seed(0)
        module, x = Program(program), torch.randn(2, 4, WIDTH)
        module.get_parameter("linear.weight").data.mul_(torch.eye(2).repeat(WIDTH // 2, WIDTH // 2))
        y = torch.compile(module, **compiler)(x)
        y.sum().backward()
        return y

    ours_, dense = outputs(ours(recipe)), outputs(DENSE)
    assert ours_.stride() == dense.stride()
    assert (ours_ - dense).norm() < 0.1 * dense.norm()


INPUTS = {
    "one dimension": lambda: torch.randn(WIDTH),
    "an empty batch": lambda: torch.randn(0, WIDTH),
    "empty in the middle": lambda: torch.randn(4, 0, WIDTH),
    "four dimensions": lambda: torch.randn(2, 3, 4, WIDTH),
    "permuted": lambda: torch.randn(8, 4, WIDTH).transpose(0, 1),
    "features apart": lambda: torch.randn(WIDTH, 8).t(),
    "channels last": lambda: torch.randn(2, WIDTH, 5, 5).permute(0, 2, 3, 1),
    "expanded": lambda: torch.randn(4, 1, WIDTH).expand(4, 8, WIDTH),
    "every other feature": lambda: torch.randn(4, 8, 2 * WIDTH)[..., ::2],
}


def doubled(linear, x):
    return linear(x).mul_(2)


@pytest.mark.nightly
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS.keys())
def test_of_inputs_of_any_layout(make, bias):
    compare(doubled, make(), bias=bias)


def test_of_inputs_of_any_layout_side_by_side():
    """Every other one, some with a bias, some without; in a night each alone."""
    inputs = list(INPUTS.items())[::2]
    compare_together(
        {name: (doubled, make(), index % 2 == 0, nothing_more) for index, (name, make) in enumerate(inputs)}
    )


@pytest.mark.parametrize(
    ("kind", "bias"),
    [
        pytest.param(kind, bias, id=f"{kind.__name__}-{'bias' if bias else 'no bias'}", marks=marks)
        for index, kind in enumerate((torch.no_grad, torch.inference_mode))
        for bias, marks in zip((True, False), in_turn(index, 2), strict=True)
    ],
)
def test_without_gradients(kind, bias):
    x = torch.randn(2, 4, WIDTH)
    results = []
    for compiler in (DENSE, ours()):
        torch._dynamo.reset()
        torch.manual_seed(0)
        with kind():
            y = torch.compile(Program(added_in_place, bias), **compiler)(x)
            y.add_(1)
        results.append(y)
    dense, rewritten = results
    assert rewritten.is_inference() == dense.is_inference()
    assert (rewritten - dense).norm() < 0.1 * dense.norm()


@pytest.mark.by_day(1)
@pytest.mark.parametrize(
    ("inside", "reentrant"),
    [
        pytest.param(inside, reentrant, id=f"{where}-{reentrant}", marks=marks)
        for inside, where in enumerate(("around the compiled module", "in the graph"))
        for reentrant, marks in zip((True, False), in_turn(inside, 2), strict=True)
    ],
)
def test_in_checkpointed_regions(inside, reentrant):
    def gradients(compiler):
        torch._dynamo.reset()
        torch.manual_seed(0)
        module, x = Program(added_in_place), torch.randn(2, 4, WIDTH, requires_grad=True)
        if inside:
            call = torch.compile(lambda x: checkpoint(module, x, use_reentrant=reentrant), **compiler)
            y = call(x)
        else:
            y = checkpoint(torch.compile(module, **compiler), x, use_reentrant=reentrant)
        y.sin().sum().backward()
        return [y, x.grad, module.linear.weight.grad, module.linear.bias.grad]

    for value, expected in zip(gradients(ours()), gradients(DENSE), strict=True):
        assert (value - expected).norm() < 0.1 * expected.norm()


def test_under_autocast():
    results = []
    for compiler in (DENSE, ours()):
        torch._dynamo.reset()
        torch.manual_seed(0)
        x = torch.randn(2, 4, WIDTH)
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(Program(lambda linear, x: linear(x).mul_(2)), **compiler)(x)
        results.append(y)
    dense, rewritten = results
    assert rewritten.dtype is dense.dtype is torch.bfloat16
    assert (rewritten - dense).norm() < 0.1 * dense.norm()


def test_an_input_may_be_written_afterwards():
    """A dense linear refuses backward then: it has saved the input itself.  This one has saved a copy in FP8."""
    x = torch.randn(8, WIDTH)

    def written(linear, x):
        h = x * 2
        y = linear(h)
        h.mul_(3)
        return y

    assert outcome(written, DENSE, x)[1] is None
    (_, *written_gradients), _ = outcome(written, ours(), x)
    (_, *gradients), _ = outcome(lambda linear, x: linear(x * 2), ours(), x)
    assert all(torch.equal(a, b) for a, b in zip(written_gradients, gradients, strict=True))


@pytest.mark.parametrize("recipe", [SSTE_BF16, replace(FP8, wgrad=Gemm.DENSE)], ids=lambda recipe: recipe.full_name)
def test_an_input_that_is_saved_itself_must_not_be_written_afterwards(recipe):
    """As with a dense linear: an error, no wrong gradient."""
    weight = torch.randn(32, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(2, 8, WIDTH, dtype=torch.bfloat16)
    arguments = (None, None, LinearSpec(recipe.full_name, 0, False, torch.bfloat16), operands_of(weight, recipe))
    y = linear(x, weight, *arguments)
    x.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_saved_tensors_pass_through_hooks():
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    torch.manual_seed(0)
    module, x = Program(added_in_place), torch.randn(2, 4, WIDTH)
    compiled = torch.compile(module, **ours())
    compiled(x).sin().sum().backward()
    expected, module.linear.weight.grad = module.linear.weight.grad, None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = compiled(x)
    y.sin().sum().backward()
    assert torch.float8_e4m3fn in {tensor.dtype for tensor in packed}
    assert torch.equal(module.linear.weight.grad, expected)


def test_a_second_derivative_is_refused_clearly():
    x = torch.randn(8, WIDTH, requires_grad=True)
    y = torch.compile(Program(lambda linear, x: linear(x).sin()), **ours())(x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"double backward|does not require grad"):
        grad.sum().backward()


SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
LLAMA_4 = {
    "num_key_value_heads": 4, "head_dim": 16, "intermediate_size": 128, "intermediate_size_mlp": 128,
    "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0, "max_position_embeddings": 64,
    "attention_chunk_size": 32,
}  # fmt: skip


# By day ``added_in_place`` does, to one pruned linear, what these models do.
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model", "config", "more"),
    [
        ("FalconForCausalLM", "FalconConfig", {"parallel_attn": False, "bias": True, "hidden_dropout": 0.0}),
        ("Llama4ForCausalLM", "Llama4TextConfig", LLAMA_4),
    ],
)
def test_models_that_write_in_place(model, config, more):
    """Falcon adds to what its linears return, Llama-4 multiplies it."""
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 128, (2, 16))
    losses = []
    for compiler in (DENSE, ours("s-ste")):
        torch._dynamo.reset()
        torch.manual_seed(0)
        net = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **more)).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        call, of_steps = torch.compile(net, **compiler), []
        for _ in range(3):
            loss = call(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            of_steps.append(loss.item())
        losses.append(of_steps)
    dense, rewritten = losses
    assert rewritten[0] != dense[0]
    assert rewritten[-1] < rewritten[0] - 0.1
    assert max(abs(a - b) for a, b in zip(dense, rewritten, strict=True)) < 0.2
