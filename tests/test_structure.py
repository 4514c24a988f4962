"""The rules of dependency: which code may use which."""

import ast
import re
import sys

import pytest

from tree import CSRC, PYTHON, SHARED, code, families, native_files, relative


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def owner(path):
    """The folder of csrc that a file belongs to, or its own name for a file of csrc itself."""
    return path.relative_to(CSRC).parts[0]


def may_see_torch(path):
    parts = path.relative_to(CSRC).parts
    return (
        parts == ("ops.cpp",)
        or parts[0] == "binding"
        or (len(parts) == 2 and re.fullmatch(r"(op(_\w+)?\.(h|cpp)|register\.cpp)", parts[1]))
    )


def is_kernel(path):
    """Code of a family's backend: everything under cpu/ and cuda/."""
    parts = path.relative_to(CSRC).parts
    return parts[0] in families() and parts[1] in ("cpu", "cuda")


def kernel_files():
    return [path for path in native_files() if is_kernel(path)]


# ---- C++ and CUDA


def test_the_tree_was_found():
    assert "turbo" in families()
    assert len(native_files()) > 10


@pytest.mark.parametrize("path", native_files(), ids=relative)
def test_torch_headers_only_in_ops_op_register_and_binding(path):
    if not may_see_torch(path):
        torch_headers = re.compile(r"(torch|ATen|c10|caffe2|binding)/")
        assert [name for name in includes(path) if torch_headers.match(name)] == []


@pytest.mark.parametrize("path", native_files(), ids=relative)
def test_includes_follow_the_layers(path):
    # host is a Python module beside the ops: it may read any family's layout.
    allowed = {
        "core": {"core"},
        "simt": {"core", "simt"},
        "binding": {"core", "binding"},
        "host": {"core", "host", *families()},
        "ops.cpp": set(),
    }.get(owner(path), {"core", "binding", owner(path)})
    if relative(path).startswith("csrc/core/cuda/"):
        allowed = {"core", "simt"}  # the seam: either the CUDA runtime or its model
    ours = {name for name in includes(path) if name.split("/")[0] in {*SHARED, *families()}}
    assert {name for name in ours if name.split("/")[0] not in allowed} == set()


@pytest.mark.parametrize("path", kernel_files(), ids=relative)
def test_kernels_do_not_see_their_ops(path):
    family, backend = path.relative_to(CSRC).parts[:2]
    for name in includes(path):
        parts = name.split("/")
        if parts[0] == family:
            assert parts[1] in ("params.h", "layout.h", backend), name


@pytest.mark.parametrize("path", native_files(), ids=relative)
def test_launches_and_ptx_have_one_home(path):
    text = code(path)
    if relative(path) != "csrc/core/cuda/launch.cuh":
        assert "<<<" not in text
    # The switch between fibers has no other language to be written in, and the intrinsics of AMX
    # take the numbers of tiles as literals only.
    homes = ("csrc/core/cuda/", "csrc/simt/fiber.cpp", "csrc/core/cpu/amx.h")
    if not relative(path).startswith(homes):
        assert re.search(r"\b(asm|__asm__)\b", text) is None


@pytest.mark.parametrize("path", native_files(), ids=relative)
def test_shared_memory_is_dynamic(path):
    # Static shared memory is out of the shim's sight: neither poisoned nor bounded.
    if relative(path) != "csrc/core/cuda/device.cuh":
        assert re.search(r"\b__shared__\b", code(path)) is None


@pytest.mark.parametrize("path", kernel_files(), ids=relative)
def test_kernels_are_called_so(path):
    # By their names tests/simt/test_launches.py knows which kernels there are.
    bounds = r"__launch_bounds__\((?:[^()]|\([^()]*\))*\)"
    for declared in re.findall(r"__global__([^;{]*)", code(path)):
        assert re.search(r"(\w+)\s*\(", re.sub(bounds, "", declared))[1].endswith("_kernel")


@pytest.mark.parametrize("path", sorted(CSRC.glob("*/register.cpp")), ids=relative)
def test_ops_run_on_the_device_of_their_tensors(path):
    # KVCORE_OP makes it the current one; TORCH_BOX alone would launch on whatever device is.
    text = code(path)
    assert "KVCORE_OP(" in text
    assert "TORCH_BOX" not in text
    assert "STABLE_TORCH_LIBRARY_IMPL(KVCORE_LIBRARY, KVCORE_DISPATCH_KEY, m)" in text


@pytest.mark.parametrize("path", kernel_files(), ids=relative)
def test_the_backend_is_chosen_by_folder(path):
    directives = re.findall(r"^\s*#\s*(?:el)?if.*$", code(path), re.MULTILINE)
    chosen = re.compile(r"__CUDA(CC|_ARCH)__|USE_CUDA|KVCORE_SIMT")
    assert [line for line in directives if chosen.search(line)] == []


@pytest.mark.parametrize("path", native_files(), ids=relative)
def test_macros_carry_the_project_prefix(path):
    # The shim defines CUDA's keywords, which are reserved names.
    reserved = r"|__\w+__$" if relative(path) == "csrc/simt/types.h" else ""
    for name in re.findall(r"^\s*#\s*define\s+(\w+)", code(path), re.MULTILINE):
        assert re.match(rf"(KV_CHECK|KVCORE{reserved})", name), name


