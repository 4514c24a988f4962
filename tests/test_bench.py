"""The benchmark's own machinery: order of the rounds, statistics, report."""

import pathlib
import sys

import pytest
import torch

BENCH = pathlib.Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Imports come from bench/, whose `cases` is not the one beside this file."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = [path.stem for path in BENCH.glob("*.py")] + [
        "peers",
        "peers.gdn",
        "peers.lexico",
        "peers.turbo",
    ]
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    yield
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)


def test_rounds_interleave_and_rotate(bench):
    from timer import interleave

    calls, flushes = [], []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = interleave(variants, 3, torch.device("cpu"), flush=lambda: flushes.append(None))
    assert calls == list("abc") + list("abc") + list("bca") + list("cab")  # warm-up first
    assert len(flushes) == 9
    assert all(len(s) == 3 and min(s) >= 0 for s in samples.values())


@pytest.mark.parametrize("count", [1, 2, 20])
def test_summary(bench, count):
    from timer import summary

    result = summary([float(i) for i in range(count)])
    assert result["median"] == (count - 1) / 2
    assert result["p10"] <= result["median"] <= result["p90"]


def test_report_compares_with_the_faster_bf16_peer(bench):
    from report import markdown

    def variant(seconds, num_bytes=0):
        spread = {"median": seconds, "p10": seconds, "p90": seconds}
        return {**spread, "bytes_read": num_bytes, "error": None}

    case = {
        "name": "decode",
        "cold": True,
        "operations": 0,
        "variants": {
            "SDPA fp32": variant(1e-3),
            "SDPA bf16, a": variant(8e-3),
            "SDPA bf16, b": variant(4e-3),
            "kvcore 4 bit": variant(2e-3, 20_000_000),
        },
    }
    described = ("device", "threads", "isa", "torch", "kvcore", "commit", "date")
    result = {
        "machine": {**dict.fromkeys(described, "x"), "modified": False},
        "rounds": 20,
        "ceilings": {"read": {"value": 20.0, "unit": "GB/s"}},
        "cases": [case],
    }
    row = next(line for line in markdown(result).splitlines() if "kvcore 4 bit" in line)
    assert "2.00x" in row  # against the faster bf16 variant, not the fp32 one
    assert "10.0 GB/s (50%)" in row


def test_every_case_passes_its_check_and_runs(bench):
    """The smallest of the real cases, built and run once."""
    import cases

    case = cases._decode(1, 2, 200, torch.device("cpu"))
    assert {"SDPA bf16, grouped view", "kvcore 4 bit", "kvcore 8 bit"} <= set(case.variants)
    for variant in case.variants.values():
        variant.run()
    with pytest.raises(SystemExit, match=r"relative error 0\.5000 exceeds 0\.1"):
        cases._checked("case", 0.5, 0.1)
    with pytest.raises(SystemExit, match=r"relative error nan exceeds 0\.1"):
        cases._checked("case", float("nan"), 0.1)


def test_lexicos_cases_pass_their_checks_and_run(bench, monkeypatch):
    import lexico_cases

    monkeypatch.setattr(lexico_cases, "ATOMS", 160)
    monkeypatch.setattr(lexico_cases, "ENCODED", {4: 64})
    monkeypatch.setattr(lexico_cases, "SPARSITIES", (4, 9))
    encode, decode = lexico_cases._encode(4), lexico_cases._decode(704, 160)
    on_gpu = lexico_cases._encode_on_gpu(4, 64, torch.device("cpu"))
    assert {"kvcore", "torch, batched", "scikit-learn orthogonal_mp"} <= set(encode.variants)
    assert "kvcore, sparsity 9, 29.0 bytes a vector" in decode.variants
    assert set(on_gpu.variants) == {"kvcore", "torch, batched"}
    for case in (encode, decode, on_gpu):
        for variant in case.variants.values():
            variant.run()
    assert encode.variants["kvcore"].units == 0.064


def test_parts_of_a_run_are_merged(bench):
    from run import merged

    def result(commit, read, *cases):
        facts = ("device", "isa", "threads", "modified", "torch")
        return {
            "machine": {**dict.fromkeys(facts, "x"), "commit": commit},
            "rounds": 20,
            "ceilings": {"read": {"value": read, "unit": "GB/s"}},
            "cases": [{"name": name, "of": read} for name in cases],
        }

    both = merged(result("a", 30.0, "decode", "append"), result("a", 20.0, "append", "prefill"))
    assert [(case["name"], case["of"]) for case in both["cases"]] == [
        ("decode", 30.0),
        ("append", 20.0),
        ("prefill", 20.0),
    ]
    assert both["ceilings"]["read"]["value"] == 30.0
    with pytest.raises(SystemExit, match="the file's commit must be b, got a"):
        merged(result("a", 1.0), result("b", 1.0))
