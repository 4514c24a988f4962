"""Peers with environments of their own: installation, adapters, and how results show them."""

import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"
INSTALL = PEERS / "install.sh"
CPU = torch.device("cpu")

# Attention that is right, off by a half, and none at all, in an environment that is ours.
ADAPTER = """
import numpy as np

def load(arrays, *, work, threads, device):
    if work == "broken":
        raise ValueError("no such work")
    q, k, v = (np.asarray(arrays[name]) for name in "qkv")
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights / weights.sum(-1, keepdims=True) @ v
    assert threads >= 1 and device == "cpu"

    def fails():
        raise ValueError("no kernel for this")

    return {"f16": lambda: out, "q8_0": lambda: 1.5 * out, "q4_0": fails}
"""


def listed(text, pattern):
    return re.findall(pattern, text, re.MULTILINE)


@pytest.fixture
def folder(bench, tmp_path, monkeypatch):
    """Where environments lie; there is none yet."""
    monkeypatch.setenv("KVCORE_PEERS", str(tmp_path / "peers"))
    return tmp_path / "peers"


def install(folder, name):
    """An environment that is this one, in which an import sees no variables of ours."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    folder.joinpath(name, "installed.txt").write_text(f"{name}==1\n")


@pytest.fixture
def ggml(folder, tmp_path, monkeypatch):
    from peers import registry

    install(folder, "ggml")
    (tmp_path / "ggml.py").write_text(ADAPTER)
    monkeypatch.setattr(registry, "ADAPTERS", tmp_path)
    return registry


def decode_case():
    import turbo_cases

    return turbo_cases._decode(1, 1, 130, CPU)()


# ---- the same peers everywhere


def test_installer_adapters_registry_and_documents_know_the_same_peers(bench):
    from peers import registry

    script = INSTALL.read_text()
    assert set(listed(script, r"^  (\w+)\)$")) == set(registry.PEERS)
    assert {path.stem for path in PEERS.glob("adapters/*.py")} == set(registry.PEERS)
    document = (ROOT / "docs" / "benchmarks.md").read_text()
    assert set(listed(document, r"`bash bench/peers/install\.sh (\w+)`")) == set(registry.PEERS)
    assert set(listed(script, r"^#   (\w+)  ")) == set(registry.PEERS)


def test_no_name_is_a_variant_of_two_peers(bench):
    from peers import registry

    assert {peer.device for peer in registry.PEERS.values()} == {"cpu", "cuda"}
    named = [
        (work, variant)
        for peer in registry.PEERS.values()
        for work, offers in peer.offers.items()
        for variant in offers
    ]
    assert len(named) == len(set(named))
    assert not any(variant.startswith("kvcore") for _, variant in named)


def run_installer(folder, *args, **env):
    env = {**os.environ, "KVCORE_PEERS": str(folder), **env}
    return subprocess.run(["bash", INSTALL, *args], env=env, capture_output=True, text=True)


def test_installer_does_nothing_twice(tmp_path):
    script = INSTALL.read_text()
    base = listed(script, r"^packages=\((.*)\)$")[0]
    extra = listed(script, r"^    packages\+=\((onnxruntime.*)\)$")[0]
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "installed.txt").write_text(f"{base} {extra}\n")
    result = run_installer(tmp_path, "onnxruntime", PYTHON="false")
    assert result.returncode == 0
    assert "onnxruntime is installed in" in result.stdout


def test_installer_that_fails_leaves_nothing_that_looks_installed(tmp_path):
    (tmp_path / "ggml").mkdir()
    (tmp_path / "ggml" / "installed.txt").write_text("of an older version\n")
    result = run_installer(tmp_path, "ggml", PYTHON="false")
    assert result.returncode != 0
    assert "ggml was not installed" in result.stderr
    assert not (tmp_path / "ggml" / "installed.txt").exists()


@pytest.mark.parametrize("args", [(), ("nonsense",)])
def test_installer_refuses_what_it_does_not_know(tmp_path, args):
    result = run_installer(tmp_path, *args)
    assert result.returncode == 2
    assert "bash bench/peers/install.sh NAME" in result.stderr


# ---- choosing


def test_choice_of_peers(folder):
    from peers.registry import choose

    assert choose(None, "cpu") == ("ggml", "onnxruntime", "executorch", "vllm", "lexico")
    assert choose(None, "cuda") == ("fla", "flashinfer", "sageattention")
    assert choose("none", "cpu") == ()
    install(folder, "vllm")
    assert choose("vllm", "cpu") == ("vllm",)
    with pytest.raises(ValueError, match=r"ggml is not installed; bash bench/peers/install\.sh"):
        choose("all", "cpu")
    with pytest.raises(
        ValueError, match="some of ggml, onnxruntime, executorch, vllm, lexico on cpu, got"
    ):
        choose("fla", "cpu")


def test_run_refuses_a_peer_that_is_not_there(folder, monkeypatch, capsys):
    import run

    monkeypatch.setattr(sys, "argv", ["run.py", "--peers", "ggml"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--peers: ggml is not installed" in capsys.readouterr().err


# ---- rows of a result


def test_what_is_not_installed_is_in_every_table(folder, capsys):
    import report
    import run
    from peers import registry

    case = decode_case()
    with registry.attached(case, registry.choose(None, "cpu")):
        ceilings = {"read": {"value": 10.0, "unit": "GB/s"}}
        entry = run.run_case(case, 1, ceilings, CPU, lambda: None, 1.0)
    expected = {
        variant
        for name in ("ggml", "onnxruntime", "executorch")
        for variant in registry.PEERS[name].offers["decode"]
    }
    assert set(entry["absent"]) == expected
    assert set(entry["absent"].values()) == {"not installed"}
    assert not expected & set(entry["variants"])
    assert len(listed(capsys.readouterr().out, r"^  .* not installed$")) == len(expected)
    facts = ("device", "threads", "isa", "torch", "kvcore", "commit", "date")
    result = {
        "machine": {**dict.fromkeys(facts, "x"), "modified": False},
        "rounds": 1,
        "ceilings": ceilings,
        "peers": registry.versions(["ggml"]),
        "cases": [json.loads(json.dumps(entry))],
    }
    assert "| ggml q8_0 | not installed |" in report.markdown(result)
    with_peers = run_block(result)
    assert "ggml q8_0" in with_peers.splitlines()[0]
    assert with_peers.splitlines()[2].count("not installed") == len(expected)
    assert "Not timed: ExecuTorch int8 SDPA not installed" in with_peers


def run_block(result):
    import blocks

    blocks.load = lambda device, family: result
    return blocks.turbo_peers("x")


def test_a_peer_joins_the_case_if_it_is_right(ggml, folder):
    case = decode_case()
    before = list(case.variants)
    with ggml.attached(case, ("ggml",)):
        names = list(case.variants)
        remote = case.variants["ggml f16"].run.remote
        assert case.variants["ggml f16"].run.timed() > 0
    assert names == [*before[:4], "ggml f16", *before[4:]]  # beside other peers, before ours
    variant = case.variants["ggml f16"]
    assert variant.error < 1e-5
    assert variant.bytes_read == 2 * 8 * 130 * 128 * 2
    assert case.absent == {
        "ggml q8_0": "wrong: relative error 0.5000 exceeds 0.03",
        "ggml q4_0": "failed: ValueError: no kernel for this",
    }
    assert remote._process.returncode is not None
    assert ggml.versions(["ggml", "vllm"]) == {"ggml": "ggml==1"}


def test_a_little_work_precedes_each_timing(bench, tmp_path):
    from remote import Remote, stored

    path = tmp_path / "adapter.py"
    path.write_text(
        "calls = []\n"
        "def load(arrays):\n"
        "    x = arrays['x']\n"
        "    return {'count': lambda: calls.append(len(x)) or calls}\n"
    )
    with stored({"x": torch.zeros(9)}, {"x": torch.zeros(2)}) as inputs:
        remote = Remote(sys.executable, path, {}, inputs)
    count = remote.variant("count")
    count.timed()
    assert count().tolist() == [2, 9, 9]  # a call that is not timed needs none
    remote.close()


def test_the_little_work_is_of_the_same_kind(bench):
    from peers import registry

    import gdn_cases

    task = decode_case().task
    task.arrays = {n: torch.zeros(3, 4, 1 if n == "q" else 600, 64) for n in "qkv"}
    shapes = {n: tuple(x.shape) for n, x in registry._small(task).items()}
    assert shapes == {"q": (1, 4, 1, 64), "k": (1, 4, 512, 64), "v": (1, 4, 512, 64)}
    case = gdn_cases._decode(3, CPU)
    assert {len(x) for x in registry._small(case.task).values()} == {1}


def test_a_peer_that_crashes_takes_all_its_variants_along(ggml, folder, tmp_path):
    crashing = ADAPTER.replace('raise ValueError("no kernel for this")', "__import__('os').abort()")
    (tmp_path / "ggml.py").write_text(crashing)
    case = decode_case()
    before = list(case.variants)
    with ggml.attached(case, ("ggml",)):
        assert list(case.variants) == before
    assert case.absent["ggml f16"] == "failed: its process ended"
    assert case.absent["ggml q4_0"].startswith("failed: ")


def test_a_peer_that_does_not_start_says_why(ggml, folder, monkeypatch):
    case = decode_case()
    case.task.work = "broken"
    peer = ggml.PEERS["ggml"]
    offers = {"broken": peer.offers["decode"]}
    monkeypatch.setitem(ggml.PEERS, "ggml", ggml.Peer(peer.what, "cpu", offers))
    before = list(case.variants)
    with ggml.attached(case, ("ggml",)):
        assert list(case.variants) == before
    assert set(case.absent.values()) == {"failed: ValueError: no such work"}


def test_a_peer_that_lacks_a_variant_is_named(ggml, folder, tmp_path):
    (tmp_path / "ggml.py").write_text("def load(arrays, **rest):\n    return {}\n")
    case = decode_case()
    with ggml.attached(case, ("ggml",)):
        pass
    assert set(case.absent.values()) == {"not for this shape"}


def test_bytes_that_a_peer_stores(bench):
    from peers.registry import PEERS

    k = torch.empty(1, 8, 64, 128)
    offers = PEERS["executorch"].offers["decode"]
    # 128 codes, a scale of 4 bytes and a zero point for each of K's and V's vectors.
    assert offers["ExecuTorch int8 SDPA"].stored_bytes(k) == 2 * 8 * 64 * (128 + 5)
    # Blocks of 32 values, each with a scale in fp16.
    assert PEERS["ggml"].offers["decode"]["ggml q4_0"].stored_bytes(k) == 2 * 8 * 64 * 4 * 18


# ---- adapters of what is not here: the library is a stand-in, what they pass to it is theirs


@pytest.fixture
def adapter(monkeypatch):
    """Runs an adapter's variants, with modules in place of what it imports."""
    grad = torch.is_grad_enabled()

    def run(name, work, arrays, module, **contents):
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(parts[i - 1]))
        sys.modules[module].__dict__.update(contents)
        arrays = {n: x.float().numpy() for n, x in arrays.items()}
        load = runpy.run_path(str(PEERS / "adapters" / f"{name}.py"))["load"]
        return {n: call() for n, call in load(arrays, work=work, threads=1, device="cpu").items()}

    yield run
    torch.set_grad_enabled(grad)


