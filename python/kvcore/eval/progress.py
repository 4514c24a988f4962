"""The progress of a long command, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str, total: int, unit: str = "tok") -> Iterator[Callable[[int], None]]:
    """A bar; gives the function to call with what was done since the last call."""
    from tqdm.auto import tqdm  # transformers requires it

    with tqdm(total=total, desc=title, unit=unit, unit_scale=True, file=sys.stderr) as bar:
        yield bar.update
