"""Variants that run in a process of their own, with another Python or another kvcore.

A peer that cannot share this environment lives in `.venv-peers/<name>` of the checkout (or of
KVCORE_PEERS); `bash bench/peers/install.sh NAME` makes it. The process loads an adapter, prepares
its variants, and then does one thing per line that it is sent; it times itself, while what flushes
the caches is the parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

HERE = pathlib.Path(__file__).resolve().parent
WORKER = HERE / "worker.py"


def interpreter(peer: str) -> str | None:
    """The Python of a peer's environment, or None if it is not installed."""
    folder = pathlib.Path(os.environ.get("KVCORE_PEERS", HERE.parent / ".venv-peers"))
    python = folder / peer / "bin" / "python"
    return str(python) if python.exists() else None


class RemoteError(RuntimeError):
    """The other process failed: its last words are the message."""


class Remote:
    """One process with an adapter (a file that defines ``load``), and the variants it offers.

    Args:
        python: interpreter to run.
        adapter: path of a Python file with ``load(arrays, **arguments)``, which returns functions
            by name; each does the work once and returns the result as an array, or None.
        arguments: JSON-serialisable keyword arguments of it.
        arrays: what it works on.
        env: variables beside those of this process.
    """

    def __init__(
        self,
        python: str,
        adapter: pathlib.Path,
        arguments: Mapping[str, object],
        arrays: Mapping[str, Tensor] = {},
        env: Mapping[str, str] = {},
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvcore-bench-")
        for name, array in arrays.items():
            np.save(pathlib.Path(self._folder.name) / f"{name}.npy", array.cpu().float().numpy())
        self._errors = pathlib.Path(self._folder.name) / "stderr.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [python, str(WORKER), str(adapter), self._folder.name, json.dumps(dict(arguments))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **env},
            )
        try:
            self.names: list[str] = self._read()["variants"]
        except BaseException:
            self.close()
            raise

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            words = self._errors.read_text().strip().splitlines()
            raise RemoteError(words[-1] if words else "the process ended without a word")
        return json.loads(line)

    def _ask(self, **command: object) -> dict:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def variant(self, name: str) -> RemoteVariant:
        return RemoteVariant(self, name)

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()


class RemoteVariant:
    """One of a remote's variants, as the timer wants it."""

    def __init__(self, remote: Remote, name: str) -> None:
        self.remote, self.name = remote, name

    def __call__(self) -> Tensor | None:
        """Runs it once; returns its result."""
        path = self.remote._ask(call=self.name)["result"]
        return None if path is None else torch.from_numpy(np.load(path))

    def timed(self) -> float:
        """Runs it once; returns the seconds that it took there."""
        return self.remote._ask(time=self.name)["seconds"]


def kvcore_at(checkout: pathlib.Path, family: str, index: int, quick: bool) -> Remote:
    """The index-th case of a family for the kvcore built in ``checkout``, as this bench has it."""
    arguments = {"family": family, "index": index, "quick": quick}
    env = {"PYTHONPATH": f"{checkout / 'python'}{os.pathsep}{HERE}"}
    return Remote(sys.executable, HERE / "peers" / "kvcore_case.py", arguments, env=env)