def assert_within(found, expected, bounds):
    assert set(found) == set(bounds)
    for name, bound in bounds.items():
        assert (found[name].float() - expected).norm() / expected.norm() < bound, name


@pytest.mark.parametrize("work", ["gdn_forward", "gdn_decode"])
def test_the_adapter_of_fla_asks_for_what_the_case_expects(bench, adapter, work):
    import gdn_cases
    import kvcore

    case = gdn_cases._forward(64, CPU) if work == "gdn_forward" else gdn_cases._decode(2, CPU)
    functions = {
        name: getattr(kvcore, name)
        for name in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule")
    }
    found = adapter("fla", work, case.task.arrays, "fla.ops.gated_delta_rule", **functions)
    assert_within(found, case.task.expected, {"bf16": 0.01})


class PagedDecode:
    """FlashInfer's wrapper, by gathering what its plan names."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert workspace.dtype == torch.uint8
        assert layout == "HND"

    def plan(self, starts, indices, filled, q_heads, kv_heads, head_dim, page, **types):
        self.starts, self.indices, self.filled, self.page = starts, indices, filled, page
        self.types = types

    def run(self, q, cache):
        assert (q.dtype, cache[0].dtype) == (self.types["q_data_type"], self.types["kv_data_type"])
        rows = []
        for i, row in enumerate(q.float()):
            pages = self.indices[self.starts[i] : self.starts[i + 1]].long()
            tokens = (len(pages) - 1) * self.page + self.filled[i]
            k, v = (x.float()[pages].transpose(0, 1).flatten(1, 2)[:, :tokens] for x in cache)
            attention = F.scaled_dot_product_attention
            rows.append(attention(row[None, :, None], k[None], v[None], enable_gqa=True)[0, :, 0])
        return torch.stack(rows)


def single_prefill(q, k, v, *, causal, kv_layout):
    assert kv_layout == "NHD"
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out[0].transpose(0, 1)


def test_the_adapter_of_flashinfer_asks_for_what_the_case_expects(bench, adapter):
    import turbo_cases

    functions = {
        "BatchDecodeWithPagedKVCacheWrapper": PagedDecode,
        "single_prefill_with_kv_cache": single_prefill,
    }
    task = turbo_cases._decode(2, 1, 64, CPU)().task
    found = adapter("flashinfer", "decode", task.arrays, "flashinfer", **functions)
    assert_within(found, task.expected, {"bf16": 0.01, "fp8": 0.06})
    # Pages that are not full, and more than one query, are not for it.
    for q_len, kv_len in ((1, 70), (2, 64)):
        arrays = turbo_cases._decode(1, q_len, kv_len, CPU)().task.arrays
        assert adapter("flashinfer", "decode", arrays, "flashinfer") == {}
    task = turbo_cases._prefill(64, CPU)().task
    found = adapter("flashinfer", "prefill", task.arrays, "flashinfer", **functions)
    assert_within(found, task.expected, {"bf16": 0.01})


def test_the_adapter_of_sageattention_asks_for_what_the_case_expects(bench, adapter):
    import turbo_cases

    def sageattn(q, k, v, *, tensor_layout, is_causal):
        assert tensor_layout == "HND"
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)

    task = turbo_cases._prefill(64, CPU)().task
    found = adapter("sageattention", "prefill", task.arrays, "sageattention", sageattn=sageattn)
    assert_within(found, task.expected, {"int8": 0.03})


def pursuit_in_rows(columns, x, n_nonzero_coefs):
    """Rows of a CSR matrix of 8-bit values, by scikit-learn."""
    orthogonal_mp = pytest.importorskip("sklearn.linear_model").orthogonal_mp
    assert (columns.shape[0], x.shape[0], columns.shape[1]) == (1, 1, x.shape[2])
    codes = orthogonal_mp(columns[0].numpy(), x[0].T.numpy(), n_nonzero_coefs=n_nonzero_coefs)
    codes = torch.from_numpy(codes.T)
    row_starts = F.pad((codes != 0).sum(1).cumsum(0), (1, 0))
    indices = codes.nonzero()[:, 1].short()
    return row_starts.int(), indices, codes[codes != 0].to(torch.float8_e4m3fn)


def test_the_adapter_of_lexico_asks_for_what_the_case_expects(bench, adapter, monkeypatch):
    import lexico_cases

    monkeypatch.setattr(lexico_cases, "ATOMS", 160)
    task = lexico_cases._encode(4, 64).task
    found = adapter("lexico", "encode", task.arrays, "lexico.omp", omp=pursuit_in_rows)
    found = {name: torch.from_numpy(np.asarray(codes)) for name, codes in found.items()}
    assert_within(found, task.expected, {"omp": 0.06})
    assert (task.units, task.threads) == (1, 1)
    with pytest.raises(ValueError, match="work must be encode, got 'decode'"):
        adapter("lexico", "decode", task.arrays, "lexico.omp", omp=pursuit_in_rows)


def test_results_of_any_kind_become_arrays(bench):
    from worker import as_array

    bf16 = torch.arange(6).reshape(2, 3).bfloat16().requires_grad_()
    for result in (bf16, np.arange(6, dtype=np.float16).reshape(2, 3)):
        array = as_array(result)
        assert array.dtype == np.float32
        assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
