"""The dictionaries that a :class:`kvcore.cache.LexicoCache` codes K and V with."""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from kvcore.cache.checks import is_int
from kvcore.cache.lexico_settings import MAX_ATOMS, MAX_SPARSITY
from kvcore.cache.model_facts import attention_layers, head_dim_of, kv_heads_of, model_facts
from kvcore.cache.safe_file import FileKind
from kvcore.cache.settings import HEAD_DIMS

# What the ops accept, csrc/lexico/layout.h.
NORM_TOLERANCE = 1e-4

FILE_NAME = "dictionaries.safetensors"
_FACTS = {"model_id", "text_sha256", "sparsity", "head_dim", "kv_heads", "layers", "atoms"}


class DictionaryFileError(ValueError):
    """A file of dictionaries that is damaged, or not a file of dictionaries."""


FILE = FileKind(
    "dictionary file",
    DictionaryFileError,
    "kvcore-dictionaries",
    "1",
    ("model", "dictionaries", "notes"),
)


class Pair(NamedTuple):
    """K's and V's dictionary of a layer, fp32 ``[atoms, head_dim]``, rows of norm 1."""

    k: Tensor
    v: Tensor

    def __deepcopy__(self, memo: dict) -> Pair:
        return self

    def to(self, device: torch.device | str) -> Pair:
        return Pair(*(tensor.to(device) for tensor in self))


