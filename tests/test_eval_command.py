"""kvcore eval: names of caches, plans, what it prints and writes, mistakes and interruptions."""

import contextlib
import json
import math

import pytest
import torch

pytest.importorskip("transformers")

from kvcore import cli
from kvcore.eval import mean_interval, pitfalls, plots, report, specs
from kvcore.eval.caches import FULL, CacheChoice
from kvcore.eval.peers import PressChoice, QuantizedChoice
from kvcore.eval.run import Plan

SMALL = [
    "--sequences=1", "--prompts=2", "--context=200", "--scored=24", "--lengths=150,300",
    "--depths=2", "--pairs=2,8", "--pairs-length=300",
]  # fmt: skip
FEW = "--cache=turbo:2,quantized:fp8"


def _eval(*argv):
    return cli.main(["eval", *SMALL, *argv])


# ---- names of caches


@pytest.mark.parametrize(
    ("spec", "choice"),
    [
        ("dynamic", FULL),
        ("turbo", CacheChoice()),
        ("turbo:8", CacheChoice(k_bits=8, v_bits=8)),
        ("turbo:k4v2", CacheChoice(k_bits=4, v_bits=2)),
        (
            "turbo:2:sink_pages=0:balance=false:low_bit_heads=0.5",
            CacheChoice(k_bits=2, v_bits=2, sink_pages=0, balance=False, low_bit_heads=0.5),
        ),
        ("turbo:sink_pages=2", CacheChoice(sink_pages=2)),
        ("lexico", CacheChoice("lexico", dictionaries="here")),
        ("lexico:8", CacheChoice("lexico", k_sparsity=8, v_sparsity=8, dictionaries="here")),
        (
            "lexico:k7v4:buffer_tokens=48:k_tolerance=0.2:dictionaries=there",
            CacheChoice(
                "lexico", k_sparsity=7, v_sparsity=4, buffer_tokens=48, k_tolerance=0.2,
                dictionaries="there",
            ),
        ),
        ("quantized:fp8", QuantizedChoice("fp8")),
        ("quantized:quanto2", QuantizedChoice("quanto", 2)),
        ("quantized:hqq4", QuantizedChoice("hqq", 4)),
        ("kvpress:snapkv:0.5", PressChoice("snapkv", 0.5)),
    ],
)  # fmt: skip
def test_parse(spec, choice):
    assert specs.parse(spec, "here") == choice


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "cache must be one of: dynamic .*; got ''"),
        ("huge", "cache must be one of: dynamic .*; got 'huge'"),
        ("dynamic:4", "cache must be one of: dynamic .*; got 'dynamic:4'"),
        ("quantized:fp8:2", "cache must be one of: .*; got 'quantized:fp8:2'"),
        ("quantized:int4", "cache must be one of: .*; got 'quantized:int4'"),
        ("turbo:3", "cache turbo:3: k_bits must be 8, 4 or 2, got 3"),
        ("turbo:4x", "cache turbo:4x: .* such as k4v2; got '4x'"),
        ("turbo:4:8", "cache turbo:4:8: turbo takes sink_pages=..., .*; got '8'"),
        ("turbo:4:buffer_tokens=8", "turbo takes sink_pages=.*; got 'buffer_tokens=8'"),
        ("turbo:4:sink_pages=x", "turbo:4:sink_pages=x: sink_pages must be an integer, got 'x'"),
        ("turbo:balance=maybe", "balance must be true or false, got 'maybe'"),
        ("lexico:k_tolerance=x", "k_tolerance must be a number, got 'x'"),
        ("lexico:0", r"cache lexico:0: k_sparsity must be an int in \[1, 64\], got 0"),
        ("kvpress:snapkv", "cache must be one of: .*; got 'kvpress:snapkv'"),
        (
            "kvpress:magic:0.5",
            "cache kvpress:magic:0.5: the method must be one of expected, .*'magic'",
        ),
        ("kvpress:snapkv:x", "kvpress:snapkv:x: the share must be a number, got 'x'"),
        ("kvpress:snapkv:1", "the evicted share must lie between 0 and 1, got 1.0"),
        ("turbo:4,turbo:4", "cache turbo:4 is named twice"),
    ],
)
def test_parse_rejects(spec, message):
    with pytest.raises(ValueError, match=message):
        specs.parse_all(spec)


