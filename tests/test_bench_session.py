"""gpu_session.sh: what it needs to start, and the one file that brings everything back, also after a kill."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

SESSION = Path(__file__).parents[1] / "benchmarks" / "gpu_session.sh"
PYTHON = """#!/bin/sh
# In place of an interpreter: it sees a GPU, and each suite leaves a row; one waits before it ends.
case "$1" in
  benchmarks/suites.py)
    echo "$@" >"$RESULTS/arguments"
    echo "$COMMIT" >>"$RESULTS/one.csv"
    [ "$2" != slow ] || exec sleep 60;;
esac
"""


@pytest.fixture
def folder(tmp_path):
    """Where there is no git: the script, and that interpreter."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(SESSION, tmp_path / "benchmarks")
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def start(folder: Path, **changes: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("OUT", "COMMIT")}
    environment |= {"RESULTS": str(folder / "rows"), "PYTHON": str(folder / "python")} | changes
    command = [folder / "benchmarks" / SESSION.name]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)


def packed(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as tar:
        return {Path(x.name).name: tar.extractfile(x).read().decode() for x in tar.getmembers() if x.isfile()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_session_needs_a_gpu(folder):
    session = start(folder, PYTHON=sys.executable, COMMIT="abc")
    assert "sees no CUDA GPU through torch: nothing was run" in session.communicate()[0]
    assert session.returncode == 1
    assert not (folder / "rows").exists()


def test_the_session_needs_a_commit(folder):
    session = start(folder)
    assert "no git here, and rows without a commit are worth little: nothing was run; " in session.communicate()[0]
    assert session.returncode == 1
    assert not (folder / "rows").exists()


def test_all_results_come_back_in_one_file_and_the_next_session_goes_on_in_them(folder):
    archive = folder / "back.tar.gz"
    for runs in (1, 2):
        session = start(folder, COMMIT="abc", ARCHIVE=str(archive), SUITE="ops", TIME_LIMIT="100")
        session.communicate(timeout=60)
        assert session.returncode == 0
        assert packed(archive)["one.csv"] == "abc\n" * runs
        assert "session.log" in packed(archive)
        shutil.rmtree(folder / "rows")
        (folder / "rows").mkdir()
        subprocess.run(["tar", "-xzf", archive, "-C", folder / "rows"], check=True)
    words = packed(archive)["arguments"].split()
    assert words[:6] == ["benchmarks/suites.py", "ops", "--device", "cuda", "--tests", "--results"]
    assert 50 < int(words[-1]) <= 100


def test_what_a_killed_session_had_is_packed_already(folder):
    archive = folder / "rows" / "back.tar.gz"  # within, but not packed itself
    session = start(folder, COMMIT="abc", ARCHIVE=str(archive), SUITE="slow")
    until = time.monotonic() + 60
    while time.monotonic() < until and not (archive.exists() and "one.csv" in packed(archive)):
        time.sleep(0.2)
    os.killpg(session.pid, signal.SIGKILL)
    session.communicate()
    assert sorted(packed(archive)) == ["arguments", "one.csv", "session.log"]
