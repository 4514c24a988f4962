"""What nvcc made of the kernels, read from the library that KVCORE_CUDA_LIBRARY names.

`make cuda-compile` builds it and runs this; without the variable there is nothing to read.
"""

import collections
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest

LIBRARY = os.environ.get("KVCORE_CUDA_LIBRARY")
pytestmark = pytest.mark.skipif(not LIBRARY, reason="KVCORE_CUDA_LIBRARY is not set")

# Instructions that each kernel of that name must have, alternatives separated by |: without them it
# runs, slowly. IMMA and HMMA are matrix products, LDSM is ldmatrix, LDGSTS is cp.async.
REQUIRED: dict[str, list[str]] = {
    # The pool's addresses come from a table, which leaves some of them generic: LD and ST.
    "append_(page|tail)_kernel|rewind_kernel": ["STG.E.128|ST.E.128"],
    "rewind_kernel|dequantize_kernel|append_tail_kernel": ["LDG.E.128|LD.E.128"],
    # ATOMS: counted in shared memory, its address known to be there.
    r"\bseal_v_kernel": ["ATOMS"],
    # An entry of the table, or of the tokens' weights, is one load from shared memory.
    r"\bscores_kernel<": ["LDS.128", "FFMA", "LDGSTS"],
    r"\bvalues_kernel<": ["LDS.64|LDS.128", "FFMA", "MUFU.EX2", "ATOMS.ADD"],
    r"\btables_kernel<|\bproduct_kernel": ["LDS.128", "FFMA"],
    r"\battention_kernel<": ["IMMA.16832.S8.S8", "LDSM", "LDGSTS", "LDS.128", "MUFU.EX2"],
    "chunk_solve_kernel": ["HMMA.1688.F32.TF32", "LDSM", "LDGSTS", "LDS.128"],
    "chunk_state_kernel": ["HMMA.1688.F32.TF32", "LDSM", "LDGSTS", "STG.E.128", "LDS.128"],
    "chunk_(solve|state)_kernel.*Bf16": ["HMMA.16816.F32.BF16"],
    r"\brecurrent_step_kernel<": ["LDG.E.128", "STG.E.128", "SHFL"],
    r"\bconv1d_(backward_)?kernel<": ["LDG.E", "STG.E", "MUFU.EX2", "MUFU.RCP"],
    # 4 channels are a load of 8 bytes of 16-bit types, of 16 bytes of fp32.
    r"\brms_norm_(backward_)?kernel<": ["LDG.E.64", "LDG.E.128", "STG.E", "MUFU.EX2", "MUFU.RCP"],
    r"\brms_norm_(backward_)?kernel<.*, 32>": ["SHFL"],
    r"\bbackward::(d_)?states_kernel<": ["HMMA.1688.F32.TF32", "LDGSTS", "LDS.64"],
    r"\bbackward::(prepare|gradients)_kernel<": ["HMMA.1688.F32.TF32", "LDGSTS", "LDS"],
    r"\bdecode_kernel<": ["IMMA.16832.S8.S8", "LDSM", "LDGSTS", "LDS.128", "MUFU.EX2", "HFMA2"],
    "encode_select_kernel": [
        "HMMA.16816.F32.BF16",
        "LDGSTS",
        "LDS.128",
        "LDG.E.128|LDG.E.NA.128",  # NA: beside the first-level cache
        "VIMNMX|IMNMX",
    ],
    "encode_step_kernel": ["DFMA", "LDG.E.128", "STG.E.128", "LDGSTS"],
    r"\breconstruct_kernel": ["LDG.E.128|LD.E.128"],
}


@functools.cache
def cuobjdump():
    """The tool's path; the PyPI package keeps it among the data of `nvidia`."""
    site = pathlib.Path(sysconfig.get_paths()["purelib"])
    packaged = sorted(site.glob("nvidia/*/bin/cuobjdump"))
    found = shutil.which("cuobjdump") or (str(packaged[-1]) if packaged else None)
    assert found, "cuobjdump was not found: pip install --no-deps nvidia-cuda-cuobjdump"
    folder = os.path.dirname(found)
    return found, {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@functools.cache
def dump(*options):
    tool, env = cuobjdump()
    command = [tool, *options, LIBRARY]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


@functools.cache
def demangle(name):
    return subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()


@functools.cache
def resources():
    """Registers and bytes of memory of each kernel, by architecture and name."""
    found, arch = {}, ""
    for line in dump("--dump-resource-usage").splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = (arch, demangle(match[1]))
        elif "REG:" in line:
            found[name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


@functools.cache
def opcodes():
    """How often each instruction occurs in each kernel, by architecture and name."""
    found, arch = collections.defaultdict(collections.Counter), ""
    for line in dump("--dump-sass").splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            name = (arch, demangle(match[1]))
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            found[name][match[1]] += 1
    return found


def test_the_library_loads_and_serves_every_op():
    """Without a GPU, a driver and CUDA in torch: what it needs of them is weak or loaded late."""
    code = """
import sys, torch, kvcore
from kvcore.doctor import selfcheck
torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
print(*(op for op in selfcheck.op_names() if not has(f"kvcore::{op}", "CUDA")))
"""
    run = subprocess.run([sys.executable, "-c", code, LIBRARY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


def test_kernels_were_found():
    assert resources()
    assert set(opcodes()) == set(resources())
    assert all(sum(counts.values()) > 4 for counts in opcodes().values())


def test_nothing_is_in_local_memory():
    spilled = {key: r for key, r in resources().items() if r["STACK"] or r["LOCAL"]}
    assert spilled == {}
    moved = {key for key, counts in opcodes().items() for op in counts if op[:3] in ("LDL", "STL")}
    assert moved == set()


def test_shared_memory_is_dynamic():
    assert {name: r["SHARED"] for name, r in resources().items() if r["SHARED"] > 1024} == {}


def test_kernels_use_the_instructions_they_are_built_on():
    missing = []
    for pattern, wanted in REQUIRED.items():
        kernels = {key: counts for key, counts in opcodes().items() if re.search(pattern, key[1])}
        assert kernels, f"no kernel is called {pattern}"
        for key, counts in kernels.items():
            for choices in wanted:
                starts = tuple(choices.split("|"))
                if not any(op.startswith(starts) for op in counts):
                    missing.append((*key, choices))
    assert missing == []
