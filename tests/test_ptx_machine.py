"""Kernels as they are compiled for GPUs, run without one: see ptx_machine/__main__.py."""

import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from ptx_machine.cuda import device_copy
from ptx_machine.floats import fma, from_bfloat16, to_bfloat16
from ptx_machine.launch import launch
from ptx_machine.memory import BadAccess
from ptx_machine.program import parse

HERE = Path(__file__).parent
SOME = {
    "test_seeded_noise.py": "agree_bit_for_bit",
    "test_sde_step.py": "values_and_gradients_against_fp64 or (agree_bit_for_bit and shape5)",
    "test_sde_step_triton.py": "fast_square_roots",
    "test_nft_loss.py": "value_and_gradient_against_fp64 or depend_on_the_batch",
    "test_crd_loss.py": "against_fp64 or depend_on_the_batch",
    "test_beyond_int32.py": "test",
    "test_crop_resize.py": "cpp and (dtypes_and_normalisation or different_sizes or four_channels)",
    "test_production_widths.py": "bfloat16 and (attention or 768 or 896)",
}
"""Tests of every family of kernels; with all of them it takes ten minutes."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests themselves run on this GPU")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("file", SOME)
def test_kernels_as_compiled(file: str, arch: int) -> None:
    if file == "test_crop_resize.py" and not shutil.which("nvcc"):
        pytest.skip("takes nvcc")
    command = [sys.executable, HERE / "ptx_machine", str(arch), HERE / file, "-k", f"({SOME[file]}) and not reference"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr
    assert not result.stdout.endswith("{}\n"), "nothing was launched"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="takes nvcc")
@pytest.mark.parametrize("vectors", [1, 1023, 20000])
def test_the_copy_that_measures_bandwidth_copies(vectors: int) -> None:
    """Fewer vectors than a grid's threads take, and more."""
    source = np.random.default_rng(0).integers(2**31, size=4 * vectors, dtype=np.int32)
    out = np.zeros_like(source)
    device_copy(80, out, source)
    assert np.array_equal(out, source)


def kernel(body: str) -> str:
    """Of 128 threads and a pointer; %rd1 is where a thread's number is, %r1 the thread."""
    return f"""
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry kernel(.param .u64 kernel_param_0) .reqntid 128
{{
    .reg .pred %p<9>; .reg .b32 %r<9>; .reg .b64 %rd<9>;
    ld.param.b64 %rd0, [kernel_param_0];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd1, %r1, 4;
    add.s64 %rd1, %rd0, %rd1;
    mov.b32 %r2, memory;
    mad.lo.s32 %r2, %r1, 4, %r2;
    {body}
    ret;
}}
"""


def run(body: str, out: torch.Tensor) -> torch.Tensor:
    launch(parse(kernel(body)), (1, 1, 1), [out], threads=128, shared=4096)
    return out


EXCHANGE = "st.shared.b32 [%r2], %r1; {} xor.b32 %r2, %r2, {}; ld.shared.b32 %r3, [%r2]; st.global.b32 [%rd1], %r3;"


def test_threads_of_two_warps_need_a_barrier_and_those_of_one_do_not() -> None:
    threads = torch.arange(128, dtype=torch.int32)
    assert torch.equal(run(EXCHANGE.format("bar.sync 0;", 128), torch.zeros_like(threads)), threads ^ 32)
    assert torch.equal(run(EXCHANGE.format("", 4), torch.zeros_like(threads)), threads ^ 1)
    with pytest.raises(BadAccess, match="another warp wrote"):
        run(EXCHANGE.format("", 128), torch.zeros_like(threads))
    again = EXCHANGE.format("bar.sync 0;", 128) + "xor.b32 %r2, %r2, 128; st.shared.b32 [%r2], %r0;"
    with pytest.raises(BadAccess, match="another warp uses"):
        run(again, torch.zeros_like(threads))


ARRIVE = """
st.global.b32 [%rd1+512], %r1; {}
setp.eq.s32 %p1, %r1, 0; @%p1 atom.global.gpu.acq_rel.add.u32 %r3, [%rd0], 1; {}
ld.global.cg.b32 %r4, [%rd1+512]; st.global.b32 [%rd1+512], %r4;
"""


