"""Calls whose n-th allocation fails, for every n, in a process of its own.

``python hostile_malloc.py SET THREADS`` runs a set of ``malloc_cases.SETS`` with
``native/failing_malloc.c`` preloaded and prints a line of JSON for each case: its name, how many
allocations there are to fail, the errors that were raised with how often, and what went wrong.
"""

import collections
import ctypes
import json
import sys

import torch

import malloc_cases

EVERY = 2**62
# An op takes some 50 allocations, an update of the cache some 100.
MOST = 5_000


class FailingMalloc:
    """Counts the allocations in its block, and lets some of them fail."""

    def __init__(self):
        library = ctypes.CDLL(None)
        self.arm, self.disarm = library.failing_malloc_arm, library.failing_malloc_disarm
        self.arm.argtypes, self.arm.restype = [ctypes.c_long, ctypes.c_long, ctypes.c_size_t], None
        self.disarm.argtypes, self.disarm.restype = [], ctypes.c_long

    def call(self, function, first, failures, min_bytes):
        """The function's result, its error, and whether an allocation failed."""
        result = error = None
        self.arm(first, failures, min_bytes)
        try:
            result = function()
        except (MemoryError, RuntimeError, SystemError) as raised:  # the last is numpy's
            error = raised
        finally:
            counted = self.disarm()
        return result, error, counted > first


def run(malloc, case, failures, min_bytes):
    """Fails the n-th allocation and `failures - 1` more, for every n; returns how many there are.

    A call that fails changes nothing, and succeeds when it is made again.
    """
    errors = collections.Counter()
    for n in range(MOST):
        result, error, failed = malloc.call(case.call, n, failures, min_bytes)
        if error is not None:
            errors[f"{type(error).__name__}: {error}".splitlines()[0]] += 1
            assert failed, f"nothing failed, but: {error}"
            case.check_unchanged()
            result = case.call()
        case.check_done(result)
        case.restore()
        if not failed:
            return n, errors
    raise AssertionError(f"more than {MOST} allocations")


def main():
    make_cases, smallest = malloc_cases.SETS[sys.argv[1]]
    torch.set_num_threads(int(sys.argv[2]))
    malloc = FailingMalloc()
    for name, case in make_cases().items():
        # One alone; then all of those that hold data, as when memory is used up.
        for kind, failures, min_bytes in (("one", 1, smallest), ("all", EVERY, 1024)):
            line = {"case": name, "kind": kind, "failed": 0, "errors": {}, "wrong": ""}
            try:
                line["failed"], line["errors"] = run(malloc, case, failures, min_bytes)
            except AssertionError as wrong:
                line["wrong"] = str(wrong)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
