#!/usr/bin/env bash
# shellcheck disable=SC2329 # stages are called by name
#
# Everything that only a machine with a GPU can tell, in one command and without a network:
#
#   bench/gpu_check.sh [--out FOLDER] [STAGE...]
#
# Stages, in this order (default: all; `build` always runs first):
#   build      loads kvcore_cuda, or builds it with nvcc for the GPU that is there
#   wrappers   every wrapper of core/cuda on the GPU against the SIMT shim's model, bit for bit
#   tests      pytest -m cuda
#   sanitizer  compute-sanitizer: the wrappers and the tests marked cuda and asan
#   bench      bench/run.py --device cuda
#
# Each stage ends by itself: its commands share ten minutes. A stage that cannot run says why and
# is skipped. FOLDER (default build/gpu-check) gets gpu_check.json and gpu_check_logs.tar.gz, each
# below 16 MiB. Exit status: 0 if nothing failed, 1 otherwise.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

STAGE_SECONDS=590
MAX_LOG_BYTES=4000000
STAGES=(build wrappers tests sanitizer bench)
out=build/gpu-check
wanted=()
while [ $# -gt 0 ]; do
  case $1 in
    --out)
      [ $# -ge 2 ] || { echo "--out needs a folder" >&2; exit 2; }
      out=$2
      shift
      ;;
    -h | --help)
      sed -n '4,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
      exit 0
      ;;
    build | wrappers | tests | sanitizer | bench) wanted+=("$1") ;;
    *)
      echo "stage must be one of ${STAGES[*]}, got $1" >&2
      exit 2
      ;;
  esac
  shift
done
[ ${#wanted[@]} -gt 0 ] || wanted=("${STAGES[@]}")

python=${PYTHON:-python3}
work=build/gpu-check-work
rm -rf "$work"
mkdir -p "$work" "$out" || exit 1
rm -f "$out/gpu_check.json" "$out/gpu_check_logs.tar.gz"
export PYTHONPATH="$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
deadline=0

# Runs a command until the stage's time is over; its output goes to the stage's log.
within() {
  local left=$((deadline - SECONDS))
  [ "$left" -gt 5 ] || { echo "no time left for: $*" >&2; return 124; }
  echo "+ $*" >&2
  timeout --kill-after=5 "$left" "$@"
}

# The reason for which a stage is skipped; its status is that of a skip.
SKIPPED=77
skip() {
  echo "$*" | tee "$work/$stage.reason"
  return "$SKIPPED"
}

have() { command -v "$1" >/dev/null; }

# Facts about the machine, as the stages need them: GPU and architecture, or nothing.
find_gpu() {
  "$python" - <<'PY' 2>"$work/gpu.log"
import torch
if torch.cuda.is_available():
    print("{}{}".format(*torch.cuda.get_device_capability()), torch.cuda.get_device_name())
PY
}

need_gpu() {
  [ -n "$gpu" ] && return 0
  local reason="no GPU that torch can use"
  have "$python" || reason="$python was not found"
  skip "$reason"
}

cuda_loads() {
  within "$python" -c '
from kvcore import _native
library = _native.status()["kvcore_cuda"]
print("kvcore_cuda:", library.path, library.reason or "loaded")
raise SystemExit(not library.loaded)'
}

stage_build() {
  need_gpu || return
  cuda_loads && return 0
  have nvcc || { skip "kvcore_cuda does not load, and there is no nvcc to build it with"; return; }
  for tool in cmake ninja c++; do
    have "$tool" || { skip "kvcore_cuda does not load, and there is no $tool"; return; }
  done
  local arch=${gpu%% *}
  [ "$arch" = 90 ] && arch=90a
  CMAKE_ARGS="${CMAKE_ARGS:-} -DKVCORE_CUDA=ON -DKVCORE_CUDA_ARCHS=$arch-real" \
    within "$python" setup.py build_ext --inplace || return
  cuda_loads
}

# The program for the GPU, in $work/wrappers.
compile_wrappers() {
  [ -x "$work/wrappers" ] && return 0
  have nvcc || { skip "no nvcc"; return; }
  within nvcc -std=c++20 "-arch=sm_${gpu%% *}" --fmad=false -lineinfo -I csrc \
    tests/simt/wrappers.cu csrc/core/cuda/error_flags.cu -o "$work/wrappers"
}

stage_wrappers() {
  need_gpu || return
  compile_wrappers || return
  have c++ || { skip "no C++ compiler for the shim's side"; return; }
  within "$python" tests/simt/programs.py wrappers plain >"$work/program" || return
  local shim
  shim=$(tail -n 1 "$work/program")
  # Both may report a broken bound, which the comparison shows.
  within "$work/wrappers" >"$work/wrappers.cuda"
  within "$shim" >"$work/wrappers.simt"
  within "$python" bench/gpu_report.py compare "$work/wrappers.cuda" "$work/wrappers.simt" \
    "$work/wrappers.json"
}

stage_tests() {
  need_gpu || return
  within "$python" -c 'import pytest, hypothesis' || { skip "pytest or hypothesis is missing"; return; }
  within "$python" -m pytest -q -m cuda -p no:cacheprovider "--junitxml=$work/tests.xml" tests
}

stage_sanitizer() {
  need_gpu || return
  have compute-sanitizer || { skip "no compute-sanitizer"; return; }
  compile_wrappers || return
  local failed=0 tool
  for tool in memcheck racecheck initcheck synccheck; do
    within compute-sanitizer "--tool=$tool" --error-exitcode=9 "$work/wrappers" \
      >"$work/sanitizer.$tool.log" 2>&1
    # 1: a bound that the stage before reports.
    case $? in
      0 | 1) echo "$tool: nothing found in the wrappers" ;;
      *)
        echo "$tool: see sanitizer.$tool.log"
        tail -n 20 "$work/sanitizer.$tool.log"
        failed=1
        ;;
    esac
  done
  within "$python" -c 'import pytest, hypothesis' || { echo "no pytest: wrappers only"; return "$failed"; }
  for tool in memcheck racecheck; do
    # Caching would give a kernel room beyond its tensors.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within compute-sanitizer "--tool=$tool" --error-exitcode=9 \
      --target-processes=all "$python" -m pytest -q -x -m "cuda and asan" -p no:cacheprovider tests \
      >"$work/sanitizer.tests.$tool.log" 2>&1
    case $? in
      0) echo "$tool: nothing found in the tests" ;;
      5) echo "$tool: no test is marked cuda and asan" ;;
      *)
        echo "$tool: see sanitizer.tests.$tool.log"
        tail -n 20 "$work/sanitizer.tests.$tool.log"
        failed=1
        ;;
    esac
  done
  return "$failed"
}

