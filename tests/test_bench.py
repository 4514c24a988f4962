"""The benchmark's own machinery: order of the rounds, statistics, report."""

import ctypes
import itertools
import pathlib
import resource
import sys

import pytest
import torch

BENCH = pathlib.Path(__file__).resolve().parent.parent / "bench"
CPU = torch.device("cpu")


def test_rounds_interleave_and_rotate(bench):
    from timer import interleave

    calls, flushes = [], []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = interleave(variants, 3, torch.device("cpu"), flush=lambda: flushes.append(None))
    assert calls == list("abc") + list("abc") + list("bca") + list("cab")  # warm-up first
    assert len(flushes) == 9
    assert all(len(s) == 3 and min(s) >= 0 for s in samples.values())


def test_rounds_end_when_the_time_is_over(bench):
    import math

    from timer import MIN_ROUNDS, interleave

    for seconds, rounds in ((0.0, MIN_ROUNDS), (math.inf, 20)):
        samples = interleave({"a": lambda: None}, 20, CPU, seconds=seconds)
        assert len(samples["a"]) == rounds
    assert len(interleave({"a": lambda: None}, 2, CPU, seconds=0.0)["a"]) == 2


@pytest.mark.parametrize("count", [1, 2, 20])
def test_summary(bench, count):
    from timer import summary

    result = summary([float(i) for i in range(count)])
    assert result["median"] == (count - 1) / 2
    assert result["p10"] <= result["median"] <= result["p90"]


