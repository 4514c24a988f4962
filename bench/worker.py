"""The other side of remote.py: one process that runs what an adapter offers.

    python worker.py ADAPTER.py FOLDER ARGUMENTS

FOLDER holds arrays as .npy, and takes results. Needs numpy and whatever the adapter imports.
"""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import sys
import time

import numpy as np


def main() -> None:
    adapter, folder, arguments = sys.argv[1], pathlib.Path(sys.argv[2]), json.loads(sys.argv[3])
    # Whatever libraries print must not be taken for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    arrays = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    variants = runpy.run_path(adapter)["load"](arrays, **arguments)

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    answer(variants=list(variants))
    for line in sys.stdin:
        command = json.loads(line)
        if "time" in command:
            run = variants[command["time"]]
            start = time.perf_counter()
            result = run()
            seconds = time.perf_counter() - start
            del result
            answer(seconds=seconds)
            continue
        result, path = variants[command["call"]](), None
        if result is not None:
            path = str(folder / "result.npy")
            np.save(path, np.asarray(result, dtype=np.float32))
        answer(result=path)


if __name__ == "__main__":
    main()
