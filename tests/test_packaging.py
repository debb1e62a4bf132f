"""The forms in which the package is used: wheel, sdist, wheel from sdist, editable, and a checkout on PYTHONPATH."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
LINKS = ("sparse_compile/kernels", "sparse_compile/passes")  # to the folders at the top level
# What is not Python, such as templates, is in the package too; what a run leaves there is not.
SOURCES = {
    f"{package}/{path.relative_to(REPOSITORY / package).as_posix()}"
    for package in ("sparse_compile", *LINKS)
    for path in (REPOSITORY / package).rglob("*")  # which does not follow links
    if path.is_file() and "__pycache__" not in path.parts
}

IMPORT_ALL = """
import sparse_compile, sparse_compile.passes, sparse_compile.kernels.ops
print(sparse_compile.__file__, sparse_compile.passes.__file__, sparse_compile.kernels.ops.__file__, sep="\\n")
"""
FIND_BACKEND = """
import sys
import torch._dynamo
assert "sste" in torch._dynamo.list_backends()
assert "sparse_compile.backend" not in sys.modules, "listing the backends imported one"
from torch._dynamo.backends.registry import lookup_backend
from sparse_compile.backend import sste
assert lookup_backend("sste") is sste
"""

IMPORT_TORCH = """
import sys
import torch
assert "torch._dynamo" not in sys.modules, "importing torch imported dynamo"
"""
UNASKED = f"""{IMPORT_TORCH}
more = {{"sparse_compile.launcher.route_compile", "tabulate", "jinja2"}} & set(sys.modules)
assert not more, f"{{more}} were imported with the entry point"
assert not hasattr(torch.compile, "__wrapped__"), "torch was touched"
"""
# A script that compiles nothing; the rewritten graph runs as it is, so that neither is Inductor imported.
TRAIN = """
import torch
from torch import nn
from sparse_compile import backend
backend.compile_graph = lambda graph, *args, **named: graph.forward
backend.leave_without_kernels = lambda plans: (plans, [])  # as on a GPU that has them
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
step = STEP
step(torch.ones(8, 64)).sum().backward()
optimizer.step()
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed; PYTHONPATH is not inherited."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def checkout(to: Path) -> Path:
    """A copy of the repository's files, links kept."""
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__")
    return Path(shutil.copytree(REPOSITORY, to, symlinks=True, ignore=ignored))


