"""The other side of remote.py: one process that runs what an adapter offers.

    python worker.py ADAPTER.py ARRAYS RESULTS ARGUMENTS

ARRAYS is a folder of .npy files, RESULTS one that takes them. A folder `small` in ARRAYS has fewer
of them: those are worked on just before each timing, so that the threads are awake, as they are in
a model. Needs numpy and whatever the adapter imports; on a GPU that is torch as well, whose clock
is the GPU's.
"""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import sys
import time
from collections.abc import Callable

import numpy as np


def time_on_cpu(run: Callable[[], object]) -> float:
    """Seconds of one call; its result is kept until the clock has stopped."""
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return seconds


def clock(device: str) -> Callable[[Callable[[], object]], float]:
    """What times one call on a device, behind a flush that hides the launch if it is a GPU."""
    if device == "cpu":
        return time_on_cpu
    import torch
    from timer import CacheFlusher, time_on_gpu

    flush = CacheFlusher(torch.device(device))

    def timed(run: Callable[[], object]) -> float:
        flush()
        return time_on_gpu(run)

    return timed


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Arrays by name, mapped: what an adapter converts never is in memory as a whole."""
    return {path.stem: np.load(path, mmap_mode="c") for path in folder.glob("*.npy")}


def as_array(result: object) -> np.ndarray:
    """A result in fp32; numpy knows neither bf16 nor GPUs."""
    if hasattr(result, "cpu"):
        result = result.detach().float().cpu().numpy()
    return np.asarray(result, dtype=np.float32)


def main() -> None:
    adapter, arguments = sys.argv[1], json.loads(sys.argv[4])
    inputs, results = (pathlib.Path(folder) for folder in sys.argv[2:4])
    # Whatever libraries print must not be taken for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    time_once = clock(arguments.get("device", "cpu"))
    load = runpy.run_path(adapter)["load"]
    variants = load(read(inputs), **arguments)
    small = inputs / "small"
    wake = load(read(small), **arguments) if small.exists() else {}

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    answer(variants=list(variants))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            if "time" in command:
                name = command["time"]
                if name in wake:
                    wake[name]()
                answer(seconds=time_once(variants[name]))
                continue
            result, path = variants[command["call"]](), None
            if result is not None:
                path = str(results / "result.npy")
                np.save(path, as_array(result))
            answer(result=path)
        except Exception as error:  # of a library's: the other variants go on
            answer(error=f"{type(error).__name__}: {error}".splitlines()[0])


if __name__ == "__main__":
    main()
