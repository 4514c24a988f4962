"""Names of a package that are imported on first use, since their modules import transformers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def attributes(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: its name.
        homes: the module that each of its names is in.
    """

    def get(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        try:
            module = importlib.import_module(homes[name])
        except ModuleNotFoundError as error:
            if error.name != "transformers":
                raise
            raise ImportError(
                f"{package}.{name} needs transformers >= 5.0, which is not installed; "
                "run `pip install 'transformers>=5.0'`"
            ) from error
        return getattr(module, name)

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