def test_default_caches_are_known():
    found = specs.parse_all(specs.DEFAULT)
    assert next(iter(found.values())) == FULL
    kinds = {choice.kind for choice in found.values()}
    assert kinds == {"full", "turbo", "lexico", "quantized", "kvpress"} == set(plots.MARKERS)


# ---- plans


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 2}, "seeds must be at least 3, got 2"),
        ({"context": 0}, "context must be at least 1, got 0"),
        ({"depths": 1}, "depths must be at least 2, got 1"),
        ({"lengths": ()}, "lengths must be one or more, got none"),
        ({"pairs": (4, 0)}, "pairs must be at least 1, got 0"),
        ({"measures": ("text", "speed")}, "measures must be among text, .*, got speed"),
    ],
)
def test_plan_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        Plan(**settings)


def test_plan_knows_its_longest_sequences():
    plan = Plan(context=100, scored=20, lengths=(50, 70), depths=3, pairs=(2, 9), pairs_length=200)
    bindings = pitfalls.SEGMENTS * pitfalls.PER_SEGMENT
    longest = {"text": 121, "needle": 76, "pairs": 218, "pitfalls": 200 + 2 * bindings}
    assert plan.longest() == longest
    assert plan.needle_depths == (0, 0.5, 1)


# ---- the command


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of both models, and what was printed."""
    folder = tmp_path_factory.mktemp("eval") / "new"
    with contextlib.redirect_stdout(open(folder.parent / "out", "w")) as out:
        argv = ["--model", "hybrid", "--model", "control", "--out", str(folder)]
        assert _eval(*argv, FEW) == 0
    out.close()
    result = json.loads((folder / "eval.json").read_text())
    return result, (folder.parent / "out").read_text(), folder


def test_results(measured):
    result, out, _ = measured
    assert result["command"].startswith("kvcore eval --sequences=1")
    assert result["plan"]["seeds"] == [0, 1, 2]
    assert result["text"]["files"] == "held out of the standard library"
    for name in ("kvcore", "commit", "modified", "torch", "transformers", "threads", "date"):
        assert name in result["setup"]
    assert "does not carry over to large models" in result["note"]
    assert [model["fallbacks"] for model in result["models"]] == [{}, {}]
    assert result["note"] in out
    hybrid, control = result["models"]
    assert [model["model"] for model in (hybrid, control)] == ["hybrid", "control"]
    # transformers' own quantized cache refuses hybrid models, and says why.
    assert [row["cache"] for row in hybrid["caches"]] == ["dynamic", "turbo:2"]
    assert (
        "only supported for models with only full attention"
        in hybrid["not_measured"]["quantized:fp8"]
    )
    assert [row["cache"] for row in control["caches"]] == ["dynamic", "turbo:2", "quantized:fp8"]
    assert "quantized:fp8: `QuantizedCache` is only supported" in out
    assert (hybrid["layer_types"][0], control["layer_types"][0]) == (
        "linear_attention",
        "full_attention",
    )


def test_figures_of_each_cache(measured):
    result, _, _ = measured
    for model in result["models"]:
        full, two = model["caches"][:2]
        attention = sum(kind == "full_attention" for kind in model["layer_types"])
        # K and V of 2 heads of 64 channels in fp32; the last token is not fed back.
        assert full["text"]["tokens"] == 224
        assert full["text"]["kv_bytes"] == attention * 2 * 2 * 64 * 4 * 224
        assert full["text"]["ratio"] == 0.5
        assert (full["text"]["state_bytes"] > 0) == (model["model"] == "hybrid")
        assert two["text"]["kv_bytes"] < full["text"]["kv_bytes"]
        for name in ("kl", "bits_change"):
            assert full["text"][name] == {"mean": 0, "half_width": 0, "samples": 3}
        assert two["text"]["kl"]["mean"] > 1e-3
        assert two["text"]["kl"]["samples"] == 3
        by_seed = mean_interval(torch.tensor(two["text"]["kl_by_seed"]))
        assert two["text"]["kl"]["mean"] == pytest.approx(by_seed.mean)
        assert [entry["length"] for entry in two["needle"]] == [150, 300]
        assert [cell["depth"] for cell in two["needle"][0]["by_depth"]] == [0, 1]
        assert [entry["pairs"] for entry in two["pairs"]] == [2, 8]
        assert full["pairs"][0]["recall"]["samples"] == 6  # 2 prompts of each seed
        assert full["pairs"][0]["nats_lost"]["mean"] == 0
        checks = full["pitfalls"], two["pitfalls"]
        assert checks[0]["rank_correlation"]["mean"] == pytest.approx(1)
        assert checks[0]["order_effect"]["mean"] == 0
        assert checks[1]["rank_correlation"]["mean"] < 0.999
        assert all(len(c["recall_by_segment"]) == pitfalls.SEGMENTS for c in checks)
        assert {e["mean"] for e in checks[0]["k_error_by_segment"]} == {0}
        assert {e["mean"] for c in checks for e in c["kept_by_segment"]} == {1}
        # The first page keeps 8 bits, and so does the last, which is not full.
        assert checks[1]["k_error_by_segment"][3]["mean"] > 0.1


def test_tables_and_plots(measured):
    result, out, folder = measured
    for model in result["models"]:
        table = report.render(model)
        assert table in out
        lines = report.aligned(report.rows(model)).splitlines()
        assert len({len(line) for line in lines}) == 1
    assert "quantized:fp8            -" in out
    assert "Recall in % against the number of pairs" in out
    assert {path.name for path in folder.iterdir()} == {
        "eval.json",
        "eval.png",
        "eval-needle.png",
    }
    for name in plots.PLOTS:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_chosen_measures_only(tmp_path, capsys):
    out = str(tmp_path)
    argv = ["--model", "control", "--measures", "text", "--cache", "turbo:4", "--out", out]
    assert _eval(*argv) == 0
    captured = capsys.readouterr()
    (model,) = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert set(model["caches"][1]) == {"cache", "label", "kind", "text"}
    assert "KL to full" in captured.out
    assert "needles" not in captured.out
    assert not (tmp_path / "eval-needle.png").exists()
    assert "tok/s" in captured.err  # progress


def test_own_text_and_model(tmp_path, capsys):
    """Any checkpoint, here of random weights, with a tokenizer of its own and a first token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from test_docs import byte_tokenizer

    tokenizer = byte_tokenizer(special={"bos_token": "<s>"})
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=1, head_dim=64, max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id, **sizes,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("abcdefg 😀 hij\n" * 200)
    argv = ["--model", str(tmp_path / "model"), "--text", str(text), "--cache", "turbo:8,lexico"]
    assert _eval(*argv, "--out", str(tmp_path)) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    (model,) = result["models"]
    assert list(model["not_measured"]) == ["lexico"]
    assert "kvcore train-dictionary" in model["not_measured"]["lexico"]
    bits = model["caches"][0]["text"]["bits_per_byte"]["mean"]
    assert bits == pytest.approx(math.log2(len(tokenizer)), rel=0.2)  # it knows nothing
    assert result["text"]["files"] == 1
    assert len(result["text"]["sha256"]) == 64
    capsys.readouterr()


