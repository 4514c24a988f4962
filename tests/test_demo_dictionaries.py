"""The demo models' dictionaries: what is shipped, its record, and what it was trained on."""

import dataclasses
import json

import pytest
import torch

import kvcore

pytest.importorskip("transformers")

from kvcore.cache import Dictionaries
from kvcore.demo import data, models, tasks, train_dictionaries
from kvcore.demo.fast import fast
from kvcore.eval.recording import recording

# Of K and V on held-out text, codes of 8 atoms. The largest are 0.105 and 0.054.
MAX_ERROR = {"k": 0.115, "v": 0.06}


@pytest.fixture(scope="module", params=models.NAMES)
def name(request):
    return request.param


def _report(name):
    return json.loads((models.path(name) / "dictionaries.json").read_text())


def test_dictionaries_are_the_models_and_of_its_training_text(name):
    made = Dictionaries.load(models.path(name))
    made.check_model(models.build_config(name))
    assert made.model_id == name
    recorded = models.training_record(name)["data"]
    assert made.text_sha256 == recorded["text"]["contents_sha256"]
    assert made.text_sha256 != recorded["held_out"]["contents_sha256"]
    assert made.notes["recipe"] == dataclasses.asdict(train_dictionaries.RECIPE)
    assert made.sparsity == train_dictionaries.RECIPE.sparsity


def test_dictionaries_are_small():
    sizes = [
        (models.path(name) / "dictionaries.safetensors").stat().st_size for name in models.NAMES
    ]
    assert sum(sizes) < 4 * 2**20


def test_report_is_of_the_dictionaries(name):
    report, made = _report(name), Dictionaries.load(models.path(name))
    assert report["settings"]["recipe"] == made.notes["recipe"]
    assert report["settings"]["source"]["tokens_sha256"] == made.notes["source"]["tokens_sha256"]
    assert [layer["layer"] for layer in report["layers"]] == list(made.layers)


def test_rows_are_of_training_files_and_of_the_models_tokens():
    rows, source = train_dictionaries.rows()
    names = data.source_files(held_out=False)
    assert source["text_sha256"] == data.describe(names)["contents_sha256"]
    corpus = data.read_corpus(names).tobytes()
    lengths = {len(row) for row in rows}
    assert lengths == {train_dictionaries.LONG_ROW, 2304}
    for row in rows[::8]:  # plain text
        assert bytes(row.tolist()) in corpus
    woven = torch.cat(rows)
    assert int(woven.max()) < models.VOCAB_SIZE
    assert (woven >= models.FIRST_KEY).float().mean() > 0.01


def test_codes_are_near_keys_and_values_of_held_out_text(name):
    model, made = models.load(name), Dictionaries.load(models.path(name))
    tokens = tasks.text_chunks(2, 1024)
    errors = {}

    def record(module, q, k, v, kwargs):
        pair = made[module.layer_idx]
        for kind, x, dictionary in (("k", k, pair.k), ("v", v, pair.v)):
            *code, _ = kvcore.lexico_encode(x, dictionary, sparsity=8)
            rebuilt = kvcore.lexico_reconstruct(*code, dictionary)
            error = (rebuilt - x).square().sum() / x.square().sum()
            errors[kind, module.layer_idx] = error.item()

    with torch.no_grad(), fast(model), recording(model, record):
        model(input_ids=tokens, use_cache=False)
    assert sorted(errors) == [(kind, layer) for kind in "kv" for layer in made.layers]
    largest = {kind: max(e for (k, _), e in errors.items() if k == kind) for kind in "kv"}
    assert largest["k"] < MAX_ERROR["k"]
    assert largest["v"] < MAX_ERROR["v"]
