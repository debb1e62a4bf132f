"""Launching compiled kernels with little time of the host.

``kernel[grid](...)`` binds its arguments, specialises on them and encodes TMA descriptors, anew in each call.  Nearly
all of it follows from the tensors' metadata: shapes, strides, dtypes, device, and addresses modulo 16.  So a launcher
has two parts:

* a *plan*, made once for tensors of one metadata: it checks them, compiles the kernel and fixes its grid and sizes;
* a call, which looks the plan up and gives it what varies, mostly addresses.

A launcher is written as the function that plans:

    @planned
    def launch_scale(x: Tensor, factor: Tensor, out: Tensor) -> LaunchPlan:
        check_buffer("out", out, tuple(x.shape), x.dtype, x.device)
        if x.numel() == 0:
            return NOTHING
        grid = (triton.cdiv(x.numel(), 1024),)
        return plan_kernel(_scale_kernel, grid, (x, factor, out), (x.numel(),), BLOCK=1024, num_warps=4)

Plans and descriptors are kept in caches of bounded size, whose oldest entry makes room: to order them by use would cost
every call, and only shapes or addresses that never stop changing reach the bound.

All private names of Triton, and of PyTorch's allocator, that we lean on are in this file; ``self_test`` says which of
them are gone.
"""

import inspect
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial, wraps
from threading import RLock, local
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from sparse_compile.kernels import kernel_artifacts

P = ParamSpec("P")
K = TypeVar("K")
V = TypeVar("V")

# Launches on the current device, that of the plan.  Called with what varies, in the order of the launcher's arguments:
# addresses, None for no tensor, ints.
LaunchPlan: TypeAlias = Callable[..., Any]

_KNOWN_VERSIONS = ("3.6", "3.7", "3.8")
_MAX_PLANS = 512  # of a launcher
_MAX_DESCRIPTORS = 512  # of an argument of a plan
_lock = RLock()
_entered = local()  # the devices whose context was current in a thread


def _check_version(version: str) -> None:
    if ".".join(version.split(".")[:2]) not in _KNOWN_VERSIONS:
        raise ImportError(
            f"triton {version} is installed; the kernels are launched through parts of Triton that change from version "
            f"to version and are known to work with {', '.join(_KNOWN_VERSIONS)}"
        )


_check_version(triton.__version__)