class Dictionaries:
    """K's and V's dictionary of every attention layer of a model (arXiv 2412.08890, section 3).

    One pair serves all heads and requests of its layer. K's is of keys after their rotary
    embedding. The tensors are not to be changed: caches share them, and copies of caches too.

    Args:
        pairs: for each attention layer of the model, by its number, K's and V's dictionary, fp32
            ``[atoms, head_dim]``, rows of norm 1 (to 1e-4), at most 32,768 of them.
        config: the model's configuration.
        sparsity: atoms of a code in training; what caches use unless they are told otherwise.
        model_id: name of the model or path it was read from.
        text_sha256: of the text that K and V came from, 64 hexadecimal digits.
        notes: whatever else is to be kept, JSON values by name.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        pairs: Mapping[int, tuple[Tensor, Tensor]],
        config: PretrainedConfig,
        *,
        sparsity: int,
        model_id: str = "",
        text_sha256: str = "",
        notes: dict | None = None,
    ) -> None:
        expected = attention_layers(config)
        _check(
            tuple(sorted(pairs)) == expected,
            "pairs",
            f"of the attention layers {list(expected)}",
            sorted(pairs),
        )
        head_dim = head_dim_of(config)
        _check(head_dim in HEAD_DIMS, "config", f"of a model with head_dim {_HEAD_DIMS}", head_dim)
        held = {}
        for layer in expected:
            held[layer] = Pair(*(tensor.detach() for tensor in pairs[layer]))
            for name, tensor in zip("kv", held[layer], strict=True):
                field = f"pairs[{layer}].{name}"
                holds = (
                    tensor.dtype == torch.float32
                    and tensor.ndim == 2
                    and 1 <= tensor.shape[0] <= MAX_ATOMS
                    and tensor.shape[1] == head_dim
                )
                form = f"fp32 [atoms, {head_dim}] of 1 to {MAX_ATOMS} atoms"
                _check(holds, field, form, f"{tensor.dtype} {list(tensor.shape)}")
                _check(*norms(tensor, field))
        _check(*_sparsity(sparsity, held))
        _check(isinstance(model_id, str), "model_id", "a str", repr(model_id))
        _check(_is_sha256(text_sha256), "text_sha256", _SHA256, repr(text_sha256))
        self._adopt(
            held,
            model_facts(config),
            {
                "model_id": model_id,
                "text_sha256": text_sha256,
                "sparsity": sparsity,
                "head_dim": head_dim,
                "kv_heads": kv_heads_of(config),
            },
            dict(notes or {}),
        )

    def _adopt(self, pairs: dict[int, Pair], model: dict, facts: dict, notes: dict) -> None:
        self._pairs = {i: Pair(*(t.contiguous() for t in pair)) for i, pair in pairs.items()}
        self._moved: dict[tuple[int, torch.device], Pair] = {}
        self.layers = tuple(self._pairs)
        self.model = model
        self.model_id: str = facts["model_id"]
        self.text_sha256: str = facts["text_sha256"]
        self.sparsity: int = facts["sparsity"]
        self.head_dim: int = facts["head_dim"]
        self.kv_heads: int = facts["kv_heads"]
        self.notes = notes
        self._fingerprint: str | None = None

    def __deepcopy__(self, memo: dict) -> Dictionaries:
        return self

    def __getitem__(self, layer: int) -> Pair:
        """K's and V's dictionary of a layer of the model."""
        return self._pairs[layer]

    def atoms(self) -> dict[int, tuple[int, int]]:
        """Atoms of K's and of V's dictionary, by layer."""
        return {i: (pair.k.shape[0], pair.v.shape[0]) for i, pair in self._pairs.items()}

    def largest_sparsity(self) -> int:
        """The most atoms that a code may have: 64, and no more than atoms or channels."""
        return _largest_sparsity(self._pairs)

    def nbytes(self) -> int:
        """Bytes of all dictionaries."""
        return sum(tensor.nbytes for pair in self._pairs.values() for tensor in pair)

    @property
    def device(self) -> torch.device:
        return next((pair.k.device for pair in self._pairs.values()), torch.device("cpu"))

    def fingerprint(self) -> str:
        """SHA-256 of the atoms: codes are of use with these dictionaries only."""
        if self._fingerprint is None:
            sha = hashlib.sha256()
            for layer, pair in self._pairs.items():
                sha.update(f"{layer} {list(pair.k.shape)} {list(pair.v.shape)}".encode())
                for tensor in pair:
                    sha.update(tensor.cpu().numpy())
            self._fingerprint = sha.hexdigest()
        return self._fingerprint

    def to(self, device: torch.device | str) -> Dictionaries:
        """The same dictionaries on a device; itself if they are there."""
        if torch.device(device) == self.device:
            return self
        moved = object.__new__(Dictionaries)
        vars(moved).update(vars(self))
        moved._pairs = {i: pair.to(device) for i, pair in self._pairs.items()}
        moved._moved = {}
        return moved

    def pair(self, layer: int, device: torch.device) -> Pair:
        """K's and V's dictionary of a layer on a device; copied there once for all caches."""
        home = self._pairs[layer]
        if home.k.device == device:
            return home
        if (layer, device) not in self._moved:
            self._moved[layer, device] = home.to(device)
        return self._moved[layer, device]

    def check_model(self, config: PretrainedConfig) -> None:
        """Refuses a model whose facts are not those of the model that these are of.

        Which weights it has cannot be known: a fine-tuned model may well use the dictionaries of
        the one it came from.

        Raises:
            ValueError: naming the fact.
        """
        for name, value in model_facts(config).items():
            known = self.model.get(name)
            _check(known == value, f"model.{name}", f"{value!r} as the config has it", repr(known))
        layers, head_dim = attention_layers(config), head_dim_of(config)
        expected = f"the model's attention layers {list(layers)}"
        _check(self.layers == layers, "layers", expected, list(self.layers))
        _check(self.head_dim == head_dim, "head_dim", f"the model's {head_dim}", self.head_dim)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, into a folder as ``dictionaries.safetensors``."""
        facts = {
            "model_id": self.model_id,
            "text_sha256": self.text_sha256,
            "sparsity": self.sparsity,
            "head_dim": self.head_dim,
            "kv_heads": self.kv_heads,
            "layers": list(self.layers),
            "atoms": [list(count) for count in self.atoms().values()],
        }
        tensors = {
            f"layers.{i}.{name}": tensor.cpu()
            for i, pair in self._pairs.items()
            for name, tensor in zip("kv", pair, strict=True)
        }
        parts = {"model": self.model, "dictionaries": facts, "notes": self.notes}
        FILE.write(_file(path), parts, tensors, "Dictionaries.save")

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: torch.device | str = "cpu") -> Dictionaries:
        """Reads what :meth:`save` wrote, a file or the folder that it is in.

        Raises:
            DictionaryFileError: a ValueError, naming the field.
        """
        metadata, tensors = FILE.read(_file(path))
        model = FILE.parse_json(metadata, "model", dict)
        facts = FILE.parse_json(metadata, "dictionaries", dict)
        notes = FILE.parse_json(metadata, "notes", dict)
        _check_facts(facts)
        head_dim, layers = facts["head_dim"], facts["layers"]
        forms = {
            f"layers.{layer}.{name}": (torch.float32, [count, head_dim])
            for layer, counts in zip(layers, facts["atoms"], strict=True)
            for name, count in zip("kv", counts, strict=True)
        }
        FILE.check_forms(tensors, forms)
        for name, tensor in tensors.items():
            holds, field, expected, actual = norms(tensor, name)
            FILE.check(holds, field, expected, actual)
        pairs = {i: Pair(*(tensors[f"layers.{i}.{name}"] for name in "kv")) for i in layers}
        holds, field, expected, actual = _sparsity(facts["sparsity"], pairs)
        FILE.check(holds, f"dictionaries.{field}", expected, actual)
        loaded = object.__new__(cls)
        loaded._adopt(pairs, model, facts, notes)
        return loaded.to(device)


