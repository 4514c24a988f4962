"""kvcore demo: what it measures, prints and writes."""

import dataclasses
import json
import math
import sys

import pytest
import torch

from kvcore import cli
from kvcore.eval import (
    Interval,
    accuracy,
    bits_per_byte,
    kl_divergence,
    stepwise_scores,
    through_caches,
)

pytest.importorskip("transformers")

from kvcore.demo import models, report, run, tasks
from kvcore.demo.measure import Quality, Scores, Workload, compare, measure, score
from kvcore.eval.caches import COMPARED, FULL, CacheChoice
from kvcore.hf import dense

TWO = CacheChoice(k_bits=2, v_bits=2)


@pytest.fixture(scope="module")
def control():
    return models.load("control")


@pytest.fixture(scope="module")
def work():
    recall = tasks.recall_prompts(3, num_pairs=4, min_distance=200, max_distance=250)
    return Workload(
        text=tasks.text_chunks(4, 300),
        text_context_len=200,
        recall=recall.tokens,
        recall_context_len=recall.context_len,
        query_positions=recall.query_positions,
        batch=3,
    )


# ---- measuring


def test_through_caches_is_stepwise_scoring(control, work, monkeypatch):
    """Prompts run once for all caches, in batches, give what each cache's own run gives."""
    # All prompts in torch's attention: at 2 bits their last bits decide on codes.
    monkeypatch.setattr(dense, "fast_dtypes", frozenset)
    shared = through_caches(control, [FULL, TWO], work.text, 200, batch=3)
    for choice, scores in zip([FULL, TWO], shared, strict=True):
        for i in (0, 3):
            with choice.attention(control):
                own = stepwise_scores(
                    control,
                    lambda choice=choice: choice.make(control),
                    work.text[i : i + 1],
                    context_len=200,
                    chunk=32,
                )
            torch.testing.assert_close(scores[i : i + 1], own, rtol=0, atol=1e-3)
    assert not torch.equal(*shared)


def test_chunks_read_what_decoding_reads(control):
    """Steps of many tokens cost a compressed cache what steps of one token cost it."""
    text = tasks.text_chunks(6, 330)
    found = {}
    for chunk in (1, 32):
        full, two = through_caches(control, [FULL, TWO], text, 128, chunk=chunk)
        found[chunk] = kl_divergence(full, two).mean().item(), two
    assert found[32][0] == pytest.approx(found[1][0], rel=0.1)
    # A block that opens with many tokens knows a larger maximum, so some codes round elsewhere.
    # Unrelated errors would be twice as far from each other as each is from the full cache.
    between = kl_divergence(found[1][1], found[32][1]).mean().item()
    assert between < 0.5 * found[1][0]


def test_compare_against_hand_computed_figures(work):
    """Scores that favour the right token with a known probability, in half of the places."""
    vocab = 384
    targets = work.text[:, 201:]
    answers = work.recall[:, work.query_positions + 1]

    def favour(tokens, probability):
        other = (1 - probability) / (vocab - 1)
        scores = torch.full((*tokens.shape, vocab), math.log(other))
        return scores.scatter(-1, tokens[..., None], math.log(probability))

    full = Scores(favour(targets, 0.5), favour(answers, 0.9))
    wrong = answers.clone()
    wrong[:, 0] = (wrong[:, 0] + 1) % vocab
    worse = Scores(favour(targets, 0.25), favour(wrong, 0.9))
    quality = compare(worse, full, work)
    assert quality.bits_per_byte.mean == pytest.approx(2.0)
    assert quality.bits_change.mean == pytest.approx(1.0)
    assert quality.recall.mean == pytest.approx(0.75)
    assert quality.recall_change.mean == pytest.approx(-0.25)
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert quality.kl.mean == pytest.approx(expected, rel=1e-4)
    assert quality.agreement.mean == 1
    assert (quality.num_queries, quality.recall.samples, quality.kl.samples) == (12, 3, 4)
    same = compare(full, full, work)
    assert same.bits_change.mean == same.recall_change.mean == same.kl.mean == 0


def test_measure_counts_tokens_and_orders_caches(control, work):
    steps = []
    found = measure(control, [TWO, FULL], work, steps.append)
    assert list(found) == [TWO, FULL]
    assert sum(steps) == work.num_tokens(2)
    assert found[FULL].kl.mean == 0
    assert found[TWO].kl.mean > 1e-4
    (full,) = score(control, [FULL], work)
    assert found[FULL].bits_per_byte.mean == pytest.approx(
        bits_per_byte(full.text, work.text[:, 201:]).mean().item()
    )
    answers = work.recall[:, work.query_positions + 1]
    assert found[FULL].recall.mean == pytest.approx(accuracy(full.recall, answers).mean().item())


def test_attention_is_given_back(control):
    before = control.config._attn_implementation
    with TWO.attention(control):
        assert control.config._attn_implementation != before
    assert control.config._attn_implementation == before

    def fail():
        with TWO.attention(control):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert control.config._attn_implementation == before


# ---- reporting


def _row(model="hybrid", cache="4 bit", **changes):
    one = Interval(0.01, 0.002, 8)
    quality = {
        "bits_per_byte": Interval(2.5, 0.1, 8),
        "recall": Interval(0.95, math.nan, 1),
        "num_queries": 32,
        "bits_change": one,
        "recall_change": Interval(-0.02, 0.01, 8),
        "kl": Interval(1e-4, 1e-5, 8),
        "agreement": Interval(0.99, 0.001, 8),
    }
    row = report.Row(model, cache, 100, 5000, 20000, 77, 12.3, Quality(**quality), "sample")
    return dataclasses.replace(row, **changes)


