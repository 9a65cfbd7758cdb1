"""What is installed, under which names, with and without a compiler."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_SOURCE = (".*", "__pycache__", "*.egg-info", "*.so", "build", "dist", "runs", "tests", "benchmarks", "shared")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the tree, so that building leaves no trace in it."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return copy


@pytest.fixture(scope="module")
def built(source) -> tuple[Path, Path]:
    """sdist, and the wheel that is built from that sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", "--outdir", source / "dist"]
    subprocess.run([*command, source], check=True, env=os.environ | {"MTEDIT_NO_CPP": "1"}, capture_output=True)
    (sdist,), (wheel,) = source.glob("dist/*.tar.gz"), source.glob("dist/*.whl")
    return sdist, wheel


def pip_install(target: Path, *arguments: str | Path, **environment: str) -> str:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-v"]
    run = subprocess.run(
        [*command, "--target", target, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    return run.stdout


def sources() -> set[str]:
    """Every Python file and data file that an install must hold, by its installed path."""
    weights = ROOT / "training" / "playground" / "weights"
    found = [*(ROOT / "mtedit_fast").glob("**/*.py"), *(ROOT / "training" / "configs").glob("*.yaml")]
    found += [*(ROOT / "kernels").glob("*.py"), *(ROOT / "training").glob("**/*.py")]
    found += [path for path in weights.glob("**/*") if path.is_file()]
    paths = {str(path.relative_to(ROOT)) for path in found}
    return {re.sub("^(kernels|training)/", r"mtedit_fast/\1/", path) for path in paths}


def test_wheel_holds_every_source_under_one_name(built):
    names = {name for name in zipfile.ZipFile(built[1]).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"mtedit_fast"}
    assert sources() <= names
    assert not [name for name in names if "__pycache__" in name]


def test_sdist_holds_what_a_build_needs(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*")}
    assert wanted | {"setup.py", "pyproject.toml", "LICENSE", "constraints.txt", "Makefile"} <= names


def test_import_names(built, tmp_path):
    pip_install(tmp_path, built[1])
    # -S: nothing but the installed wheel and the standard library can be found
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from importlib.util import find_spec
from importlib.metadata import entry_points
for name in ("mtedit_fast.kernels.sde_step", "mtedit_fast.training.playground", "mtedit_fast.rollout"):
    print(name, find_spec(name) is not None)
print("kernels", find_spec("kernels"))
print("training", find_spec("training"))
print(*[e.value for e in entry_points(group="console_scripts") if e.name == "mtedit-fast"])
"""
    run = subprocess.run([sys.executable, "-ISc", program], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert run.stdout.splitlines() == [
        "mtedit_fast.kernels.sde_step True",
        "mtedit_fast.training.playground True",
        "mtedit_fast.rollout True",
        "kernels None",
        "training None",
        "mtedit_fast.cli:main",
    ]


def test_the_tree_itself_has_the_same_names():
    program = "import mtedit_fast.kernels, mtedit_fast.training as t; print(mtedit_fast.kernels.__path__, t.__path__)"
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT)
    assert "mtedit_fast/kernels" in run.stdout
    assert "mtedit_fast/training" in run.stdout
    for name in ("kernels", "training"):
        assert (ROOT / "mtedit_fast" / name).is_symlink()
        assert not (ROOT / name / "__init__.py").exists()


def test_without_a_compiler_it_installs_and_says_so(source, tmp_path):
    missing = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "MTEDIT_NO_CUDA": "1"}
    log = pip_install(tmp_path, source, **missing)
    assert "WARNING: the C++ extension did not build" in log
    assert "MTEDIT_NO_CUDA=1: building CPU code only" in log
    assert not list(tmp_path.glob("mtedit_fast/_C*"))
    program = """
import torch
from mtedit_fast.ops import _cpp, seeded_noise
print(_cpp.__file__)
print(_cpp.unavailable_reason())
seed = torch.tensor([1])
print(torch.equal(seeded_noise(seed, (5,), 0), seeded_noise(seed, (5,), 0, backend="reference")))
seeded_noise(seed, (5,), 0, backend="cpp")
"""
    # -S: an editable install beside it stays out
    run = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    where, reason, fallback = run.stdout.splitlines()
    assert Path(where).is_relative_to(tmp_path)
    assert "the C++ extension is not built" in reason
    assert "install g++" in reason
    assert fallback == "True"
    assert "ValueError: backend='cpp' is not available" in run.stderr


def test_an_old_python_is_named(source, tmp_path):
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    run = subprocess.run(["make", "install", f"PYTHON={old}"], cwd=source, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"needs Python 3.11 or newer, and '{old}' is not" in run.stderr
    assert not (source / ".venv").exists()


def test_every_requirement_is_pinned_torch_first():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines[0].startswith("torch==")
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[\w.]+", version) for version in pins.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    required = [
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
        *project["build-system"]["requires"],
    ]

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    names = {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in required}  # type: ignore[index]
    assert names <= {normal(name) for name in pins}
