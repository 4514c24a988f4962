import os
import pathlib
import sys

# torch keeps compiled graphs on disk under keys that leave out arguments equal to a schema's
# default: after a default changed, a graph of another checkout would run with the old value.
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch
from hypothesis import settings

# Derandomized: a failure is that of the change under test, and shows again when run again.
settings.register_profile("kvcore", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("kvcore")


def pytest_collection_modifyitems(config, items):
    for mark in ("slow", "long"):
        if mark in config.option.markexpr:
            continue
        for item in items:
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"long run; select it with -m {mark}"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Every device that the ops run on."""
    return torch.device(request.param)


@pytest.fixture
def bench(monkeypatch):
    """Imports come from bench/, whose `cases` is not the one beside this file."""
    folder = pathlib.Path(__file__).resolve().parent.parent / "bench"
    monkeypatch.syspath_prepend(str(folder))
    names = [path.stem for path in folder.glob("*.py")]
    names += ["peers", *(f"peers.{path.stem}" for path in folder.glob("peers/*.py"))]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield folder
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


@pytest.fixture
def poisoned_memory():
    """Makes `empty` return NaN, or the largest integer, also to allocations in C++.

    An op that leaves a part of its output unwritten then shows it.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def no_fallback_reasons():
    """None is recorded when the test begins."""
    from kvcore.hf import clear_fallback_reasons

    clear_fallback_reasons()


@pytest.fixture
def restored_models(no_fallback_reasons):
    """The models of hf_models are left as they were found."""
    import hf_models
    import kvcore.hf

    yield
    for name in (*hf_models.NAMES, hf_models.SLIDING):
        kvcore.hf.disable(hf_models.model(name))
        hf_models.model(name).set_attn_implementation("sdpa")
