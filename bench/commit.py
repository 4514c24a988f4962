"""Which commit of this checkout a figure is of. Needs nothing but git: kvcore may not be built."""

from __future__ import annotations

import pathlib
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Results themselves do not make a checkout modified.
_CHANGES = (
    "status",
    "--porcelain",
    "--untracked-files=no",
    "--",
    ":/",
    ":(top,exclude)bench/results",
)


def _git(*words: str) -> str:
    try:
        run = subprocess.run(
            ["git", "-C", ROOT, *words], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


def describe() -> dict[str, object]:
    """``commit`` (empty if there is none to know) and whether the tree was ``modified``."""
    return {"commit": _git("rev-parse", "HEAD"), "modified": bool(_git(*_CHANGES))}
