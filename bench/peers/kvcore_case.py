"""An adapter for worker.py: kvcore's own variants of a case, as whichever build is on the path."""

from __future__ import annotations

from collections.abc import Callable


def load(arrays: dict, *, family: str, index: int, quick: bool) -> dict[str, Callable[[], None]]:
    """Our variants of the index-th case, named ``<case>: <variant>``."""
    import torch
    from families import FAMILIES
    from report import is_ours

    torch.set_grad_enabled(False)
    case = list(FAMILIES[family](quick, torch.device("cpu")))[index]()
    return {
        f"{case.name}: {name}": _without_result(variant.run)
        for name, variant in case.variants.items()
        if is_ours(name)
    }


def _without_result(run: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        run()

    return call