stage_bench() {
  need_gpu || return
  within "$python" bench/run.py --device cuda --out "$work/bench"
}

gpu=$(have "$python" && find_gpu)
{
  uname -a
  have nvidia-smi && nvidia-smi
  have nvcc && nvcc --version
  have "$python" && "$python" -m pip list 2>/dev/null
} >"$work/environment.log" 2>&1

any_failed=0
echo "GPU: ${gpu:-none}"
for stage in "${STAGES[@]}"; do
  case " build ${wanted[*]} " in
    *" $stage "*) ;;
    *) continue ;;
  esac
  start=$SECONDS
  deadline=$((SECONDS + STAGE_SECONDS))
  status=0
  "stage_$stage" >"$work/$stage.log" 2>&1 || status=$?
  result=ok
  case $status in
    0) ;;
    "$SKIPPED") result=skipped ;;
    124 | 137) result="failed: out of time" any_failed=1 ;;
    *) result=failed any_failed=1 ;;
  esac
  printf '%s\t%s\t%d\n' "$stage" "$result" $((SECONDS - start)) >>"$work/stages.tsv"
  printf '%-10s %-20s %4d s  %s\n' "$stage" "$result" $((SECONDS - start)) \
    "$(cat "$work/$stage.reason" 2>/dev/null)"
  [ "$result" = ok ] || [ "$result" = skipped ] || tail -n 15 "$work/$stage.log"
done

# Logs that ran away keep their ends.
for log in "$work"/*.log; do
  if [ "$(wc -c <"$log")" -gt $MAX_LOG_BYTES ]; then
    tail -c $MAX_LOG_BYTES "$log" >"$log.end" && mv "$log.end" "$log"
  fi
done
if have "$python"; then
  "$python" bench/gpu_report.py collect "$work" "$gpu" "$out/gpu_check.json" || any_failed=1
else
  printf '{"stages": [], "reason": "%s was not found"}\n' "$python" >"$out/gpu_check.json"
fi
find "$work" -maxdepth 1 \( -name '*.log' -o -name '*.tsv' -o -name 'wrappers.cuda' \
  -o -name 'wrappers.simt' \) -printf '%f\0' |
  tar --null -C "$work" -czf "$out/gpu_check_logs.tar.gz" -T -
echo "$out/gpu_check.json, $out/gpu_check_logs.tar.gz"
exit $any_failed
