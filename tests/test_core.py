"""The C++ helpers that all families share: checks, dispatch, threads."""

import os
import pathlib
import re
import subprocess

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """tests/native/core_ops.cpp, compiled here: the helpers have no ops of their own."""
    library = tmp_path_factory.mktemp("core") / "core_ops.so"
    site = pathlib.Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "c++")
    command = [
        *([launcher] if (launcher := os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER")) else []),
        compiler,
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-shared",
        "-DTORCH_STABLE_ONLY",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{ROOT / 'csrc'}",
        f"-isystem{site / 'include'}",
        str(ROOT / "tests" / "native" / "core_ops.cpp"),
        str(ROOT / "csrc" / "binding" / "parallel.cpp"),
        "-Wl,--no-as-needed",
        str(site / "lib" / "libtorch.so"),
        "-o",
        str(library),
    ]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)
    return torch.ops.kvcore_test


@pytest.fixture(params=[1, 2, 5])
def num_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


X = torch.zeros(5, 64)


@pytest.mark.parametrize(
    ("check", "args", "message"),
    [
        ("dtype", [X.double()], "x must be float32 or float16, got float64"),
        ("dtype", [X.to(torch.int8)], "x must be float32 or float16, got int8"),
        ("dtype", [X.to(torch.complex64)], "x must be float32 or float16, got ComplexFloat"),
        ("dim", [X[0]], "x must be 2-dimensional, got [64]"),
        ("shape", [X[:, :3]], "x must be [*, 64], got [5, 3]"),
        ("shape", [X[0]], "x must be [*, 64], got [64]"),
        ("contiguous", [X[:, ::2]], "x must be contiguous, got strides [64, 2]"),
        (
            "last_contiguous",
            [X.T],
            "x must be contiguous in its last dimension, got strides [1, 64]",
        ),
        ("same_dtype", [X, X.half()], "other must be float32 like x, got float16"),
        ("same_device", [X, X.to("meta")], "other must be on cpu like x, got"),
        ("one_of", [3], "bits must be one of 2, 4, 8, got 3"),
        ("range", [10], "page must be in [0, 9], got 10"),
        ("range", [-1], "page must be in [0, 9], got -1"),
    ],
)
def test_failed_checks_name_argument_expected_and_actual(core, check, args, message):
    with pytest.raises(RuntimeError, match=re.escape(f"core_op: {message}")):
        getattr(core, f"check_{check}")(*args)


@pytest.mark.parametrize(
    ("check", "args"),
    [
        ("dtype", [X.half()]),
        ("dim", [X]),
        ("shape", [X]),
        ("shape", [X[:0]]),
        ("contiguous", [X]),
        ("last_contiguous", [X[::2, :7]]),
        ("last_contiguous", [X.T[:, :1]]),
        ("same_dtype", [X, X]),
        ("same_dtype", [X, None]),
        ("same_device", [X, X[0]]),
        ("one_of", [8]),
        ("range", [0]),
        ("range", [9]),
    ],
)
def test_passed_checks(core, check, args):
    getattr(core, f"check_{check}")(*args)


def test_dispatch(core):
    assert [core.dispatch_value(d) for d in (64, 96, 128)] == [64, 96, 128]
    with pytest.raises(RuntimeError, match="head_dim must be one of 64, 96, 128, got 80"):
        core.dispatch_value(80)


def test_dispatch_dtype(core):
    assert [core.dispatch_bytes(X.to(t)) for t in (torch.float, torch.half, torch.bfloat16)] == [
        4,
        2,
        2,
    ]
    message = "core_op: x must be float32, float16 or bfloat16, got float64"
    with pytest.raises(RuntimeError, match=message):
        core.dispatch_bytes(X.double())


@pytest.mark.parametrize("size", [0, 1, 7, 1000])
@pytest.mark.parametrize("grain", [0, 1, 16, 10_000])
def test_parallel_for_covers_the_range_once(core, num_threads, size, grain):
    counts = torch.zeros(size, dtype=torch.int64)
    core.count_range(counts, grain, -1)
    assert counts.tolist() == [1] * size


def test_parallel_for_passes_the_exception_on(core, num_threads):
    counts = torch.zeros(100, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="element 70 failed"):
        core.count_range(counts, 1, 70)
    core.count_range(counts.zero_(), 1, -1)
    assert counts.sum() == 100


@pytest.mark.parametrize("tasks", [0, 1, 3, 200])
def test_parallel_tasks_runs_each_once_and_slots_are_exclusive(core, num_threads, tasks):
    workers = core.max_workers(tasks)
    assert workers == min(tasks, num_threads)
    counts = torch.zeros(num_threads, tasks, dtype=torch.int64)
    busy = torch.zeros(num_threads, dtype=torch.int64)
    core.count_tasks(counts, busy, -1)
    assert counts.sum(0).tolist() == [1] * tasks
    assert busy.tolist() == (1000 * counts.sum(1)).tolist()
    assert counts[workers:].sum() == 0


def test_parallel_tasks_passes_the_exception_on(core, num_threads):
    counts, busy = torch.zeros(num_threads, 50, dtype=torch.int64), torch.zeros(num_threads).long()
    with pytest.raises(RuntimeError, match="task 20 failed"):
        core.count_tasks(counts, busy, 20)


def test_poisoned_memory_reaches_allocations_in_cpp(core, poisoned_memory):
    assert core.unwritten(X).isnan().all()
    assert (core.unwritten(X.to(torch.int8)) == 127).all()


def test_poisoned_memory_ends_with_the_test():
    assert not torch.are_deterministic_algorithms_enabled()
