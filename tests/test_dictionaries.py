"""Dictionaries: what they know, what they refuse, and their files."""

import copy
import pickle

import pytest
import torch

import hf_models
from cache_files import rewrite
from hf_models import HYBRID_NAMES, needs_hybrids
from kvcore.cache import Dictionaries, DictionaryFileError
from lexico_cases import make_dictionary

SHA = "ab" * 32


def make_pairs(layers=(0, 1), atoms=(70, 90), head_dim=64):
    return {i: tuple(make_dictionary(n, head_dim, seed=10 * i + n) for n in atoms) for i in layers}


def make(name="llama", **arguments):
    config = hf_models.config(name)
    layers = [1] if name in HYBRID_NAMES else [0, 1]
    given = {"sparsity": 8, "model_id": "tiny", "text_sha256": SHA, "notes": {"epochs": 3}}
    return Dictionaries(make_pairs(layers), config, **{**given, **arguments})


@pytest.mark.parametrize("name", hf_models.NAMES)
@pytest.mark.parametrize("as_folder", [True, False])
def test_files_give_back_what_was_saved(tmp_path, name, as_folder):
    dictionaries = make(name)
    path = tmp_path if as_folder else tmp_path / "file"
    dictionaries.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [
        "dictionaries.safetensors" if as_folder else "file"
    ]
    loaded = Dictionaries.load(path)
    assert loaded.layers == dictionaries.layers
    for layer in loaded.layers:
        assert torch.equal(loaded[layer].k, dictionaries[layer].k)
        assert torch.equal(loaded[layer].v, dictionaries[layer].v)
    for fact in ("model", "model_id", "text_sha256", "sparsity", "head_dim", "kv_heads", "notes"):
        assert getattr(loaded, fact) == getattr(dictionaries, fact), fact
    assert loaded.fingerprint() == dictionaries.fingerprint()
    assert loaded.nbytes() == len(loaded.layers) * (70 + 90) * 64 * 4
    assert loaded.atoms() == dict.fromkeys(loaded.layers, (70, 90))
    loaded.check_model(hf_models.config(name))


def test_fingerprints_are_of_the_atoms():
    one, other = make(), make(sparsity=3, model_id="another")
    assert one.fingerprint() == other.fingerprint()
    pairs = make_pairs()
    pairs[1] = (pairs[1][0], -pairs[1][1])
    other = Dictionaries(pairs, hf_models.config("llama"), sparsity=8)
    assert one.fingerprint() != other.fingerprint()


def test_copies_share_the_atoms():
    dictionaries = make()
    assert copy.deepcopy(dictionaries) is dictionaries
    assert dictionaries.to("cpu") is dictionaries
    other = pickle.loads(pickle.dumps(dictionaries))
    assert torch.equal(other[1].v, dictionaries[1].v)
    assert dictionaries.to("meta")[0].k.device.type == "meta"


def pairs_with(layer, kv_idx, change):
    pairs = make_pairs()
    both = list(pairs[layer])
    both[kv_idx] = change(both[kv_idx])
    pairs[layer] = tuple(both)
    return pairs


def longer(atoms):
    atoms = atoms.clone()
    atoms[5] *= 1.001
    return atoms


def poisoned(atoms):
    atoms = atoms.clone()
    atoms[5, 3] = torch.nan
    return atoms


@pytest.mark.parametrize(
    ("pairs", "arguments", "message"),
    [
        (make_pairs([0]), {}, r"pairs must be of the attention layers \[0, 1\], got \[0\]"),
        (make_pairs([0, 1, 2]), {}, r"pairs must be of the attention layers \[0, 1\], got \[0, 1"),
        (make_pairs(head_dim=96), {}, r"pairs\[0\].k must be fp32 \[atoms, 64\] of 1 to 32768"),
        (pairs_with(1, 1, lambda x: x.half()), {}, r"pairs\[1\].v must be fp32 .* got torch.float"),
        (pairs_with(1, 0, lambda x: x[0]), {}, r"pairs\[1\].k must be fp32 .*, got .* \[64\]"),
        (pairs_with(0, 1, lambda x: x[:0]), {}, r"pairs\[0\].v must be fp32 .*, got .* \[0, 64\]"),
        (pairs_with(0, 1, longer), {}, r"pairs\[0\].v must be of atoms of norm 1 .* 1.001 of atom"),
        (pairs_with(0, 0, poisoned), {}, r"pairs\[0\].k must be of atoms of norm 1 .* nan of atom"),
        (make_pairs(), {"sparsity": 0}, r"sparsity must be an int in \[1, 64\], got 0"),
        (make_pairs(), {"sparsity": 65}, r"sparsity must be an int in \[1, 64\], got 65"),
        (make_pairs(), {"sparsity": 8.0}, r"sparsity must be an int in \[1, 64\], got 8.0"),
        (make_pairs(atoms=(70, 5)), {}, r"sparsity must be an int in \[1, 5\], got 8"),
        (make_pairs(), {"model_id": None}, "model_id must be a str, got None"),
        (make_pairs(), {"text_sha256": "ab"}, "text_sha256 must be 64 hexadecimal digits"),
    ],
)
def test_rejects(pairs, arguments, message):
    with pytest.raises(ValueError, match=message):
        Dictionaries(pairs, hf_models.config("llama"), **{"sparsity": 8, **arguments})


