# Everything from an empty clone: `make demo`, `make test`. Each target sets up its own virtual
# environment in $(VENV); what is already there is not done again.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TRANSFORMERS ?= transformers==5.23.0
MAX_JOBS ?= $(shell nproc)
PYTEST_ARGS ?=
# Processes of pytest; each takes one thread and imports torch.
PYTEST_WORKERS ?= 2
ISA_LEVELS ?= scalar avx2 avx512

.PHONY: help build test slow long demo isa amx asan simt simt-tsan cuda-compile lint format audit bench clean
.DEFAULT_GOAL := help

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
STAMP := $(VENV)/.kvcore
# The version is in the name, so that another TORCH=... installs again.
TORCH_STAMP := $(STAMP)/torch/$(subst /,_,$(TORCH))
INSTALL_STAMP := $(STAMP)/install/$(subst /,_,$(TORCH)-$(TRANSFORMERS))
# Ninja and CMake come from the environment, whatever else the machine has.
export PATH := $(abspath $(VENV)/bin):$(PATH)
export MAX_JOBS
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)
export CMAKE_CUDA_COMPILER_LAUNCHER ?= $(shell command -v ccache)
RUN_TESTS := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(PYTEST_WORKERS)

help:
	@echo "make build   compile and install in place (editable)"
	@echo "make test    the test suite"
	@echo "make slow    the tests marked slow, which make test leaves out"
	@echo "make long    50,000 random problems, a million decoding steps, a thousand repeats"
	@echo "make demo    full and compressed caches compared on two small models"
	@echo "make isa     the tests marked isa at each of: $(ISA_LEVELS)"
	@echo "make amx     the tests marked isa over a software model of AMX tiles (needs AVX-512 BF16)"
	@echo "make asan    the tests marked asan under AddressSanitizer and UBSan"
	@echo "make simt    the CUDA kernels' source on the CPU, under the same sanitizers"
	@echo "make simt-tsan     a selection of them as a check for races between CUDA threads"
	@echo "make cuda-compile  nvcc for CUDA_ARCHS=\"$(CUDA_ARCHS)\", and what it made of the kernels"
	@echo "make lint    ruff and clang-format, nothing changed;  make format  changes"
	@echo "make audit   the libraries use torch's stable ABI only"
	@echo "make bench   the benchmarks; BENCH_ARGS=--quick for few of them;  make clean  remove what was built"

$(STAMP)/venv:
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(@D) && touch $@

$(TORCH_STAMP): $(STAMP)/venv
	$(PIP) "setuptools>=77" wheel "cmake>=3.25" ninja "pybind11>=2.13" "$(TORCH)"
	@rm -rf $(@D) && mkdir -p $(@D) && touch "$@"

$(INSTALL_STAMP): $(TORCH_STAMP) pyproject.toml
	$(PIP) --no-build-isolation --editable ".[test]" "$(TORCH)" "$(TRANSFORMERS)"
	@rm -rf $(@D) && mkdir -p $(@D) && touch "$@"

$(STAMP)/lint: $(STAMP)/venv pyproject.toml
	$(PIP) $$($(PY) .ci/extra.py lint)
	@touch $@

$(STAMP)/sass: $(STAMP)/venv pyproject.toml
	$(PIP) --no-deps $$($(PY) .ci/extra.py sass)
	@touch $@

$(STAMP)/audit: $(STAMP)/venv pyproject.toml
	$(PIP) $$($(PY) .ci/extra.py audit)
	@touch $@

build: $(INSTALL_STAMP)
	$(PY) setup.py --quiet build_ext --inplace

test: build
	$(RUN_TESTS) $(PYTEST_ARGS)

slow: build
	$(RUN_TESTS) -m slow $(PYTEST_ARGS)

long: build
	$(RUN_TESTS) -m long $(PYTEST_ARGS)

demo: build
	$(PY) -m kvcore demo

isa: build
	for level in $(ISA_LEVELS); do \
	  if ! $(PY) -c "from kvcore import _C; assert '$$level' in _C.cpu_isa()['supported']" \
	      2>/dev/null; then echo "$$level: not supported by this machine"; continue; fi; \
	  echo "KVCORE_CPU_ISA=$$level"; \
	  KVCORE_CPU_ISA=$$level $(RUN_TESTS) -m isa $(PYTEST_ARGS) || exit 1; \
	done

# Level amx is never chosen by itself; its software model needs what surrounds the tiles.
MODELLED = $(shell grep -qw avx512_bf16 /proc/cpuinfo 2>/dev/null && echo amx)

# The sanitized build lives beside the normal one. The runtimes are preloaded because Python is not
# linked with them, libstdc++ because they must find __cxa_throw when they start. Python itself
# leaks by design. Reports go to files: pytest's capture would lose them when the process aborts. Only
# the level that the tests run at is compiled, and scalar: amx, its tiles modelled, is the source of
# AVX-512 VNNI and more.
ASAN_DIR := $(CURDIR)/build/asan
runtimes = $(foreach l,$(1),$(shell c++ -print-file-name=$(l)))
with_asan = ASAN_OPTIONS=detect_leaks=0:log_path=$(ASAN_DIR)/report \
  UBSAN_OPTIONS=print_stacktrace=1:log_path=$(ASAN_DIR)/report \
  LD_PRELOAD="$(call runtimes,libasan.so libubsan.so libstdc++.so)"