class UncachedPlan:
    """The plan of a single call: it holds the call's tensors, and is not kept."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run

    def __call__(self, *_: Any) -> Any:
        return self._run()


NOTHING = UncachedPlan(lambda: None)


def planned(make: Callable[P, LaunchPlan]) -> Callable[P, Any]:
    """The launcher of the plans that ``make`` makes; returns what they do.

    ``make`` checks its arguments, of which the first is a tensor, and returns the plan of all arguments like them.  It
    may look at a tensor's metadata: shape, strides (those of a contiguous tensor follow from its shape), dtype, device,
    and the address modulo 16.  Ints vary as addresses do; every other argument, a bool or a dtype, belongs to the plan.
    Plans are made and called with the first tensor's device as the current one.
    """
    plans: dict[tuple[object, ...], LaunchPlan] = {}
    signature = inspect.signature(make)

    @wraps(make)
    def launch(*arguments: P.args, **named: P.kwargs) -> Any:
        ordered: Sequence[Any] = signature.bind(*arguments, **named).args if named else arguments
        key: list[object] = []
        varying: list[int | None] = []
        for argument in ordered:
            if isinstance(argument, Tensor):
                address = argument.data_ptr()
                varying.append(address)
                layout = argument.is_contiguous() or argument.stride()
                key.append((argument.shape, layout, argument.dtype, argument.get_device(), address % 16))
            elif type(argument) is int:
                varying.append(argument)
            else:
                key.append(argument)
                if argument is None:
                    varying.append(None)
        device = ordered[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return launch(*arguments, **named)
        found = tuple(key)
        plan = plans.get(found)
        if plan is None:
            plan = make(*arguments, **named)
            # An interpreted kernel runs on the very tensors that it was planned with.
            if not (isinstance(plan, UncachedPlan) or knobs.runtime.interpret):
                _keep(plans, found, plan, _MAX_PLANS)
        return plan(*varying)

    return launch


def allocator(example: Tensor) -> Callable[[], Tensor]:
    """What allocates tensors like ``example`` on the current device, in half the time of ``torch.empty``."""
    allocate: Callable[..., Tensor] = getattr(torch._C._dynamo.guards, f"_empty_strided_{example.device.type}")
    return partial(allocate, tuple(example.shape), example.stride(), example.dtype)


def plan_with_results(
    launcher: Callable[..., Any], allocate: Callable[..., Any], arguments: Sequence[Any], order: Callable[..., Any]
) -> LaunchPlan:
    """The plan of ``launcher`` for ``arguments`` and for results like ``allocate(*arguments)``, which it returns.

    Args:
        launcher: a ``planned`` one.
        allocate: returns a tensor, a tuple of tensors, or None for no results.
        arguments: what varies among them comes first in what varies for the launcher, followed by the results.
        order: the launcher's arguments from ``arguments`` and the results.
    """
    example = allocate(*arguments)
    results: tuple[Tensor, ...] = (example,) if isinstance(example, Tensor) else example or ()
    plan: LaunchPlan = inspect.unwrap(launcher)(*order(*arguments, *results))
    if isinstance(plan, UncachedPlan):
        plan()
        return UncachedPlan(lambda: example)
    if example is None:
        return plan
    allocators, single = [allocator(result) for result in results], isinstance(example, Tensor)

    def launch(*varying: Any) -> Tensor | tuple[Tensor, ...]:
        results = tuple([allocate() for allocate in allocators])
        plan(*varying, *[result.data_ptr() for result in results])
        return results[0] if single else results

    return launch


def plan_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    varying: Sequence[Tensor | TensorDescriptor | int | None],
    sizes: Sequence[int | None] = (),
    *,
    cluster: int = 1,
    **constants: Any,
) -> LaunchPlan:
    """Compile a Triton or Gluon kernel, whose parameters are ``varying``, ``sizes`` and constexprs, and load it.

    Args:
        kernel: the jitted function.
        grid: one to three numbers of programs.
        varying: examples, on the current device, of what the plan will be called with.  It encodes the descriptor of an
            address by its example.  The kernel may not specialise on an int, which fits into 32 bits.
        sizes: ints that stay as they are, None for a pointer that there never is.
        cluster: how many programs, of which ``grid`` has a multiple, make a thread block cluster.
        constants: constexprs and Triton's options, such as ``num_warps``.
    """
    if knobs.runtime.interpret:
        return UncachedPlan(lambda: kernel[grid](*varying, *sizes, **constants))
    constexprs = kernel.params[len(varying) + len(sizes) :]
    assert all(parameter.is_constexpr for parameter in constexprs), kernel
    assert all(p.do_not_specialize for p, v in zip(kernel.params, varying, strict=False) if isinstance(v, int)), kernel

    compiled = kernel.warmup(*varying, *sizes, grid=grid, **constants)
    kernel_artifacts.record(compiled)
    encoders = _encoders(compiled, varying)
    with _lock:
        # Loads the kernel.  Triton shows other threads ``run`` while ``function`` is not there yet.
        run = compiled.run
    if encoders:
        # Triton encodes the descriptors in a wrapper of what launches.
        run = copy(run)
        run.launch = _wrapped(run.launch)

    grid_x, grid_y, grid_z = (*grid, 1, 1)[:3]
    function, packed_metadata = compiled.function, compiled.packed_metadata
    if cluster > 1:
        # As Triton launches a kernel whose blocks are clusters: ours was compiled as one block, and knows of its peers.
        num_warps, _, shared = packed_metadata
        grid_x, packed_metadata = grid_x // cluster, (num_warps, cluster, shared)
    # The launcher counts the constexprs, too, and does not look at them.
    fixed = (*sizes, *(None for _ in constexprs))
    middle, spread = _passed_on(run, function, packed_metadata)
    launch_directly, runtime = run.launch, knobs.runtime
    device, current_stream = driver.active.get_current_device(), driver.active.get_current_stream

    def launch(*varying: Any) -> None:
        stream = current_stream(device)
        arguments: Sequence[Any] = varying
        if encoders:
            arguments = []
            for value, encoder in zip(varying, encoders, strict=True):
                if encoder is None:
                    arguments.append(value)
                else:
                    arguments += encoder[value]
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if middle is None or getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            metadata = compiled.launch_metadata(grid, stream, *varying, *fixed)
            run(grid_x, grid_y, grid_z, stream, function, packed_metadata, metadata, enter, leave, *arguments, *fixed)
        elif spread:
            launch_directly(grid_x, grid_y, grid_z, stream, *middle, *arguments, *fixed)
        else:
            launch_directly(grid_x, grid_y, grid_z, stream, *middle, (*arguments, *fixed))

    return launch


def _passed_on(run: Any, *head: Any) -> tuple[tuple[Any, ...] | None, bool]:
    """What ``run`` passes to ``run.launch`` between stream and kernel arguments, and whether it spreads the latter.

    Without hooks it is the same in every call.  So a call may leave ``run`` out, which takes half of the time of a
    launch.  None where ``run`` does more: where it allocates scratch memory, or a sanitizer adds arguments of its own.
    """
    if run.global_scratch_size or run.profile_scratch_size:
        return None, False
    passed: list[Any] = []
    probe, argument = copy(run), object()
    probe.launch = lambda *arguments: passed.extend(arguments)
    probe(1, 1, 1, 0, *head, None, None, None, argument)
    last = passed.pop()
    if passed[:4] != [1, 1, 1, 0] or last not in (argument, (argument,)):
        return None, False
    return tuple(passed[4:]), last is argument


def _encoders(
    compiled: Any, varying: Sequence[Tensor | TensorDescriptor | int | None]
) -> tuple["_Encoder | None", ...]:
    """What encodes each of the varying arguments, None for what is no descriptor; empty where there is none."""
    descriptors = [argument for argument in varying if isinstance(argument, TensorDescriptor)]
    if not descriptors:
        return ()
    encoders = map(_Encoder, descriptors, compiled.metadata.tensordesc_meta)
    return tuple(next(encoders) if isinstance(argument, TensorDescriptor) else None for argument in varying)


class _Encoder(dict[int, list[Any]]):
    """Address -> what the kernel takes for a descriptor like ``example``: its encoding, its shape and its strides."""

    def __init__(self, example: TensorDescriptor, metadata: dict[str, Any]) -> None:
        # The tensor itself must not be kept alive.
        self._example, self._metadata = copy(example), metadata
        self._example.base = None

    def __missing__(self, address: int) -> list[Any]:
        descriptor = copy(self._example)
        descriptor.base = SimpleNamespace(data_ptr=lambda: address)
        return _keep(self, address, _encode(descriptor, self._metadata), _MAX_DESCRIPTORS)


def _make_context_current() -> None:
    """Of the current device, in a thread that may not have used it yet: only then can the driver encode a descriptor.

    CUDA's runtime would do it at its first call in a thread; a capture has made such a call.
    """
    device, entered = driver.active.get_current_device(), vars(_entered)
    if torch.cuda.is_initialized() and device not in entered and not torch.cuda.is_current_stream_capturing():
        torch.cuda.mem_get_info(device)
        entered[device] = True


def _encode(descriptor: TensorDescriptor, metadata: dict[str, Any]) -> list[Any]:
    _make_context_current()
    # From 3.8 on there is a third parameter, which tensors on CUDA do not need.
    parameters = inspect.signature(nvidia.make_tensordesc_arg).parameters
    encoded: list[Any] = nvidia.make_tensordesc_arg(descriptor, metadata, *(None for _ in range(len(parameters) - 2)))
    return encoded


def _wrapped(launch: Callable[..., None]) -> Callable[..., None]:
    """What launches, without Triton's wrapper that encodes descriptors."""
    wrapped: Callable[..., None] = inspect.getclosurevars(launch).nonlocals["launcher"]
    return wrapped


