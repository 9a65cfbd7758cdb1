"""Suites of benches, step by step, most valuable first.

mtedit-fast bench all --list                    what would run here, and what would not and why
mtedit-fast bench rollout                       one suite; with options of the bench itself, that one
python benchmarks/suites.py all --tests         needs torch only to start: on a GPU machine, see gpu_session.sh

Every step is a process of its own, whose rows are appended as they come. Interrupted, a suite goes on where it stopped:
steps that session.log has as done at this commit on this device are left out while their rows are there, and every
bench leaves out the rows that its file holds.
"""

import argparse
import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import record
import torch
from command import as_device, default_device

HERE = Path(__file__).resolve().parent
SUITES = ("ops", "rollout", "judge", "consistency", "update", "iteration", "onestep", "export", "plan")
MODELS = ("diffusers", "transformers", "pydantic")
LEAST_SECONDS = 20  # a step is not begun with less


@dataclass(frozen=True)
class Step:
    """A run of a bench.

    needs: modules. gigabytes: of free memory, the device's: weights and what they compute with, by estimate.
    tests: of `TESTS`, that must be green on the device before. seconds: at most.
    """

    suite: str
    bench: str
    options: str = ""
    device: str = "cuda"
    gigabytes: float = 4
    seconds: int = 540
    tests: str = ""
    needs: tuple[str, ...] = MODELS

    @property
    def name(self) -> str:
        return f"{self.bench} {self.options}".strip()

    def obstacle(self, device: torch.device) -> str | None:
        """Why the step cannot run on `device`."""
        if self.device != device.type:
            found = "and torch sees none" if not torch.cuda.is_available() else f"and --device is {device.type}"
            return f"needs a GPU, {found}" if self.device == "cuda" else f"runs on a CPU, and --device is {device.type}"
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            return f"needs {', '.join(missing)}, not installed"
        free = free_gigabytes(device)
        return f"needs {self.gigabytes:g} GB of memory, {free:.1f} GB are free" if free < self.gigabytes else None


def free_gigabytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / 1e9


def _rollout(options: str, gigabytes: float, seconds: int = 480) -> Step:
    return Step("rollout", "rollout", f"--editor {options}", "cuda", gigabytes, seconds, "rollout")


def _iteration(options: str) -> Step:
    return Step("iteration", "iteration", f"--full --repetitions 2 {options}", "cuda", 90, 570, "iteration")


def _update(options: str, needs: tuple[str, ...] = MODELS) -> Step:
    return Step("update", "update", f"--full {options}", "cuda", 60, 540, "update", needs)


def _op(bench: str, options: str = "", seconds: int = 540, gigabytes: float = 10) -> Step:
    return Step("ops", bench, options, "cuda", gigabytes, seconds, bench, ())


