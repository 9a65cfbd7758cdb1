"""Counts of machine code: of a listing by hand, and of our kernels as bench_machine_code.py has them."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from compiled import STACK

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

LISTING = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;         /* 0x00000a00ff017b82 */
        /*0010*/              @!P1 LDG.E.128 R4, desc[UR6][R22.64] ;
        /*0020*/                   FADD R4, R4, R5 ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/                   FMUL R4, R4, R4 ;
        /*0060*/              @!P1 BRA 0x50 ;
        /*0070*/               @P2 BRA 0x10 ;
        /*0080*/               @P3 EXIT ;
        /*0090*/                   ATOMG.E.ADD.STRONG.GPU PT, R8, desc[UR6][R4.64], R3 ;
        /*00a0*/               @P0 EXIT ;
        /*00b0*/                   FADD R4, R4, R5 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   FADD R4, R4, R5 ;
        /*00e0*/                   BRA 0x50 ;
        /*00f0*/                   BRA 0xf0 ;
"""


@pytest.fixture
def machine_code(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("machine_code")


def listed(machine_code, text):
    found = machine_code.LINE.findall(text)
    instructions = [machine_code.Instruction(int(at, 16), bool(guard), name, rest) for at, guard, name, rest in found]
    return machine_code.MachineCode(instructions, registers=32, stack=0, shared=0)


def test_a_listing_is_read(machine_code):
    code = listed(machine_code, LISTING)
    assert [each.address for each in code.instructions] == list(range(0, 0x100, 16))
    assert code.instructions[1].predicated
    assert not code.instructions[0].predicated
    assert [each.jumps_back_to for each in code.instructions if each.name == "BRA"] == [0x20, 0x50, 0x10, 0x50, None]


def test_what_a_program_runs_once_ends_where_the_last_one_goes_on(machine_code):
    assert [each.name for each in listed(machine_code, LISTING).once()][-2:] == ["ATOMG", "EXIT"]
    without = "\n".join(line for line in LISTING.splitlines() if "ATOMG" not in line)
    assert listed(machine_code, without).once()[-1].address == 0xC0


def test_the_longest_innermost_loop(machine_code):
    assert [each.name for each in listed(machine_code, LISTING).loop()] == ["FADD", "MUFU", "BRA"]
    with pytest.raises(RuntimeError, match="expected a loop"):
        listed(machine_code, LISTING.splitlines()[1]).loop()


def test_warps_of_a_multiprocessor(machine_code):
    bench = importlib.import_module("bench_machine_code")
    h200 = bench.MACHINES[90]

    def warps(registers, shared, per_program):
        code = SimpleNamespace(registers=registers, shared=shared)
        return bench.resident_warps(code, per_program, h200)

    assert warps(32, 0, 8) == 64  # all
    assert warps(65, 0, 4) == 28  # 72 registers for 128 threads: 7 programs
    assert warps(32, 100 << 10, 4) == 8  # two programs' shared memory


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    out = tmp_path_factory.mktemp("machine_code") / "rows.csv"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "bench_machine_code.py"), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        return list(csv.DictReader(file))


def test_bytes_and_products_are_those_of_the_formulas(rows):
    def of(op, variant, dtype, column):
        return {int(row[column]) for row in rows if (row["op"], row["variant"], row["dtype"]) == (op, variant, dtype)}

    assert of("sde_step", "sample", "bf16", "bytes") == {8}  # sample, velocity and noise in, one out
    assert of("sde_step", "seed", "fp32", "bytes") == {12}
    assert of("nft_loss", "nft_kl backward", "bf16", "bytes") == {10}
    assert of("attention_columns", "lse", "bf16", "flops") == {2 * 128}
    assert of("attention_columns", "grad_key", "bf16", "flops") == {2 * 2 * 128}
    assert len(rows) == 54
    for row in rows:  # the two are in the same proportion everywhere
        assert (float(row["special"]) > 0) == (float(row["special_percent"]) > 0)
        assert int(row["stack_bytes"]) <= STACK, row


def test_memory_bound_kernels_issue_in_less_time_than_their_bytes_take(rows):
    """With room for what a count does not see. What draws noise is the exception that docs/performance.md explains."""
    for row in rows:
        if row["unit"] == "element" and row["variant"] != "seed":
            assert float(row["issue_percent"]) <= 85, row
    assert all(float(row["issue_percent"]) < 200 for row in rows)
