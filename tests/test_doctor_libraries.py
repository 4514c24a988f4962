"""kvcore doctor where the CUDA library is built and not loadable: real files, the real loader."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import kvcore
from kvcore import _native, doctor
from kvcore.doctor import environment

PACKAGE = pathlib.Path(kvcore.__file__).parent
CXX = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def shared_library(path, source, *options):
    path.parent.mkdir(exist_ok=True)
    command = [CXX, "-shared", "-fPIC", "-x", "c++", "-", "-o", path, *options]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def missing_runtime(path):
    """It needs a CUDA runtime that nothing provides."""
    folder = path.parent / "elsewhere"
    name = "libcudart.so.99"
    shared_library(folder / name, "int runtime() { return 0; }", f"-Wl,-soname,{name}")
    source = "int runtime(); int needs = runtime();"
    shared_library(path, source, "-Wl,--no-as-needed", f"-L{folder}", f"-l:{name}")
    shutil.rmtree(folder)


def another_torch(path):
    """It needs a function of torch that this one does not have."""
    source = 'extern "C" int aoti_torch_of_another_version(); '
    shared_library(path, source + "int needs = aoti_torch_of_another_version();")


def missing_version(path):
    """It needs a symbol of a version, as of a libc, that what is there does not have."""
    library = path.parent / "elsewhere" / "libversioned.so"
    script = path.with_suffix(".map")

    def provide(version):
        script.write_text(f"RUNTIME_{version} {{ *; }};")
        soname = f"-Wl,-soname,{library.name}"
        source = "int runtime() { return 0; }"
        shared_library(library, source, soname, f"-Wl,--version-script={script}")

    provide(99)
    search = [f"-L{library.parent}", f"-l:{library.name}", f"-Wl,-rpath,{library.parent}"]
    shared_library(path, "int runtime(); int needs = runtime();", "-Wl,--no-as-needed", *search)
    provide(1)


def cut_short(path):
    """A copy that broke off within its first header."""
    path.write_bytes((PACKAGE / "kvcore_cpu.so").read_bytes()[:50])


def truncated(path):
    """A copy that broke off later: the loader would take it, and the process would die."""
    content = (PACKAGE / "kvcore_cpu.so").read_bytes()
    path.write_bytes(content[: len(content) // 2])


def without_headers(path):
    """A copy that broke off behind its first header."""
    path.write_bytes((PACKAGE / "kvcore_cpu.so").read_bytes()[:100])


def empty(path):
    path.touch()


def other_machine(path):
    """An ELF file of 32 bit."""
    content = bytearray((PACKAGE / "kvcore_cpu.so").read_bytes()[:5000])
    content[4] = 1
    path.write_bytes(content)


def not_readable(path):
    path.mkdir()


BROKEN = [
    (missing_runtime, "libcudart.so.99: cannot open shared object", "install what the loader"),
    (another_torch, "undefined symbol: aoti_torch_of_another_version", "built beside other"),
    (missing_version, "version `RUNTIME_99' not found", "built beside other"),
    (cut_short, "file too short", "the file is damaged or not for this machine"),
    (truncated, "file truncated, ", "the file is damaged or not for this machine"),
    (without_headers, "file truncated, 100 of", "the file is damaged or not for this machine"),
    (empty, "file too short", "the file is damaged or not for this machine"),
    (other_machine, "wrong ELF class", "the file is damaged or not for this machine"),
    (not_readable, "cannot read file data: Is a directory", "the file is damaged"),
]
each_broken = pytest.mark.parametrize(
    ("make", "reason", "remedy"), BROKEN, ids=[make.__name__ for make, *_ in BROKEN]
)


@pytest.fixture
def cuda_library(monkeypatch, tmp_path):
    """Where _native looks for kvcore_cuda.so, beside a torch that says that it has CUDA."""
    (tmp_path / "kvcore_cpu.so").symlink_to(PACKAGE / "kvcore_cpu.so")
    monkeypatch.setattr(_native, "_HERE", tmp_path)
    monkeypatch.setattr(_native, "_libraries", {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path / "kvcore_cuda.so"


def cuda_fallback():
    _native.load()
    (found,) = [f for f in environment.fallbacks(environment.collect()) if "CUDA" in f["what"]]
    return found


@needs_compiler
@each_broken
def test_a_library_that_does_not_load_is_explained(cuda_library, make, reason, remedy):
    make(cuda_library)
    found = cuda_fallback()
    assert found["what"] == "CUDA kernels: CUDA tensors are refused"
    assert found["reason"].startswith("built, but does not load: ")
    assert reason in found["reason"]
    assert remedy in found["remedy"]
    status = _native.status()
    assert (status["kvcore_cpu"].loaded, status["kvcore_cuda"].loaded) == (True, False)


def test_a_truncated_cpu_library_is_an_import_error(cuda_library):
    cpu = cuda_library.with_name("kvcore_cpu.so")
    cpu.unlink()
    truncated(cpu)
    with pytest.raises(ImportError, match=r"does not load .* file truncated, \d+ of at least \d+"):
        _native.load()
    assert not _native.status()["kvcore_cpu"].loaded


@needs_compiler
def test_no_cuda_in_torch_is_said_before_the_file_is_opened(cuda_library, monkeypatch):
    another_torch(cuda_library)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = cuda_fallback()
    assert found["reason"] == f"torch {torch.__version__} is a build without CUDA"
    assert found["remedy"] == "install a CUDA build of torch"


NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040). Please update"


@needs_compiler
@pytest.mark.parametrize(
    ("error", "visible", "reason", "remedy"),
    [
        (NO_DRIVER, None, "Found no NVIDIA driver on your system", "nvidia-smi"),
        (OLD_DRIVER, None, "is too old (found version 11040)", "nvidia-smi"),
        ("No CUDA GPUs are available", "", "No CUDA GPUs are available", "unset CUDA_VISIBLE"),
        ("No CUDA GPUs are available", "0", "No CUDA GPUs are available", "nvidia-smi"),
    ],
)
def test_a_library_without_a_gpu_is_explained(
    cuda_library, monkeypatch, error, visible, reason, remedy
):
    """The library loads: what is missing is the driver, or a GPU that may be used."""

    def init():
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    shared_library(cuda_library, "")
    found = cuda_fallback()
    assert _native.status()["kvcore_cuda"].loaded
    assert found["what"] == "CUDA kernels"
    assert found["reason"].startswith("torch finds no GPU: ")
    assert reason in found["reason"]
    assert remedy in found["remedy"]


@needs_compiler
def test_the_command_says_it_and_the_cpu_works_on(tmp_path):
    """In a process of its own, over a copy of the package."""
    copy = tmp_path / "kvcore"
    copy.mkdir()
    for path in PACKAGE.iterdir():
        if path.name not in ("kvcore_cuda.so", "__pycache__"):
            (copy / path.name).symlink_to(path)
    missing_runtime(copy / "kvcore_cuda.so")
    code = """
import sys, torch
torch.version.cuda = "13.0"
import kvcore, kvcore.cli
raise SystemExit(kvcore.cli.main(["doctor", "--json", sys.argv[1]]))
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    path = tmp_path / "doctor.json"
    run = subprocess.run(
        [sys.executable, "-c", code, path], env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "libcudart.so.99: cannot open shared object file" in run.stdout
    assert "install what the loader misses" in run.stdout
    diagnosis = json.loads(path.read_text())
    assert doctor.healthy(diagnosis)
    assert all(check["device"] == "cpu" for check in diagnosis["checks"])
