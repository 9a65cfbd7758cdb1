"""What suites run: each bench with its options, on what device, in how much memory and time, and after which tests."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

SUITES = ("ops", "rollout", "judge", "consistency", "update", "iteration", "onestep", "export", "plan")
MODELS = ("diffusers", "transformers", "pydantic")
CUDA_KERNELS = "CUDA kernels"
WITH_KERNELS = (*MODELS, CUDA_KERNELS)
LEAST_SECONDS = 20  # nothing is begun with less
WORKERS = 8  # of pytest, where there are as many cores


@dataclass(frozen=True)
class Step:
    """A run of a bench.

    needs: modules, and CUDA_KERNELS. gigabytes: of free memory, the device's: weights and what they compute with, by
    estimate. tests: of `TESTS`, that must be green on the device before. seconds: at most. first_row: seconds until
    there is one, by estimate; a step is not begun with less.
    """

    suite: str
    bench: str
    options: str = ""
    device: str = "cuda"
    gigabytes: float = 4
    seconds: int = 540
    tests: str = ""
    needs: tuple[str, ...] = MODELS
    first_row: int = LEAST_SECONDS

    @property
    def name(self) -> str:
        return f"{self.bench} {self.options}".strip()

    def obstacle(self, device: torch.device) -> str | None:
        """Why the step cannot run on `device`."""
        if self.device != device.type:
            found = "and torch sees none" if not torch.cuda.is_available() else f"and --device is {device.type}"
            return f"needs a GPU, {found}" if self.device == "cuda" else f"runs on a CPU, and --device is {device.type}"
        missing = [name for name in self.needs if name != CUDA_KERNELS and importlib.util.find_spec(name) is None]
        if missing:
            return f"needs {', '.join(missing)}, not installed"
        if CUDA_KERNELS in self.needs and (reason := without_kernels()):
            return f"needs the CUDA kernels: {reason}"
        free = free_gigabytes(device)
        return f"needs {self.gigabytes:g} GB of memory, {free:.1f} GB are free" if free < self.gigabytes else None


def without_kernels() -> str | None:
    """Why the extension's CUDA kernels cannot run."""
    from mtedit_fast.ops import _cpp

    return _cpp.cuda_unavailable_reason()


def free_gigabytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 / 1e9


def _rollout(options: str, gigabytes: float, seconds: int = 480, first_row: int = 95) -> Step:
    return Step("rollout", "rollout", f"--editor {options}", "cuda", gigabytes, seconds, "rollout", MODELS, first_row)


def _iteration(options: str) -> Step:
    words = f"--full --repetitions 2 {options}"
    return Step("iteration", "iteration", words, "cuda", 90, 570, "iteration", WITH_KERNELS, 400)


def _update(options: str, first_row: int, needs: tuple[str, ...] = MODELS) -> Step:
    return Step("update", "update", f"--full {options}", "cuda", 60, 540, "update", needs, first_row)


def _judge(options: str = "") -> Step:
    return Step("judge", "judge", f"--full {options}".strip(), "cuda", 32, 420, "judge", WITH_KERNELS, 200)


def _op(
    bench: str,
    options: str = "",
    seconds: int = 540,
    gigabytes: float = 10,
    *,
    first_row: int = 30,
    needs: tuple[str, ...] = (),
) -> Step:
    return Step("ops", bench, options, "cuda", gigabytes, seconds, bench, needs, first_row)