STEPS = (
    _rollout("kontext --turns 1", 40, 300),
    _rollout("kontext --turns 1 --compile whole", 40),
    _rollout("kontext --turns 1 --dtype fp8 --compile blocks", 40),
    _rollout("klein-kv --turns 1 --size 1024 --group 8", 40, 360),
    _iteration("--needed both"),
    _rollout("klein-kv --turns 1 --group 8", 32, 180),
    _rollout("klein --turns 1 --group 4", 16, 180),
    _rollout("klein --turns 1 --group 4 --cuda-graphs", 16, 180),
    _rollout("qwen --turns 1 --group 8", 64),
    Step("onestep", "onestep", "", "cuda", 12, 240, "onestep"),
    Step("onestep", "onestep", "--compile", "cuda", 12, 300, "onestep"),
    Step("judge", "judge", "--full", "cuda", 32, 420, "judge"),
    _update("--only nft"),
    _update("--only compile"),
    _update("--only compaction --only grpo"),
    _update("--only fp8", (*MODELS, "torchao")),
    _iteration("--needed both --compile blocks"),
    _iteration("--needed neither"),
    _iteration("--objective grpo --steps 4"),
    Step("consistency", "consistency", "--full", "cuda", 8, 240, "consistency"),
    _op("digit_score"),
    _op("nft_loss", "--shape 32x4096x64", 240),
    _op("sde_step", "--shape 32x4096x64", 240),
    _op("attention_columns", seconds=300, gigabytes=24),
    _op("token_similarity"),
    _op("crop_resize", seconds=240),
    Step("ops", "adapters", "", "cuda", 32, 240, "update"),
    _op("nft_loss"),
    _op("sde_step"),
    _op("sde_step", "--dtype fp16 --shape 8x4096x64", 240),
    _rollout("kontext --turns 3 --group 8", 40),
    _rollout("kontext --turns 1 --group 4", 40, 180),
    _rollout("kontext --turns 1 --group 8", 40, 240),
    _rollout("kontext --turns 1 --size 1024 --group 4", 40),
    _rollout("kontext --turns 1 --size 1024 --group 4 --compile blocks --dtype fp8", 40),
    _rollout("klein-kv --turns 1 --size 1024 --group 8 --compile blocks --dtype fp8", 40, 300),
    _rollout("qwen --turns 1 --size 1024 --group 4 --steps 4 --samples 2", 64),
    _rollout("qwen --turns 1 --group 8 --compile blocks --dtype fp8", 64),
    Step("export", "export", "--editor klein-4b", "cuda", 16, 540),
    *(
        Step("rollout", "rollout", f"--editor {name} --size 64 --group 8 --steps 4", "cpu", 1, 300, "rollout")
        for name in ("kontext", "qwen", "klein", "klein-kv")
    ),
    Step("iteration", "iteration", "", "cpu", 2, 900, "iteration"),
    Step("iteration", "iteration", "--objective grpo", "cpu", 2, 600, "iteration"),
    Step("plan", "plan", "", "cpu", 2, 900, "plan"),
    Step("onestep", "onestep", "", "cpu", 2, 600, "onestep"),
    Step("update", "update", "", "cpu", 3, 600, "update"),
    Step("judge", "judge", "", "cpu", 2, 300, "judge"),
    Step("consistency", "consistency", "", "cpu", 2, 300, "consistency"),
    *(
        Step("ops", name, "", "cpu", 3, 900, name, ())
        for name in ("sde_step", "nft_loss", "digit_score", "attention_columns", "token_similarity", "crop_resize")
    ),
    Step("ops", "adapters", "", "cpu", 2, 300, "update"),
    Step("export", "export", "--tiny", "cpu", 1, 300),
    Step("export", "export", "--tiny --editor klein-4b", "cpu", 1, 300),
)

TESTS = {
    "nft_loss": "nft_loss nft_loss_errors nft_loss_registration crd_loss",
    "sde_step": "sde_step sde_step_triton sde_step_registration sde_step_errors sde_step_schedule seeded_noise",
    "attention_columns": "attention_columns attention_columns_registration",
    "token_similarity": "token_similarity token_similarity_registration token_similarity_errors",
    "digit_score": "digit_score digit_score_registration digit_score_errors digit_score_auto token_log_probs",
    "crop_resize": "crop_resize crop_resize_errors csrc",
    "rollout": "bench_rollout fp8 speed",
    "update": "rollout adapters adapters_state update",
    "iteration": "bench_iteration",
    "consistency": "consistency",
    "plan": "plan",
    "judge": "judge_huggingface",
    "onestep": "bench_onestep onestep_sampling onestep_writers",
}
"""Test files by what they are tests of."""
NEEDED_BY_TESTS = {"sde_step_schedule": "diffusers", "csrc": "pybind11"}


def test_files(name: str) -> list[str]:
    able = [x for x in TESTS[name].split() if importlib.util.find_spec(NEEDED_BY_TESTS.get(x, "torch")) is not None]
    return [f"tests/test_{x}.py" for x in able]


