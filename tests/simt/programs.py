"""Compiles the shim's test programs; what is unchanged is not compiled again.

python tests/simt/programs.py NAME VARIANT    prints the executable's path
"""

import fcntl
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "simt-programs"
CXX = os.environ.get("CXX", "c++")

_FLAGS = ["-std=c++20", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
_FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", f"-I{CSRC}"]
# Flags of the program by variant. The shim itself is never instrumented, only told.
VARIANTS = {
    "plain": ["-O2"],
    "asan": [
        "-O1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
    ],
    "tsan": ["-O1", "-fsanitize=thread"],
}


def _run(*command: object) -> None:
    launcher = [shutil.which("ccache")] if shutil.which("ccache") else []
    subprocess.run([*launcher, *map(str, command)], check=True)


def program(name: str, variant: str) -> pathlib.Path:
    """The executable of ``tests/simt/<name>.cu`` in a variant, for the host."""
    flags = VARIANTS[variant]
    source = pathlib.Path(__file__).parent / f"{name}.cu"
    runtime = sorted((CSRC / "simt").glob("*.cpp"))
    # Kernels report errors through a word of the library's.
    kernels = [CSRC / "core" / "cuda" / "error_flags.cu", source]
    inputs = [*kernels, *runtime, *sorted(CSRC.glob("simt/*.h"))]
    inputs += sorted(source.parent.glob("*.h"))
    inputs += sorted(CSRC.glob("core/**/*"))
    digest = hashlib.sha256(repr([CXX, _FLAGS, flags]).encode())
    for path in inputs:
        if path.is_file():
            digest.update(path.read_bytes())
    folder = BUILD / f"{name}-{variant}-{digest.hexdigest()[:16]}"
    executable = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if executable.exists():
            return executable
        told = [f"-DKVCORE_SIMT_{variant.upper()}=1"]
        objects = []
        for path in (*runtime, *kernels):
            is_kernel = path.suffix == ".cu"
            objects.append(folder / f"{path.stem}.o")
            own = [*flags, "-x", "c++"] if is_kernel else ["-O2", *told]
            _run(CXX, *_FLAGS, *own, "-c", path, "-o", objects[-1])
        # -rdynamic: reports name kernels by their exported symbols.
        partial = folder / "partial"
        _run(CXX, *flags, "-rdynamic", *objects, "-o", partial, "-ldl")
        partial.rename(executable)
    return executable


if __name__ == "__main__":
    print(program(*sys.argv[1:]))
