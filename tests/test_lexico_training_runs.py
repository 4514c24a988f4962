"""Runs of training: what they leave, interruptions, wrong calls, the command."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402
from kvcore import cli, lexico_training  # noqa: E402
from kvcore.cache.dictionaries import FILE, Dictionaries  # noqa: E402
from kvcore.lexico_training import session  # noqa: E402
from kvcore.lexico_training.capture import capture_row  # noqa: E402
from training_cases import SMALL, make_rows  # noqa: E402

SOURCE = {"text_sha256": "0" * 64}


def _train(out, name="llama", **changes):
    arguments = {"recipe": SMALL, "vectors": 1000, "rows": make_rows(), **changes}
    rows = arguments.pop("rows")
    return lexico_training.train(
        hf_models.model(name), rows, out, name=name, source=SOURCE, **arguments
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run, and its report."""
    out = tmp_path_factory.mktemp("finished")
    return out, _train(out)


def test_run_leaves_dictionaries_and_report(finished):
    out, report = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "dictionaries.json",
        "dictionaries.safetensors",
    ]
    made = Dictionaries.load(out)
    assert made.layers == (0, 1)
    assert made.atoms() == {0: (96, 96), 1: (96, 96)}
    assert (made.sparsity, made.model_id, made.head_dim) == (4, "llama", 64)
    assert made.text_sha256 == SOURCE["text_sha256"]
    assert made.notes["recipe"] == dataclasses.asdict(SMALL)
    assert json.loads((out / "dictionaries.json").read_text()) == report


def test_hybrid_models_have_dictionaries_of_their_attention_layers(tmp_path):
    if not hf_models.HYBRID_NAMES:
        pytest.skip("transformers before 5.8")
    _train(tmp_path, hf_models.HYBRID_NAMES[0])
    assert Dictionaries.load(tmp_path).layers == (1,)


def test_report_has_errors_and_bytes_of_all_arms(finished):
    _, report = finished
    for layer in report["layers"]:
        arms = {arm["name"]: arm for arm in layer["arms"]}
        assert {"turbo, 4 bit", "turbo, 2 bit", "anchor and 2-bit rest"} < set(arms)
        four, two = arms["turbo, 4 bit"], arms["turbo, 2 bit"]
        assert 32 < four["bytes_per_vector"] < 45  # 64 channels, and steps and zeros of them
        assert 0 < four["k_error"] < two["k_error"] < 1
        codes = [arms[f"lexico, {s} atoms"] for s in (2, 4, 8)]
        assert [arm["bytes_per_vector"] for arm in codes] == [8, 14, 26]
        assert 0 < codes[2]["k_error"] < codes[1]["k_error"] < codes[0]["k_error"] < 1
        assert layer["k_curve"][-1] < layer["k_curve"][0]
    text = session.render(report)
    assert "turbo, 2 bit" in text
    assert len({len(line) for line in text.splitlines()}) == 1


