"""What was built, what it exports and needs, and how it loads."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch

import kvcore
from kvcore import _C, _native

ROOT = pathlib.Path(__file__).parent.parent
BUILD_DIR = pathlib.Path(os.environ.get("KVCORE_BUILD_DIR", ROOT / "build" / "cmake"))


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def nm(*args):
    return subprocess.run(
        ["nm", *map(str, args)], capture_output=True, text=True, check=True
    ).stdout


# ---- import


def test_import_is_quiet_and_light():
    result = python("""
        import torch, sys
        before = set(sys.modules)
        import warnings
        warnings.simplefilter("error")
        import kvcore
        heavy = {"transformers", "numpy", "safetensors"} & (set(sys.modules) - before)
        assert not heavy, heavy
    """)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_status_names_every_library():
    status = _native.status()
    assert list(status) == ["kvcore_cpu", "kvcore_cuda", "_C"]
    assert status["kvcore_cpu"].loaded
    assert status["kvcore_cpu"].path.exists()
    for library in status.values():
        assert library.loaded == (library.reason == "")


def test_works_without_the_pybind11_module():
    result = python("""
        import sys
        sys.modules["kvcore._C"] = None
        import kvcore, torch
        assert torch.ops.kvcore.turbo_attention.default
        assert kvcore.turbo_attention
        print(kvcore._native.status()["_C"].loaded)
    """)
    assert result.stdout.strip() == "False", result.stderr


def test_submodules_are_attributes():
    assert kvcore.ops is sys.modules["kvcore.ops"]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kvcore.nonsense
    assert "cache" in dir(kvcore)


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """_native looks for libraries in an empty folder and its record is restored afterwards."""
    monkeypatch.setattr(_native, "_HERE", tmp_path)
    monkeypatch.setattr(_native, "_libraries", {})
    return tmp_path


def test_missing_library_says_where_and_what_to_run(elsewhere):
    with pytest.raises(ImportError, match=r"not found at .*kvcore_cpu\.so; run `pip install"):
        _native.load()
    assert "not found" in _native.status()["kvcore_cpu"].reason


def test_broken_library_says_so(elsewhere):
    (elsewhere / "kvcore_cpu.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match=r"does not load with torch .*rebuild it"):
        _native.load()


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cu117", "2.9.0a0+git1"])
def test_old_torch_is_named(elsewhere, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=re.escape(f"needs torch >= 2.11, found torch {version}")):
        _native.load()


def test_cuda_library_beside_a_cpu_torch_is_skipped_with_a_reason(elsewhere, monkeypatch):
    shutil.copy(pathlib.Path(kvcore.__file__).parent / "kvcore_cpu.so", elsewhere)
    (elsewhere / "kvcore_cuda.so").write_bytes(b"")
    monkeypatch.setattr(torch.version, "cuda", None)
    loaded = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    _native.load()
    assert loaded == [elsewhere / "kvcore_cpu.so"]
    assert "build without CUDA" in _native.status()["kvcore_cuda"].reason


def test_cuda_library_that_does_not_load_says_why(elsewhere, monkeypatch):
    shutil.copy(pathlib.Path(kvcore.__file__).parent / "kvcore_cpu.so", elsewhere)
    (elsewhere / "kvcore_cuda.so").write_bytes(b"not a library")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    load = torch.ops.load_library
    cuda_only = lambda path: load(path) if path.name == "kvcore_cuda.so" else None  # noqa: E731
    monkeypatch.setattr(torch.ops, "load_library", cuda_only)
    _native.load()
    status = _native.status()["kvcore_cuda"]
    assert not status.loaded
    assert re.match(r"built, but does not load: .*kvcore_cuda\.so: ", status.reason)


# ---- symbols


def test_cpu_library_needs_only_the_stable_abi():
    library = _native.status()["kvcore_cpu"].path
    needed = nm("--dynamic", "--undefined-only", library)
    assert "torch_library" in needed or "aoti_torch" in needed
    unstable = re.findall(r" (_ZN\d*(?:K?)(?:2at|3c10|5torch)\S*|Py\w+)", needed)
    assert unstable == []


def test_cpu_library_exports_nothing_of_its_own():
    exported = nm("--dynamic", "--defined-only", "--demangle", _native.status()["kvcore_cpu"].path)
    assert [line for line in exported.splitlines() if "kvcore::" in line] == []


def isa_object(source, level):
    folder = BUILD_DIR / "CMakeFiles" / f"kvcore_kernels_{level}.dir"
    return folder / source.relative_to(ROOT).parent / f"{source.name}.o"


def leaks(listing, level):
    """Symbols of an object compiled for `level` that a machine without it could come to run.

    These are the global ones outside the ISA namespace, and code that runs when the library loads.
    """
    found = []
    for line in listing.splitlines():
        match = re.match(r"[0-9a-f]* +(\w) (.*)", line)
        if match is not None and match[2].startswith("_GLOBAL__sub_I"):
            found.append(line)
        # Upper case is global; W, V and u are weak: the linker keeps one copy of all levels'.
        if match is None or match[1] not in "TDBRGSVWu":
            continue
        if f"::{level}::" not in match[2].split("(")[0]:
            found.append(line)
    return found


def test_objects_define_symbols_only_inside_their_isa_namespace():
    levels = [level for level in _C.build_info()["isa_levels"] if level != "scalar"]
    for source in sorted((ROOT / "csrc").glob("*/cpu/*_kernel.cpp")):
        for level in levels:
            path = isa_object(source, level)
            assert path.exists(), f"{path} is missing: run `make build`"
            found = leaks(nm("--demangle", "--defined-only", path), level)
            assert found == [], f"{source.name} at {level}"


def test_leaks_are_found():
    clean = "0000000000000000 T kvcore::turbo::avx2::attention_kernel(int)"
    weak = "0000000000000000 W std::vector<float, std::allocator<float> >::resize(unsigned long)"
    helper = "0000000000000000 W kvcore::round_up(long, kvcore::turbo::avx2::Tile)"
    local = "0000000000000000 t helper(float)"
    startup = "0000000000000000 t _GLOBAL__sub_I_attention_kernel.cpp"
    other = "0000000000000000 T kvcore::turbo::avx512::attention_kernel(int)"
    listing = "\n".join([clean, weak, helper, local, startup, other])
    assert leaks(listing, "avx2") == [weak, helper, startup, other]


@pytest.mark.parametrize(
    ("kernel", "product"),
    [("turbo/cpu/tile_kernel.cpp", "tdpbssd"), ("gdn/cpu/chunk_scan_kernel.cpp", "tdpbf16ps")],
)
def test_tiles_are_used_at_level_amx_and_nowhere_else(kernel, product):
    info = _C.build_info()
    if "amx" not in info["isa_levels"] or info["amx_model"]:
        pytest.skip("not a build with AMX instructions")
    source = ROOT / "csrc" / kernel
    for level in info["isa_levels"]:
        listing = subprocess.run(
            ["objdump", "--disassemble", "--no-show-raw-insn", isa_object(source, level)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for instruction in ("ldtilecfg", "tileloadd", product, "tilestored", "tilerelease"):
            assert (instruction in listing) == (level == "amx"), f"{instruction} at {level}"


# ---- CMake options


@pytest.fixture
def checkout(tmp_path):
    """A copy of what CMake reads, and a stand-in for torch."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "csrc", source / "csrc")
    shutil.copytree(ROOT / "cmake", source / "cmake")
    shutil.copy(ROOT / "CMakeLists.txt", source)
    for path in source.glob("csrc/*/cuda"):
        shutil.rmtree(path)
    (source / "torch" / "lib").mkdir(parents=True)
    (source / "torch" / "version.py").write_text("__version__ = '2.13.0'\ncuda = None\n")
    return source


