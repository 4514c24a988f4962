"""kvcore.demo: the shipped models, their training record, the tasks and the training recipe."""

import hashlib
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

import kvcore.hf  # noqa: E402
from kvcore.demo import data, induction, models, scaffold, tasks, train  # noqa: E402
from kvcore.demo.fast import fast  # noqa: E402

MIB = 2**20


@pytest.fixture(scope="module", params=models.NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name):
    return models.load(name)


# ---- what is shipped


def test_weights_are_small_bf16_and_those_of_the_record(name):
    path = models.path(name) / "model.safetensors"
    record = models.training_record(name)
    assert path.stat().st_size <= 8 * MIB
    assert path.stat().st_size == record["weights_bytes"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == record["weights_sha256"]
    with safetensors.safe_open(path, "pt") as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert sum(weight.numel() for weight in weights.values()) == record["parameters"] <= 4_000_000


def test_models_have_the_same_size():
    sizes = [models.training_record(name)["parameters"] for name in models.NAMES]
    assert max(sizes) < 1.02 * min(sizes)


def test_shipped_configuration_is_that_of_the_code(name):
    shipped = json.loads((models.path(name) / "config.json").read_text())
    built = json.loads(models.build_config(name).to_json_string())
    differs = {k for k in built if k not in ("dtype", "architectures") and shipped[k] != built[k]}
    assert differs == set()
    assert shipped["head_dim"] == 64
    assert shipped["num_attention_heads"] > shipped["num_key_value_heads"]
    assert ("linear_attention" in shipped.get("layer_types", [])) == (name == "hybrid")


def test_record_is_complete(name):
    record = models.training_record(name)
    assert record["model"] == name
    for split in ("text", "held_out"):
        described = record["data"][split]
        assert described["files"] > 0
        assert described["bytes"] > 0
        assert re.fullmatch("[0-9a-f]{64}", described["names_sha256"])
        assert re.fullmatch("[0-9a-f]{64}", described["contents_sha256"])
    assert record["recipe"]["seed"] == 0
    assert record["threads"] >= 1
    assert re.fullmatch(r"3\.\d+\.\d+", record["versions"]["python"])
    steps, seconds, lengths, bits, recall = zip(*record["curve"], strict=True)
    assert list(steps) == sorted(steps)
    assert list(seconds) == sorted(seconds)
    assert steps[-1] <= record["steps"]
    assert seconds[-1] <= record["wall_seconds"] + 1
    assert lengths[-1] > 2048
    assert min(bits) > 0
    assert 0 <= min(recall) <= max(recall) <= 1
    from_step = [part["from_step"] for part in record["curriculum"]]
    assert from_step[0] == 0
    assert from_step == sorted(from_step)


def test_recorded_checks_are_consistent(name):
    """The verdict follows from the figures, and is that the model uses its context."""
    checks = models.training_record(name)["checks"]
    context, recall, bounds = checks["context"], checks["recall"], checks["bounds"]
    expected = 100 * (context["cut_bits_per_byte"] / context["full_bits_per_byte"] - 1)
    assert context["worse_percent"] == pytest.approx(expected)
    assert 1500 <= context["positions"][0] < context["positions"][1] <= 2048
    assert bounds == {
        "context_worse_percent_at_least": 1.0,
        "recall_accuracy_percent_at_least": 90.0,
    }
    uses_context = context["worse_percent"] >= bounds["context_worse_percent_at_least"]
    recalls = recall["accuracy_percent"] >= bounds["recall_accuracy_percent_at_least"]
    assert checks["passed"] == (uses_context and recalls)
    assert checks["passed"]
    assert recall["queries"] >= 4000
    assert 1500 <= recall["distances"][0] < recall["distances"][1] <= 2000


def test_records_were_made_on_the_same_data():
    first, second = (models.training_record(name)["data"] for name in models.NAMES)
    assert first == second


def test_text_and_recall_are_predicted(model):
    chunks = tasks.text_chunks(6, 512)
    assert tasks.next_token_nats(model, chunks).mean().item() / math.log(2) < 3.0
    near = tasks.recall_prompts(6, num_pairs=8, min_distance=100, max_distance=200)
    assert tasks.recall_hits(model, near).float().mean() > 0.9
    # Chance, and a check of the check: the answers of other prompts are not predicted.
    wrong = torch.roll(near.answers, 1, 0)
    scrambled = tasks.RecallPrompts(
        near.tokens, near.context_len, near.query_positions, wrong, near.distances
    )
    assert tasks.recall_hits(model, scrambled).float().mean() < 0.2


def test_compute_dtype(name):
    exact, rounded = (models.load(name, dtype=x) for x in ("float32", "bfloat16"))
    assert exact.dtype == torch.float32
    assert rounded.dtype == torch.bfloat16
    for key, weight in rounded.state_dict().items():
        assert torch.equal(exact.state_dict()[key], weight.float()), key


def test_load_rejects():
    with pytest.raises(ValueError, match=r"name must be one of \['hybrid', 'control'\], got 'big'"):
        models.load("big")
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int8'"):
        models.load("hybrid", dtype="int8")
    with pytest.raises(ValueError, match="name must be one of"):
        models.build_config("big")


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no model.safetensors in {tmp_path}")):
        models.load(tmp_path)


# ---- tokens


@given(st.text())
def test_text_round_trips(text):
    assert models.decode(models.encode(text)) == text


def test_decode_shows_symbols():
    ids = [*models.encode("a"), models.FIRST_KEY + 3, models.FIRST_VALUE, *models.encode("é")]
    assert models.decode(ids) == "a<k3><v0>é"
    assert models.decode([0xC3]) == "\ufffd"
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 384\), got 384"):
        models.decode([models.VOCAB_SIZE])