def _assert_same(one, other):
    """Two finished runs, bit for bit; safetensors writes its metadata in any order."""
    assert (one / "dictionaries.json").read_bytes() == (other / "dictionaries.json").read_bytes()
    name = "dictionaries.safetensors"
    (metadata, tensors), (others_metadata, others) = (FILE.read(x / name) for x in (one, other))
    assert metadata == others_metadata  # among it the digest
    assert all(torch.equal(tensors[name], others[name]) for name in others)


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
import test_lexico_training_runs as t
t._train(sys.argv[1], save_every=0.0)
"""


def _start(out):
    tests = os.path.dirname(__file__)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out)],
        cwd=tests,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_bit_for_bit(number, tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _train(tmp_path / "whole")
    finally:
        torch.set_num_threads(threads)
    out = tmp_path / "interrupted"
    process = _start(out)
    work = out / session.WORK
    # Some dictionary is being trained, not the first.
    deadline = time.monotonic() + 120
    while not (work / "v.0.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    error = process.communicate(timeout=120)[1]
    assert process.returncode != 0
    if number != signal.SIGKILL:
        assert "Interrupted" in error
    assert (work / "v.0.safetensors").exists()
    assert not (out / "dictionaries.safetensors").exists()
    process = _start(out)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error
    _assert_same(out, tmp_path / "whole")


def test_an_interrupted_capture_goes_on(tmp_path, monkeypatch, finished):
    ran = []

    def failing(model, tokens, row, *rest):
        if row == 3 and len(ran) == 3:
            ran.append(row)
            raise KeyboardInterrupt
        ran.append(row)
        return capture_row(model, tokens, row, *rest)

    monkeypatch.setattr("kvcore.lexico_training.capture.capture_row", failing)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path)
    _train(tmp_path)
    assert ran == [0, 1, 2, 3, 3, 4, 5]
    _assert_same(tmp_path, finished[0])


# ---- wrong calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": make_rows(1)}, "rows must be at least 2"),
        ({"recipe": dataclasses.replace(SMALL, sparsity=65)}, r"sparsity must be in \[1, 64\]"),
        ({"recipe": dataclasses.replace(SMALL, sparsity=0)}, r"sparsity must be in \[1, 64\]"),
        ({"recipe": dataclasses.replace(SMALL, atoms=8, sparsity=9)}, r"sparsity must be in \[1,"),
        ({"recipe": dataclasses.replace(SMALL, atoms=4096)}, "4096 vectors or more .* got 1000"),
        ({"recipe": dataclasses.replace(SMALL, atoms=32769)}, r"atoms must be in \[1, 32768\]"),
    ],
)
def test_rejects(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        _train(tmp_path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_rejects_a_model_without_layers_to_code(tmp_path):
    config = hf_models.config("llama", head_dim=32)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"head_dim of .* got 32"):
        lexico_training.train(
            model, make_rows(), tmp_path, name="x", source=SOURCE, recipe=SMALL, vectors=1000
        )


def test_rejects_a_folder_of_another_run(tmp_path, finished):
    with pytest.raises(ValueError, match=r"without dictionaries.safetensors"):
        _train(finished[0])
    work = tmp_path / session.WORK
    work.mkdir()
    facts = {"model": "other"}
    (work / "settings.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"begun with model other, not llama"):
        _train(tmp_path)
    (work / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings.json is damaged"):
        _train(tmp_path)


def test_rejects_damaged_files(tmp_path, monkeypatch):
    def stop(self, layer, trainers):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session.Session, "_compare", stop)
        with pytest.raises(KeyboardInterrupt):
            _train(tmp_path)
    state = tmp_path / session.WORK / "k.0.safetensors"
    good = state.read_bytes()
    state.write_bytes(good[:-7] + b"\0" + good[-6:])
    with pytest.raises(ValueError, match=r"training file: digest"):
        _train(tmp_path)
    state.write_bytes(good[:1000])
    with pytest.raises(ValueError, match=r"k\.0\.safetensors"):
        _train(tmp_path)
    state.write_bytes(good)
    row = tmp_path / session.WORK / "row-000002.safetensors"
    row.write_bytes(row.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"row-000002.safetensors is damaged"):
        _train(tmp_path)


def test_rejects_values_that_are_not_finite(tmp_path, monkeypatch):
    def broken(*args):
        return {name: x + float("inf") for name, x in capture_row(*args).items()}

    monkeypatch.setattr("kvcore.lexico_training.capture.capture_row", broken)
    with pytest.raises(ValueError, match=r"model's k.0 .* not finite"):
        _train(tmp_path)


def test_text_rows():
    encode = lambda text: torch.arange(len(text))[None]  # noqa: E731
    rows = lexico_training.text_rows(["x" * 300, "y" * 100], encode, context=128, tokens=10**6)
    assert sorted(map(len, rows)) == [100, 128, 128]
    few = lexico_training.text_rows(["x" * 3000], encode, context=128, tokens=300)
    assert [len(row) for row in few] == [128] * 3
    with pytest.raises(ValueError, match="two rows"):
        lexico_training.text_rows(["x" * 150], encode, context=128, tokens=300)


# ---- the command


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.py"
    path.write_text("def greet(name):\n    return 'hello ' + name\n" * 40)
    return str(path)


def _command(text, out, *options):
    small = ["--atoms", "64", "--steps", "5", "--batch", "64", "--context", "256"]
    call = ["train-dictionary", "--model", "hybrid", "--text", text, "--out", str(out)]
    return cli.main([*call, *small, *options])


def test_command(text_file, tmp_path, capsys):
    assert _command(text_file, tmp_path / "out", "--sparsity", "4") == 0
    captured = capsys.readouterr()
    assert "turbo, 4 bit" in captured.out
    assert "train" in captured.err
    made = Dictionaries.load(tmp_path / "out")
    assert made.layers == (1, 3)
    made.check_model(transformers.AutoConfig.from_pretrained(_shipped("hybrid")))


def _shipped(name):
    from kvcore.demo import models

    return models.path(name)


def test_command_says_how_to_go_on(text_file, tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise lexico_training.Interrupted

    monkeypatch.setattr(lexico_training, "train", interrupted)
    assert _command(text_file, tmp_path / "out") == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "0"], "--sparsity must be at least 1, got 0"),
        (["--sparsity", "65"], "sparsity must be in [1, 64]"),
        (["--atoms", "100000"], "atoms must be in [1, 32768], got 100000"),
        (["--vectors", "10"], "64 vectors or more"),
        (["--text", "/nonexistent"], "--text /nonexistent: No such file or directory"),
        (["--model", "/nonexistent"], "there is no folder /nonexistent"),
    ],
)
def test_command_rejects(options, message, text_file, tmp_path, capsys):
    assert _command(text_file, tmp_path / "out", *options) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
