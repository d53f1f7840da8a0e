"""The package as a user gets it: wheel and editable install in fresh environments, and what import costs."""

from __future__ import annotations

import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import lcf_fast

ROOT = Path(__file__).resolve().parents[1]
FILES = ("README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints.txt", "MANIFEST.in")
SOURCES = ("setup.py", "pyproject.toml", *FILES, "lcf_fast", "kernels", "bench", "docs", "examples", "tests")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed, free of this test run's environment."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building writes into them."""
    copy = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=ignore)
        elif source.exists():
            shutil.copy(source, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tree / "out", tree, cwd=tree)
    (path,) = (tree / "out").glob("*.whl")
    return path


def make_environment(folder: Path) -> Path:
    """A fresh environment's python. It sees torch and the rest through a path file, and no network.

    The path file adds this environment's packages by name only: their own path files are not run, so an
    editable lcf_fast of this environment does not shine through.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    paths = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "borrowed.pth").write_text("\n".join(paths) + "\n", encoding="utf-8")
    return python


def install(python: Path, *what: str | Path, cwd: Path) -> None:
    run(python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--ignore-installed", *what, cwd=cwd)


IMPORT_ALL = """
import importlib, json, pkgutil, lcf_fast, lcf_fast.kernels
files = {}
for package in (lcf_fast, lcf_fast.kernels):
    files[package.__name__] = package.__file__
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        files[info.name] = importlib.import_module(info.name).__file__
for name in lcf_fast.__all__:
    getattr(lcf_fast, name)
import transformers.integrations.hub_kernels
try:
    import kernels
except ImportError:
    kernels = None
print(json.dumps({"files": files, "kernels": getattr(kernels, "__file__", None)}))
"""


def modules_in_the_sources() -> set[str]:
    def inside(folder: str, package: str) -> set[str]:
        stems = {path.stem for path in (ROOT / folder).glob("*.py")}
        return {package if stem == "__init__" else f"{package}.{stem}" for stem in stems}

    return inside("lcf_fast", "lcf_fast") | inside("kernels", "lcf_fast.kernels")


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        top_level = archive.read(next(n for n in names if n.endswith("top_level.txt"))).decode().split()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert top_level == ["lcf_fast"]
    assert {name.split("/")[0] for name in names} == {
        "lcf_fast",
        f"lcf_fast-{lcf_fast.__version__}.dist-info",
    }
    code = {name for name in names if name.startswith("lcf_fast/")}
    expected = {f"lcf_fast/{path.relative_to(ROOT / 'lcf_fast')}" for path in (ROOT / "lcf_fast").rglob("*.py")}
    expected |= {f"lcf_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert code == expected | {"lcf_fast/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "Requires-Python: >=3.10,<3.14" in metadata.replace("<3.14,>=3.10", ">=3.10,<3.14")
    assert 'Requires-Dist: triton>=3.6; platform_system == "Linux"' in metadata


def test_sdist_holds_all_that_its_tests_read_and_readme_links_to(tree: Path, tmp_path: Path) -> None:
    built = tree / "tests" / "__pycache__" / "built.pyc"  # as tests leave them
    built.parent.mkdir(exist_ok=True)
    built.touch()
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, tree, cwd=tree)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    found = (each for name in SOURCES for each in [tree / name, *(tree / name).rglob("*")] if each.is_file())
    assert {each.relative_to(tree).as_posix() for each in found if each.suffix != ".pyc"} <= names
    assert not [name for name in names if name.endswith(".pyc") or name.startswith(("out", "build"))]
    for page in [name for name in names if name.endswith(".md")]:
        for link in re.findall(r"\]\(([^)#:]+)[#)]", (tree / page).read_text(encoding="utf-8")):
            assert posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) in names, (page, link)


def test_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    install(python, wheel, cwd=tmp_path)
    found = json.loads(run(python, "-c", IMPORT_ALL, cwd=tmp_path))
    assert set(found["files"]) >= modules_in_the_sources()
    assert all(Path(file).is_relative_to(tmp_path / "env") for file in found["files"].values()), found
    assert found["kernels"] is None or not Path(found["kernels"]).is_relative_to(tmp_path)


def test_types_hold_across_the_border_to_the_kernels(wheel: Path, tmp_path: Path) -> None:
    """Only in the wheel does mypy see the kernels as lcf_fast.kernels, so the calls into them are checked here."""
    python = make_environment(tmp_path / "env")
    install(python, wheel, cwd=tmp_path)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = silent\ncheck_untyped_defs = true\n"
        "[mypy-triton.*,transformers.*,safetensors.*]\nignore_missing_imports = true\nfollow_imports = skip\n",
        encoding="utf-8",
    )
    run(python, "-m", "mypy", "-p", "lcf_fast", cwd=tmp_path)


def test_editable_install_finds_the_kernels(tree: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "env")
    install(python, "--no-build-isolation", "-e", tree, cwd=tmp_path)
    found = json.loads(run(python, "-c", IMPORT_ALL, cwd=tmp_path))
    assert set(found["files"]) >= modules_in_the_sources()
    assert Path(found["files"]["lcf_fast"]).parent == tree / "lcf_fast"
    assert Path(found["files"]["lcf_fast.kernels"]).parent == tree / "kernels"
    assert found["kernels"] is None or not Path(found["kernels"]).is_relative_to(tree)
    # From the checkout itself, where ./kernels is in reach, transformers must still import.
    run(python, "-c", "import transformers.integrations.hub_kernels, lcf_fast.kernels", cwd=tree)


IMPORT_COST = """
import json, os, sys, time
import torch

def first_import():
    # In a forked child, so that each of several tries is a first import.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        started = time.perf_counter()
        import lcf_fast
        os.write(writer, str(time.perf_counter() - started).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return float(os.read(reader, 100))

seconds = min(first_import() for _ in range(5))
heavy = ("triton", "transformers", "lcf_fast.kernels")
import lcf_fast
bare = [name for name in heavy if name in sys.modules]
for name in lcf_fast.__all__:
    getattr(lcf_fast, name)
used = [name for name in heavy if name in sys.modules]
print(json.dumps({"seconds": seconds, "bare": bare, "used": used, "cuda": torch.cuda.is_initialized()}))
"""


def test_import_is_light(tmp_path: Path) -> None:
    """Neither importing nor naming the public names brings in Triton, transformers or a CUDA context."""
    cost = json.loads(run(sys.executable, "-c", IMPORT_COST, cwd=tmp_path))
    assert cost["bare"] == []
    assert cost["used"] == []
    assert not cost["cuda"]
    assert cost["seconds"] < 0.3, f"import lcf_fast takes {cost['seconds']:.2f} s over torch's own import"


def test_public_names() -> None:
    promised = (
        "CacheGeometry LCFConfig layer_map LatentCacheFlow Message ops reference use_backend __version__ "
        "LCFError ShapeError DTypeError DeviceError GeometryError SpanError IndexRangeError BackendError "
        "CheckpointError MessageError Spans SharerSide GrowingMessage PartialPool spans parallel transport "
        "LatentSlots SlotsSharerSide GrowingSlots"
    )
    assert set(promised.split()) <= set(lcf_fast.__all__)
    assert set(lcf_fast.__all__) <= set(dir(lcf_fast))
    for name in lcf_fast.__all__:
        assert getattr(lcf_fast, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        lcf_fast.no_such_name  # noqa: B018
