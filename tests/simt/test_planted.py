"""The shim and the sanitizers behind it find planted bugs, and nothing in right kernels."""

import os
import re
import subprocess

import pytest
from programs import VARIANTS, program

SHIM, WRONG = 2, 3  # exit codes of planted.cu

RIGHT = (
    "right_global",
    "right_shared",
    "right_copy",
    "right_warp",
    "right_warp_halves",
    "right_atomics",
    "right_vectors",
    "right_raw_vectors",
    "right_ldmatrix",
    "right_launch",
)
# What the shim itself says about each, whatever sanitizer is there.
REPORTED = {
    "divergent_barrier": "__syncthreads in divergent code: other threads wait in the one at",
    "lost_barrier": "threads wait for each other forever",
    "divergent_shuffle": "in divergent code: lanes 0x",
    "lane_not_in_mask": "__shfl_xor_sync with mask 0xffff without the calling lane",
    "mma_after_return": "mma.m16n8k32.s8 in a warp of which lanes have returned",
    "misaligned_load": "load_16: address is not aligned to 16 bytes",
    "ldmatrix_misaligned": "ldmatrix: row address is not aligned to 16 bytes",
    "ldmatrix_outside": "ldmatrix: row address lies outside the 512 bytes of shared memory",
    "empty_grid": "grid must be from 1 to (2147483647, 65535, 65535), got (1, 0, 1)",
    "large_grid": "grid must be from 1 to (2147483647, 65535, 65535), got (1, 65536, 1)",
    "large_block": "block must be 1 to 1024 threads, at most 64 in z, got (32, 33, 1)",
    "large_smem": "dynamic shared memory must be at most 101376 bytes on sm_120, got 101377",
}
# Poison shows in the result, in every order of the threads.
WRONG_ALWAYS = (
    "shared_unwritten",
    "copy_without_wait",
    "copy_waits_for_too_few",
    "copy_reuses_early",
)
# The result depends on the order of the threads.
WRONG_IN_SOME_ORDER = ("missing_barrier", "copy_without_barrier", "missing_syncwarp")
RACES = (*WRONG_IN_SOME_ORDER, "race_between_warps", "race_between_blocks")
SANITIZED = {
    "global_out_of_bounds": "heap-buffer-overflow",
    "shared_overrun": "use-after-poison",
    "misaligned_raw_load": "misaligned address",
}


def run(name, variant, seed=""):
    options = "exitcode=66:report_signal_unsafe=0"
    env = {**os.environ, "KVCORE_SIMT_SEED": str(seed), "KVCORE_SIMT_DEVICE": ""}
    env |= {"ASAN_OPTIONS": "detect_leaks=0:exitcode=66", "TSAN_OPTIONS": options}
    env.pop("LD_PRELOAD", None)
    command = [program("planted", variant), name]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_case_has_an_expectation(variant):
    names = subprocess.run([program("planted", variant)], capture_output=True, text=True).stdout
    known = {*RIGHT, *REPORTED, *WRONG_ALWAYS, *RACES, *SANITIZED}
    assert set(names.split()) == known


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", ["", 1, 2, 3])
@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_pass(name, variant, seed):
    result = run(name, variant, seed)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", ["", 1])
@pytest.mark.parametrize("name", REPORTED)
def test_the_shim_reports(name, variant, seed):
    result = run(name, variant, seed)
    assert REPORTED[name] in result.stderr
    assert result.returncode == SHIM


def test_a_report_names_kernel_block_thread_and_line():
    stderr = run("ldmatrix_misaligned", "plain").stderr
    pattern = r"load_matrix.*, block \(0, 0, 0\): thread \(\d+, 0, 0\) at planted\.cu:\d+: "
    assert re.search(pattern, stderr)


@pytest.mark.parametrize("seed", ["", 1, 2, 3])
@pytest.mark.parametrize("name", WRONG_ALWAYS)
def test_poison_reaches_the_result(name, seed):
    assert run(name, "plain", seed).returncode == WRONG


@pytest.mark.parametrize("name", WRONG_IN_SOME_ORDER)
def test_some_order_of_threads_gives_a_wrong_result(name):
    codes = {run(name, "plain", seed).returncode for seed in ("", *range(1, 9))}
    assert WRONG in codes
    assert codes <= {0, WRONG}


@pytest.mark.parametrize("name", RACES)
def test_races_are_found(name):
    result = run(name, "tsan")
    assert "WARNING: ThreadSanitizer: data race" in result.stderr
    assert "planted.cu" in result.stderr
    assert result.returncode == 66


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitizers_see_the_kernels(name):
    result = run(name, "asan")
    assert SANITIZED[name] in result.stderr
    assert "planted.cu" in result.stderr
    assert result.returncode != 0


def test_the_guards_of_shared_memory_need_no_sanitizer():
    result = run("shared_overrun", "plain")
    assert "wrote outside its 512 bytes of shared memory, at offset 512" in result.stderr
    assert result.returncode == SHIM


def test_the_same_seed_gives_the_same_run():
    for name in WRONG_IN_SOME_ORDER:
        results = [run(name, "plain", seed) for seed in (5, 5)]
        assert results[0].returncode == results[1].returncode


def test_devices_are_named():
    env = {**os.environ, "KVCORE_SIMT_DEVICE": "sm_75"}
    command = [program("planted", "plain"), "right_launch"]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (
        "KVCORE_SIMT_DEVICE must be one of sm_120, sm_80, sm_90, one_sm, got sm_75" in result.stderr
    )
    larger = {**env, "KVCORE_SIMT_DEVICE": "sm_90"}
    command[1] = "large_smem"
    assert subprocess.run(command, env=larger, capture_output=True).returncode == 0