class Session:
    """What runs steps, remembers those that are done, and keeps to a time limit.

    results: folder of the CSV files and session.log. tests: run a step's before it, once.
    """

    def __init__(self, results: Path, device: torch.device, *, seconds: float, fresh: bool, tests: bool):
        self.results, self.device, self.fresh, self.tests = results, device, fresh, tests
        self.until, self.failed = time.monotonic() + seconds, list[str]()
        self.here = {"commit": record.commit(), "device": record.device_name(device)}
        self.log = results / "session.log"
        results.mkdir(parents=True, exist_ok=True)
        known = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.known, self.red = set(known), set[str]()

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def done(self, name: str) -> str:
        return f"== {name}: done at {self.here['commit']} on {self.here['device']}"

    def bench(self, step: Step) -> None:
        """Raises TimeoutError where no time is left."""
        out = self.results / f"{step.bench}.csv"
        if not self.fresh and self.done(step.name) in self.known and record.holds(record.read(out), self.here):
            print(f"{self.done(step.name)} before")
            return
        if self.tests and step.tests and not self._green(step.tests):
            self.failed.append(step.name)
            self.say(f"== {step.name}: left out, the tests of {step.tests} are not green")
            return
        command = [sys.executable, str(HERE / f"bench_{step.bench}.py"), *shlex.split(step.options)]
        command += ["--device", self.device.type, "--out", str(out), *["--fresh"] * self.fresh]
        self._run(step.name, command, step.seconds)

    def _green(self, tests: str) -> bool:
        name = f"tests of {tests}"
        if self.done(name) in self.known:
            return True
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *test_files(tests)]
        if tests in self.red or not self._run(name, command, 240):
            self.red.add(tests)
            return False
        return True

    def _run(self, name: str, command: Sequence[str], seconds: int) -> bool:
        limit = min(seconds, self.until - time.monotonic())
        if limit < LEAST_SECONDS:
            raise TimeoutError(f"no time left for {name}")
        self.say(f"== {name}, {limit:.0f} s at most")
        code = streamed(command, limit, self.say)
        if code == 0:
            self.say(self.done(name))
            self.known.add(self.done(name))
            return True
        self.failed.append(name)
        killed = "was killed, as a system does that runs out of memory"
        why = "ran out of time" if code is None else killed if code == -signal.SIGKILL else f"failed ({code})"
        self.say(f"== {name}: {why}")
        return False


def streamed(command: Sequence[str], seconds: float, say: Callable[[str], None]) -> int | None:
    """Its exit code; None where it took longer and was ended with all that it had started."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=HERE.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    late = threading.Event()

    def end() -> None:
        late.set()
        kill(process)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            say(line.rstrip("\n"))
        code = process.wait()
    except BaseException:  # interrupted
        kill(process)
        raise
    finally:
        timer.cancel()
    return None if late.is_set() else code


def kill(process: subprocess.Popen[str]) -> None:
    """With what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        "mtedit-fast bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("suite", choices=(*SUITES, "all"))
    made.add_argument("--device", type=as_device, default=default_device())
    made.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the CSV files and session.log")
    made.add_argument("--list", action="store_true", help="say what would run, and run nothing")
    made.add_argument("--fresh", action="store_true", help="measure again what is there already")
    made.add_argument("--tests", action="store_true", help="run a step's tests on the device before it")
    made.add_argument("--time-limit", type=float, default=86400.0, help="seconds for everything")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a step failed or time ran out: run again, it goes on."""
    args = parser().parse_args(arguments)
    steps = [step for step in STEPS if args.suite in (step.suite, "all")]
    obstacles = {step: step.obstacle(args.device) for step in steps}
    ready = [step for step in steps if obstacles[step] is None]
    for step in ready:
        print(f"run   {step.name}")
    for step in steps:
        if obstacles[step] is not None:
            print(f"skip  {step.name}: {obstacles[step]}")
    if args.list:
        return 0
    session = Session(args.results, args.device, seconds=args.time_limit, fresh=args.fresh, tests=args.tests)
    for step in ready:
        try:
            session.bench(step)
        except (TimeoutError, KeyboardInterrupt) as error:
            session.say(f"== {str(error) or 'interrupted'}: run again, and it goes on")
            return 1
    for name in session.failed:
        print(f"failed  {name}")
    print(f"rows are in {args.results}; mtedit-fast bench report --results {args.results}")
    return bool(session.failed)


if __name__ == "__main__":
    sys.exit(main())
