"""Suites of benches, step by step, most valuable first.

mtedit-fast bench all --list                    what would run here, and what would not and why
mtedit-fast bench rollout                       one suite; with options of the bench itself, that one
python benchmarks/suites.py all --tests         needs torch only to start: on a GPU machine, see gpu_session.sh

Every step is a process of its own, whose rows are appended as they come. Interrupted, a suite goes on where it stopped:
steps that session.log has as done at this commit on this device are left out while their rows are there, those that it
has as failed come last, and every bench leaves out the rows that its file holds. A step whose first row would take
longer than what is left of the time is passed over for the next.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import record
import torch
from command import as_device, default_device
from steps import LEAST_SECONDS, STEPS, SUITES, Step, pytest_command

HERE = Path(__file__).resolve().parent


class Session:
    """What runs steps, remembers those that are done, and keeps to a time limit.

    results: folder of the CSV files and session.log. tests: run a step's before it, once.
    """

    def __init__(self, results: Path, device: torch.device, *, seconds: float, fresh: bool, tests: bool):
        self.results, self.device, self.fresh, self.tests = results, device, fresh, tests
        self.until, self.failed, self.passed = time.monotonic() + seconds, list[str](), list[str]()
        self.here = {"commit": record.commit(), "device": record.device_name(device)}
        self.log = results / "session.log"
        results.mkdir(parents=True, exist_ok=True)
        known = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        self.known, self.red = set(known), set[str]()

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    def line(self, name: str, how: str) -> str:
        return f"== {name}: {how} at {self.here['commit']} on {self.here['device']}"

    def done(self, name: str) -> str:
        return self.line(name, "done")

    def failed_before(self, step: Step) -> bool:
        """Or ran out of time or was left out, in an earlier session."""
        start, end = self.line(step.name, "|").split("|")
        lines = (line for line in self.known if line.startswith(start) and line.endswith(end))
        return any(line != self.done(step.name) for line in lines)

    def bench(self, step: Step) -> None:
        """Raises TimeoutError where no time is left for any."""
        out = self.results / f"{step.bench}.csv"
        if not self.fresh and self.done(step.name) in self.known and record.holds(record.read(out), self.here):
            print(f"{self.done(step.name)} before")
            return
        if not self._fits(step):
            return
        if self.tests and step.tests and not self._green(step.tests):
            self._fails(step.name, f"left out, the tests of {step.tests} are not green,")
            return
        if not self._fits(step):  # after its tests
            return
        command = [sys.executable, str(HERE / f"bench_{step.bench}.py"), *shlex.split(step.options)]
        command += ["--device", self.device.type, "--out", str(out), *["--fresh"] * self.fresh]
        self._run(step.name, command, step.seconds)

    def _fits(self, step: Step) -> bool:
        left = self.until - time.monotonic()
        if left < step.first_row:
            print(f"== {step.name}: passed over, {left:.0f} s are left and a row takes {step.first_row}", flush=True)
            self.passed.append(step.name)
        return left >= step.first_row

    def _green(self, tests: str) -> bool:
        name = f"tests of {tests}"
        if self.done(name) in self.known:
            return True
        if tests in self.red or not self._run(name, pytest_command(tests), 240):
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
        if code is None and limit < seconds:  # not its fault: it goes on in its place
            raise TimeoutError(f"no time left for the rest of {name}")
        killed = "was killed, as a system does that runs out of memory,"
        self._fails(
            name, "ran out of time" if code is None else killed if code == -signal.SIGKILL else f"failed ({code})"
        )
        return False

    def _fails(self, name: str, how: str) -> None:
        self.failed.append(name)
        self.say(self.line(name, how))


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
    if args.suite == "all" and args.device.type == "cuda":
        exports = [step for step in steps if (step.suite, step.device) == ("export", "cuda")]
        obstacles |= {step: "takes a CPU's time, not the GPU's: bench export" for step in exports}
    ready = [step for step in steps if obstacles[step] is None]
    for step in ready:
        print(f"run   {step.name}")
    for step in steps:
        if obstacles[step] is not None:
            print(f"skip  {step.name}: {obstacles[step]}")
    if args.list:
        return 0
    session = Session(args.results, args.device, seconds=args.time_limit, fresh=args.fresh, tests=args.tests)
    for step in sorted(ready, key=session.failed_before):
        try:
            session.bench(step)
        except (TimeoutError, KeyboardInterrupt) as error:
            session.say(f"== {str(error) or 'interrupted'}: run again, and it goes on")
            return 1
    for name in session.failed:
        print(f"failed  {name}")
    if session.passed:
        session.say(f"== no time left for {', '.join(session.passed)}: run again, and it goes on")
    print(f"rows are in {args.results}; mtedit-fast bench report --results {args.results}")
    return bool(session.failed or session.passed)


if __name__ == "__main__":
    sys.exit(main())
