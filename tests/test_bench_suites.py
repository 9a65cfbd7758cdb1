"""Suites of benches: a session that goes on where it stopped, within its time, and what it does not run and why."""

import importlib
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import command  # noqa: E402
import record  # noqa: E402
import steps  # noqa: E402
import suites  # noqa: E402
from random_editors import ALIASES, RECIPES  # noqa: E402

from mtedit_fast import cli_bench  # noqa: E402
from mtedit_fast.ops import _cpp  # noqa: E402
from mtedit_fast.training.public_models import FAMILIES  # noqa: E402

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
STEP = steps.Step("ops", "one", "--words 'a b'", "cpu", 0, 60, "", ())

BENCH = """
import csv, sys
from pathlib import Path
print("called with", sys.argv[1:])
out = Path(sys.argv[sys.argv.index("--out") + 1])
new = not out.exists()
with out.open("a", newline="") as file:
    writer = csv.DictWriter(file, ["commit", "device"])
    if new:
        writer.writeheader()
    writer.writerow({"commit": COMMIT, "device": DEVICE})
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Makes sessions on a folder of benches of its own: one appends a row, others fail, hang or are killed."""
    here = {"COMMIT": record.commit(), "DEVICE": record.device_name(CPU)}
    setting = "\n".join(f"{name} = {value!r}" for name, value in here.items())
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "bench_one.py").write_text(setting + BENCH)
    (folder / "bench_two.py").write_text("raise SystemExit(3)\n")
    (folder / "bench_three.py").write_text("import time\nprint('waits', flush=True)\ntime.sleep(600)\n")
    (folder / "bench_four.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setattr(suites, "HERE", folder)

    def made(seconds: float = 1000.0, *, fresh: bool = False, tests: bool = False) -> suites.Session:
        return suites.Session(tmp_path / "results", CPU, seconds=seconds, fresh=fresh, tests=tests)

    return made


def test_a_step_is_run_once_per_commit_and_again_when_its_rows_are_gone(session, capsys):
    first = session()
    first.bench(STEP)
    out = first.results / "one.csv"
    shown = capsys.readouterr().out
    assert f"called with {['--words', 'a b', '--device', 'cpu', '--out', str(out)]}" in shown
    assert first.done(STEP.name) in first.log.read_text()
    assert len(record.read(out)) == 1
    session().bench(STEP)
    assert "before" in capsys.readouterr().out
    assert len(record.read(out)) == 1
    session(fresh=True).bench(STEP)
    assert "'--fresh'" in capsys.readouterr().out
    assert len(record.read(out)) == 2
    out.unlink()
    session().bench(STEP)
    assert len(record.read(out)) == 1


def test_what_fails_or_hangs_is_named_and_the_others_go_on(session, monkeypatch):
    monkeypatch.setattr(suites, "LEAST_SECONDS", 0)
    own, start = session(), time.monotonic()
    own.bench(replace(STEP, bench="two"))
    own.bench(replace(STEP, bench="three", options="", seconds=3))
    own.bench(replace(STEP, bench="four", options=""))
    own.bench(STEP)
    assert time.monotonic() - start < 300
    assert own.failed == ["two --words 'a b'", "three", "four"]
    log, where = own.log.read_text(), f"at {record.commit()} on {record.device_name(CPU)}"
    assert f"== two --words 'a b': failed (3) {where}" in log
    assert f"waits\n== three: ran out of time {where}" in log
    assert f"== four: was killed, as a system does that runs out of memory, {where}" in log
    assert own.done(STEP.name) in log


def test_a_step_that_does_not_fit_is_passed_over(session, monkeypatch, capsys):
    own = session(seconds=100)
    own.bench(replace(STEP, first_row=101, options="--long"))
    own.bench(STEP)
    assert own.passed == ["one --long"]
    assert "== one --long: passed over, 100 s are left and a row takes 101" in capsys.readouterr().out
    assert len(record.read(own.results / "one.csv")) == 1
    assert not own.failed
    late = session(seconds=steps.LEAST_SECONDS - 1)
    late.bench(replace(STEP, options="--late"))
    assert late.passed == ["one --late"]
    monkeypatch.setattr(suites.Session, "_fits", lambda self, step: True)
    with pytest.raises(TimeoutError, match="no time left for one --late"):
        late.bench(replace(STEP, options="--late"))


def test_a_step_that_the_session_ends_in_goes_on_in_its_place(session, monkeypatch):
    monkeypatch.setattr(suites, "LEAST_SECONDS", 0)
    own, hangs = session(seconds=2), replace(STEP, bench="three", options="", first_row=1)
    with pytest.raises(TimeoutError, match="no time left for the rest of three"):
        own.bench(hangs)
    assert not own.failed
    assert not session().failed_before(hangs)


def test_what_failed_is_tried_again_at_last(session, tmp_path, monkeypatch, capsys):
    failing = (replace(STEP, bench="two"), replace(STEP, options="--red", tests="red"))
    order = (*failing, STEP, replace(STEP, options="--new"))
    monkeypatch.setattr(suites, "STEPS", order)
    monkeypatch.setattr(suites.Session, "_green", lambda self, tests: False)
    arguments = ["ops", "--device", "cpu", "--results", str(tmp_path / "results"), "--tests"]
    assert suites.main(arguments) == 1
    again = session()
    assert [again.failed_before(step) for step in order] == [True, True, False, False]
    tried = []
    monkeypatch.setattr(suites.Session, "bench", lambda self, step: tried.append(step))
    suites.main(arguments)
    assert tried == [*order[2:], *failing]
    monkeypatch.setattr(record, "commit", lambda: "another")
    assert not any(session().failed_before(step) for step in order)


@pytest.mark.parametrize(("bench", "code", "shown"), [("one", 0, "rows are in"), ("two", 1, "failed  two")])
def test_the_command_runs_a_suite_and_says_what_failed(bench, code, shown, session, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suites, "STEPS", (replace(STEP, bench=bench), replace(STEP, suite="judge")))
    arguments = ["ops", "--device", "cpu", "--results", str(tmp_path / "results")]
    assert suites.main(arguments) == code
    assert shown in capsys.readouterr().out
    assert suites.main([*arguments, "--time-limit", "1", "--fresh"]) == 1
    assert f"== no time left for {bench} --words 'a b': run again, and it goes on" in capsys.readouterr().out


def test_an_interrupted_suite_says_that_it_goes_on(session, tmp_path, monkeypatch, capsys):
    def interrupted(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(suites.Session, "bench", interrupted)
    monkeypatch.setattr(suites, "STEPS", (STEP,))
    assert suites.main(["all", "--device", "cpu", "--results", str(tmp_path / "results")]) == 1
    assert "== interrupted: run again, and it goes on" in capsys.readouterr().out


def test_a_step_whose_tests_are_red_is_left_out(session, tmp_path, monkeypatch):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_good.py").write_text("def test():\n    pass\ndef test_compiles_for_others():\n    assert False\n")
    (tests / "test_bad.py").write_text("def test_one():\n    assert False\ndef test_two():\n    assert False\n")
    monkeypatch.setattr(steps, "TESTS", {"good": "good", "bad": "good bad"})
    own = session(tests=True)
    for name in ("good", "bad", "bad", "good"):
        own.bench(replace(STEP, tests=name, options=f"--{name}"))
    log = own.log.read_text()
    assert own.failed == ["tests of bad", "one --bad", "one --bad"]
    assert log.count("== tests of good, ") == log.count("== tests of bad, ") == 1
    assert "== one --bad: left out, the tests of bad are not green, at " in log
    assert "FAILED tests/test_bad.py::test_one" in log
    assert "FAILED tests/test_bad.py::test_two" in log
    assert len(record.read(own.results / "one.csv")) == 1


def test_a_suites_tests_are_files_or_tests_of_one_in_parallel_where_there_are_cores(monkeypatch):
    monkeypatch.setattr(steps, "TESTS", {"judge": "judge_errors on_gpu::test_judges_are_the_cpus"})
    files = ["tests/test_judge_errors.py", "tests/test_on_gpu.py::test_judges_are_the_cpus"]
    assert steps.tests_of("judge") == files
    monkeypatch.setattr(steps.os, "cpu_count", lambda: 7)
    alone = steps.pytest_command("judge")
    assert alone[-2:] == files
    assert "-x" not in alone
    assert "not compiles_for and not compiled_for and not fuses_multiply_adds" in alone
    monkeypatch.setattr(steps.os, "cpu_count", lambda: 8)
    found = {"xdist": True}
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: found.get(name, True) or None)
    assert steps.pytest_command("judge") == ["env", steps.WORKSPACE, "OMP_NUM_THREADS=2", *alone[2:], "-n", "8"]
    found["xdist"] = False
    assert steps.pytest_command("judge") == alone


def test_what_cannot_run_says_why(monkeypatch):
    step = replace(STEP, device="cuda", needs=("no_such_module", "torch"), gigabytes=1e6)
    assert step.obstacle(CPU) == (
        "needs a GPU, and torch sees none" if not torch.cuda.is_available() else "needs a GPU, and --device is cpu"
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8_000_000_000, 9))
    assert step.obstacle(CUDA) == "needs no_such_module, not installed"
    assert replace(step, needs=()).obstacle(CUDA) == "needs 1e+06 GB of memory, 8.0 GB are free"
    assert replace(step, needs=(), gigabytes=7).obstacle(CUDA) is None
    assert replace(step, device="cpu").obstacle(CUDA) == "runs on a CPU, and --device is cuda"
    assert STEP.obstacle(CPU) is None
    assert steps.free_gigabytes(CPU) > 0.01
    kernels = replace(step, needs=(steps.CUDA_KERNELS,), gigabytes=7)
    for reason in ("built without CUDA", None):
        monkeypatch.setattr(_cpp, "cuda_unavailable_reason", lambda reason=reason: reason)
        assert kernels.obstacle(CUDA) == (reason and f"needs the CUDA kernels: {reason}")


