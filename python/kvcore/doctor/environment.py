"""What this installation is made of, and why something better is not used."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from typing import Any

import torch

import kvcore
from kvcore import _native


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _isa() -> dict[str, Any]:
    """Levels that are built and supported, and the active one; ``reason`` if they are unknown."""
    override = os.environ.get("KVCORE_CPU_ISA")
    library = _native.status().get("_C")
    if library is None or not library.loaded:
        reason = f"kvcore._C is not loaded: {library.reason if library else 'not built'}"
        return {"override": override, "reason": reason}
    host = importlib.import_module("kvcore._C")
    try:
        return {**host.cpu_isa(), "override": override}
    except RuntimeError as error:
        return {"override": override, "reason": str(error)}


def _build() -> dict[str, Any] | None:
    library = _native.status().get("_C")
    if library is None or not library.loaded:
        return None
    return dict(importlib.import_module("kvcore._C").build_info())


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    return [
        {
            "name": torch.cuda.get_device_name(i),
            "arch": "sm_{}{}".format(*torch.cuda.get_device_capability(i)),
            "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
        }
        for i in range(torch.cuda.device_count())
    ]


def _no_gpu() -> str:
    """Why torch finds no GPU, as it says itself: no driver, one too old, or nothing there."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return str(error).partition("\n")[0].partition(". ")[0]
    return "none is there"


def collect() -> dict[str, Any]:
    """Versions, native libraries, CPU instruction sets and GPUs, as JSON-ready values."""
    gpus = _gpus()
    return {
        "kvcore": kvcore.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_threads": torch.get_num_threads(),
        "transformers": _version("transformers"),
        "libraries": [
            {
                "name": name,
                "path": str(library.path),
                "loaded": library.loaded,
                "reason": library.reason,
            }
            for name, library in _native.status().items()
        ],
        "build": _build(),
        "cpu_isa": _isa(),
        "gpus": gpus,
        "no_gpu": "" if gpus else _no_gpu(),
    }


def _runs_on(archs: list[str], gpu: str) -> bool:
    """Whether code for one of `archs` (CMake's syntax) runs on a GPU such as ``sm_90``.

    Machine code runs on the same major version from its minor one on, that for ``90a`` on 9.0
    alone; what has no ``-real`` carries PTX too, which the driver compiles for later GPUs.
    """
    version = int(gpu.removeprefix("sm_"))
    for arch in archs:
        number, _, kind = arch.partition("-")
        if number.endswith("a"):
            if version == int(number[:-1]):
                return True
            continue
        built = int(number)
        if version >= built and (kind != "real" or version // 10 == built // 10):
            return True
    return False


def _loader_remedy(reason: str) -> str:
    """What to do about a library that is there and does not load, by what the loader said."""
    if "cannot open shared object file" in reason:
        return f"install what the loader misses, or rebuild: {_native.INSTALL}"
    if "undefined symbol" in reason or "version `" in reason:
        return f"it was built beside other libraries than these: rebuild: {_native.INSTALL}"
    return f"the file is damaged or not for this machine: rebuild: {_native.INSTALL}"


def _cuda_fallback(env: dict[str, Any], library: dict[str, Any]) -> tuple[str, str, str] | None:
    """Why CUDA kernels are not used: what, reason and remedy; None if they are."""
    what = "CUDA kernels: CUDA tensors are refused"
    if not library["loaded"]:
        is_built = library["reason"] != "not built"
        if env["torch_cuda"] is None:
            # The library needs nothing of torch at build time: any torch with CUDA can load it.
            then = "" if is_built else ", then rebuild kvcore"
            remedy = f"install a CUDA build of torch{then}"
        elif is_built:
            remedy = _loader_remedy(library["reason"])
        else:
            remedy = "rebuild with nvcc on the PATH and KVCORE_CUDA=ON"
        return what, library["reason"], remedy
    if not env["gpus"]:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        remedy = "unset CUDA_VISIBLE_DEVICES" if hidden else "check the driver with nvidia-smi"
        return "CUDA kernels", f"torch finds no GPU: {env['no_gpu']}", remedy
    archs = (env.get("build") or {}).get("cuda_archs")
    left_out = {gpu["arch"] for gpu in env["gpus"] if archs and not _runs_on(archs, gpu["arch"])}
    if left_out:
        names = ", ".join(sorted(left_out))
        reason = f"built for {' '.join(archs)}, which does not run on {names}"
        number = min(left_out).removeprefix("sm_")
        return what, reason, f"rebuild with CMAKE_ARGS=-DKVCORE_CUDA_ARCHS={number}"
    return None


def fallbacks(env: dict[str, Any]) -> list[dict[str, str]]:
    """Each thing that is not used here, with its reason and what to do about it."""
    found = []

    def add(what: str, reason: str, remedy: str) -> None:
        found.append({"what": what, "reason": reason, "remedy": remedy})

    libraries = {library["name"]: library for library in env["libraries"]}
    cuda = libraries.get("kvcore_cuda")
    if cuda is not None and (missing := _cuda_fallback(env, cuda)):
        add(*missing)

    host = libraries.get("_C")
    if host is not None and not host["loaded"]:
        add(
            "page allocator and ISA information (kvcore._C)",
            host["reason"],
            f"build for this Python: {_native.INSTALL}",
        )

    isa = env["cpu_isa"]
    if "active" in isa:
        best = [level for level in isa["supported"] if level not in isa["opt_in"]][-1]
        if isa["active"] != best and isa["active"] not in isa["opt_in"]:
            add(
                f"CPU kernels at {best}",
                f"KVCORE_CPU_ISA={isa['override']} asks for {isa['active']}",
                "unset KVCORE_CPU_ISA",
            )
        for level, reason in isa["opt_in"].items():
            if level != isa["active"]:
                remedy = f"KVCORE_CPU_ISA={level} uses it"
                add(f"CPU kernels at {level}", f"available, but opt-in: {reason}", remedy)
        for obstacle in dict.fromkeys(isa["obstacles"].values()):
            levels = [level for level, why in isa["obstacles"].items() if why == obstacle]
            add(
                f"CPU kernels at {', '.join(levels)}",
                obstacle,
                f"none needed: {isa['active']} is used",
            )
    elif isa.get("reason") and not (host is not None and not host["loaded"]):
        add("CPU kernels", isa["reason"], "unset KVCORE_CPU_ISA or name a supported level")

    if env["transformers"] is None:
        add(
            "caches for Hugging Face models (kvcore.cache, kvcore.hf)",
            "transformers is not installed",
            "pip install 'kvcore[hf]'",
        )
    return found
