"""What the user may say, and what is answered to anything else."""

from ast import literal_eval
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparse_compile.options import Executor, option_rows, parse_option, read_options
from sparse_compile.projections.groups_of_four import SOFT, TOP2
from sparse_compile.projections.groups_of_four_bf16 import SOFT_BF16
from sparse_compile.projections.identity import IDENTITY
from sparse_compile.recipe import (
    FP8,
    RECIPES,
    SSTE,
    Estimator,
    Gemm,
    GradFormat,
    Recipe,
    Rounding,
    recipe_named,
)


def test_defaults():
    options = read_options(None, None)
    assert (options.recipe, options.targets, options.executor) == (SSTE, "ffn", Executor.INDUCTOR)
    assert options.tune is False
    assert options.inductor == {"triton.multi_kernel": 1}
    assert (options.head, options.measure) == (replace(FP8, grad_format=GradFormat.E5M2), True)


def test_ours_and_inductors_are_told_apart():
    ours = {"sste.recipe": "fp8", "sste.executor": "eager", "sste.tune": True}
    options = read_options(None, {**ours, "epilogue_fusion": False})
    assert (options.recipe, options.executor, options.tune) == (FP8, Executor.EAGER, True)
    assert options.inductor == {"triton.multi_kernel": 1, "epilogue_fusion": False}
    assert read_options(None, {"triton.multi_kernel": 0}).inductor == {"triton.multi_kernel": 0}


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES.values() if recipe.estimator is not None])
@pytest.mark.parametrize(
    ("mvue", "estimator", "wgrad"),
    [
        ("exact", Estimator.EXACT_MVUE, Gemm.SPARSE24),
        ("approximate", Estimator.APPROXIMATE_MVUE, Gemm.SPARSE24),
        ("off", None, Gemm.FP8),
    ],
)
def test_the_estimator_of_any_recipe(recipe, mvue, estimator, wgrad):
    schedule = {"sste.total_steps": 6, "sste.tail": 1} if recipe.projection.prunes else {}
    chosen = read_options(None, {"sste.recipe": recipe.name, "sste.mvue": mvue, **schedule}).recipe
    assert (chosen.estimator, chosen.wgrad) == (estimator, wgrad)
    # Nothing else, and graphs can name all that it may become.
    assert replace(chosen, name=recipe.name, estimator=recipe.estimator, wgrad=recipe.wgrad) == recipe
    assert all(recipe_named(variant.full_name) == variant for variant in chosen.variants())


def test_defaults_are_those_of_the_table():
    """What is given as the table has it changes nothing, with a recipe that has the option."""
    recipes = {"sste.decay": "sr-ste", "sste.refresh": "t-sr-ste"}
    shown = {name.strip("`"): default.strip("`") for name, default, _, _ in option_rows()}
    words = {"sste.mvue", "sste.tail", "sste.total_steps", "sste.plan", "sste.report"}
    assert words < set(shown)
    for name in set(shown) - words:
        recipe = {"sste.recipe": recipes[name]} if name in recipes else {}
        assert read_options(None, recipe | {name: literal_eval(shown[name])}) == read_options(None, recipe), name


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("recipe", "fp8", "fp8"),
        ("tune", "true", True),
        ("tune", "False", False),
        ("health", "100", 100),
        ("total_steps", "0", 0),
        ("decay", "1e-5", 1e-5),
        ("decay", "2", 2.0),
        ("warmup", "10", 10),
        ("warmup", "0.1", 0.1),
        ("warmup", "1e-1", 0.1),
        ("targets", "3", "3"),
        ("targets", "true", "true"),
        ("report", "1.txt", "1.txt"),
    ],
)
def test_text_becomes_what_the_option_is(name, text, value):
    parsed = parse_option(f"sste.{name}", text)
    assert (parsed, type(parsed)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tune", "1", "is '1'; allowed is True or False"),
        ("health", "1.0", "is '1.0'; allowed is a number of optimizer steps"),
        ("health", "-1", "is '-1'; allowed is a number of optimizer steps"),
        ("decay", "-1", "is '-1'; allowed is a finite number"),
        ("decay", "nan", "is 'nan'; allowed is a finite number"),
        ("warmup", "1.0", "is '1.0'; allowed is a number of optimizer steps, or a share below 1.0"),
        ("memory", "fastt", r"is 'fastt'; did you mean 'fast'\? allowed are 'fast', 'small'"),
        ("report", "r.xml", "the report file 'r.xml' must end in"),
    ],
)
def test_text_that_is_not_allowed_is_shown_as_it_was_given(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse_option(f"sste.{name}", text)


@pytest.mark.parametrize("given", [1e-5, "1e-5"], ids=["python", "command line"])
def test_a_decay_replaces_that_of_the_recipe(given):
    assert read_options(None, {"sste.recipe": "sr-ste"}).recipe.decay == 2e-4
    assert read_options(None, {"sste.recipe": "sr-ste", "sste.decay": given}).recipe.decay == 1e-5


def test_modes_are_inductors():
    assert read_options("reduce-overhead", None).inductor["triton.cudagraphs"] is True
    assert read_options("max-autotune", None).inductor["max_autotune"] is True
    with pytest.raises(RuntimeError, match="Unrecognized mode=bogus"):
        read_options("bogus", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sste.recipy": "fp8"}, r"unknown option 'sste.recipy'; did you mean 'sste.recipe'\?"),
        ({"sste.recipe": "sste"}, r"option 'sste.recipe' is 'sste'; did you mean 's-ste'\? allowed are 'fp8', 'fp8-ba"),
        (
            {"sste.recipe": "s-ste-boosted"},
            r"'s-ste-boosted', which was retired; say 'sste.recipe': 's-ste', 'sste.beta': 1.7 instead",
        ),
        ({"sste.recipe": None}, r"option 'sste.recipe' is None; .*allowed are"),
        (
            {"sste.mvue": "of"},
            r"option 'sste.mvue' is 'of'; did you mean 'off'\? allowed are 'approximate', 'exact', 'off'",
        ),
        ({"sste.recipe": "ste", "sste.beta": 2}, r"recipe 'ste' has no beta; option 'sste.beta' is for 's-ste', "),
        ({"sste.beta": 0}, r"option 'sste.beta' is 0; allowed is a finite number above 0"),
        ({"sste.beta": "much"}, r"option 'sste.beta' is 'much'; allowed is a finite number"),
        ({"sste.refresh": 2}, r"recipe 's-ste' keeps no masks; option 'sste.refresh' is for 't-sr-ste'"),
        (
            {"sste.recipe": "t-sr-ste", "sste.refresh": 0},
            r"'sste.refresh' is 0; allowed is a number of",
        ),
        (
            {"sste.recipe": "fp8", "sste.mvue": "off"},
            r"recipe 'fp8' samples no gradients, so 'sste.mvue' has no effect",
        ),
        ({"sste.decay": 1e-4}, r"recipe 's-ste' has no decay; option 'sste.decay' is for 'sr-ste', 't-sr-ste'"),
        (
            {"sste.recipe": "sr-ste", "sste.decay": -1},
            r"option 'sste.decay' is -1; allowed is a finite number, 0 or above",
        ),
        (
            {"sste.recipe": "sr-ste", "sste.decay": "x"},
            r"option 'sste.decay' is 'x'; allowed is a finite number",
        ),
        ({"sste.recipe": "sr-ste", "sste.decay": True}, r"option 'sste.decay' is True; allowed is"),
        ({"sste.executor": "cuda"}, r"option 'sste.executor' is 'cuda'; .*allowed are 'eager', 'inductor'"),
        ({"sste.targets": 3}, r"option 'sste.targets' is 3; allowed are 'all', 'ffn', 'ffn-up' or a glob"),
        ({"sste.targets": ""}, r"option 'sste.targets' is ''; allowed are"),
        ({"sste.tune": "yes"}, r"option 'sste.tune' is 'yes'; allowed is True or False"),
        ({"sste.frozen": "2:4"}, r"option 'sste.frozen' is '2:4'; allowed are 'dense', 'sparse'"),
        ({"sste.tune": 1}, r"option 'sste.tune' is 1; allowed is True or False"),
        ({"epilog_fusion": True}, r"unknown option 'epilog_fusion'; did you mean 'epilogue_fusion'\?"),
    ],
)
def test_unknown_names_and_values(options, message):
    with pytest.raises(ValueError, match=message):
        read_options(None, options)