def configure(source, *args, **env):
    arguments = [
        "-G",
        "Ninja",
        "-DKVCORE_HOST=OFF",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DTORCH_DIR={source / 'torch'}",
        *args,
    ]
    result = subprocess.run(
        ["cmake", "-S", str(source), "-B", str(source / "build"), *arguments],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    build_ninja = source / "build" / "build.ninja"
    targets = build_ninja.read_text() if build_ninja.exists() else ""
    return result, "kvcore_cuda" in targets


def path_without_nvcc(folder):
    """A PATH with the tools that CMake runs and nothing else."""
    folder.mkdir()
    for tool in ("cmake", "ninja", "c++", "g++", "cc", "ld", "ar", "as", "ranlib", "nm", "sh"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(pathlib.Path(found).resolve())
    return {"PATH": str(folder), "CUDACXX": "", "CUDA_HOME": "", "CUDA_PATH": ""}


def assert_silent(source, result):
    """Nothing about CUDA in the output, the paths of the checkout apart."""
    output = (result.stdout + result.stderr).replace(str(source.parent), "")
    assert "cuda" not in output.lower()
    assert "nvcc" not in output.lower()


def add_cuda_source(source):
    (source / "csrc" / "turbo" / "cuda").mkdir(parents=True)
    (source / "csrc" / "turbo" / "cuda" / "attention.cu").write_text("")


def test_cuda_auto_is_silent_without_cuda_sources(checkout):
    result, has_cuda = configure(checkout)
    assert result.returncode == 0, result.stderr
    assert not has_cuda
    assert_silent(checkout, result)


def test_cuda_auto_is_silent_on_a_cpu_torch(checkout):
    add_cuda_source(checkout)
    result, has_cuda = configure(checkout)
    assert result.returncode == 0, result.stderr
    assert not has_cuda
    assert_silent(checkout, result)


def test_cuda_auto_is_silent_without_nvcc(checkout, tmp_path):
    add_cuda_source(checkout)
    (checkout / "torch" / "version.py").write_text("__version__ = '2'\ncuda: str = '13.0'\n")
    result, has_cuda = configure(checkout, **path_without_nvcc(tmp_path / "bin"))
    assert result.returncode == 0, result.stderr
    assert not has_cuda
    assert_silent(checkout, result)


def test_cuda_on_without_nvcc_says_what_to_do(checkout, tmp_path):
    add_cuda_source(checkout)
    result, _ = configure(checkout, "-DKVCORE_CUDA=ON", **path_without_nvcc(tmp_path / "bin"))
    assert result.returncode != 0
    assert "nvcc was not found" in result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize(
    ("option", "cuda", "expected"),
    [("AUTO", "'13.0'", True), ("ON", "None", True), ("OFF", "'13.0'", False)],
)
def test_cuda_with_nvcc(checkout, option, cuda, expected):
    add_cuda_source(checkout)
    (checkout / "torch" / "version.py").write_text(f"__version__ = '2'\ncuda: str = {cuda}\n")
    result, has_cuda = configure(checkout, f"-DKVCORE_CUDA={option}")
    assert result.returncode == 0, result.stderr
    assert has_cuda == expected


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("archs", ["80;90a-real;120-real", "86"])
def test_the_pybind11_module_is_told_every_architecture(checkout, archs):
    """What CMake would take for several definitions has broken the command that compiles it."""
    pytest.importorskip("pybind11")
    add_cuda_source(checkout)
    result, _ = configure(
        checkout, "-DKVCORE_CUDA=ON", "-DKVCORE_HOST=ON", f"-DKVCORE_CUDA_ARCHS={archs}"
    )
    assert result.returncode == 0, result.stderr
    commands = json.loads((checkout / "build" / "compile_commands.json").read_text())
    (command,) = (row["command"] for row in commands if row["file"].endswith("host/module.cpp"))
    told = [word for word in shlex.split(command) if word.startswith("-DKVCORE_CUDA_ARCHS=")]
    assert told == [f'-DKVCORE_CUDA_ARCHS="{archs.replace(";", " ")}"']


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-DKVCORE_CUDA=MAYBE"], "KVCORE_CUDA must be AUTO, ON or OFF, got 'MAYBE'"),
        (["-DKVCORE_CUDA=ON"], "has no CUDA sources"),
        (["-DKVCORE_ISA_LEVELS=sse9"], "KVCORE_ISA_LEVELS must be of scalar"),
    ],
)
def test_options_are_rejected_by_name(checkout, args, message):
    result, _ = configure(checkout, *args)
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())