def _keep(cache: dict[K, V], key: K, value: V, limit: int) -> V:
    with _lock:
        while len(cache) >= limit:
            del cache[next(iter(cache))]
        cache[key] = value
    return value


def self_test() -> list[str]:
    """What this installation lacks of the private parts that we lean on; empty on every known version."""
    described = nvidia.wrap_handle_tensordesc(_keep, {"desc": "tensordesc<fp8e4nv[64, 64]>"}, [{}])
    encode = list(inspect.signature(nvidia.make_tensordesc_arg).parameters)
    call = list(inspect.signature(nvidia.CudaLauncher.__call__).parameters)
    checks = {
        "wrap_handle_tensordesc keeps what it wraps as 'launcher'": _wrapped(described) is _keep,
        "make_tensordesc_arg(arg, metadata, [one more])": encode[:2] == ["arg", "metadata"] and len(encode) <= 3,
        "CudaLauncher(gridX, gridY, gridZ, stream, function, ...)": call[1:6]
        == ["gridX", "gridY", "gridZ", "stream", "function"],
        "CompiledKernel.run and launch_metadata": {"run", "launch_metadata"} <= set(dir(CompiledKernel)),
        "launch_enter_hook.calls": hasattr(knobs.runtime.launch_enter_hook, "calls"),
        "_empty_strided_cuda(size, stride, dtype)": hasattr(torch._C._dynamo.guards, "_empty_strided_cuda"),
    }
    return [what for what, there in checks.items() if not there]
