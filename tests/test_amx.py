"""Level amx: the model of the tiles; turbo's results there are AVX-512 VNNI's, bit by bit."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

import kvcore
from kvcore import _C

ROOT = pathlib.Path(__file__).resolve().parent.parent
FAULTS = {
    "not configured": "#UD",
    "released": "#UD",
    "unused": "#UD",
    "palette": "#GP",
    "reserved": "#GP",
    "rows": "#GP",
    "half": "#GP",
    "ninth": "#GP",
    "dword": "#UD",
    "m": "#UD",
    "n": "#UD",
    "k": "#UD",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A program of the tile operations' software model."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("amx") / "model"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    defines = ["-DKVCORE_AMX_MODEL=1", "-DKVCORE_ISA=amx", "-DKVCORE_ISA_AMX=1"]
    source = ROOT / "tests" / "amx_model.cpp"
    subprocess.run([compiler, *flags, *defines, source, "-o", program], check=True)
    # Under `make asan` the runtimes preloaded for Python would be this program's too.
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return lambda *args: subprocess.run([program, *args], env=env, capture_output=True, text=True)


def test_model_multiplies_tiles_of_all_shapes(model):
    result = model()
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("product", [(), ("bf16",)], ids=["int8", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_model_stops_where_the_instruction_faults(model, fault, product):
    result = model(fault, *product)
    assert result.returncode != 0
    assert FAULTS[fault] in result.stderr


def _digest(tensors):
    content = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors]
    return hashlib.sha256(b"".join(content)).hexdigest()


def _results():
    """Digests of out and lse at the active level, over rows, widths, head_dims and masks."""
    digests = {}
    for head_dim in (64, 96, 128, 256):
        generator = torch.Generator().manual_seed(head_dim)

        def normal(*shape, generator=generator):
            return torch.randn(shape, generator=generator)

        for group, q_len in ((1, 7), (1, 8), (4, 4), (3, 11), (2, 60), (5, 41)):
            q = normal(2, 2 * group, q_len, head_dim)
            k, v = normal(2, 2, 230, head_dim), normal(2, 2, 230, head_dim)
            balance, mean = kvcore.turbo_calibrate(k)
            padding = torch.tensor([0, 200], dtype=torch.int32)
            for k_bits, v_bits in ((8, 8), (4, 4), (2, 8), (8, 2)):
                *pools, table, tail, _, _, lens = kvcore.turbo_quantize(
                    k, v, balance, mean, padding, k_bits=[k_bits], v_bits=[v_bits], sink_pages=1
                )
                pool = [p for p in pools if p.shape[0]]
                store = (pool, table, tail, lens, balance, mean)
                for scalars in ({}, {"causal": False}, {"window": 50}, {"sas_threshold": None}):
                    name = f"decode {head_dim} {group}x{q_len} K{k_bits}V{v_bits} {scalars}"
                    digests[name] = _digest(kvcore.turbo_decode(q, *store, **scalars))
            causal = {"causal": True}
            for scalars in ({}, causal, causal | {"window": 50}, {"sas_threshold": None}):
                name = f"attention {head_dim} {group}x{q_len} {scalars}"
                digests[name] = _digest(kvcore.turbo_attention(q, k, v, **scalars))
            cu_q = torch.tensor([0, 0, q_len // 3, q_len], dtype=torch.int32)
            cu_k = torch.tensor([0, 3, 130, 230], dtype=torch.int32)
            packed = kvcore.turbo_attention(
                q[:1], k[:1], v[:1], cu_seqlens_q=cu_q, cu_seqlens_k=cu_k
            )
            digests[f"packed {head_dim} {group}x{q_len}"] = _digest(packed)
            bad = k.clone()
            bad[0, 0, 70, 3] = float("nan")
            q[1, 0, 0, 0] = float("inf")
            digests[f"not finite {head_dim} {group}x{q_len}"] = _digest(
                kvcore.turbo_attention(q, bad, v, causal=True)
            )
    return digests


@pytest.mark.isa
def test_amx_is_avx512_vnni_bit_by_bit():
    levels = ("avx512_vnni", "amx")
    isa = _C.cpu_isa()
    if not set(levels) <= set(isa["supported"]):
        pytest.skip("needs levels avx512_vnni and amx; `make amx` has a model of the latter")
    results = []
    for level in levels:
        env = {**os.environ, "KVCORE_CPU_ISA": level}
        run = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        results.append(json.loads(run.stdout))
    assert len(results[0]) > 400
    assert [name for name in results[0] if results[0][name] != results[1][name]] == []


if __name__ == "__main__":
    json.dump(_results(), sys.stdout)
