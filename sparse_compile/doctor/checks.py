"""What the backend needs of a machine, checked one by one: each check yields findings and changes nothing."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_compile.kernels import ops
from sparse_compile.kernels.timing import gpu_times
from sparse_compile.kernels.timing.components import COMPONENTS, LinearShape, RandomOperands
from sparse_compile.projections.base import Projection
from sparse_compile.recipe import RECIPES
from sparse_compile.torch_internals import private_names
from sparse_compile.torch_internals.attention import chosen_backend
from sparse_compile.torch_internals.autocast import plain_arithmetic

OLDEST_TORCH, TOO_NEW_TORCH = "2.11", "2.14"
_REQUIRED = ("Jinja2", "tabulate", "tqdm", *(["triton"] if sys.platform == "linux" else []))
_SMALL = LinearShape(
    tokens=512, in_features=256, out_features=512, dtype=torch.bfloat16, weight_dtype=torch.bfloat16, transposed=False
)
# The first linear of a Llama-3-8B FFN.
_LARGE = replace(_SMALL, tokens=8192, in_features=4096, out_features=14336)
_TOLERANCE = 1e-2  # of a product's norm: tensor cores add up with fewer bits than the reference
_LAUNCHES, _ROUNDS = 5, 15
_LEAST_SPACE = 2**30  # bytes, for what Triton, Inductor and this package keep
_PRODUCTS = ("fprop", "dgrad", "wgrad")


class Status(Enum):
    OK = "ok"
    WARNING = "warning"  # the backend works, less well than it could
    PROBLEM = "problem"  # it does not
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table.

    Attributes:
        what: was looked at.
        text: what was found.
        remedy: what to do about it.
        values: numbers behind the text.
    """

    what: str
    status: Status
    text: str
    remedy: str = ""
    values: Mapping[str, Any] | None = None


def versions() -> Iterator[Finding]:
    """Of Python and of what the package requires, and the private names of PyTorch and Triton that it leans on."""
    # The metadata of torch may lack what it was built for.
    found = {"sparse_compile": _version("sparse_compile"), "torch": str(torch.__version__)}
    found |= {name: _version(name) for name in _REQUIRED}
    found["python"] = platform.python_version()
    text = ", ".join(f"{name} {number or 'not installed'}" for name, number in found.items())
    absent = [name for name in _REQUIRED if found[name] is None]
    if absent:
        yield Finding("versions", Status.PROBLEM, text, f"pip install {' '.join(absent)}", found)
    elif not OLDEST_TORCH <= torch.__version__ < TOO_NEW_TORCH:
        remedy = f"install torch>={OLDEST_TORCH},<{TOO_NEW_TORCH}: other versions are untested"
        yield Finding("versions", Status.WARNING, text, remedy, found)
    else:
        yield Finding("versions", Status.OK, text, values=found)
    missing = private_names.self_test()
    if not missing and found.get("triton") is not None:
        from sparse_compile.kernels import launch_plan

        missing = launch_plan.self_test()
    if missing:
        remedy = "install the versions of PyTorch and Triton that the package requires"
        yield Finding("private interfaces", Status.PROBLEM, f"missing: {', '.join(missing)}", remedy)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def backend() -> Iterator[Finding]:
    """Whether torch.compile finds the backend by its name."""
    if "sste" in torch.compiler.list_backends():
        how = "by its entry point" if _version("sparse_compile") else "in programs that import sparse_compile"
        yield Finding("backend", Status.OK, f'torch.compile finds backend="sste" {how}')
    else:
        remedy = "pip install sparse_compile in this environment"
        yield Finding("backend", Status.PROBLEM, 'torch.compile does not know backend="sste"', remedy)


