"""Training of dictionaries: the gradient, the capture, what codes are compared with."""

import dataclasses

import pytest
import torch

import kvcore

transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402
from kvcore.eval.recording import recording  # noqa: E402
from kvcore.lexico_training import comparison  # noqa: E402
from kvcore.lexico_training.capture import capture_row, plan  # noqa: E402
from kvcore.lexico_training.trainer import DictionaryTrainer, dictionary_gradient  # noqa: E402
from training_cases import SMALL, make_rows  # noqa: E402


def _planted(num_vectors=4096, atoms=96, sparsity=4, head_dim=64):
    """Vectors that are sums of a few atoms of a dictionary, and the dictionary."""
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(atoms, head_dim, generator=generator)
    dictionary /= dictionary.norm(dim=1, keepdim=True)
    values = torch.randn(num_vectors, sparsity, generator=generator)
    chosen = torch.rand(num_vectors, atoms, generator=generator).topk(sparsity).indices
    return (values[:, :, None] * dictionary[chosen]).sum(1), dictionary


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
    model, rows = hf_models.model(name), make_rows(4)
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
    model, (row, *_) = hf_models.model("llama"), make_rows(2)
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


# ---- what codes are compared with


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