@pytest.mark.filterwarnings("error:Data has no positive values")
def test_a_cache_that_compresses_nothing_is_told(tmp_path, capsys):
    """With a head_dim that has no kernel, TurboCache holds K and V as they are."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from test_docs import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "model")
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=1, head_dim=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    argv = ["--model", str(tmp_path / "model"), "--cache", "turbo:2", "--measures", "text"]
    with pytest.warns(RuntimeWarning, match="unsupported head_dim"):
        assert _eval(*argv, "--out", str(tmp_path)) == 0
    assert "times: unsupported head_dim" in capsys.readouterr().out
    (model,) = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert model["fallbacks"]["unsupported head_dim"] > 0
    assert model["caches"][1]["text"]["kl"]["mean"] == pytest.approx(0, abs=1e-6)


def test_interruption_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    real, calls = pitfalls.unevenness, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(pitfalls, "unevenness", interrupted)
    argv = ["--model", "control", "--model", "hybrid", FEW, "--out", str(tmp_path)]
    assert _eval(*argv, "--measures", "text,pitfalls") == 130
    out = capsys.readouterr().out
    assert "interrupted: figures are of what was finished by then" in out
    (model,) = json.loads((tmp_path / "eval.json").read_text())["models"]
    assert model["interrupted"] is True
    row = model["caches"][1]
    assert row["text"]["kl"]["samples"] == 3
    assert row["pitfalls"]["order_effect"]["samples"] == 2
    assert (tmp_path / "eval.png").exists()


def test_interrupted_at_once(tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvcore.eval.text.score", stop)
    assert _eval("--model", "control", FEW, "--out", str(tmp_path)) == 130
    assert json.loads((tmp_path / "eval.json").read_text())["models"] == []


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "available", lambda: False)
    argv = ["--model", "control", "--measures", "text", FEW, "--out", str(tmp_path)]
    assert _eval(*argv) == 0
    assert plots.NO_MATPLOTLIB in capsys.readouterr().out


def test_lists_are_of_integers(capsys):
    with pytest.raises(SystemExit):
        _eval("--model", "control", "--lengths", "1,x")
    assert "--lengths: must be integers with commas, got '1,x'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "nothing/here/at/all"], "model must be hybrid, control, a folder"),
        (["--cache", "turbo:5"], "cache turbo:5: k_bits must be 8, 4 or 2, got 5"),
        (["--cache", "turbo:4,,"], "cache must be one of"),
        (["--seeds", "2"], "--seeds must be at least 3, got 2"),
        (["--pairs-length", "0"], "--pairs-length must be at least 1, got 0"),
        (["--measures", "speed"], "--measures must be among text, needle, pairs, pitfalls"),
        (["--context", "9000"], "text: sequences of 9025 tokens exceed the 8192 positions of"),
        (["--lengths", "8190"], "needle: sequences of 8194 tokens exceed the 8192 positions"),
        (["--pairs", "65"], "pairs must lie in [1, 64], got 65"),
        (["--pairs", "8", "--pairs-length", "10"], "8 pairs take 16 tokens, and do not fit"),
        (["--text", "no/such/file"], "--text no/such/file: No such file or directory"),
        (["--text", "{empty}"], "the text is empty"),
        (["--text", "{short}"], "the text has 40 tokens, which make 0 sequences of 225"),
        (["--out", "{short}/x"], "Not a directory"),
        (["--device", "tpu"], "--device must be cpu or cuda, got tpu"),
    ],
)
def test_mistakes(argv, message, tmp_path, capsys):
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("a" * 40)
    files = {name: str(tmp_path / name) for name in ("empty", "short")}
    argv = [word.format(**files) for word in argv]
    model = [] if "--model" in argv else ["--model", "control"]
    assert _eval(*model, *argv) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


def test_no_figures_are_made_up():
    """A table says what is in the JSON, and a hyphen where nothing was measured."""
    one = {"mean": 0.5, "half_width": None, "samples": 1}
    row = {"cache": "x", "pairs": [{"pairs": 1, "recall": one}]}
    model = {"caches": [row], "not_measured": {"y": "z"}, "fallbacks": {}, "interrupted": False}
    lines = report.render(model).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["cache", "most", "pairs", "%"],
        ["x", "50.0"],
        ["y", "-"],
    ]
    assert lines[3] == "y: z"
