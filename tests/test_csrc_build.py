"""How csrc is built, what it holds whatever the build, and its CUDA kernels beside the C++ ones."""

import importlib.util
import shutil
import subprocess
import sysconfig
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pybind11
import pytest
import torch
from ptx_machine.cuda import crop_resize
from test_csrc import DTYPES, TABLE, bits, inputs
from torch import Tensor

from mtedit_fast.ops import _cpp as cpp

CSRC = Path(__file__).parents[1] / "csrc"


def test_other_python_threads_run_meanwhile():
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    start = time.perf_counter()
    cpp.seeded_noise(torch.tensor([1]), 30_000_000, 0, torch.float32)
    end = time.perf_counter()
    done.set()
    thread.join()
    margin = 0.2 * (end - start)
    assert any(start + margin < tick < end - margin for tick in ticks)


def test_baseline_instructions_give_the_same_bits(tmp_path):
    library = tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
    flags = "-O0 -std=c++17 -shared -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math -DMTEDIT_BASELINE"
    sources = sorted(map(str, CSRC.glob("*.cpp")))
    subprocess.run(["g++", *flags.split(), *includes, *sources, "-o", library], check=True)
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None
    assert spec.loader is not None
    baseline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(baseline)
    assert baseline.openmp is False
    assert baseline.cuda_archs == ""

    def results() -> list[Tensor]:
        torch.manual_seed(0)
        found = [cpp.seeded_noise(torch.tensor([3, -9]), 4099, 2, torch.float32)]
        for dtype in DTYPES:
            args = (*inputs((2, 4099), dtype)[:2], TABLE, 0, None, torch.tensor([3, 4]), None, dtype, 1, True)
            found += cpp.sde_step_forward(*args, True)
            found += cpp.sde_step_backward(*args, None, torch.tensor([1.0, -2.0]), None, True)
            velocities = (*inputs((2, 4099), dtype), inputs((2, 4099), dtype, seed=1)[0])
            tokens, index, weights = inputs((2, 17, 70), dtype)[0], torch.tensor([1, 0, 1]), torch.rand(3, 17)
            found.append(cpp.token_pool(tokens, index, weights, True))
            found.append(cpp.token_pool_backward(tokens, index, weights, inputs((3, 70), torch.float32)[0], True))
            found.append(cpp.velocity_moments(*velocities, mixed=True, beta=0.7))
            found.append(cpp.velocity_loss_backward(*velocities, inputs((3, 2), torch.float32)[0], torch.tensor(0.3)))
        return found + [crop(*case) for case in CROPS[:4]]

    here = results()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpp, "_C", baseline)
        there = results()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(here, there, strict=True))


BOXES = torch.tensor(
    [[3, 4, 20, 30], [-5.5, 2.25, 8.125, 90], [7, 7, 8, 8], [12.2, 9.5, 12.5, 9.7], [0, 0, 900, 61], [9, 9, 3, 20]]
).double()
# pixels, channels last, of different sizes, cubic, size, dtype; 900 pixels to 7 take more taps than the GPU's table has
CROPS = [
    (torch.uint8, False, False, True, (17, 70), torch.float32),
    (torch.uint8, True, False, False, (33, 7), torch.bfloat16),
    (torch.float32, False, True, True, (40, 130), torch.float16),
    (torch.bfloat16, True, True, True, (1, 65), torch.float32),
    (torch.float16, False, False, False, (16, 64), torch.float32),
]


def crop(pixels, channels_last: bool, ragged: bool, cubic: bool, size: tuple[int, int], dtype) -> Tensor:
    images = torch.rand(2, 3, 61, 900, generator=torch.Generator().manual_seed(0)).mul(255).to(pixels)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    batches = [images[:1], images[1:, :, :50, :800]] if ragged else [images]
    index = torch.tensor([0, 1, 1, 0, 0, 1])
    return cpp.crop_resize(batches, BOXES, index, *size, cubic, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4], dtype)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="takes nvcc")
@pytest.mark.parametrize("case", CROPS)
def test_cuda_agrees_with_cpp(case, monkeypatch):
    here = crop(*case)
    monkeypatch.setattr(cpp, "_C", SimpleNamespace(crop_resize=crop_resize(90)))
    there = crop(*case)
    missing = [False] * 5 + [True]
    assert here.isnan().flatten(1).all(1).tolist() == there.isnan().flatten(1).all(1).tolist() == missing
    assert not there[:5].isnan().any()
    scale = here[:5].abs().max().item()
    torch.testing.assert_close(there[:5], here[:5], rtol=torch.finfo(here.dtype).eps, atol=1e-6 * scale)


def test_bad_codes_of_crop_resize_are_named():
    images, shape, three = [0] * 9, (0, 3, 8, 8), [1.0] * 3
    with pytest.raises(ValueError, match="pixel code must be 0 to 3, got 4"):
        cpp._C.crop_resize(images, 4, 0, 0, shape, True, three, three, (0, 0), 1)
    with pytest.raises(ValueError, match="1 to 4 channels, each with a gain and a bias, expected: 5"):
        cpp._C.crop_resize(images, 0, 0, 0, (0, 5, 8, 8), True, [1.0] * 5, [1.0] * 5, (0, 0), 1)
    with pytest.raises(ValueError, match="expected: 3"):
        cpp._C.crop_resize(images, 0, 0, 0, shape, True, three, [1.0], (0, 0), 1)


def test_cuda_objects_compile_without_spills(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        assert cpp._C.cuda_archs == ""
        return
    assert cpp._C.cuda_archs == "sm_80 sm_90 sm_100"
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90, 100)]
    for source in CSRC.glob("*.cu"):
        command = [nvcc, "-O3", "-std=c++17", "-Xptxas=-v", *gencode, "-c", source, "-o", tmp_path / "object.o"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        kernels = log.count("bytes stack frame")
        assert kernels in (3, 12)  # one, or one for each of four types of pixels, on three architectures
        assert log.count("0 bytes spill stores, 0 bytes spill loads") == kernels
        assert "warning" not in log


def test_device_copy():
    if not cpp._C.cuda_archs:
        return
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"^device_copy: \w+"):
            cpp._C.device_copy(0, 0, 1024, 0)
        return
    source = torch.randn(1 << 20, device="cuda")
    for length in (1 << 20, 4, 4096 + 4):
        copy = torch.zeros_like(source)
        stream = torch.cuda.current_stream().cuda_stream
        cpp._C.device_copy(copy.data_ptr(), source.data_ptr(), 4 * length, stream)
        assert torch.equal(copy[:length], source[:length])
        assert not copy[length:].any()