def test_table_is_aligned():
    text = report.table([_row(), _row(cache="full", kv_bytes=1_000_000)])
    lines = text.splitlines()
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:4] == ["4", "bit", "5,000", "4.00x"]
    assert "+1.00 ± 0.20" in lines[1]
    assert "-2.00 ± 1.00" in lines[1]
    assert "1,000,000" in lines[2]
    assert "0.02x" in lines[2]


def test_json_has_no_nan():
    figures = report.to_json([_row()], {"seconds": 1.0})
    parsed = json.loads(json.dumps(figures, allow_nan=False))
    (row,) = parsed["rows"]
    assert row["ratio"] == 4
    assert row["quality"]["recall"] == {"mean": 0.95, "half_width": None, "samples": 1}
    assert "does not carry over to large models" in parsed["note"]


def test_plot(tmp_path):
    path = tmp_path / "plot.png"
    rows = [
        _row(name, cache, kv_bytes=size, kind=kind)
        for name in models.NAMES
        for cache, size, kind in (
            ("full", 9000, "full"),
            ("8 bit", 5000, "turbo"),
            ("2 bit", 2000, "turbo"),
            ("8+4 atoms", 2500, "lexico"),
        )
    ]
    assert report.plot(rows, str(path)) == f"plot: {path}"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "plot.png"
    assert "pip install matplotlib" in report.plot([_row()], str(path))
    assert not path.exists()


# ---- the command


@pytest.fixture
def tiny(monkeypatch):
    size = run.Size(
        prompt_bytes=200, new_tokens=6, sequences=2, context_len=128, scored=32, prompts=1
    )
    monkeypatch.setattr(run, "QUICK_SIZE", size)
    return size


def test_demo_end_to_end(tiny, tmp_path, capsys):
    figures, plot = tmp_path / "demo.json", tmp_path / "demo.png"
    argv = ["demo", "--quick", "--json", str(figures), "--plot", str(plot)]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    for name in models.NAMES:
        assert f"{name} continues" in out
    assert "does not carry over to large models" in out
    assert plot.read_bytes().startswith(b"\x89PNG")

    found = json.loads(figures.read_text())
    rows = {(row["model"], row["cache"]): row for row in found["rows"]}
    assert set(rows) == {(name, choice.label) for name in models.NAMES for choice in COMPARED}
    assert found["setup"]["queries"] == 32
    assert found["setup"]["prompt"] in out
    for name in models.NAMES:
        full, two = rows[name, "full"], rows[name, "2 bit"]
        layers = models.build_config(name).layer_types if name == "hybrid" else ["full"] * 4
        attention = sum(kind.startswith("full") for kind in layers)
        # K and V of 2 kv heads of 64 channels in fp32; the last new byte is not fed back.
        assert full["tokens"] == 200 + 6 - 1
        assert full["kv_bytes"] == attention * 2 * 2 * 64 * 4 * full["tokens"]
        assert full["kv_bytes_16bit"] == full["kv_bytes"] / 2
        assert full["quality"]["kl"]["mean"] == 0
        assert two["quality"]["kl"]["mean"] > 0
        assert two["kv_bytes"] < rows[name, "8 bit"]["kv_bytes"] < full["kv_bytes"]
        assert two["state_bytes"] == full["state_bytes"]
        assert (full["state_bytes"] > 0) == (name == "hybrid")
        assert len(models.encode(two["sample"])) >= 6
        sparse = [row for key, row in rows.items() if key[0] == name and row["kind"] == "lexico"]
        assert [row["cache"] for row in sparse] == ["11+5 atoms", "7+4 atoms"]
        for row in sparse:
            # An atom of 64 channels in fp32, for K and V.
            assert row["dictionary_bytes"] == attention * 2 * 1024 * 64 * 4
            assert row["kv_bytes"] < rows[name, "full"]["kv_bytes"]
            assert row["quality"]["kl"]["mean"] > 0
        assert sparse[1]["kv_bytes"] < sparse[0]["kv_bytes"]


def test_demo_of_one_model(tiny, tmp_path, capsys):
    plot = str(tmp_path / "x.png")
    assert cli.main(["demo", "--quick", "--model", "control", "--plot", plot]) == 0
    out = capsys.readouterr().out
    assert "control continues" in out
    assert "hybrid" not in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "huge"], "--model must be one of ['hybrid', 'control'], got 'huge'"),
        (["--json", "no/such/folder/x.json"], "there is no folder"),
        (["--plot", "no/such/folder/x.png"], "there is no folder"),
    ],
)
def test_demo_mistakes(argv, message, capsys):
    assert cli.main(["demo", "--quick", *argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_generate_with_a_shipped_model(capsys):
    outputs = []
    for kind in ("full", "turbo", "lexico"):
        argv = ["generate", "--model", "hybrid", "--prompt", "def f(x):\n    ret"]
        assert cli.main([*argv, "--cache", kind, "--max-new-tokens", "12"]) == 0
        captured = capsys.readouterr()
        assert "bytes of recurrent state" in captured.err
        outputs.append(captured.out)
    assert outputs[0].startswith("urn ")
    # Fewer than 64 tokens are not quantized yet, and fewer than 128 not coded.
    assert outputs[0] == outputs[1] == outputs[2]


def test_same_start():
    assert run._same_start([1, 2, 3], [1, 2, 4]) == 2
    assert run._same_start([1, 2], [1, 2]) == 2
    assert run._same_start([], []) == 0