def test_report_compares_with_the_fastest_peer(bench):
    from report import markdown

    def variant(seconds, num_bytes=0):
        spread = {"median": seconds, "p10": seconds, "p90": seconds}
        return {**spread, "bytes_read": num_bytes, "error": None, "ceiling": "read"}

    case = {
        "name": "decode",
        "cold": True,
        "operations": 0,
        "variants": {
            "SDPA fp32": variant(9e-3),
            "SDPA bf16, a": variant(8e-3),
            "SDPA bf16, b": variant(4e-3),
            "ggml f16": variant(3e-3),
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
    assert "1.50x" in row  # whatever its type and whoever's it is
    assert "10 GB/s (50% of read)" in row


def test_every_case_passes_its_check_and_runs(bench):
    """The smallest of the real cases, built and run once."""
    import turbo_cases

    import cases

    case = turbo_cases._decode(1, 2, 200, torch.device("cpu"))()
    assert {"SDPA bf16, grouped view", "kvcore 4 bit", "kvcore 8 bit"} <= set(case.variants)
    for variant in case.variants.values():
        variant.run()
    with pytest.raises(SystemExit, match=r"relative error 0\.5000 exceeds 0\.1"):
        cases._checked("case", 0.5, 0.1)
    with pytest.raises(SystemExit, match=r"relative error nan exceeds 0\.1"):
        cases._checked("case", float("nan"), 0.1)


def test_a_case_that_is_not_asked_for_is_not_built(bench, monkeypatch, capsys):
    import run

    import cases

    def refuse():
        raise AssertionError("built")

    wanted = cases.Case("decode, 64 tokens", {}, {"kvcore": cases.Variant(lambda: None)})
    plans = [cases.Planned("append", refuse), cases.Planned(wanted.name, lambda: wanted)]
    monkeypatch.setitem(run.FAMILIES, "turbo", lambda quick, device: iter(plans))
    monkeypatch.setattr(run.machine, "ceilings", lambda rounds, device: {})
    monkeypatch.setattr(run, "CacheFlusher", lambda device: lambda: None)
    result = run.run_family("turbo", True, "decode", 3, torch.device("cpu"))
    assert [case["name"] for case in result["cases"]] == ["decode, 64 tokens"]
    monkeypatch.setattr(sys, "argv", ["run.py", "--family", "turbo", "--cases", "prefill"])
    with pytest.raises(SystemExit):
        run.main()
    assert "--cases must be part of a case's name, got 'prefill'" in capsys.readouterr().err


def test_gdns_cases_pass_their_checks_and_run(bench, monkeypatch):
    import gdn_cases

    monkeypatch.setattr(gdn_cases, "K_HEADS", 2)
    monkeypatch.setattr(gdn_cases, "V_HEADS", 4)
    built = [
        gdn_cases._forward(64, CPU),
        gdn_cases._backward(64, CPU),
        gdn_cases._decode(3, CPU),
        gdn_cases._conv(64, CPU),
        gdn_cases._norm(64, 32, True, CPU),
        gdn_cases._norm(64, 48, False, CPU),
    ]
    for case in built:
        assert any(name.startswith("kvcore") for name in case.variants)
        for variant in case.variants.values():
            variant.run()
    states = built[2].task.arrays["state"]
    assert built[2].task.state_bytes == states.numel() * 4


def test_denses_cases_pass_their_checks_and_run(bench):
    import dense_cases

    shape = (2, 4, 2, 70, 32)
    for what, dtype in itertools.product(("forward", "backward"), dense_cases.MAX_ERROR):
        case = dense_cases._case(what, shape, dtype)
        assert list(case.variants) == ["SDPA", "kvcore"]
        for variant in case.variants.values():
            variant.run()
    plans = list(dense_cases.dense(False, CPU))
    assert len({plan.name for plan in plans}) == len(plans) == 8
    assert list(dense_cases.dense(False, torch.device("cuda"))) == []


def test_lexicos_cases_pass_their_checks_and_run(bench, monkeypatch):
    import lexico_cases

    monkeypatch.setattr(lexico_cases, "ATOMS", 160)
    monkeypatch.setattr(lexico_cases, "ENCODED", (64,))
    monkeypatch.setattr(lexico_cases, "SPARSITIES", (4, 9))
    encode, decode = lexico_cases._encode(4, 64), lexico_cases._decode(704, 160, CPU)
    on_gpu = lexico_cases._encode_on_gpu(4, 64, torch.device("cpu"))
    assert {"kvcore", "torch, batched", "scikit-learn orthogonal_mp"} <= set(encode.variants)
    assert "kvcore, sparsity 9, 29.0 bytes a vector" in decode.variants
    assert set(on_gpu.variants) == {"kvcore", "torch, batched"}
    for case in (encode, decode, on_gpu):
        for variant in case.variants.values():
            variant.run()
    assert encode.variants["kvcore"].units == 1
    assert encode.variants["torch, batched"].units == 1
    assert encode.variants["scikit-learn orthogonal_mp"].units == 0.5


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


# ---- documents and plots


def _documents():
    patterns = ("README.md", "docs/*.md", "csrc/*/README.md")
    return [path for pattern in patterns for path in sorted(BENCH.parent.glob(pattern))]


@pytest.mark.parametrize("path", _documents(), ids=lambda path: str(path.relative_to(BENCH.parent)))
def test_tables_of_a_document_are_those_of_the_json(bench, path):
    from report import filled

    assert filled(path.read_text()) == path.read_text()


def test_plots_are_drawn_from_the_json_beside_them(bench, capsys):
    import plots

    assert plots.write(check=True), capsys.readouterr().out


def test_a_plot_is_the_same_bytes_when_drawn_again(bench, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    import plots
    from report import RESULTS

    source = next(RESULTS.glob("*/turbo.json"))
    drawn = []
    for i in range(2):
        folder = tmp_path / str(i) / source.parent.name
        folder.mkdir(parents=True)
        (folder / source.name).write_bytes(source.read_bytes())
        monkeypatch.setattr(plots, "RESULTS", folder.parent)
        assert not plots.write(check=True)
        plots.write(check=False)
        assert plots.write(check=True)
        drawn.append(folder.joinpath("turbo.png").read_bytes())
    assert drawn[0] == drawn[1]


def test_an_unknown_table_is_refused(bench):
    from report import filled

    with pytest.raises(SystemExit, match="no table is named other; there are turbo, turbo_peers"):
        filled("<!-- bench: other x -->\n<!-- end -->")


# ---- comparing


def _result(**medians):
    """A result of one case, whose variants have these medians and a spread of 10 %."""
    variants = {name: {"median": m, "p10": 0.9 * m, "p90": 1.1 * m} for name, m in medians.items()}
    case = {"name": "decode", "shape": {"batch": 1}, "cold": True, "variants": variants}
    machine = {"device": "x", "isa": "y", "threads": 2}
    return {"family": "turbo", "machine": machine, "cases": [case]}


def test_compare_flags_what_is_beyond_the_spread(bench):
    from compare import compare

    old = _result(kvcore_a=1.0, kvcore_b=1.0, kvcore_c=1.0, SDPA=1.0, gone=1.0)
    new = _result(kvcore_a=1.1, kvcore_b=1.3, kvcore_c=0.5, SDPA=2.0, new=1.0)
    verdicts = {row[1]: row[-1] for row in compare(old, new)}
    assert verdicts == {
        "kvcore_a": "",
        "kvcore_b": "slower",
        "kvcore_c": "faster",
        "SDPA": "slower",
    }


@pytest.mark.parametrize(("medians", "code"), [({"kvcore": 2.0}, 1), ({"kvcore": 1.0}, 0)])
def test_compare_fails_only_for_ours(bench, monkeypatch, tmp_path, capsys, medians, code):
    import json

    import compare

    for name, result in (
        ("old", _result(kvcore=1.0, SDPA=1.0)),
        ("new", _result(**medians, SDPA=3.0)),
    ):
        tmp_path.joinpath(name).write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "old"), str(tmp_path / "new")])
    assert compare.main() == code
    assert "SDPA" in capsys.readouterr().out