STEPS = (
    # What 570 seconds bring. An iteration does not fit in what is left of them then: the next session begins with it.
    _rollout("kontext --turns 1", 40, 300),
    _op("sde_step", "--shape 32x4096x64 --dtype bf16", 90),
    _op("nft_loss", "--shape 32x4096x64 --dtype bf16", 90),
    _op("digit_score", "--dtype bf16", 120, first_row=45),
    _judge("--turns 3"),
    _iteration("--needed both"),
    _rollout("kontext --turns 1 --compile whole", 40, first_row=220),
    _rollout("kontext --turns 1 --dtype fp8 --compile blocks", 40, first_row=170),
    _rollout("klein-kv --turns 1 --size 1024 --group 8", 40, 360, 140),
    _rollout("klein-kv --turns 1 --group 8", 32, 180),
    _rollout("klein --turns 1 --group 4", 16, 180),
    _rollout("klein --turns 1 --group 4 --cuda-graphs", 16, 180),
    _rollout("qwen --turns 1 --group 8", 64, first_row=150),
    Step("onestep", "onestep", "", "cuda", 12, 240, "onestep", MODELS, 120),
    Step("onestep", "onestep", "--compile", "cuda", 12, 300, "onestep", MODELS, 120),
    _judge(),
    _update("--only nft", 200),
    _update("--only compile", 450),
    _update("--only compaction --only grpo", 300),
    _update("--only fp8", 450, (*MODELS, "torchao")),
    _iteration("--needed both --compile blocks"),
    _iteration("--needed neither"),
    _iteration("--objective grpo --steps 4"),
    Step("consistency", "consistency", "--full", "cuda", 8, 240, "consistency", WITH_KERNELS, 60),
    _op("digit_score", first_row=60),
    _op("nft_loss", "--shape 32x4096x64", 240),
    _op("sde_step", "--shape 32x4096x64", 240),
    _op("attention_columns", seconds=300, gigabytes=24, first_row=60),
    _op("token_similarity"),
    _op("crop_resize", seconds=240, needs=(CUDA_KERNELS,)),
    Step("ops", "tiles", "", "cuda", 24, 540, first_row=60, needs=()),
    Step("ops", "adapters", "", "cuda", 32, 240, "update", MODELS, 60),
    _op("nft_loss"),
    _op("sde_step"),
    _op("sde_step", "--dtype fp16 --shape 8x4096x64", 240),
    _rollout("kontext --turns 3 --group 8", 40, first_row=150),
    _rollout("kontext --turns 1 --group 4", 40, 180),
    _rollout("kontext --turns 1 --group 8", 40, 240),
    _rollout("kontext --turns 1 --size 1024 --group 4", 40, first_row=140),
    _rollout("kontext --turns 1 --size 1024 --group 4 --compile blocks --dtype fp8", 40, first_row=170),
    _rollout("klein-kv --turns 1 --size 1024 --group 8 --compile blocks --dtype fp8", 40, 300, 170),
    _rollout("qwen --turns 1 --size 1024 --group 4 --steps 4 --samples 2", 64, first_row=150),
    _rollout("qwen --turns 1 --group 8 --compile blocks --dtype fp8", 64, first_row=220),
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
    Step("ops", "machine_code", "", "cpu", 2, 300, "", ("triton",)),
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
    "crop_resize": "crop_resize crop_resize_errors csrc_build::test_device_copy",
    "rollout": "on_gpu speed",
    "update": "rollout adapters adapters_state update",
    "iteration": "bench_iteration",
    "consistency": "on_gpu::test_consistency_is_the_cpus",
    "plan": "plan",
    "judge": "on_gpu::test_judges_are_the_cpus",
    "onestep": "bench_onestep onestep_denoiser onestep_sampling onestep_writers",
}
"""Test files, or tests of one, by what they are tests of: those that a GPU can make red."""
NEEDED_BY_TESTS = {"sde_step_schedule": "diffusers", "csrc_build": "pybind11", "on_gpu": "diffusers"}
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG=:4096:8"
"""Without it some versions of torch refuse products of matrices in tests of deterministic mode."""
COMPILED = ("compiles_for", "compiled_for", "fuses_multiply_adds")
"""In the names of tests that look at compiled code, which needs no GPU."""


def tests_of(name: str) -> list[str]:
    """What pytest is given."""
    files = (text.partition("::") for text in TESTS[name].split())
    able = [each for each in files if importlib.util.find_spec(NEEDED_BY_TESTS.get(each[0], "torch")) is not None]
    return [f"tests/test_{file}.py{colons}{test}" for file, colons, test in able]


def pytest_command(name: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider"]
    command += ["-k", " and ".join(f"not {text}" for text in COMPILED), *tests_of(name)]
    if importlib.util.find_spec("xdist") is None or (os.cpu_count() or 1) < WORKERS:
        return ["env", WORKSPACE, *command]
    # all cores' threads in each worker would wait in line
    return ["env", WORKSPACE, "OMP_NUM_THREADS=2", *command, "-n", str(WORKERS)]