_HEAD_DIMS = f"{', '.join(map(str, HEAD_DIMS[:-1]))} or {HEAD_DIMS[-1]}"
_SHA256 = "64 hexadecimal digits or empty"


def _file(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    return path / FILE_NAME if path.is_dir() else path


def _check(holds: object, name: str, expected: object, actual: object) -> None:
    if not holds:
        raise ValueError(f"Dictionaries: {name} must be {expected}, got {actual}")


def _is_sha256(value: object) -> bool:
    if not isinstance(value, str) or len(value) not in (0, 64):
        return False
    return set(value) <= set("0123456789abcdef")


def norms(atoms: Tensor, field: str) -> tuple[bool, str, str, str]:
    """Arguments of a check that every atom has norm 1: matching pursuit takes it for 1."""
    off = (atoms.double().norm(dim=1) - 1).abs()
    # NaN is not below the bound either.
    wrong = (~(off <= NORM_TOLERANCE)).nonzero()[:, 0].tolist()
    actual = (
        f"norm {float(atoms[wrong[0]].double().norm()):.6g} of atom {wrong[0]}" if wrong else ""
    )
    return not wrong, field, f"of atoms of norm 1 (to {NORM_TOLERANCE:g})", actual


def _sparsity(sparsity: object, pairs: dict[int, Pair]) -> tuple[bool, str, str, object]:
    """Arguments of a check that codes may have so many atoms."""
    limit = _largest_sparsity(pairs)
    return is_int(sparsity, 1, limit), "sparsity", f"an int in [1, {limit}]", repr(sparsity)


def _largest_sparsity(pairs: dict[int, Pair]) -> int:
    sizes = [size for pair in pairs.values() for tensor in pair for size in tensor.shape]
    return min([MAX_SPARSITY, *sizes])


def _check_facts(facts: dict) -> None:
    """What a file says of its tensors, before they are looked at."""
    field = "dictionaries"
    FILE.check_names(facts, _FACTS, field)
    model_id = facts["model_id"]
    FILE.check(isinstance(model_id, str), f"{field}.model_id", "a string", model_id)
    sha = facts["text_sha256"]
    FILE.check(_is_sha256(sha), f"{field}.text_sha256", _SHA256, sha)
    head_dim = FILE.get_int(facts, "head_dim", field, 1)
    FILE.check(head_dim in HEAD_DIMS, f"{field}.head_dim", _HEAD_DIMS, head_dim)
    FILE.get_int(facts, "kv_heads", field, 1, 1 << 16)
    layers = FILE.get_ints(facts, "layers", field, 0, 1 << 16)
    FILE.check(layers == sorted(set(layers)), f"{field}.layers", "ascending", layers)
    atoms = facts["atoms"]
    holds = isinstance(atoms, list) and len(atoms) == len(layers)
    FILE.check(holds, f"{field}.atoms", f"{len(layers)} pairs", atoms)
    for i, counts in enumerate(atoms):
        holds = isinstance(counts, list) and len(counts) == 2
        holds = holds and all(is_int(count, 1, MAX_ATOMS) for count in counts)
        FILE.check(holds, f"{field}.atoms[{i}]", f"two ints in [1, {MAX_ATOMS}]", counts)
