"""The model type ``kvcore`` of lm-evaluation-harness: what it scores is read through the cache."""

import json
import os
import sys

import pytest
import torch

os.environ["HF_DATASETS_OFFLINE"] = "1"
pytest.importorskip("lm_eval", reason="pip install 'kvcore[eval]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kvcore import cli, lm_harness
from kvcore.cache import TurboCache
from kvcore.demo import models, tasks
from kvcore.eval import stepwise_scores
from kvcore.eval.caches import CacheChoice

PAIRS = 8


@pytest.fixture(scope="module")
def tokenizer():
    return models.tokenizer()


def _model(cache, **arguments):
    return lm_harness.KVCoreLM("control", cache=cache, device="cpu", **arguments)


@pytest.fixture(scope="module")
def plain(tokenizer):
    """The harness's own model on the same weights."""
    path = str(models.path("control"))
    return HFLM(path, tokenizer=tokenizer, dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def questions():
    """Recall: a text with pairs and a key, all answers that there are, and the right one."""
    asked = tasks.recall_prompts(3, num_pairs=PAIRS, min_distance=250, max_distance=320)
    rows = []
    for tokens, answers in zip(asked.tokens, asked.answers, strict=True):
        end = int(asked.query_positions[0]) + 1
        choices = [models.decode([value]) for value in sorted(set(answers.tolist()))]
        answer = models.decode(answers[:1].tolist())
        prompt = models.tokenizer().decode(tokens[:end].tolist())
        rows.append({"question": prompt, "choices": choices, "answer": answer})
    return rows


# ---- the tokenizer of the shipped models


def test_tokenizer_has_the_ids_of_the_models(tokenizer):
    every = bytes(range(256)) * 2
    text = "naïve 😀\n\tx  y\0" + every.decode("latin-1")
    assert tokenizer(text).input_ids == models.encode(text)
    ids = [100, *range(models.FIRST_KEY, models.VOCAB_SIZE), 101]
    assert tokenizer.decode(ids) == models.decode(ids)
    assert tokenizer(models.decode(ids)).input_ids == ids
    assert len(tokenizer) == models.VOCAB_SIZE
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


# ---- log-likelihoods


def _requests(*pairs):
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


@pytest.fixture(scope="module")
def requests(questions):
    text = tasks.source_prompt(400).text.decode()
    long = [(text[:200], text[200:300]), (text[:200], text[200:210]), ("", text[:150]), ("a", "b")]
    return [*long, *((row["question"], c) for row in questions[:2] for c in row["choices"][:3])]


def test_full_cache_is_what_the_harness_says(plain, requests):
    expected = plain.loglikelihood(_requests(*requests), disable_tqdm=True)
    found = _model("dynamic", chunk=7).loglikelihood(_requests(*requests), disable_tqdm=True)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=2e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_compressed_cache_is_scored_through_the_cache(requests):
    """A context prefilled but for its last token, and single steps from there, written out."""
    model = _model("turbo:2", chunk=1)
    found = model.loglikelihood(_requests(*requests), disable_tqdm=True)
    choice = CacheChoice(k_bits=2, v_bits=2)
    for (context, answer), (nats, greedy) in zip(requests, found, strict=True):
        ids = torch.tensor([models.encode(context) or [0]])
        if context.endswith(">"):
            ids = model.tokenizer(context, return_tensors="pt").input_ids
        wanted = model.tokenizer(answer).input_ids
        total, same = 0.0, True
        with choice.attention(model.model), torch.no_grad():
            cache = choice.make(model.model)
            if ids.shape[1] > 1:
                model.model(ids[:, :-1], past_key_values=cache)
            fed = ids[0, -1:]
            for token in wanted:
                logits = model.model(fed[None], past_key_values=cache).logits[0, -1]
                total += logits.log_softmax(-1)[token].item()
                same &= logits.argmax().item() == token
                fed = torch.tensor([token])
        assert nats == pytest.approx(total, abs=1e-3)
        assert greedy == same


@pytest.mark.parametrize("cache", ["dynamic", "turbo:2", "lexico:k7v4", "quantized:fp8"])
def test_answers_that_run_together_are_scored_as_if_alone(requests, cache):
    """Answers of 1 to 150 tokens: to one context some of one length, and some to none at all."""
    text = tasks.source_prompt(400).text.decode()
    asked = [*requests, *((text[:200], text[begin : begin + 70]) for begin in (200, 230, 260))]
    asked += [("", text[:70]), ("", text[100:170])]
    alone = _model(cache, batch_size=1).loglikelihood(_requests(*asked), disable_tqdm=True)
    model, sizes = _model(cache, batch_size=2), []
    score = model._score
    model._score = lambda *args: sizes.append(len(args[1])) or score(*args)
    together = model.loglikelihood(_requests(*asked[::-1]), disable_tqdm=True)
    assert sum(sizes) == len(asked)
    assert sizes.count(2) == 3  # of 70 tokens, and of both questions
    for (nats, greedy), (expected, same) in zip(together[::-1], alone, strict=True):
        assert nats == pytest.approx(expected, abs=1e-3)
        assert greedy == same


def test_answers_run_alone_where_one_would_change_another():
    model = _model("turbo:4:low_bit_heads=0.5", batch_size=4)
    assert model._answers_together(None) == 1
    assert _model("turbo:4", batch_size=4)._answers_together(None) == 4
    assert _model("turbo:4", batch_size="auto")._answers_together(None) == 1


def test_mixed_precision(requests):
    """The prompt is run in the precision of the steps: a cache takes one dtype."""
    model = _model("turbo:8", mixed_precision_dtype="bfloat16")
    found = model.loglikelihood(_requests(*requests[:2]), disable_tqdm=True)
    exact = _model("turbo:8").loglikelihood(_requests(*requests[:2]), disable_tqdm=True)
    assert [x for x, _ in found] == pytest.approx([x for x, _ in exact], rel=0.05)


def test_two_bits_change_log_likelihoods(plain, requests):
    """With one forward pass they would not; nor would they with a cache that returns nothing."""
    exact, two = (
        torch.tensor([nats for nats, _ in model.loglikelihood(_requests(*requests), True)])
        for model in (plain, _model("turbo:2"))
    )
    # The first context is longer than the 64 tokens that are kept exactly.
    assert (exact - two)[:2].abs().min() > 0.01


def test_a_broken_cache_shows(plain, requests, monkeypatch):
    """Values of zero, behind the 64 tokens that are kept exactly: no one forward pass sees it."""
    real = TurboCache.__init__

    def broken(self, *args, **kwargs):
        real(self, *args, **kwargs)
        for layer in self.layers:
            update = layer.update
            layer.update = lambda k, v, *a, u=update, **kw: u(k, v * 0, *a, **kw)

    model = _model("turbo:8")
    good = model.loglikelihood(_requests(requests[0]), disable_tqdm=True)
    monkeypatch.setattr(TurboCache, "__init__", broken)
    bad = model.loglikelihood(_requests(requests[0]), disable_tqdm=True)
    (expected,) = plain.loglikelihood(_requests(requests[0]), disable_tqdm=True)
    assert good[0][0] == pytest.approx(expected[0], abs=1)
    assert bad[0][0] < expected[0] - 20


def test_rolling(plain):
    text = tasks.source_prompt(700).text.decode()
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    expected = plain.loglikelihood_rolling(asked, disable_tqdm=True)
    assert _model("dynamic").loglikelihood_rolling(asked, True) == pytest.approx(expected, abs=0.01)
    two = _model("turbo:2").loglikelihood_rolling(asked, True)
    assert abs(two[0] - expected[0]) > 1
    # Windows of the length that the model is given, each with a token before it.
    short = HFLM(plain.model, tokenizer=plain.tokenizer, max_length=100)
    expected = short.loglikelihood_rolling(asked, disable_tqdm=True)
    found = _model("dynamic", max_length=100).loglikelihood_rolling(asked, True)
    assert found == pytest.approx(expected, abs=0.01)


def test_long_contexts_are_cut_from_the_left(plain):
    text = tasks.source_prompt(400).text.decode()
    model = _model("dynamic", max_length=64)
    (found,) = model.loglikelihood(_requests((text[:300], text[300:310])), disable_tqdm=True)
    ids = torch.tensor([models.encode(text[300 - 55 : 310])])
    scores = stepwise_scores(
        plain.model, lambda: CacheChoice("full").make(plain.model), ids, context_len=54
    )
    expected = scores[0].gather(-1, ids[0, 55:, None]).sum().item()
    assert found[0] == pytest.approx(expected, abs=1e-3)
    with pytest.raises(lm_harness.RefusedError, match=r"from 1 to 64 tokens .* got 80 after 10"):
        model.loglikelihood(_requests((text[:10], text[10:90])), disable_tqdm=True)


# ---- tasks


@pytest.fixture(scope="module")
def task_folder(questions, tmp_path_factory):
    """A task that generates and one that ranks answers, on the same local questions."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "questions.json"
    data.write_text("\n".join(json.dumps(row) for row in questions))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
    (folder / "say.yaml").write_text(
        "task: recall_say\noutput_type: generate_until\ndoc_to_target: answer\n"
        "generation_kwargs: {until: ['>>'], max_gen_toks: 1, do_sample: false}\n"
        "metric_list: [{metric: exact_match}]\n" + common
    )
    (folder / "rank.yaml").write_text(
        "task: recall_rank\noutput_type: multiple_choice\ndoc_to_choice: choices\n"
        'doc_to_target: "{{choices.index(answer)}}"\nmetric_list: [{metric: acc}]\n' + common
    )
    return folder


@pytest.fixture(scope="module")
def results(task_folder):
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)

    def run(model):
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=["recall_say", "recall_rank"],
            task_manager=manager,
            bootstrap_iters=0,
            verbosity="ERROR",
        )
        return found["results"], found["samples"]

    return run


def _said(samples):
    return [row["resps"][0][0] for row in samples["recall_say"]]


def _ranked(samples):
    return [[float(choice[0][0]) for choice in row["resps"]] for row in samples["recall_rank"]]


def test_tasks_with_the_full_cache_are_the_harness_s(plain, results):
    (expected, samples), (found, own) = results(plain), results(_model("dynamic", batch_size=4))
    for task in ("recall_say", "recall_rank"):
        assert {k: v for k, v in found[task].items() if k != "alias"} == {
            k: v for k, v in expected[task].items() if k != "alias"
        }
    assert expected["recall_rank"]["acc,none"] == 1
    assert expected["recall_say"]["exact_match,none"] == 1
    assert _said(own) == _said(samples)
    for one, other in zip(_ranked(own), _ranked(samples), strict=True):
        assert one == pytest.approx(other, abs=2e-3)


@pytest.mark.parametrize("cache", ["turbo:4", "lexico:k11v5:buffer_tokens=48"])
def test_tasks_read_the_cache(results, cache, monkeypatch):
    model = _model(cache, batch_size=4)
    found, samples = results(model)
    assert found["recall_rank"]["acc,none"] == found["recall_say"]["exact_match,none"] == 1
    made, real = [], CacheChoice.make
    monkeypatch.setattr(CacheChoice, "make", lambda *args: made.append(real(*args)) or made[-1])
    _, again = results(model)
    assert _ranked(again) == _ranked(samples)
    assert {type(cache).__name__ for cache in made} == {
        type(real(model.choice, model.model)).__name__
    }
    # One for the batch that is generated, and one for every four answers that are ranked: they are
    # single tokens.
    assert len(made) == 1 + sum(-(-len(row) // 4) for row in _ranked(again))
    assert all(layer.get_seq_length() > 250 for cache in made for layer in cache.layers)


def test_generation_with_a_broken_cache_fails(results, monkeypatch):
    def forgetful(self, k, v, *args, **kwargs):
        return real(self, k * 0, v * 0, *args, **kwargs)

    from kvcore.cache import TurboLayer

    real = TurboLayer.update
    monkeypatch.setattr(TurboLayer, "update", forgetful)
    found, _ = results(_model("turbo:8", batch_size=4))
    assert found["recall_say"]["exact_match,none"] < 0.5
    assert found["recall_rank"]["acc,none"] < 0.8


# ---- the command


def test_command(task_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvcore"])  # the harness reads it
    argv = ["lm-eval", "--model_args", "pretrained=control,cache=turbo:4", "--tasks"]
    argv += ["recall_say,recall_rank", "--include_path", str(task_folder), "--device", "cpu"]
    assert cli.main([*argv, "--output_path", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "kvcore" in out
    assert "recall_rank" in out
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["recall_rank"]["acc,none"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache": "turbo:5"}, "cache turbo:5: k_bits must be 8, 4 or 2, got 5"),
        ({"cache": "nothing"}, "cache must be one of: dynamic"),
        ({"cache": "kvpress:knorm:0.5"}, "kvpress:knorm:0.5: caches that evict tokens are for kvc"),
        ({"cache": "turbo:4", "chunk": 0}, "chunk must be at least 1, got 0"),
        ({"cache": "lexico", "dictionaries": "/no/such"}, "cache lexico: dictionaries: there are"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(lm_harness.RefusedError, match=message):
        _model(**arguments)


def test_hybrid_models_and_what_they_cannot_have():
    with pytest.raises(lm_harness.RefusedError, match="only supported for models with only full"):
        lm_harness.KVCoreLM("hybrid", cache="quantized:fp8", device="cpu")
    model = lm_harness.KVCoreLM("hybrid", cache="turbo:8", device="cpu")
    (found,) = model.loglikelihood(_requests(("def f(x):\n    ret", "urn")), disable_tqdm=True)
    assert found[1]


def test_command_reports_refusals_in_a_line(monkeypatch, capsys):
    def refuse():
        _model("turbo:5")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", refuse)
    monkeypatch.setattr(sys, "argv", ["kvcore"])
    assert cli.main(["lm-eval", "--tasks", "x", "--model_args", "pretrained=control"]) == 2
    words = ["run", "--model", "kvcore", "--tasks", "x", "--model_args", "pretrained=control"]
    assert sys.argv == ["lm-eval", *words]
    assert "kvcore lm-eval: cache turbo:5: k_bits must be" in capsys.readouterr().err


def test_command_without_the_harness(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "kvcore.lm_harness")
    monkeypatch.delattr("kvcore.lm_harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    assert cli.main(["lm-eval", "--tasks", "x"]) == 2
    assert "pip install 'kvcore[eval]'" in capsys.readouterr().err
