#!/usr/bin/env bash
# On a machine with a GPU: the kernel tests, then the benches in order of value, results written as they come.
# Run again, it goes on where it stopped: finished steps and rows already measured at this commit are left out.
#
#   TIME_LIMIT=1500   seconds for everything        OUT=benchmarks/results   where results go
#   PYTHON=python3    needs torch >= 2.11 and triton; wheels in .whl/ are added to it for this run only
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TIME_LIMIT=${TIME_LIMIT:-1500}
OUT=${OUT:-benchmarks/results}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_session: $PYTHON sees no CUDA GPU through torch: nothing was run" >&2
  exit 1
fi

mkdir -p "$OUT"
deadline=$((SECONDS + TIME_LIMIT))
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
COMMIT=${COMMIT:-$(git describe --always --dirty --abbrev=10 2>/dev/null || echo unknown)}
export COMMIT
if compgen -G '.whl/*.whl' >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$site
fi

# step NAME COMMAND...: once per commit, within what is left of the time; output also goes to $OUT/NAME.log
step() {
  local name=$1 left=$((deadline - SECONDS))
  shift
  if grep -qxF "$name $COMMIT" "$OUT/done.txt" 2>/dev/null; then
    echo "== $name: done before"
    return 0
  fi
  if ((left < 20)); then
    echo "== $name: no time left, run the session again"
    return 1
  fi
  echo "== $name (${left} s left)"
  if timeout "$left" "$@" 2>&1 | tee "$OUT/$name.log"; then
    echo "$name $COMMIT" >>"$OUT/done.txt"
  else
    echo "== $name: failed or ran out of time"
    return 1
  fi
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  "$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, torch.version.cuda, triton.__version__)'
  nvcc --version 2>/dev/null | tail -1 || echo "no nvcc"
  if ldconfig -p | grep libnvinfer; then echo "TensorRT: present"; else
    "$PYTHON" -c 'import tensorrt; print("TensorRT:", tensorrt.__version__)' 2>/dev/null || echo "TensorRT: absent"
  fi
}
machine 2>&1 | tee "$OUT/machine.txt"

"$PYTHON" setup.py -q build_ext --inplace >"$OUT/build.log" 2>&1 || echo "csrc did not build: see $OUT/build.log"

# A row counts only where the tests are green. Those of the kernels need torch and triton alone; the others what they name.
has() { "$PYTHON" -c "import $1" 2>/dev/null; }
tests=(tests/test_sde_step.py tests/test_sde_step_triton.py tests/test_sde_step_registration.py)
tests+=(tests/test_sde_step_errors.py tests/test_seeded_noise.py)
if has diffusers; then tests+=(tests/test_sde_step_schedule.py); else echo "no diffusers: without its schedules"; fi
if has mtedit_fast._C && has pybind11; then tests+=(tests/test_csrc.py); else echo "no csrc: leaving out tests/test_csrc.py"; fi
step tests "$PYTHON" -m pytest -q -x "${tests[@]}" || exit 1

bench=("$PYTHON" benchmarks/bench_sde_step.py --out "$OUT/sde_step.csv")
step sde_step_large "${bench[@]}" --shape 32x4096x64 || exit 1
step sde_step "${bench[@]}" || exit 1
step sde_step_fp16 "${bench[@]}" --dtype fp16 --shape 8x4096x64 || exit 1
echo "== all done: results in $OUT"