def devices() -> Iterator[Finding]:
    """Each GPU, its driver and memory, and whether there are kernels for it."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "this PyTorch was built without CUDA" if built is None else f"PyTorch for CUDA {built} sees no GPU"
        remedy = (
            "models run dense here; 'sste.when': 'always' emulates the kernels, slowly. A speedup needs a Hopper GPU"
        )
        if built is not None:
            remedy += "; check that nvidia-smi lists one and that CUDA_VISIBLE_DEVICES does not hide it"
        yield Finding("device", Status.PROBLEM, why, remedy)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        text = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} "
            f"multiprocessors, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free, driver {_driver()}, "
            f"CUDA {torch.version.cuda}"
        )
        missing = ops.missing_kernels(device)
        if missing is None:
            yield Finding(f"device {index}", Status.OK, text)
        else:
            remedy = "models run dense on it; a speedup needs a Hopper GPU (H100, H200, GH200)"
            yield Finding(f"device {index}", Status.PROBLEM, f"{text}: {missing}", remedy)


def _driver() -> str:
    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.exists() else "unknown"


def compiler() -> Iterator[Finding]:
    """Whether there is a C++ compiler, without which Inductor and Triton can't build what they generate."""
    names = [os.environ.get("CXX"), os.environ.get("CC"), "g++", "gcc", "clang++", "clang"]
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        yield Finding("compiler", Status.PROBLEM, "neither gcc nor clang is on PATH", "apt-get install g++, or set CXX")
    else:
        yield Finding("compiler", Status.OK, found)


def cache(device: torch.device | None) -> Iterator[Finding]:
    """The folder of measured times: whether it can be written, what is in it, and the space that is left."""
    folder = gpu_times.root() if device is None else gpu_times.folder(device)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    files = list(folder.rglob("*.json")) if folder.exists() else []
    remedy = "set SPARSE_COMPILE_CACHE_DIR to another folder"
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        text = f"{folder} cannot be written, so every process measures again"
        yield Finding("cache", Status.WARNING, text, remedy)
        return
    space = shutil.disk_usage(existing).free
    text = f"{folder}: {len(files)} files, {space / 2**30:.1f} GiB left"
    status = Status.OK if space >= _LEAST_SPACE else Status.WARNING
    yield Finding("cache", status, text, "" if status is Status.OK else f"free some space, or {remedy}")