def test_the_user_of_torch_compile_sees_the_error():
    model = torch.compile(nn.Linear(64, 64), backend="sste", options={"sste.recipe": "t-srste"})
    with pytest.raises(Exception, match=r"option 'sste\.recipe' is 't-srste'"):
        model(torch.randn(8, 64))


BF16 = {"fprop": Gemm.SPARSE24_BF16, "dgrad": Gemm.BF16, "wgrad": Gemm.BF16, "estimator": None}


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"fprop": Gemm.FP8}, "fprop is 2:4 if and only if the weight is projected"),
        ({"estimator": None}, "wgrad is 2:4 if and only if an estimator is named"),
        ({"dgrad": Gemm.SPARSE24}, "dgrad is 2:4 if and only if the weight is 2:4 both ways"),
        ({"dgrad": Gemm.MVUE24, "wgrad": Gemm.FP8, "estimator": None}, "a sampled dgrad needs a pruned weight"),
        (
            {"dgrad": Gemm.MVUE24, "projection": IDENTITY, "fprop": Gemm.FP8},
            "a sampled dgrad needs a pruned weight",
        ),
        ({"dgrad": Gemm.DENSE}, "dgrad must be dense fp8"),
        ({"decay": 1.0}, "a decay needs a mask"),
        ({"beta_factor": 2.0, "projection": TOP2}, "beta_factor needs a projection that has a beta"),
        ({"refresh": 1}, "refresh must be above 0 if and only if the masks are transposable"),
        ({"fprop": Gemm.SPARSE24_BF16}, "all three products must be in bf16, or none"),
        (
            {"wgrad": Gemm.FP8, "estimator": None, "rounding": Rounding.STOCHASTIC},
            "rounding needs an estimator",
        ),
        (
            BF16 | {"projection": SOFT_BF16, "grad_format": GradFormat.E5M2},
            "grad_format needs a product that reads gradients in FP8",
        ),
        (BF16, "its products and projection soft24 have different dtypes"),
        ({"name": "my recipe"}, "the name of a recipe is 'my recipe'; allowed are letters"),
    ],
)
def test_recipes_are_consistent(field, message):
    fields = {
        "name": "x",
        "projection": SOFT,
        "fprop": Gemm.SPARSE24,
        "dgrad": Gemm.FP8,
        "wgrad": Gemm.SPARSE24,
        "estimator": Estimator.EXACT_MVUE,
    }
    Recipe(**fields)
    with pytest.raises(ValueError, match=message):
        Recipe(**(fields | field))