def test_exports_are_left_out_of_all_that_a_gpu_does(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    assert suites.main(["all", "--list", "--device", "cuda"]) == 0
    assert "skip  export --editor klein-4b: takes a CPU's time, not the GPU's: bench export" in capsys.readouterr().out
    assert suites.main(["export", "--list", "--device", "cuda"]) == 0
    assert "run   export --editor klein-4b" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_the_list_has_every_step_with_its_reason(capsys):
    assert suites.main(["all", "--list", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(suites.STEPS)
    assert "skip  judge --full: needs a GPU, and torch sees none" in shown
    assert suites.main(["judge", "--list", "--device", "cpu"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == sum(step.suite == "judge" for step in suites.STEPS)


def test_steps_name_what_there_is():
    assert {step.suite for step in suites.STEPS if step.device == "cuda"} == set(suites.SUITES) - {"plan"}
    assert {step.suite for step in suites.STEPS if step.device == "cpu"} == set(suites.SUITES)
    assert list(cli_bench.SUITES) == [*suites.SUITES, "all"]
    own = {action.option_strings[0] for action in suites.parser()._actions if action.option_strings}
    assert {"--help" if name == "-h" else name for name in own} == cli_bench.SUITE_OPTIONS | {"--help"}
    assert {step.bench for step in suites.STEPS} == {p.stem[6:] for p in BENCHMARKS.glob("bench_*.py")}
    assert all(step.tests in steps.TESTS for step in suites.STEPS if step.tests)
    for file, _, test in (each.partition("::") for name in steps.TESTS for each in steps.tests_of(name)):
        assert f"def {test}" in (BENCHMARKS.parent / file).read_text()
    assert all(steps.LEAST_SECONDS <= step.first_row < step.seconds for step in suites.STEPS)
    assert len(suites.STEPS) == len({(step.name, step.device) for step in suites.STEPS})


def test_an_iteration_begins_the_second_session():
    """It comes after what fills the first, and before all else."""
    order = [step for step in suites.STEPS if step.device == "cuda"]
    before = order[: next(i for i, step in enumerate(order) if step.bench == "iteration")]
    assert [step.bench for step in before] == ["rollout", "sde_step", "nft_loss", "digit_score", "judge"]
    assert sum(step.first_row for step in before) + 400 > 570 > sum(step.first_row for step in before)


def test_full_rollouts_ask_for_more_memory_than_their_weights():
    rollouts = [step for step in suites.STEPS if step.bench == "rollout" and step.device == "cuda"]
    asked = {name: [s.gigabytes for s in rollouts if s.options.split()[1] == name] for name in ("kontext", *ALIASES)}
    assert sum(map(len, asked.values())) == len(rollouts)
    for name, gigabytes in asked.items():
        recipe = RECIPES[ALIASES.get(name, name)]
        with torch.device("meta"):
            model = FAMILIES[recipe.editor.family].transformer.from_config(recipe.full.transformer)
        assert 2 * sum(p.numel() for p in model.parameters()) / 1e9 < min(gigabytes)


def test_every_step_has_options_that_its_bench_knows():
    for step in suites.STEPS:
        module = importlib.import_module(f"bench_{step.bench}")
        options = module.BENCH.options if hasattr(module, "BENCH") else module.options
        parser = command.parser(None, step.bench, options)
        assert parser.parse_args([*shlex.split(step.options), "--device", step.device]).device.type == step.device