# ---- text


def test_splits_are_disjoint_and_complete():
    trained, held_out = data.source_files(held_out=False), data.source_files(held_out=True)
    assert set(trained).isdisjoint(held_out)
    assert 0.005 < len(held_out) / len(trained) < 0.05
    assert not [x for x in trained + held_out if "site-packages" in x or not x.endswith(".py")]
    assert trained == sorted(trained)


def test_text_chunks():
    chunks = tasks.text_chunks(5, 300)
    assert chunks.shape == (5, 300)
    assert chunks.dtype == torch.int64
    assert torch.equal(chunks, tasks.text_chunks(5, 300))
    text = tasks.held_out_text().tobytes()
    found = [text.find(bytes(chunk.tolist())) for chunk in chunks]
    assert min(found) == 0
    assert all(b - a >= 300 for a, b in itertools.pairwise(found))
    with pytest.raises(ValueError, match=r"num_chunks must be in \[1, \d+\] at length 300, got 0"):
        tasks.text_chunks(0, 300)


def test_source_prompt_begins_a_held_out_file():
    prompt = tasks.source_prompt(700)
    assert data.is_held_out(prompt.name)
    assert len(prompt.text) == 700
    assert prompt.text in tasks.held_out_text().tobytes()
    with pytest.raises(ValueError, match=r"num_bytes must be in \[1, \d+\], got 0"):
        tasks.source_prompt(0)


def test_echo_repeats_what_came_before():
    text = np.arange(2000)
    echoed = data.echo(np.random.default_rng(0), text)
    assert np.array_equal(text, np.arange(2000))
    changed = echoed != text
    assert 0.1 < changed.mean() < 0.6
    assert np.all(echoed[changed] < text[changed])