def test_rejects_a_model_without_kernels():
    config = hf_models.config("llama", head_dim=80)
    with pytest.raises(ValueError, match="config must be of a model with head_dim 64, 96, 128 or"):
        Dictionaries(make_pairs(head_dim=80), config, sparsity=8)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_size": 128}, "model.hidden_size must be 128 as the config has it, got 64"),
        ({"num_key_value_heads": 1}, "model.num_key_value_heads must be 1"),
        ({"head_dim": 128}, "model.head_dim must be 128"),
        ({"num_hidden_layers": 3}, "model.num_hidden_layers must be 3"),
    ],
)
def test_refuses_other_models(change, field):
    with pytest.raises(ValueError, match=f"Dictionaries: {field}"):
        make().check_model(hf_models.config("llama", **change))
    with pytest.raises(ValueError, match=r"model.model_type must be 'qwen3' as"):
        make().check_model(hf_models.config("qwen3"))


@needs_hybrids
def test_refuses_the_layers_of_another_model():
    name = "qwen3_next"
    other = hf_models.config(name, layer_types=["full_attention", "linear_attention"])
    with pytest.raises(ValueError, match=r"model.layer_types must be \['full_attention', 'linear"):
        make(name).check_model(other)


# ---- files that are not right


def changed(change):
    """A change of the facts, for `rewrite`."""
    return lambda metadata, parts, tensors: change(metadata, parts["dictionaries"], tensors)


def fact(**values):
    return lambda metadata, facts, tensors: facts.update(values)


def tensor(name, change):
    def go(metadata, facts, tensors):
        tensors[name] = change(tensors[name])

    return go


REFUSED = [
    (lambda m, f, t: m.update(format="kvcore-cache"), "format must be 'kvcore-dictionaries', got"),
    (lambda m, f, t: m.update(version="2"), "version must be 1, got 2"),
    (lambda m, f, t: m.update(extra="1"), "metadata must be"),
    (lambda m, f, t: m.pop("notes"), "metadata must be"),
    (lambda m, f, t: m.update(notes="["), "notes must be JSON"),
    (lambda m, f, t: m.update(model="[]"), "model must be JSON of a dict"),
    (lambda m, f, t: f.pop("sparsity"), "dictionaries must be an object of"),
    (fact(more=1), "dictionaries must be an object of"),
    (fact(model_id=3), "dictionaries.model_id must be a string, got 3"),
    (fact(text_sha256="x" * 64), "dictionaries.text_sha256 must be 64 hexadecimal digits"),
    (fact(sparsity=0), r"dictionaries.sparsity must be an int in \[1, 64\], got 0"),
    (fact(sparsity=71), r"dictionaries.sparsity must be an int in \[1, 64\], got 71"),
    (fact(sparsity=True), "dictionaries.sparsity must be an int"),
    (fact(head_dim=65), "dictionaries.head_dim must be 64, 96, 128 or 256, got 65"),
    (fact(head_dim=128), r"layers.0.k must be torch.float32 \[70, 128\]"),
    (fact(kv_heads=0), "dictionaries.kv_heads must be an int in"),
    (fact(layers=[1, 0]), r"dictionaries.layers must be ascending, got \[1, 0\]"),
    (fact(layers=[0, 0]), "dictionaries.layers must be ascending"),
    (fact(layers=[0]), "dictionaries.atoms must be 1 pairs"),
    (fact(layers="01"), "dictionaries.layers must be a list of ints"),
    (fact(layers=[0, 2]), "tensors must be an object"),
    (fact(atoms=[[70, 90], [70]]), r"dictionaries.atoms\[1\] must be two ints in \[1, 32768\]"),
    (fact(atoms=[[70, 90], [0, 90]]), r"dictionaries.atoms\[1\] must be two ints"),
    (fact(atoms=[[70, 90], [70, 10**9]]), r"dictionaries.atoms\[1\] must be two ints"),
    (fact(atoms=[[70, 90], [71, 90]]), r"layers.1.k must be torch.float32 \[71, 64\]"),
    (lambda m, f, t: t.pop("layers.1.v"), "tensors must be an object"),
    (tensor("layers.1.v", lambda x: x.half()), r"layers.1.v must be torch.float32 \[90, 64\]"),
    (
        tensor("layers.1.v", longer),
        r"layers.1.v must be of atoms of norm 1 \(to 0.0001\), got norm",
    ),
    (tensor("layers.0.k", poisoned), "layers.0.k must be of atoms of norm 1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused(tmp_path, change, message):
    make().save(tmp_path / "file")
    rewrite(tmp_path / "file", tmp_path / "changed", changed(change), names=("dictionaries",))
    with pytest.raises(DictionaryFileError, match=f"dictionary file: {message}"):
        Dictionaries.load(tmp_path / "changed")


def test_damaged_files(tmp_path):
    """What else can be wrong with a file: test_cache_files_fuzz.py."""
    make().save(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    cut = "dictionary file: .* cannot be read: "
    digest = "dictionary file: digest must be"
    flipped = bytearray(content)
    flipped[-5] ^= 1
    for name, changed, message in (
        ("cut", content[:-1000], cut),
        ("header", content[:300], cut),
        ("flipped", bytes(flipped), digest),
    ):
        (tmp_path / name).write_bytes(changed)
        with pytest.raises(DictionaryFileError, match=message):
            Dictionaries.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        Dictionaries.load(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError):
        Dictionaries.load(tmp_path / "empty")


def test_saving_fails_as_a_whole(tmp_path):
    (tmp_path / "file").write_bytes(b"what was there")
    with pytest.raises(TypeError):
        make(notes={"bad": object()}).save(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"what was there"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(OSError, match=r"Dictionaries.save: .* cannot be written"):
        make().save(tmp_path / "none" / "file")