class Environment:
    """A fresh virtual environment that sees what is installed here, except sparse_compile."""

    def __init__(self, at: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", at, cwd=at.parent)
        self.python = at / "bin" / "python"
        self.elsewhere = at / "elsewhere"
        self.elsewhere.mkdir()
        borrowed = at / "borrowed"
        borrowed.mkdir()
        for folder in dict.fromkeys(sys.path):
            if Path(folder).name in ("site-packages", "dist-packages"):
                for entry in Path(folder).iterdir():
                    link = borrowed / entry.name
                    if "sparse_compile" not in entry.name and not link.exists():
                        link.symlink_to(entry)
        site_packages = next(at.glob("lib/python*/site-packages"))
        (site_packages / "borrowed.pth").write_text(f"{borrowed}\n")

    def install(self, *what: str | Path) -> None:
        """Install from local files only."""
        offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
        run(sys.executable, "-m", "pip", "--python", self.python, "install", *offline, *what, cwd=self.elsewhere)

    def execute(self, code: str, **environment: str) -> str:
        """Output of ``code`` run outside the repository."""
        return run(self.python, "-c", code, cwd=self.elsewhere, **environment)


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """An environment of the test's own."""
    return Environment(tmp_path / "environment")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel made from it, and in ``direct/`` the wheel made from the checkout."""
    pytest.importorskip("build", reason="the package `build` is not installed")
    folder = tmp_path_factory.mktemp("built")
    source = checkout(folder / "source")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder / "direct", source, cwd=folder)
    return folder


def test_wheels_hold_the_package_and_nothing_else(built: Path) -> None:
    files = []
    for wheel in (next(built.glob("*.whl")), next(built.glob("direct/*.whl"))):
        assert wheel.name.endswith("-py3-none-any.whl")
        with zipfile.ZipFile(wheel) as archive:
            files.append({name: archive.read(name) for name in archive.namelist()})
        assert {name for name in files[-1] if ".dist-info/" not in name} == SOURCES
    assert files[0].keys() == files[1].keys()
    assert [name for name, text in files[0].items() if text != files[1][name]] == [], "they differ"


def test_sdist_holds_files_in_place_of_links(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        members = {member.name.partition("/")[2]: member for member in sdist.getmembers()}
    assert set(members) >= SOURCES | {"LICENSE", "README.md", "CHANGELOG.md", "DESIGN.md", "pyproject.toml"}
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert not [name for name in members if name.startswith(("passes/", "kernels/", "tests/"))]


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel made from the sdist."""
    environment = Environment(tmp_path_factory.mktemp("installed") / "environment")
    environment.install(next(built.glob("*.whl")))
    return environment


def check_import(environment: Environment, more: str = "") -> str:
    """What ``more`` prints after an import of torch that touches nothing, as long as SPARSE_COMPILE is not set."""
    light = "import sys, sparse_compile; assert 'torch' not in sys.modules, 'the package imported torch'"
    return environment.execute(light + UNASKED + more)


def check_files(environment: Environment, printed: str) -> None:
    """``IMPORT_ALL`` printed files of the environment."""
    files = printed.splitlines()
    assert len(files) == 3
    assert all(Path(file).is_relative_to(environment.python.parent.parent) for file in files)


@pytest.mark.nightly  # by day the next but one is in such an environment
def test_wheel_from_sdist_installs_into_a_fresh_environment(installed: Environment) -> None:
    """Its backend is found in ``test_environment_variables``."""
    check_import(installed)


@pytest.mark.nightly  # it holds what the other one does
def test_wheel_installs_into_a_fresh_environment(built: Path, environment: Environment) -> None:
    environment.install(next(built.glob("direct/*.whl")))
    check_files(environment, check_import(environment, FIND_BACKEND + IMPORT_ALL))


@pytest.mark.nightly
def test_environment_variables(installed: Environment) -> None:
    """SPARSE_COMPILE does what the launcher does under torchrun."""
    train, report = installed.elsewhere / "train.py", installed.elsewhere / "report.json"
    train.write_text(IMPORT_TORCH + FIND_BACKEND + IMPORT_ALL + TRAIN.replace("STEP", "model"))
    torchrun = f"import sys, runpy; sys.argv[1:] = ['--standalone', {str(train)!r}]\n"
    torchrun += "runpy.run_module('torch.distributed.run', run_name='__main__')"
    check_files(installed, installed.execute(torchrun, SPARSE_COMPILE="auto", SPARSE_COMPILE_REPORT=str(report)))
    assert "2:4" in report.read_text(), "torchrun's own process wrote over it"


@pytest.mark.nightly
def test_pytorch_may_be_told_to_load_nothing(installed: Environment) -> None:
    installed.execute(UNASKED, SPARSE_COMPILE="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0")


@pytest.mark.nightly
def test_editable_install(tmp_path: Path, environment: Environment) -> None:
    """With SPARSE_COMPILE, which does what the launcher does."""
    source = checkout(tmp_path / "source")
    environment.install("--editable", source)
    report = tmp_path / "report.json"
    code = f"{IMPORT_TORCH}assert torch.compile.__wrapped__\n{FIND_BACKEND}{IMPORT_ALL}"
    code += TRAIN.replace("STEP", "torch.compile(model)")
    for path in environment.execute(code, SPARSE_COMPILE="1", SPARSE_COMPILE_REPORT=str(report)).splitlines():
        assert Path(path).is_relative_to(source)
    assert "2:4" in report.read_text()


@pytest.mark.nightly
def test_checkout_on_pythonpath(environment: Environment) -> None:
    """Neither Triton nor CUDA is touched before a graph is compiled for a GPU."""
    code = """
import sys
import torch, torch._dynamo.backends.registry as registry
packages = lambda: {name.partition(".")[0] for name in sys.modules}
before = packages()
import sparse_compile
# Nothing is installed that could announce the backend, so the import does.
registry.lookup_backend("sste")
import sparse_compile.backend, sparse_compile.kernels.ops
added = packages() - before
assert "triton" not in added, "Triton was imported"
assert "jinja2" not in added, "Jinja2 was imported"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
"""
    for path in environment.execute(code + IMPORT_ALL, PYTHONPATH=str(REPOSITORY)).splitlines():
        assert Path(path).is_relative_to(REPOSITORY)


def test_links_are_committed_as_links() -> None:
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    listing = run("git", "ls-files", "-s", *LINKS, cwd=REPOSITORY).splitlines()
    assert [(line.split()[0], line.split("\t")[1]) for line in listing] == [("120000", link) for link in LINKS]
    assert [os.readlink(REPOSITORY / link) for link in LINKS] == ["../kernels", "../passes"]