# ---- recall


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with one short held-out file: walking the standard library takes its time."""
    root = tmp_path_factory.mktemp("library")
    name = next(x for x in map("part{}.py".format, itertools.count()) if data.is_held_out(x))
    (root / name).write_bytes(bytes(range(32, 127)) * 40)
    return root


@given(
    pairs=st.integers(1, 64),
    low=st.integers(2, 300),
    slack=st.integers(0, 60),
    before=st.integers(0, 20),
    seed=st.integers(0),
)
def test_recall_prompts_ask_for_what_they_bound(root, pairs, low, slack, before, seed):
    high = low + 4 * pairs - 4 + slack
    prompts = tasks.recall_prompts(
        2,
        num_pairs=pairs,
        min_distance=low,
        max_distance=high,
        before=before,
        seed=seed,
        root=root,
    )
    assert prompts.query_positions[0] == prompts.context_len
    for tokens, answers, distances in zip(
        prompts.tokens.tolist(), prompts.answers.tolist(), prompts.distances.tolist(), strict=True
    ):
        at = prompts.query_positions.tolist()
        assert len({tokens[i] for i in at}) == pairs
        for i, answer, distance in zip(at, answers, distances, strict=True):
            bound = tokens.index(tokens[i])
            assert models.FIRST_KEY <= tokens[i] < models.FIRST_VALUE <= answer < models.VOCAB_SIZE
            assert bound < prompts.context_len
            assert tokens[bound + 1] == tokens[i + 1] == answer
            assert i - bound == distance
            assert low <= distance <= high
        assert sum(token < models.NUM_BYTES for token in tokens[:before]) == before


def test_recall_prompts_follow_the_seed():
    make = lambda seed: tasks.recall_prompts(3, seed=seed).tokens  # noqa: E731
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert torch.equal(make(5), make(5))
    assert not torch.equal(make(5), make(6))
    assert np.array_equal(state[0], np.random.get_state()[1])
    assert torch.equal(state[1], torch.get_rng_state())


def test_recall_prompts_reject():
    with pytest.raises(ValueError, match=r"num_pairs must be in \[1, 64\], got 65"):
        tasks.recall_prompts(1, num_pairs=65)
    with pytest.raises(ValueError, match=r"must be 2 or more and leave .* got 100, 110, 64 with"):
        tasks.recall_prompts(1, num_pairs=8, min_distance=100, max_distance=110)


@pytest.mark.parametrize("layout", data.LAYOUTS)
@pytest.mark.parametrize("stage", [train.STAGES[0], train.STAGES[4], train.STAGES[-1]])
def test_training_rows_mark_exactly_the_known_answers(layout, stage):
    corpus = np.frombuffer(bytes(range(32, 127)) * 40, dtype=np.uint8)
    ids, roles = data.training_row(np.random.default_rng(3), corpus, stage, layout)
    again, _ = data.training_row(np.random.default_rng(3), corpus, stage, layout)
    assert np.array_equal(ids, again)
    assert len(ids) == len(roles) == stage.length
    bound = {}
    for position, (token, role) in enumerate(zip(ids.tolist(), roles.tolist(), strict=True)):
        if token < models.NUM_BYTES:
            assert role == data.TEXT
        elif token < models.FIRST_VALUE:
            assert role == data.UNSCORED
        else:
            key = ids[position - 1]
            assert role == (data.ANSWER if key in bound else data.UNSCORED)
            assert bound.setdefault(key, token) == token
    assert (len(bound) == 0) == (layout == "text")
    assert len(bound) <= stage.max_pairs


def test_training_row_rejects():
    with pytest.raises(ValueError, match=r"layout must be one of .* got 'tree'"):
        data.training_row(
            np.random.default_rng(0), np.zeros(999, np.uint8), train.STAGES[0], "tree"
        )


# ---- training


def test_fast_models_are_restored():
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    before, model = modeling.torch_chunk_gated_delta_rule, models.build("hybrid")
    with fast(model):
        assert modeling.torch_chunk_gated_delta_rule is not before
        with fast(model):  # leaves it to the outer block
            pass
        assert kvcore.hf.is_enabled(model)
    assert modeling.torch_chunk_gated_delta_rule is before
    with pytest.raises(KeyError), fast(model):
        raise KeyError
    assert modeling.torch_chunk_gated_delta_rule is before
    assert not kvcore.hf.is_enabled(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", models.NAMES)
def test_fast_models_train_the_same(name):
    tokens = torch.randint(0, models.VOCAB_SIZE, (2, 150))

    def make():
        torch.manual_seed(0)
        return models.build(name).train()

    def gradients(model):
        model(tokens, labels=tokens).loss.backward()
        return [p.grad for p in model.parameters()]

    expected, model = gradients(make()), make()
    with fast(model):
        actual = gradients(model)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-5)


def test_scaffold_attends_to_the_previous_tokens():
    torch.manual_seed(0)
    model = scaffold.scaffold_(models.build("control")).eval()
    model.set_attn_implementation("eager")
    tokens = torch.randint(0, models.VOCAB_SIZE, (2, 40))
    weights = model(tokens, output_attentions=True).attentions[0]
    for head, distance in ((0, 1), (1, 2)):
        met = weights[:, head].diagonal(-distance, 1, 2)
        assert met[:, 4:].mean() > 0.8


def test_sources_follow_equal_bytes():
    tokens = torch.tensor([[1, 2, 3, 9, 1, 2, 3, 8, 2, 3], [1] * 10])
    mask = induction._source_mask(tokens)
    for row in range(2):
        for i in range(10):
            for j in range(10):
                expected = j <= i and i >= 2 and j >= 3
                expected = expected and torch.equal(
                    tokens[row, i - 2 : i + 1], tokens[row, j - 3 : j]
                )
                assert mask[row, i, j] == expected


def test_graft_replaces_one_kv_head_and_finds_sources():
    model = models.load("control")
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    corpus = data.read_corpus(data.source_files(held_out=True))
    try:
        paid = induction.graft_(model, corpus, np.random.default_rng(0), iterations=60)
        changed = {
            k for k, weight in model.state_dict().items() if not torch.equal(weight, before[k])
        }
        prefix = f"model.layers.{model.config.num_hidden_layers - 1}.self_attn."
        assert changed == {f"{prefix}{x}_proj.weight" for x in "qkvo"}
        key = f"{prefix}k_proj.weight"
        assert torch.equal(model.state_dict()[key][:64], before[key][:64])
        assert paid > 0.5
    finally:
        model.load_state_dict(before)


def test_rate():
    recipe = train.Recipe(warmup_steps=10, decay_from=0.5, final_rate=0.1)
    assert train.rate(recipe, 0, 0.0) == pytest.approx(0.1)
    assert train.rate(recipe, 50, 0.5) == 1
    assert train.rate(recipe, 50, 0.75) == pytest.approx(0.5)
    assert train.rate(recipe, 50, 1.0) == pytest.approx(0.1)


def test_resuming_changes_nothing(tmp_path):
    corpus = data.read_corpus(data.source_files(held_out=True))
    record = {"text": {}, "held_out": {}}
    whole = train.Run("control", tmp_path / "whole", 1, train.RECIPE)
    for _ in range(2):
        whole.step(corpus)
    part = train.Run("control", tmp_path / "part", 1, train.RECIPE)
    part.step(corpus)
    part.save(record)
    resumed = train.Run("control", tmp_path / "part", 1, train.RECIPE)
    resumed.step(corpus)
    assert resumed.state["step"] == whole.state["step"] == 2
    assert resumed.state["sessions"] == 2
    for key, weight in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], weight), key
    exported = models.load(tmp_path / "part")
    for key, weight in exported.state_dict().items():
        assert torch.equal(weight, part.model.state_dict()[key].bfloat16().float()), key
    with pytest.raises(ValueError, match="holds a control checkpoint, not hybrid"):
        train.Run("hybrid", tmp_path / "part", 1, train.RECIPE)
