#!/usr/bin/env bash
# On a machine with a GPU: every suite in order of value (suites.py), each step after its tests, rows as they come.
# Run again with the same RESULTS, it goes on where it stopped: what that folder holds of this commit is left out.
#
#   TIME_LIMIT=570    seconds for everything    RESULTS=benchmarks/results   the CSV files, and session.log
#   PYTHON=python3    needs torch >= 2.11 and triton; wheels in .whl/ are added to it for this run only
#   COMMIT=...        where there is no git     SUITE=all                    another of `mtedit-fast bench`
#   ARCHIVE=X.tar.gz  RESULTS in one file, packed anew every 10 s and at the end: all of it survives a kill
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TIME_LIMIT=${TIME_LIMIT:-570}
RESULTS=${RESULTS:-benchmarks/results}
ARCHIVE=${ARCHIVE:-}

COMMIT=$(git describe --always --dirty --abbrev=10 2>/dev/null || echo "${COMMIT:-}")
if [ -z "$COMMIT" ]; then
  echo "gpu_session: no git here, and rows without a commit are worth little: nothing was run; where there is one," \
    "COMMIT=\$(git describe --always --dirty --abbrev=10), and pass that" >&2
  exit 1
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "gpu_session: $PYTHON sees no CUDA GPU through torch: nothing was run" >&2
  exit 1
fi
mkdir -p "$RESULTS"
export COMMIT PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

pack() {  # beside, so that what was packed before is there until the new one is whole
  tar -czf "$ARCHIVE.part" --exclude="${ARCHIVE##*/}*" -C "$RESULTS" . 2>/dev/null
  [ $? -le 1 ] && mv "$ARCHIVE.part" "$ARCHIVE"  # 1: a file has grown meanwhile
}
site= packer=
finish() {
  [ -z "$packer" ] || { kill "$packer" 2>/dev/null; pack; }
  [ -z "$site" ] || rm -rf "$site"
}
trap finish EXIT
if [ -n "$ARCHIVE" ]; then
  while kill -0 $$; do sleep 10; pack; done >/dev/null 2>&1 &  # not after a step: no trap sees a kill in the midst of it
  packer=$!
fi

if compgen -G '.whl/*.whl' >/dev/null; then
  site=$(mktemp -d)
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl || exit 1
  export PYTHONPATH=$PYTHONPATH:$site
fi
sources=$(cat setup.py csrc/* | sha256sum) built=build/gpu_session.sha256
if [ "$(cat "$built" 2>/dev/null)" != "$sources" ] || ! compgen -G 'mtedit_fast/_C*.so' >/dev/null; then
  "$PYTHON" setup.py -q build_ext --inplace >>"$RESULTS/session.log" 2>&1 && mkdir -p build && echo "$sources" >"$built" ||
    echo "csrc did not build: see session.log"
fi

machine() {
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  nvcc --version 2>/dev/null | tail -1 || echo "no nvcc"
  "$PYTHON" - <<'END'
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

from mtedit_fast.ops import _cpp

print("python", sys.version, "CUDA", torch.version.cuda)
for name in ("torch", "triton", "diffusers", "transformers", "peft", "torchao", "tensorrt", "pytest", "pytest-xdist"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print("no", name)
print("C++ kernels:", _cpp.unavailable_reason() or "built")
print("CUDA kernels:", _cpp.cuda_unavailable_reason() or f"built for {_cpp._C.cuda_archs}")
END
}
machine 2>&1 | tee -a "$RESULTS/session.log"

"$PYTHON" benchmarks/suites.py "${SUITE:-all}" --device cuda --tests --results "$RESULTS" \
  --time-limit $((TIME_LIMIT - SECONDS))
