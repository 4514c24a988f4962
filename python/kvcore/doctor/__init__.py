"""Says what runs here, checks it, and explains what does not: ``kvcore doctor``."""

from __future__ import annotations

import dataclasses
from typing import Any

from kvcore.doctor import environment, selfcheck
from kvcore.doctor.report import render

__all__ = ["diagnose", "examine", "healthy", "render"]


def examine(loaded: Any, text: str | None = None, *, max_tokens: int = 1024) -> dict[str, Any]:
    """See `kvcore.doctor.probe.examine`; imports transformers."""
    from kvcore.doctor import probe

    return probe.examine(loaded, text, max_tokens=max_tokens)


def diagnose() -> dict[str, Any]:
    """The environment, each op's self-check on each device, and the fallbacks; JSON-ready."""
    env = environment.collect()
    devices = ["cpu"]
    loaded = {library["name"] for library in env["libraries"] if library["loaded"]}
    if "kvcore_cuda" in loaded and env["gpus"]:
        devices.append("cuda")
    checks = [dataclasses.asdict(check) for check in selfcheck.run(tuple(devices))]
    return {"environment": env, "checks": checks, "fallbacks": environment.fallbacks(env)}


def healthy(diagnosis: dict[str, Any]) -> bool:
    """Whether every op that has a kernel agrees with its reference, and the CPU has all of them."""
    return all(
        check["status"] == "ok" or (check["status"] == "missing" and check["device"] != "cpu")
        for check in diagnosis["checks"]
    )
