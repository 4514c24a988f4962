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
# Each stage ends by itself: its commands share ten minutes, and what tests and benchmarks found until
# then is kept. A stage that cannot run says why and is skipped. FOLDER (default build/gpu-check) gets gpu_check.json and gpu_check_logs.tar.gz, each
# below 16 MiB. Exit status: 0 if nothing failed, 1 otherwise.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

STAGE_SECONDS=${STAGE_SECONDS:-570}
# After the end of its time a command has so long to write down what it found.
KILL_SECONDS=20
MAX_ARCHIVE_BYTES=16000000
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
  # As Ctrl-C would, which pytest and bench/run.py take as an end.
  timeout --signal=INT --kill-after=$KILL_SECONDS "$left" "$@"
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

loaded=""
cuda_loads() {
  within "$python" -c '
from kvcore import _native
library = _native.status()["kvcore_cuda"]
print("kvcore_cuda:", library.path, library.reason or "loaded")
raise SystemExit(not library.loaded)' && loaded=yes
}

need_library() {
  need_gpu || return
  [ -n "$loaded" ] || skip "kvcore_cuda is not loaded"
}

need_pytest() {
  within "$python" -c 'import pytest, hypothesis' || skip "pytest or hypothesis is missing"
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
  # The ops do not need kvcore._C.
  local host=ON
  "$python" -c 'import pybind11' || host=OFF
  CMAKE_ARGS="${CMAKE_ARGS:-} -DKVCORE_CUDA=ON -DKVCORE_CUDA_ARCHS=$arch-real -DKVCORE_HOST=$host" \
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
  need_library || return
  need_pytest || return
  within "$python" -m pytest -q -m cuda -p no:cacheprovider "--junitxml=$work/tests.xml" tests
}

# Runs a tool of compute-sanitizer on a command, whose output goes to a log of its own.
sanitize() {
  local tool=$1 what=$2 result=ok
  local log=$work/sanitizer.$what.$tool.log
  shift 2
  within compute-sanitizer "--tool=$tool" --error-exitcode=9 "$@" >"$log" 2>&1
  case $?,$what in
    0,*) ;;
    1,wrappers) ;; # a bound, which the stage before reports
    5,tests) result="no test is marked cuda and asan" ;;
    124,* | 137,*) result="out of time" ran_out=124 ;;
    *) result=failed found_some=1 ;;
  esac
  printf '%s\t%s\t%s\n' "$what" "$tool" "$result" | tee -a "$work/sanitizer.tsv"
  [ "$result" = ok ] || tail -n 20 "$log"
}

stage_sanitizer() {
  need_gpu || return
  have compute-sanitizer || { skip "no compute-sanitizer"; return; }
  compile_wrappers || return
  local found_some=0 ran_out=0 why="" tool
  if [ -z "$loaded" ]; then
    why="kvcore_cuda is not loaded"
  elif ! why=$(need_pytest); then
    rm -f "$work/$stage.reason"
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    sanitize "$tool" wrappers "$work/wrappers"
  done
  if [ -n "$why" ]; then
    printf 'tests\tall\tskipped: %s\n' "$why" | tee -a "$work/sanitizer.tsv"
  else
    # Caching would give a kernel room beyond its tensors.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
      sanitize "$tool" tests --target-processes=all "$python" -m pytest -q -x \
        -m "cuda and asan" -p no:cacheprovider tests
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  fi
  [ "$found_some" = 0 ] || return 1
  return "$ran_out"
}

stage_bench() {
  need_library || return
  local family families failed=0
  families=$(PYTHONPATH="bench:$PYTHONPATH" within "$python" -c '
import run
print(*run.FAMILIES)') || return
  # One by one: what a family lacks, or the end of the time, leaves the others' results.
  for family in $families; do
    within "$python" bench/run.py --family "$family" --device cuda --out "$work/bench" || failed=$?
  done
  return "$failed"
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

if have "$python"; then
  "$python" bench/gpu_report.py collect "$work" "$gpu" "$out/gpu_check.json" || any_failed=1
else
  printf '{"stages": [], "reason": "%s was not found"}\n' "$python" >"$out/gpu_check.json"
fi
# Logs that ran away keep their ends: the fewer bytes the less they compress.
for max_log_bytes in 4000000 1000000 200000; do
  for log in "$work"/*.log; do
    if [ "$(wc -c <"$log")" -gt $max_log_bytes ]; then
      tail -c $max_log_bytes "$log" >"$log.end" && mv "$log.end" "$log"
    fi
  done
  find "$work" -maxdepth 1 \( -name '*.log' -o -name '*.tsv' -o -name 'wrappers.cuda' \
    -o -name 'wrappers.simt' \) -printf '%f\0' |
    tar --null -C "$work" -czf "$out/gpu_check_logs.tar.gz" -T -
  [ "$(wc -c <"$out/gpu_check_logs.tar.gz")" -gt $MAX_ARCHIVE_BYTES ] || break
done
echo "$out/gpu_check.json, $out/gpu_check_logs.tar.gz"
exit $any_failed
