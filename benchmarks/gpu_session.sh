#!/usr/bin/env bash
# On a machine with a GPU: the tests that need it, then the benches in order of value, results written as they come.
# Run again with the same OUT, it goes on where it stopped: what $OUT holds of this commit is left out.
#
#   TIME_LIMIT=570    seconds for everything        OUT=benchmarks/results   the CSV files, and session.log
#   PYTHON=python3    needs torch >= 2.11 and triton; wheels in .whl/ are added to it for this run only
#   COMMIT=...        where there is no git
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
LOG=$OUT/session.log
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

say() { echo "== $*" | tee -a "$LOG"; }
has() { "$PYTHON" -c "import $1" 2>/dev/null; }
finished() { grep -qxF "== $1: done at $COMMIT" "$LOG" 2>/dev/null; }

# step NAME SECONDS COMMAND...: once per commit, within SECONDS and what is left of the session
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS))
  shift 2
  finished "$name" && return 0
  if ((left < 20)); then
    say "no time left for $name: run the session again"
    exit 1
  fi
  if ((limit > left)); then limit=$left; fi
  say "$name, $limit s at most"
  if timeout "$limit" "$@" 2>&1 | tee -a "$LOG"; then
    say "$name: done at $COMMIT"
  else
    say "$name: failed or ran out of time"
    return 1
  fi
}

tests() { step "tests of $1" 240 "$PYTHON" -m pytest -q -x -p no:cacheprovider "${@:2}"; }

# bench NAME SECONDS TESTS FILE OPTIONS...: a row counts only where the tests are green
bench() {
  local name=$1 limit=$2 green=$3 file=$4
  shift 4
  if finished "tests of $green"; then
    step "$name" "$limit" "$PYTHON" "$file" --device cuda --out "$OUT/$(basename "$file" .py | cut -c7-).csv" "$@"
  else
    say "$name: left out, the tests of $green are not green"
  fi
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit --format=csv
  "$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, torch.version.cuda, triton.__version__)'
  nvcc --version 2>/dev/null | tail -1 || echo "no nvcc"
  for package in diffusers transformers peft torchao tensorrt; do
    "$PYTHON" -c "import $package as p; print('$package', p.__version__)" 2>/dev/null || echo "no $package"
  done
}
machine 2>&1 | tee -a "$LOG"
"$PYTHON" setup.py -q build_ext --inplace >>"$LOG" 2>&1 || say "csrc did not build"

schedules=() extension=()
if has diffusers; then schedules=(tests/test_sde_step_schedule.py); fi
if has mtedit_fast._C && has pybind11; then extension=(tests/test_csrc.py); else say "no csrc: without its tests"; fi
tests nft_loss tests/test_nft_loss.py tests/test_nft_loss_errors.py tests/test_nft_loss_registration.py tests/test_crd_loss.py
tests sde_step tests/test_sde_step.py tests/test_sde_step_triton.py tests/test_sde_step_registration.py \
  tests/test_sde_step_errors.py tests/test_seeded_noise.py "${schedules[@]}"
tests attention_columns tests/test_attention_columns.py tests/test_attention_columns_registration.py
tests token_similarity tests/test_token_similarity.py tests/test_token_similarity_registration.py \
  tests/test_token_similarity_errors.py
tests digit_score tests/test_digit_score.py tests/test_digit_score_registration.py tests/test_digit_score_errors.py \
  tests/test_digit_score_auto.py tests/test_token_log_probs.py
tests crop_resize tests/test_crop_resize.py tests/test_crop_resize_errors.py "${extension[@]}"
if has diffusers && has pydantic; then
  tests update tests/test_rollout.py tests/test_adapters.py tests/test_update.py
  tests rollout tests/test_bench_rollout.py tests/test_fp8.py tests/test_speed.py
  tests consistency tests/test_consistency.py
  tests judge tests/test_judge_huggingface.py
  tests iteration tests/test_bench_iteration.py
else
  say "no diffusers or no pydantic: without the tests and benches of whole models"
fi

# rollout NAME SECONDS EDITOR OPTIONS...: a row that is not exact, or not its peer's, is refused by the bench itself
rollout() { bench "rollout of $1" "$2" rollout benchmarks/bench_rollout.py --turns 1 --editor "${@:3}"; }

rollout "kontext" 300 kontext
rollout "kontext, compiled" 420 kontext --compile whole
rollout "kontext, fp8" 480 kontext --compile blocks --dtype fp8
rollout "klein-kv, 1024" 360 klein-kv --size 1024 --group 8
rollout "klein-kv" 180 klein-kv --group 8
rollout "klein" 180 klein --group 4
rollout "klein, graphs" 180 klein --group 4 --cuda-graphs
rollout "qwen" 480 qwen --group 8
rollout "kontext, three turns" 480 kontext --turns 3 --group 8
rollout "kontext, group of 4" 180 kontext --group 4
rollout "kontext, group of 8" 240 kontext --group 8
rollout "kontext, 1024" 540 kontext --size 1024 --group 4
rollout "kontext, 1024, fp8" 540 kontext --size 1024 --group 4 --compile blocks --dtype fp8
rollout "klein-kv, fp8" 300 klein-kv --size 1024 --group 8 --compile blocks --dtype fp8
rollout "qwen, 1024" 540 qwen --size 1024 --group 4 --steps 4 --samples 2
rollout "qwen, fp8" 540 qwen --group 8 --compile blocks --dtype fp8

iteration=(benchmarks/bench_iteration.py --full --repetitions 2)
bench "iteration" 570 iteration "${iteration[@]}" --needed both
bench "iteration, compiled" 570 iteration "${iteration[@]}" --needed both --compile blocks
bench "iteration, nothing needed" 570 iteration "${iteration[@]}" --needed neither
bench "iteration, grpo" 570 iteration "${iteration[@]}" --objective grpo --steps 4
bench "update" 420 update benchmarks/bench_update.py --full --only nft
bench "update, compiled" 540 update benchmarks/bench_update.py --full --only compile
bench "update, compaction and replay" 420 update benchmarks/bench_update.py --full --only compaction --only grpo
if has torchao; then
  bench "update, fp8" 540 update benchmarks/bench_update.py --full --only fp8
else
  say "no torchao: without the fp8 rows of the update"
fi
bench "judge" 420 judge benchmarks/bench_judge.py --full
bench "digit_score" 540 digit_score benchmarks/bench_digit_score.py
bench "consistency" 240 consistency benchmarks/bench_consistency.py --full
bench "nft_loss, large" 240 nft_loss benchmarks/bench_nft_loss.py --shape 32x4096x64
bench "attention_columns" 300 attention_columns benchmarks/bench_attention_columns.py
bench "token_similarity" 540 token_similarity benchmarks/bench_token_similarity.py
bench "crop_resize" 240 crop_resize benchmarks/bench_crop_resize.py
bench "adapters" 240 update benchmarks/bench_adapters.py
bench "sde_step, large" 240 sde_step benchmarks/bench_sde_step.py --shape 32x4096x64
bench "nft_loss" 540 nft_loss benchmarks/bench_nft_loss.py
bench "sde_step" 540 sde_step benchmarks/bench_sde_step.py
bench "sde_step, fp16" 240 sde_step benchmarks/bench_sde_step.py --dtype fp16 --shape 8x4096x64
say "the end: results in $OUT"
