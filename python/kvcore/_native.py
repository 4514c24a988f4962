"""Loads the native libraries and remembers what happened, for error messages and the doctor."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import struct

MIN_TORCH = (2, 11)
INSTALL = "pip install --no-build-isolation ."

_HERE = pathlib.Path(__file__).parent
_libraries: dict[str, Library] = {}


@dataclasses.dataclass(frozen=True)
class Library:
    """What became of one native library.

    ``reason`` says why it is not loaded; empty if it is.
    """

    path: pathlib.Path
    loaded: bool
    reason: str = ""


def status() -> dict[str, Library]:
    """The libraries by name (``kvcore_cpu``, ``kvcore_cuda``, ``_C``), in load order."""
    return dict(_libraries)


def _torch_version(version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _check_whole(path: pathlib.Path) -> None:
    """Raises OSError if a library ends before what its program headers say is loaded of it.

    The loader maps a file whose copy broke off without an error, and the process dies of SIGBUS
    where it touches the first page that is not there. Whatever is no ELF file of 64 bit, or too
    short to say, is left to the loader, which explains it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(1 << 12)
            size = file.seek(0, 2)
    except OSError:
        return
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return
    order = "<" if head[5] == 1 else ">"
    (table,) = struct.unpack_from(f"{order}Q", head, 32)
    entry_size, count = struct.unpack_from(f"{order}HH", head, 54)
    entry = struct.Struct(f"{order}IIQQQQ")  # type, flags, offset, two addresses, bytes
    end = table + entry_size * count
    if end <= len(head) and entry_size >= entry.size:
        entries = [entry.unpack_from(head, table + entry_size * i) for i in range(count)]
        end = max((offset + length for _, _, offset, _, _, length in entries), default=end)
    if size < end:
        raise OSError(f"{path}: file truncated, {size} of at least {end} bytes")


def load() -> None:
    """Loads kvcore_cpu.so, and kvcore_cuda.so where it exists and torch has CUDA.

    Raises ImportError, saying what to do, if torch is too old or kvcore_cpu.so is missing or does
    not load. A CUDA library that does not load is recorded in `status`, not raised: the CPU ops
    work without it.
    """
    import torch

    if _torch_version(torch.__version__) < MIN_TORCH:
        wanted = ".".join(map(str, MIN_TORCH))
        raise ImportError(f"kvcore needs torch >= {wanted}, found torch {torch.__version__}")

    cpu = _HERE / "kvcore_cpu.so"
    if not cpu.exists():
        reason = f"kvcore's native library was not found at {cpu}; run `{INSTALL}`"
        _libraries["kvcore_cpu"] = Library(cpu, False, reason)
        raise ImportError(reason)
    try:
        _check_whole(cpu)
        torch.ops.load_library(cpu)
    except OSError as error:
        reason = (
            f"kvcore's native library {cpu} does not load with torch {torch.__version__} "
            f"({error}); rebuild it with `{INSTALL}`"
        )
        _libraries["kvcore_cpu"] = Library(cpu, False, reason)
        raise ImportError(reason) from error
    _libraries["kvcore_cpu"] = Library(cpu, True)

    cuda = _HERE / "kvcore_cuda.so"
    if not cuda.exists():
        _libraries["kvcore_cuda"] = Library(cuda, False, "not built")
    elif torch.version.cuda is None:
        reason = f"torch {torch.__version__} is a build without CUDA"
        _libraries["kvcore_cuda"] = Library(cuda, False, reason)
    else:
        try:
            _check_whole(cuda)
            torch.ops.load_library(cuda)
            _libraries["kvcore_cuda"] = Library(cuda, True)
        except OSError as error:
            # torch's own message is the path; the loader's says what it did not find.
            reason = f"built, but does not load: {error.__cause__ or error}"
            _libraries["kvcore_cuda"] = Library(cuda, False, reason)

    host = importlib.util.find_spec("kvcore._C")
    if host is None or host.origin is None:
        _libraries["_C"] = Library(_HERE / "_C.so", False, "not built for this Python")
        return
    path = pathlib.Path(host.origin)
    try:
        _check_whole(path)
        importlib.import_module("kvcore._C")
        _libraries["_C"] = Library(path, True)
    except (ImportError, OSError) as error:
        _libraries["_C"] = Library(path, False, str(error))