@pytest.mark.parametrize("family", families())
def test_family_trees_have_the_same_shape(family):
    files = {p.relative_to(CSRC / family).as_posix() for p in (CSRC / family).rglob("*.*")}
    fixed = {"README.md", "layout.h", "params.h", "op.h", "register.cpp"}
    assert fixed - files == set()
    free = [
        r"op(_\w+)?\.cpp",
        r"cpu/\w+\.(cpp|h)",
        r"cuda/(sm90/)?\w+\.(cu|cuh|h|cpp)",
        r"cuda/(sm90/)?instances/\w+\.cu",
    ]
    unknown = {f for f in files - fixed if not any(re.fullmatch(p, f) for p in free)}
    assert unknown == set()


@pytest.mark.parametrize("path", sorted(CSRC.glob("*/cpu/*_kernel.cpp")), ids=relative)
def test_per_isa_sources_live_in_their_namespace(path):
    namespaces = re.findall(r"^namespace\s+([\w:]+)\s*\{", code(path), re.MULTILINE)
    assert namespaces[:1] == [f"kvcore::{owner(path)}::KVCORE_ISA"]


# ---- Python


def python_files():
    return sorted(PYTHON.rglob("*.py"))


def layer(path):
    """The first folder below kvcore, or the module's own name."""
    return path.relative_to(PYTHON).parts[0].removesuffix(".py")


def imports(path):
    """Absolute names of the imported modules, with whether the import runs with the module."""
    module = path.relative_to(PYTHON.parent).with_suffix("").parts
    tree = ast.parse(path.read_text())
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module[:-1]
                package = package[:-1] if path.name == "__init__.py" else package
                base = ".".join([*package[: len(package) - node.level + 1], base]).rstrip(".")
            # `from kvcore import cache` names a module, `from torch import Tensor` does not.
            names = [f"{base}.{alias.name}" if base == "kvcore" else base for alias in node.names]
        else:
            continue
        for name in names:
            yield name, id(node) not in inner


# What each layer of the package may import of kvcore; `cli` and `__init__` see everything.
LAYERS = {
    "_native": set(),
    "ops": {"ops", "_native"},
    "distributed": {"ops"},
    "reference": {"reference"},
    "cache": {"cache", "ops", "_native", "_C"},
    "hf": {"hf", "cache", "ops", "_native", "_C"},
    "eval": {"eval", "hf", "cache", "ops", "reference", "_native"},
    "lexico_training": {"lexico_training", "eval", "hf", "cache", "ops"},
    "demo": {"demo", "lexico_training", "eval", "hf", "cache", "ops", "_native"},
    "lm_harness": {"demo", "eval"},
    "doctor": {"doctor", "demo", "eval", "hf", "cache", "ops", "reference", "_native", "_C"},
}
# Third-party packages beside torch, by layer. Only what the demo and the evaluation need.
THIRD_PARTY = {
    # transformers requires numpy, safetensors, tokenizers and tqdm.
    "cache": {"numpy", "safetensors", "transformers"},
    "hf": {"transformers"},
    # packaging and tqdm are transformers' own requirements; kvpress is a peer to compare with.
    "eval": {"kvpress", "matplotlib", "packaging", "tqdm", "transformers"},
    "lexico_training": {"safetensors", "tqdm"},
    "demo": {"matplotlib", "numpy", "safetensors", "tokenizers", "tqdm", "transformers"},
    "lm_harness": {"lm_eval", "tqdm"},
    "doctor": {"transformers"},
    "cli": {"transformers", "safetensors"},
}


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_python_layers(path):
    if layer(path) not in LAYERS:
        assert layer(path) in ("__init__", "__main__", "cli"), "a new layer: say what it may import"
        return
    used = {name.split(".")[1] for name, _ in imports(path) if name.startswith("kvcore.")}
    assert used - LAYERS[layer(path)] == set()


@pytest.mark.parametrize("path", python_files(), ids=relative)
def test_third_party_imports(path):
    known = {"kvcore", "torch", *THIRD_PARTY.get(layer(path), ())}
    tops = {name.split(".")[0] for name, _ in imports(path)} - sys.stdlib_module_names
    assert tops - known == set()


@pytest.mark.parametrize("path", [*PYTHON.glob("cli/*.py"), PYTHON / "__init__.py"], ids=relative)
def test_transformers_is_not_imported_with_the_package(path):
    assert [name for name, eager in imports(path) if eager and "transformers" in name] == []


def test_relative_imports_are_resolved(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PYTHON", tmp_path / "kvcore")
    path = tmp_path / "kvcore" / "cache" / "turbo.py"
    path.parent.mkdir(parents=True)
    path.write_text("from ..hf import x\nfrom . import y\ndef f():\n    import transformers\n")
    assert list(imports(path)) == [
        ("kvcore.hf", True),
        ("kvcore.cache", True),
        ("transformers", False),
    ]