def test_compare_refuses_other_machines(bench):
    from compare import compare

    other = _result(kvcore=1.0)
    other["machine"]["isa"] = "z"
    with pytest.raises(SystemExit, match="the isa of both results must be the same, got y and z"):
        compare(_result(kvcore=1.0), other)
    with pytest.raises(SystemExit, match="the results share no case"):
        compare({**_result(kvcore=1.0), "cases": []}, _result(kvcore=1.0))


def test_ratios_are_of_rounds_not_of_medians(bench):
    """A machine that slows down for half of the rounds slows both down."""
    from ab import _row

    old = [1.0] * 10 + [2.0] * 10
    new = [1.1 * seconds for seconds in old]
    assert _row("a", old, new)[3:] == ["1.10", "1.10-1.10", "slower"]
    assert _row("a", old, old)[-1] == ""


# ---- other processes

ADAPTER = """
import time
import numpy as np

def load(arrays, *, factor):
    def double():
        time.sleep(0.02)
        print("libraries say things")
        return factor * arrays["x"]
    def fails():
        raise ValueError("no such thing")
    return {"double": double, "nothing": lambda: None, "fails": fails}
"""


@pytest.fixture
def remote(bench, tmp_path):
    from remote import Remote

    path = tmp_path / "adapter.py"
    path.write_text(ADAPTER)
    remote = Remote(sys.executable, path, {"factor": 2}, {"x": torch.arange(3)})
    yield remote
    remote.close()


def test_a_remote_variant_computes_and_times_itself(remote):
    from timer import interleave

    assert remote.names == ["double", "nothing", "fails"]
    double = remote.variant("double")
    assert double().tolist() == [0, 2, 4]
    assert remote.variant("nothing")() is None
    (samples,) = interleave({"a": double}, 2, torch.device("cpu")).values()
    # The other process's clock: without the way there and back, but with its sleep.
    assert len(samples) == 2
    assert all(seconds >= 0.02 for seconds in samples)


def test_a_remote_that_fails_says_why(remote, tmp_path):
    from remote import Remote, RemoteError

    with pytest.raises(RemoteError, match="ValueError: no such thing"):
        remote.variant("fails")()
    path = tmp_path / "broken.py"
    path.write_text("import absent")
    with pytest.raises(RemoteError, match="No module named 'absent'"):
        Remote(sys.executable, path, {})


def test_a_peer_that_is_not_installed_has_no_interpreter(bench, monkeypatch, tmp_path):
    from remote import interpreter

    monkeypatch.setenv("KVCORE_PEERS", str(tmp_path))
    assert interpreter("ggml") is None
    python = tmp_path / "ggml" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert interpreter("ggml") is None  # install.sh was interrupted
    tmp_path.joinpath("ggml", "installed.txt").write_text("ggml==1\n")
    assert interpreter("ggml") == str(python)


def test_peak_bytes_sees_scratch_memory(bench):
    from memory import peak_bytes

    def run():
        scratch = torch.ones(16 << 20, dtype=torch.uint8)
        return scratch[:1].clone()

    # Linux counts resident pages in batches of each CPU, 128 KiB or, with more than 16 CPUs, two
    # pages for each of them: with 64 CPUs half a MiB.
    assert 15 << 20 <= peak_bytes(run, torch.device("cpu")) <= 17 << 20


def test_a_case_runs_in_a_process_of_its_own(bench):
    """As an A/B of two commits does it, of this build against itself."""
    from ab import compare

    rows = compare((BENCH.parent, BENCH.parent), "turbo", "decode", True, 1)
    assert [row[0] for row in rows] == [
        f"decode, 4096 tokens, batch 1, q_len 1: kvcore {width}"
        for width in ("8 bit", "4 bit", "K4V2", "2 bit")
    ]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="malloc is not glibc's")
def test_kept_memory_is_found_again(bench):
    from memory import FromSystem, kept_memory

    def faults(call) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def run():
        return torch.ones(16 << 20)

    from_system = FromSystem(run)
    with kept_memory():
        of_system = faults(from_system.timed)
        for _ in range(4):  # the heap has more than one place for it
            run()
        assert faults(run) < of_system // 10
        assert faults(from_system.timed) > of_system // 2
