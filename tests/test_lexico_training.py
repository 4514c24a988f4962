"""Training of dictionaries: the gradient, the capture, interruptions, the figures it reports."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import kvcore

transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402
from kvcore import cli, lexico_training  # noqa: E402
from kvcore.cache.dictionaries import FILE, Dictionaries  # noqa: E402
from kvcore.eval.recording import recording  # noqa: E402
from kvcore.lexico_training import comparison, session  # noqa: E402
from kvcore.lexico_training.capture import capture_row, plan  # noqa: E402
from kvcore.lexico_training.trainer import DictionaryTrainer, Recipe, dictionary_gradient  # noqa: E402

SMALL = Recipe(atoms=96, sparsity=4, steps=40, batch=128, renew_every=10)


def _planted(num_vectors=4096, atoms=96, sparsity=4, head_dim=64):
    """Vectors that are sums of a few atoms of a dictionary, and the dictionary."""
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(atoms, head_dim, generator=generator)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    values = torch.randn(num_vectors, sparsity, generator=generator)
    chosen = torch.rand(num_vectors, atoms, generator=generator).topk(sparsity).indices
    return (values[:, :, None] * dictionary[chosen]).sum(1), dictionary


def _rows(count=6, length=160):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, hf_models.VOCAB, (length,), generator=generator) for _ in range(count)]


SOURCE = {"text_sha256": "0" * 64}


def _train(out, name="llama", **changes):
    arguments = {"recipe": SMALL, "vectors": 1000, "rows": _rows(), **changes}
    rows = arguments.pop("rows")
    return lexico_training.train(
        hf_models.model(name), rows, out, name=name, source=SOURCE, **arguments
    )


# ---- one dictionary


def test_gradient_is_that_of_the_squared_error():
    x, _ = _planted(50)
    dictionary = torch.nn.functional.normalize(torch.randn(30, 64), dim=1).requires_grad_()
    indices, values, *_ = kvcore.lexico_encode(
        x[None, None], dictionary.detach(), sparsity=5, dtype=torch.float32
    )
    indices, values = indices[0, 0].long(), values[0, 0]
    residual = x - (values[:, :, None] * dictionary[indices]).sum(1)
    # Atoms of norm 1 whatever is added to them: what is left is orthogonal to each.
    residual.square().sum(1).mean().backward()
    unit, full = dictionary.detach(), dictionary.grad
    expected = full - (full * unit).sum(1, keepdim=True) * unit
    actual = dictionary_gradient(indices, values, residual.detach(), unit)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert (actual * unit).sum(1).abs().max() < 1e-6


def test_atoms_keep_their_norm_after_every_step():
    trainer = DictionaryTrainer(_planted()[0], SMALL)
    while not trainer.done:
        trainer.step()
        assert (trainer.dictionary.double().norm(dim=1) - 1).abs().max() < 1e-6


def test_a_planted_dictionary_is_found():
    x, planted = _planted(20_000)
    trainer = DictionaryTrainer(x, dataclasses.replace(SMALL, steps=600, batch=512))
    errors = [trainer.step() for _ in range(600)]
    assert errors[0] > 0.2
    assert sum(errors[-10:]) / 10 < 0.05
    # Of nearly every planted atom there is one that is it, but for the sign.
    found = (planted @ trainer.dictionary.T).abs().amax(1)
    assert (found > 0.98).float().mean() > 0.8


def test_keys_a_thousand_times_larger_train_the_same():
    x, _ = _planted()
    trainers = [DictionaryTrainer(x * size, SMALL) for size in (1, 1024.0)]
    errors = [[trainer.step() for _ in range(SMALL.steps)] for trainer in trainers]
    torch.testing.assert_close(*map(torch.tensor, errors), rtol=1e-3, atol=0)


def test_atoms_that_nothing_uses_begin_anew():
    x, _ = _planted()
    recipe = dataclasses.replace(SMALL, settle=1.0)
    trainer = DictionaryTrainer(x, recipe)
    # Orthogonal to all vectors if they have nothing in the last channels.
    trainer.vectors = torch.cat([x[:, :48], torch.zeros(len(x), 16)], 1)
    useless = torch.zeros(5, 64)
    useless[:, 60] = 1
    trainer.dictionary = torch.nn.functional.normalize(
        torch.cat([trainer.dictionary[:-5, :48], torch.zeros(91, 16)], 1), dim=1
    )
    trainer.dictionary = torch.cat([trainer.dictionary, useless])
    for _ in range(recipe.renew_every):
        trainer.step()
    assert trainer.dictionary[-5:, 60].abs().max() < 1e-6
    assert (trainer.dictionary[-5:].norm(dim=1) - 1).abs().max() < 1e-6


def test_a_saved_state_goes_on_bit_for_bit():
    x, _ = _planted()
    whole = DictionaryTrainer(x, SMALL)
    while not whole.done:
        whole.step()
    for stop in (1, 9, 10, 33):
        first = DictionaryTrainer(x, SMALL)
        for _ in range(stop):
            first.step()
        state = {name: tensor.clone() for name, tensor in first.state().items()}
        second = DictionaryTrainer(x, SMALL)
        second.load_state(state)
        while not second.done:
            second.step()
        for name, tensor in whole.state().items():
            assert torch.equal(tensor, second.state()[name]), (stop, name)
        assert whole.curve() == second.curve()


# ---- capture


@pytest.mark.parametrize("name", hf_models.NAMES)
def test_captured_keys_are_what_the_cache_gets(name, tmp_path):
    model, rows = hf_models.model(name), _rows(4)
    layers = (1,) if name in hf_models.HYBRID_NAMES else (0, 1)
    planned = plan([len(row) for row in rows], 2, 100)
    cache = transformers.DynamicCache(config=model.config)
    model(input_ids=rows[0][None], past_key_values=cache, use_cache=True)
    whole = capture_row(model, rows[0], 0, planned, layers, 0)
    assert set(whole) == {f"{kind}.{layer}" for kind in "kv" for layer in layers}
    for layer in layers:
        torch.testing.assert_close(whole[f"k.{layer}"], cache.layers[layer].keys[0])
        torch.testing.assert_close(whole[f"v.{layer}"], cache.layers[layer].values[0])

    drawn = capture_row(model, rows[0], planned.held_out, planned, layers, 0)
    for layer in layers:
        k, v = (whole[f"{kind}.{layer}"].flatten(0, 1) for kind in "kv")
        dk, dv = (drawn[f"{kind}.{layer}"] for kind in "kv")
        assert len(dk) == planned.vectors_per_row
        at = (dk[:, None] - k).abs().amax(2).argmin(1)
        torch.testing.assert_close(dk, k[at])
        assert len(at.unique()) == len(dk)  # none twice
        torch.testing.assert_close(dv, v[at])  # V of the same tokens


def test_recording_leaves_the_model_as_it_was():
    model, (row, *_) = hf_models.model("llama"), _rows(2)
    before = model.config._attn_implementation
    expected = model(input_ids=row[None]).logits
    with recording(model, lambda *_: None):
        torch.testing.assert_close(model(input_ids=row[None]).logits, expected)
    assert model.config._attn_implementation == before


def test_plan_holds_out_a_row_and_draws_what_is_wanted():
    assert plan([2048] * 100, 8, 10**9) == dataclasses.replace(
        plan([2048] * 100, 8, 10**9), rows=100, held_out=2, vectors_per_row=8 * 2048
    )
    assert plan([64, 64], 2, 50).held_out == 1
    assert plan([64, 64], 2, 50).vectors_per_row == 50
    assert plan([64] * 9, 2, 100).num_vectors == 7 * 15


# ---- a run


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


def test_codes_arm_is_the_error_of_the_codes():
    x, dictionary = _planted(128)
    held = [x.view(2, 64, 64)] * 2
    arm = comparison.codes(held, [dictionary] * 2, 2)
    *code, _ = kvcore.reference.lexico.lexico_encode(held[0][None], dictionary, sparsity=2)
    rebuilt = kvcore.reference.lexico.lexico_reconstruct(*code, dictionary)[0]
    expected = ((rebuilt - held[0]) ** 2).sum() / (held[0] ** 2).sum()
    assert arm.k_error == arm.v_error == pytest.approx(float(expected), rel=1e-3)
    assert arm.bytes_per_vector == 8


def test_anchors_are_a_local_optimum_and_two_bits_are_four_levels():
    x, _ = _planted(3000)
    anchors = comparison.k_means(x, 32, 0)
    index = comparison.nearest(x, anchors)
    assert torch.equal(index, torch.cdist(x, anchors).argmin(1))
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:32]]
    distance = (x - anchors[index]).square().sum()
    assert distance < 0.85 * torch.cdist(x, start).amin(1).square().sum()
    rounded = comparison.two_bit(x)
    assert max(len(row.unique()) for row in rounded) <= 4
    # The best uniform quantizer of Gaussian values at 2 bits leaves 0.119 of their variance.
    noise = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0))
    error = (comparison.two_bit(noise) - noise).square().mean()
    assert 0.11 < error < 0.125


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
import test_lexico_training as t
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
        ({"rows": _rows(1)}, "rows must be at least 2"),
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
            model, _rows(), tmp_path, name="x", source=SOURCE, recipe=SMALL, vectors=1000
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
