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
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from select import select
from types import ModuleType
from typing import Any, TextIO

LIMIT = 300  # seconds
ADDRESS = "WARM_SERVER"  # the variable that names the socket


def share() -> None:
    """Start the server, for this process of pytest and its workers; it imports nothing before it is needed."""
    without = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSE_COMPILE", "PYTHON"))}
    # Whether there is a GPU is then asked without the CUDA runtime, which a forked process could not use again.
    without["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    # Threads are counted when torch is imported.  Tests and ranks run side by side.
    without["OMP_NUM_THREADS"] = "1"
    folder = tempfile.TemporaryDirectory()
    os.environ[ADDRESS] = f"{folder.name}/socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.environ[ADDRESS])
        listening.listen()
        given = listening.fileno()
        process = subprocess.Popen(
            [sys.executable, __file__, str(given)], env=without, stdin=subprocess.PIPE, pass_fds=[given]
        )
    atexit.register(folder.cleanup)
    atexit.register(process.communicate)


@cache
def server() -> TextIO:
    """A connection to it: requests are written, answers are read, a line each."""
    if ADDRESS not in os.environ:
        share()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[ADDRESS])
        return connection.makefile("rw")


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
    connection = server()
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        requests = [
            {
                "arguments": words, "cwd": str(cwd or Path.cwd()), "env": environment,
                "out": f"{folder}/out{number}", "err": f"{folder}/err{number}",
            }
            for number, environment in enumerate(environments)
        ]  # fmt: skip
        connection.write(f"{json.dumps(requests)}\n")
        connection.flush()
        return [
            subprocess.CompletedProcess(words, status, *(Path(request[name]).read_text() for name in ("out", "err")))
            for request, status in zip(requests, json.loads(connection.readline()), strict=True)
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
    """Spare compilations what takes long, and a warning, and changes nothing that is tested."""
    # Dynamo measures the guards of each, for which it flushes the caches of the processor.
    import_module("torch._dynamo.guards").profile_guard_manager = lambda *_: 0.0
    # It walks over all objects after each, too, and warns of Python 3.13.0, where guards are slow.
    import_module("torch._dynamo.config").run_gc_after_compile = False
    import_module("torch._dynamo.config").issue_3_13_0_warning = False
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


def connections(listening: socket.socket) -> Iterator[socket.socket]:
    """As long as the process of pytest lives, which holds the other end of standard input."""
    while listening in select([listening, sys.stdin], [], [])[0]:
        yield listening.accept()[0]


@cache
def prepare() -> None:
    """What forked processes have done already."""
    compile_quickly()
    # With a GPU a compilation would begin to use it.
    if not import_module("torch").cuda.is_available():
        compile_once()
    gc.collect()
    gc.freeze()


def serve(listening: socket.socket) -> dict[str, Any] | None:
    """The request, in each process that is forked for one; nothing in this one, nor in those for a connection."""
    installed = sys.path[1:]  # without this folder
    for connection in connections(listening):
        prepare()
        if os.fork() == 0:
            return answer(connection, installed)
        connection.close()
    return None


def answer(connection: socket.socket, installed: list[str]) -> dict[str, Any] | None:
    """As ``serve``, of the requests of one connection."""
    stream = connection.makefile("rw")
    for line in stream:
        children = []
        for request in json.loads(line):
            children.append(os.fork())
            if children[-1] == 0:
                become(request, installed)
                given: dict[str, Any] = request
                return given
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        stream.write(f"{json.dumps(statuses)}\n")
        stream.flush()
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
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        finish(request)
