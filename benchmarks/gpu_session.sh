#!/usr/bin/env bash
# On a machine with a GPU: every suite in order of value (suites.py), each step after its tests, rows as they come.
# Run again with the same OUT, it goes on where it stopped: what $OUT holds of this commit is left out.
#
#   TIME_LIMIT=570    seconds for everything        OUT=benchmarks/results   the CSV files, and session.log
#   PYTHON=python3    needs torch >= 2.11 and triton; wheels in .whl/ are added to it for this run only
#   COMMIT=...        where there is no git         SUITE=all                another of `mtedit-fast bench`
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TIME_LIMIT=${TIME_LIMIT:-570}
OUT=${OUT:-benchmarks/results}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_session: $PYTHON sees no CUDA GPU through torch: nothing was run" >&2
  exit 1
fi

mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
COMMIT=${COMMIT:-$(git describe --always --dirty --abbrev=10 2>/dev/null || echo unknown)}
export COMMIT
if compgen -G '.whl/*.whl' >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$site
fi

machine() {
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  "$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, torch.version.cuda, triton.__version__)'
  nvcc --version 2>/dev/null | tail -1 || echo "no nvcc"
  for package in diffusers transformers peft torchao tensorrt; do
    "$PYTHON" -c "import $package as p; print('$package', p.__version__)" 2>/dev/null || echo "no $package"
  done
}
machine 2>&1 | tee -a "$OUT/session.log"
"$PYTHON" setup.py -q build_ext --inplace >>"$OUT/session.log" 2>&1 || echo "csrc did not build: see $OUT/session.log"

"$PYTHON" benchmarks/suites.py "${SUITE:-all}" --device cuda --tests --results "$OUT" --time-limit $((TIME_LIMIT - SECONDS))
