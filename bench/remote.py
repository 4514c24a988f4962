"""Variants that run in a process of their own, with another Python or another kvcore.

A peer that cannot share this environment lives in `.venv-peers/<name>` of the checkout (or of
KVCORE_PEERS); `bash bench/peers/install.sh NAME` makes it. The process loads an adapter, prepares
its variants, and then does one thing per line that it is sent; it times itself, while what flushes
the caches is the parent. (On a GPU both do: only a flush in its own stream hides its launches.)
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from memory import KEPT_MEMORY_ENV
from torch import Tensor

HERE = pathlib.Path(__file__).resolve().parent
WORKER = HERE / "worker.py"
# What install.sh writes last into an environment: the requirements that it has.
INSTALLED = "installed.txt"


def environment(peer: str) -> pathlib.Path:
    """Folder of a peer's environment, which need not exist."""
    folder = pathlib.Path(os.environ.get("KVCORE_PEERS", HERE.parent / ".venv-peers"))
    return folder / peer


def installed(peer: str) -> str | None:
    """What a peer's environment was made of, or None if it is not there, or not completely."""
    path = environment(peer) / INSTALLED
    return path.read_text().strip() if path.is_file() else None


def interpreter(peer: str) -> str | None:
    """The Python of a peer's environment, or None if it is not installed."""
    return None if installed(peer) is None else str(environment(peer) / "bin" / "python")


@contextlib.contextmanager
def stored(
    arrays: Mapping[str, Tensor], small: Mapping[str, Tensor] | None = None
) -> Iterator[pathlib.Path]:
    """A folder of arrays for several processes: in memory, so that no disk is busy meanwhile.

    ``small`` is what wakes their threads, see worker.py.
    """
    num_bytes = sum(4 * array.numel() for array in arrays.values())
    memory = pathlib.Path("/dev/shm")
    fits = memory.is_dir() and shutil.disk_usage(memory).free > 2 * num_bytes
    with tempfile.TemporaryDirectory(prefix="kvcore-bench-", dir=memory if fits else None) as name:
        folder = pathlib.Path(name)
        for part, kept in ((folder, arrays), (folder / "small", small or {})):
            if kept:
                part.mkdir(exist_ok=True)
            for key, array in kept.items():
                np.save(part / f"{key}.npy", array.detach().cpu().float().numpy())
        yield folder


class RemoteError(RuntimeError):
    """The other process failed: its error, or its last words, are the message."""


class Remote:
    """One process with an adapter (a file that defines ``load``), and the variants it offers.

    Args:
        python: interpreter to run.
        adapter: path of a Python file with ``load(arrays, **arguments)``, which returns functions
            by name; each does the work once and returns the result as an array, or None.
        arguments: JSON-serialisable keyword arguments of it.
        arrays: what it works on, or the folder in which ``stored`` put it, which may end once this
            process is there.
        env: variables beside those of this process.
    """

    def __init__(
        self,
        python: str,
        adapter: pathlib.Path,
        arguments: Mapping[str, object],
        arrays: Mapping[str, Tensor] | pathlib.Path | None = None,
        env: Mapping[str, str] = {},
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="kvcore-bench-")
        with contextlib.ExitStack() as stack:
            if not isinstance(arrays, pathlib.Path):
                arrays = stack.enter_context(stored(arrays or {}))
            self._start(python, adapter, arguments, arrays, env)

    def _start(
        self,
        python: str,
        adapter: pathlib.Path,
        arguments: Mapping[str, object],
        arrays: pathlib.Path,
        env: Mapping[str, str],
    ) -> None:
        command = [python, WORKER, adapter, arrays, self._folder.name, json.dumps(dict(arguments))]
        self._errors = pathlib.Path(self._folder.name) / "stderr.txt"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **KEPT_MEMORY_ENV, **env},
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
        answer = json.loads(line)
        if "error" in answer:
            raise RemoteError(answer["error"])
        return answer

    def _ask(self, **command: object) -> dict:
        with contextlib.suppress(BrokenPipeError):  # it ended; what it said is read below
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        return self._read()

    def ended(self) -> bool:
        """Whether the process is no longer there."""
        return self._process.poll() is not None

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