def test_what_is_released_and_acquired_takes_barriers() -> None:
    out = torch.zeros(256, dtype=torch.int32)
    assert run(ARRIVE.format("bar.sync 0;", "bar.sync 0;"), out)[0] == 1
    for barriers, message in ((("", "bar.sync 0;"), "releases"), (("bar.sync 0;", ""), "acquired")):
        with pytest.raises(BadAccess, match=message):
            run(ARRIVE.format(*barriers), out)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%rd1+4], %r1;", "outside of every tensor"),
        ("ld.global.b32 %r3, [%rd1+-4];", "outside of every tensor"),
        ("st.global.b32 [%rd1+2], %r1;", "no multiple"),
        ("ld.shared.b32 %r3, [%r2+4000];", "past its end"),
        ("ld.shared.v2.b32 {%r3, %r4}, [%r2];", "no multiple"),
        ("mov.b32 %r3, 0; st.shared.b32 [%r3], %r1;", "written twice"),
        ("setp.lt.s32 %p1, %r1, 9; @%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;", "not by all of the threads"),
        ("setp.lt.s32 %p1, %r1, 9; @%p1 bra DONE; bar.sync 0; DONE:", "never reach"),
        ("frob.b32 %r1, %r1;", "frob"),
    ],
)
def test_what_a_gpu_might_let_pass_is_an_error(body: str, message: str) -> None:
    out = torch.zeros(128, dtype=torch.int32)
    with pytest.raises((BadAccess, RuntimeError, KeyError), match=message):
        run(body, out)


def test_threads_that_part_meet_again() -> None:
    """A loop as often as the thread's number says, then a shuffle, which takes whole warps."""
    body = """
    mov.b32 %r3, 0; mov.b32 %r4, 0;
    LOOP: setp.ge.s32 %p1, %r3, %r1; @%p1 bra DONE;
    add.s32 %r4, %r4, %r3; add.s32 %r3, %r3, 1; bra LOOP;
    DONE: shfl.sync.bfly.b32 %r5, %r4, 1, 31, -1;
    st.global.b32 [%rd1], %r5;
    """
    neighbour = torch.arange(128, dtype=torch.int32) ^ 1
    assert torch.equal(run(body, torch.zeros_like(neighbour)), neighbour * (neighbour - 1) // 2)


@pytest.mark.parametrize("waits", [True, False])
def test_copies_arrive_when_they_are_waited_for(waits: bool) -> None:
    """And are NaN before, in every byte, as shared memory is that nothing was written to."""
    body = f"""
    cp.async.ca.shared.global [%r2], [%rd1], 4; cp.async.commit_group;
    {"cp.async.wait_group 0;" if waits else ""}
    ld.shared.b32 %r3, [%r2]; add.s32 %r3, %r3, 7; st.global.b32 [%rd1], %r3;
    """
    threads = torch.arange(128, dtype=torch.int32)
    assert torch.equal(run(body, threads.clone()), threads + 7 if waits else torch.full_like(threads, 6))


def test_fused_multiply_adds_round_once() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.standard_normal((2, 4000)).astype(np.float32)
    c = -(a * b) * generator.choice(np.float32([1, 1 + 2**-23, 2**-20, 2**20, 0]), 4000)  # cancels, or hardly counts
    a[:2], b[:2], c[:2] = 1 + 2**-12, 1 + 2**-12, (2.0**-60, -(2.0**-60))  # 1 + 2⁻¹¹ + 2⁻²⁴: halfway but for c
    for x, y, z, found in zip(a, b, c, fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        error = abs(Fraction(float(found)) - exact)
        for side in (-np.inf, np.inf):
            assert error <= abs(Fraction(float(np.nextafter(found, np.float32(side)))) - exact)
    assert fma(a, b, c)[0] == np.float32(1 + 2**-11 + 2**-23)
    assert fma(a, b, c)[1] == np.float32(1 + 2**-11)


def test_bfloat16_as_torch_rounds_it() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), dtype=torch.int32)
    values = torch.cat((bits.view(torch.float32), torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])))
    values = values[~values.isnan()]
    found = to_bfloat16(values.numpy())
    assert torch.equal(torch.from_numpy(found.view(np.int16)), values.bfloat16().view(torch.int16))
    assert torch.equal(torch.from_numpy(from_bfloat16(found)), values.bfloat16().float())
    assert np.isnan(from_bfloat16(to_bfloat16(np.float32([np.nan])))).all()