def training_step(device: torch.device) -> Iterator[Finding]:
    """A step of a small model through the backend, with generated code, against the same model dense."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).to(device, torch.bfloat16)
    x = torch.randn(256, 256, device=device, dtype=torch.bfloat16)
    gradients = []
    # Dense FP8: pruned weights compute another function.  No report: that of the check says what matters.
    options: dict[str, Any] = {"sste.when": "always", "sste.recipe": "fp8", "sste.report": None}
    compiled = torch.compile(model, backend="sste", options=options)
    for call in (model, compiled):
        model.zero_grad()
        call(x).float().square().mean().backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        gradients.append(torch.cat([grad.float().flatten() for grad in found]))
    error = float((gradients[1] - gradients[0]).norm() / gradients[0].norm())
    text = f"gradients of a compiled step in FP8 differ from dense ones by {error:.1%}"
    if error < 0.1:
        yield Finding("training step", Status.OK, text, values={"error": error})
    else:
        remedy = "report this with the output of python -m torch.utils.collect_env"
        yield Finding("training step", Status.PROBLEM, text, remedy, {"error": error})


def kernels(device: torch.device) -> Iterator[Finding]:
    """Every kernel of ours on small operands: the bits of its reference, or a product as near as tensor cores are."""
    runs: dict[str, Callable[[], Any]] = {}
    for name, component in COMPONENTS.items():
        if not (component.of_library or component.of_weight):
            runs[name] = component.make(_SMALL, RandomOperands(device))
    for recipe in RECIPES.values():
        for projection in (recipe.projection, recipe.projection.one_copy):
            if projection is not None and projection.cost_key not in runs:
                runs[projection.cost_key] = _filled(projection, RandomOperands(device))

    def run(call: Callable[[], Any]) -> Any:
        with plain_arithmetic(), torch.cuda.device(device):
            return call()

    def enter() -> None:
        torch.ones(1, device=device)  # else cuBLAS would warn that it is the first to use the device in its thread

    # They compile side by side.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), initializer=enter) as pool:
        results = dict(zip(runs, pool.map(run, runs.values()), strict=True))
    checked = [name for name, result in results.items() if result is not None]  # others write into what they are given
    wrong = []
    with ops.force_reference():
        for name in checked:
            difference = _difference(results[name], run(runs[name]))
            if difference is not None:
                wrong.append(f"{name}: {difference}")
    if wrong:
        remedy = "'sste.recipe': 'fp8' uses the fewest kernels; report this with the device and the versions above"
        yield Finding("kernels", Status.PROBLEM, "; ".join(wrong), remedy)
    else:
        yield Finding("kernels", Status.OK, f"{len(checked)} match their reference: {', '.join(checked)}")


def _filled(projection: Projection, random: RandomOperands) -> Callable[[], tuple[Tensor, ...]]:
    """Makes operands anew of the same weight."""
    n, k = _SMALL.out_features, _SMALL.in_features
    weight, beta = random.weight(_SMALL), random.ones(1, 1.5) if projection.has_beta else None

    def fill() -> tuple[Tensor, ...]:
        operands, masks = projection.new_operands(n, k, random.device), projection.new_masks(n, k, random.device)
        operands.scale_inv.fill_(1.0)  # of an earlier weight, by which it is faster alone
        projection.fill(weight, operands, beta, masks, masks is not None)
        return (
            *operands,
            *projection.dgrad_operand(*projection.kept_for_dgrad(operands)),
            *([] if masks is None else [masks]),
        )

    return fill


def _difference(actual: Any, expected: Any) -> str | None:
    """What is wrong with the results of a kernel."""
    pairs = [(actual, expected)] if isinstance(expected, Tensor) else list(zip(actual, expected, strict=True))
    for index, (one, other) in enumerate(pairs):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"result {index} is {one.dtype} {list(one.shape)}, not {other.dtype} {list(other.shape)}"
        if other.dtype.itemsize > 1 and other.is_floating_point() and other.numel() > 1:
            error = float((one.double() - other.double()).norm() / other.double().norm())
            if not error < _TOLERANCE:
                return f"result {index} is off by {error:.1%}"
        elif not torch.equal(one.view(torch.uint8), other.view(torch.uint8)):
            return f"{int((one.view(torch.uint8) != other.view(torch.uint8)).sum())} bytes of result {index} are wrong"
    return None


def speed(device: torch.device) -> Iterator[Finding]:
    """The three products of the first linear of an 8B model's FFN, against cuBLAS in bf16."""
    names = {
        "dense fprop": "bf16 fprop", "sparse24 fprop": "2:4 fprop",
        "dense dgrad": "bf16 dgrad", "fp8 dgrad": "fp8 dgrad",
        "dense wgrad": "bf16 wgrad", "sparse24 wgrad": "2:4 wgrad",
    }  # fmt: skip
    with plain_arithmetic(), torch.cuda.device(device):
        calls = {name: COMPONENTS[name].make(_LARGE, RandomOperands(device)) for name in names}
        for call in calls.values():
            call()
        # Operands of this size don't stay in the L2 cache.
        times = gpu_times.median_microseconds({name: [call] for name, call in calls.items()}, _LAUNCHES, _ROUNDS)
    ours = ("sparse24 fprop", "fp8 dgrad", "sparse24 wgrad")
    ratios = {product: times[f"dense {product}"] / times[name] for product, name in zip(_PRODUCTS, ours, strict=True)}
    text = ", ".join(
        f"{names[name]} {times[name]:.0f} us, {ratios[product]:.2f}x cuBLAS bf16"
        for product, name in zip(_PRODUCTS, ours, strict=True)
    )
    slow = [product for product, ratio in ratios.items() if ratio < 1]
    if slow:
        remedy = "check with nvidia-smi whether another program uses the GPU, and the clocks and power limit"
        yield Finding("speed", Status.WARNING, f"{text}; slower than bf16: {', '.join(slow)}", remedy, times)
    else:
        yield Finding("speed", Status.OK, text, values=times)


def attention(device: torch.device) -> Iterator[Finding]:
    """Which kernel causal attention gets, and which cuDNN is loaded."""
    heads = torch.empty(1, 8, 1024, 128, device=device, dtype=torch.bfloat16, requires_grad=True)
    chosen = chosen_backend(heads, heads, heads)
    cudnn = torch.backends.cudnn.version()
    text = f"scaled_dot_product_attention runs {chosen}; cuDNN {cudnn} is loaded"
    if chosen == "CUDNN_ATTENTION":
        yield Finding("attention", Status.OK, text)
    else:
        remedy = (
            "cuDNN's attention is up to twice as fast on Hopper: remove other cuDNN libraries from LD_LIBRARY_PATH, "
            "and don't switch it off (torch.backends.cuda.enable_cudnn_sdp)"
        )
        yield Finding("attention", Status.WARNING, text, remedy)