asan: $(INSTALL_STAMP)
	KVCORE_BUILD_DIR=$(ASAN_DIR)/cmake CMAKE_ARGS="$$CMAKE_ARGS -DKVCORE_SANITIZE=ON -DKVCORE_CUDA=OFF \
	  -DKVCORE_AMX_MODEL=ON -DKVCORE_ISA_LEVELS='scalar;amx'" \
	  $(PY) setup.py --quiet build --build-base $(ASAN_DIR) --build-lib $(ASAN_DIR)/lib
	@rm -f $(ASAN_DIR)/report.*
	PYTHONPATH=$(ASAN_DIR)/lib KVCORE_CPU_ISA=$(MODELLED) $(with_asan) $(RUN_TESTS) -m asan $(PYTEST_ARGS) \
	  || { cat $(ASAN_DIR)/report.* 2>/dev/null; exit 1; }

# A build whose level amx runs a software model of the tiles.
AMX_DIR := $(CURDIR)/build/amx
amx: $(INSTALL_STAMP)
	KVCORE_BUILD_DIR=$(AMX_DIR)/cmake CMAKE_ARGS="$$CMAKE_ARGS -DKVCORE_AMX_MODEL=ON -DKVCORE_CUDA=OFF \
	  -DKVCORE_ISA_LEVELS='scalar;avx512_vnni;amx'" \
	  $(PY) setup.py --quiet build --build-base $(AMX_DIR) --build-lib $(AMX_DIR)/lib
	PYTHONPATH=$(AMX_DIR)/lib KVCORE_CPU_ISA=$(MODELLED) $(RUN_TESTS) -m isa $(PYTEST_ARGS)

# kvcore_simt alone is built again and tested beside the normal build. SIMT_SEED draws an order of
# threads and blocks; without it they run in order.
SIMT_SEED ?=
# Which tests: CI takes those marked asan, which execute every kernel; "simt and slow" are the gates
# of accuracy at their full size.
SIMT_TESTS ?= simt and not slow
export KVCORE_SIMT_SEED = $(SIMT_SEED)
SIMT_DIR := $(CURDIR)/build/simt
TSAN_DIR := $(CURDIR)/build/tsan
# In folder $(1), with CMake arguments $(2).
build_simt = cmake -S . -B $(1) -G Ninja --log-level=NOTICE $$CMAKE_ARGS $(2) -DKVCORE_SIMT=ON \
    -DKVCORE_CUDA=OFF -DKVCORE_HOST=OFF -DPython_EXECUTABLE=$(abspath $(PY)) \
  && cmake --build $(1) --target kvcore_simt -j $(MAX_JOBS)
# The library of folder $(1), and the file in which it notes the kernels that ran.
with_simt = KVCORE_SIMT_LIBRARY=$(1)/kvcore_simt.so KVCORE_SIMT_LAUNCHES=$(1)/launches
# All kernels have to have run, unless PYTEST_ARGS or the choice of slow tests left out others.
all_launched = $(if $(or $(PYTEST_ARGS),$(findstring and slow,$(SIMT_TESTS))),:,$(call with_simt,$(1)) $(PY) -m pytest -q tests/simt/test_launches.py)
simt: build
	$(call build_simt,$(SIMT_DIR),-DKVCORE_SANITIZE=ON)
	@mkdir -p $(ASAN_DIR) && rm -f $(ASAN_DIR)/report.* $(SIMT_DIR)/launches
	$(call with_simt,$(SIMT_DIR)) $(with_asan) \
	  $(RUN_TESTS) -m "$(SIMT_TESTS)" $(PYTEST_ARGS) \
	  || { cat $(ASAN_DIR)/report.* 2>/dev/null; exit 1; }
	$(call all_launched,$(SIMT_DIR))

# Races are sought in what kvcore_simt was compiled from, not in torch.
simt-tsan: build
	$(call build_simt,$(TSAN_DIR),-DKVCORE_SIMT_TSAN=ON)
	@rm -f $(TSAN_DIR)/report.* $(TSAN_DIR)/launches
	$(call with_simt,$(TSAN_DIR)) KVCORE_SIMT_MAX_MACS=1000000 \
	  TSAN_OPTIONS=ignore_noninstrumented_modules=1:log_path=$(TSAN_DIR)/report \
	  LD_PRELOAD="$(call runtimes,libtsan.so libstdc++.so)" \
	  $(RUN_TESTS) -m "simt and asan" $(PYTEST_ARGS) \
	  || { head -200 $(TSAN_DIR)/report.* 2>/dev/null; exit 1; }
	@if ls $(TSAN_DIR)/report.* >/dev/null 2>&1; then head -200 $(TSAN_DIR)/report.*; exit 1; fi
	$(call all_launched,$(TSAN_DIR))

CUDA_ARCHS ?= 80;90a-real;120-real
CUDA_DIR := $(CURDIR)/build/cuda
cuda-compile: build $(STAMP)/sass
	cmake -S . -B $(CUDA_DIR) -G Ninja --log-level=NOTICE $$CMAKE_ARGS -DKVCORE_CUDA=ON \
	  -DKVCORE_HOST=OFF "-DKVCORE_CUDA_ARCHS=$(CUDA_ARCHS)" -DPython_EXECUTABLE=$(abspath $(PY))
	cmake --build $(CUDA_DIR) --target kvcore_cuda -j $(MAX_JOBS)
	KVCORE_CUDA_LIBRARY=$(CUDA_DIR)/kvcore_cuda.so $(RUN_TESTS) tests/test_sass.py $(PYTEST_ARGS)

CXX_FILES = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')
lint: $(STAMP)/lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)

format: $(STAMP)/lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

audit: build $(STAMP)/audit
	$(VENV)/bin/torch-abi-audit --check torch $(wildcard python/kvcore/kvcore_*.so)

bench: build
	$(PY) bench/run.py $(BENCH_ARGS)

clean:
	rm -rf build dist python/*.egg-info python/kvcore/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
