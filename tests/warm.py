"""Python programs in new processes that need not import torch: they are forked from one that has, and compiled once.

``python`` is ``subprocess.run`` of this interpreter, seconds faster.  The import of torch lies before such a process:
variables of the environment that are read then come too late, and the interpreter takes no options.
Of each way in (launcher, ``SPARSE_COMPILE``, torchrun, a script, ``-c``) one test keeps a process of its own.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

LIMIT = 300  # seconds


@cache
def server() -> "subprocess.Popen[str]":
    """Of this process of pytest; it ends with it."""
    without = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSE_COMPILE", "PYTHON"))}
    # Whether there is a GPU is then asked without the CUDA runtime, which a forked process could not use again.
    without["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # Threads are counted when torch is imported.  Tests and ranks run side by side.
    without["OMP_NUM_THREADS"] = "1"
    process = subprocess.Popen(
        [sys.executable, __file__], env=without, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(process.communicate)
    return process


def python(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, check: bool = False
) -> "subprocess.CompletedProcess[str]":
    """What ``python *arguments`` prints, and how it ends; a file of a script, ``-m`` or ``-c`` must come first."""
    (done,) = _start([dict(env or os.environ)], arguments, cwd)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def group(
    processes: int, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> "list[subprocess.CompletedProcess[str]]":
    """As many, as torchrun starts them on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    size = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    return _start([{**(env or os.environ), **size, **rank} for rank in ranks], arguments, cwd)


def _start(
    environments: list[dict[str, str]], arguments: Sequence[object], cwd: Path | None
) -> "list[subprocess.CompletedProcess[str]]":
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            {
                "arguments": words, "cwd": str(cwd or Path.cwd()), "env": environment,
                "out": f"{folder}/out{number}", "err": f"{folder}/err{number}",
            }
            for number, environment in enumerate(environments)
        ]  # fmt: skip
        process.stdin.write(f"{json.dumps(requests)}\n")
        process.stdin.flush()
        return [
            subprocess.CompletedProcess(words, status, *(Path(request[name]).read_text() for name in ("out", "err")))
            for request, status in zip(requests, json.loads(process.stdout.readline()), strict=True)
        ]


def become(request: dict[str, Any], installed: list[str]) -> None:
    """Let this process be as one that the request started."""
    signal.alarm(LIMIT)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, name in ((0, os.devnull), (1, request["out"]), (2, request["err"])):
        opened = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    first, *rest = request["arguments"]
    begin = {"-c": "", "-m": os.getcwd()}.get(first, os.path.dirname(os.path.abspath(first)))
    sys.argv = [first, *rest[1:]] if first in ("-c", "-m") else [first, *rest]
    sys.path[:] = [begin, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *installed]


def execute(request: dict[str, Any]) -> None:
    first, *rest = request["arguments"]
    if first == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = ModuleType("__main__")
    if first == "-c":
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        main.__file__ = os.path.abspath(first)
        exec(compile(Path(first).read_bytes(), main.__file__, "exec"), main.__dict__)


def compile_quickly() -> None:
    """Spare compilations what takes long and changes nothing that is tested."""
    # Dynamo measures the guards of each, for which it flushes the caches of the processor.
    import_module("torch._dynamo.guards").profile_guard_manager = lambda *_: 0.0
    # It walks over all objects after each, too.
    import_module("torch._dynamo.config").run_gc_after_compile = False
    # g++ takes half as long for loops without vector instructions, of which Inductor need not find out then.
    import_module("torch._inductor.config").cpp.vec_isa_ok = False


def compile_once() -> None:
    """What a process's first compilation imports, and computes of the sources of torch and Triton."""
    torch = import_module("torch")
    compile_fx = import_module("torch._inductor.compile_fx").compile_fx
    eager = partial(compile_fx, inner_compile=lambda graph, *_, **__: graph.forward)
    with torch.no_grad():
        torch.compile(torch.sin, backend=eager)(torch.ones(1))
    torch._dynamo.reset()


def serve() -> dict[str, Any] | None:
    """The request, in each process that is forked; nothing in this one, at the end of requests."""
    installed = sys.path[1:]  # without this folder
    compile_quickly()
    # With a GPU a compilation would begin to use it.
    if not import_module("torch").cuda.is_available():
        compile_once()
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        children = []
        for request in json.loads(line):
            children.append(os.fork())
            if children[-1] == 0:
                become(request, installed)
                return request
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        sys.stdout.write(f"{json.dumps(statuses)}\n")
        sys.stdout.flush()
    return None


def finish(request: dict[str, Any]) -> None:
    """Execute it, and end as Python does, but that nothing is freed: for all that is imported it takes 0.3 s."""
    status = 0
    try:
        execute(request)
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        status = ended.code or 0
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    given = serve()
    if given is not None:
        finish(given)
