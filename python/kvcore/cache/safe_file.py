"""Files that are read by strangers' programs and may be written by them: safetensors, never pickle.

The metadata of a file are ``format``, ``version``, ``digest`` and a few JSON texts, its *parts*.
The digest is the SHA-256 of all else, so a damaged file is refused whatever was hit; a file made by
a stranger has a right digest, so whoever reads one checks every value as well.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvcore.cache.checks import MAX_INT, is_int


def digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the metadata, without the digest, and all tensors with their forms."""
    form = {name: (str(t.dtype), list(t.shape)) for name, t in tensors.items()}
    stated = {name: text for name, text in metadata.items() if name != "digest"}
    sha = hashlib.sha256(json.dumps([stated, form], sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


@dataclasses.dataclass(frozen=True)
class FileKind:
    """A kind of file; its checks name the kind and raise its error."""

    name: str
    error: type[ValueError]
    format: str
    version: str
    parts: tuple[str, ...]

    def check(self, holds: object, field: str, expected: object, actual: object) -> None:
        """Refuses the file unless ``holds``, naming the field."""
        if not holds:
            text = str(actual)
            text = text if len(text) <= 120 else text[:117] + "..."
            raise self.error(f"{self.name}: {field} must be {expected}, got {text}")

    def get_int(self, values: dict, name: str, field: str, low: int, high: int = MAX_INT) -> int:
        value = values.get(name)
        self.check(is_int(value, low, high), f"{field}.{name}", f"an int in [{low}, {high}]", value)
        return value

    def get_ints(
        self, values: dict, name: str, field: str, low: int, high: int = MAX_INT
    ) -> list[int]:
        items = values.get(name)
        holds = isinstance(items, list) and all(is_int(item, low, high) for item in items)
        self.check(holds, f"{field}.{name}", f"a list of ints in [{low}, {high}]", items)
        return items

    def check_names(self, values: dict, names: set[str], field: str) -> None:
        self.check(isinstance(values, dict), field, "an object", values)
        extra, missing = sorted(values.keys() - names), sorted(names - values.keys())
        self.check(
            not extra and not missing, field, f"an object of {sorted(names)}", sorted(values)
        )

    def check_forms(self, tensors: dict[str, Tensor], forms: dict[str, tuple]) -> None:
        """Checks names, dtypes and shapes: ``forms`` has a dtype, or several, and a shape each."""
        self.check_names(tensors, set(forms), "tensors")
        for name, (dtype, shape) in forms.items():
            actual = (tensors[name].dtype, list(tensors[name].shape))
            wanted = dtype if isinstance(dtype, tuple) else (dtype,)
            self.check(actual[0] in wanted and actual[1] == shape, name, f"{dtype} {shape}", actual)

    def parse_json(self, metadata: dict[str, str], name: str, kind: type) -> object:
        try:
            value = json.loads(metadata[name])
        except (ValueError, RecursionError) as error:
            raise self.error(f"{self.name}: {name} must be JSON, got {error}") from error
        self.check(isinstance(value, kind), name, f"JSON of a {kind.__name__}", metadata[name])
        return value

    def write(
        self, path: str | os.PathLike, parts: dict[str, object], tensors: dict[str, Tensor], op: str
    ) -> None:
        """Writes a file; under its name there is the whole of it or what was there before.

        Args:
            path: the file.
            parts: one object for each of the kind's parts.
            tensors: on the CPU.
            op: who writes, for the error.
        """
        metadata = {"format": self.format, "version": self.version}
        metadata |= {name: json.dumps(parts[name]) for name in self.parts}
        # A tensor of its own memory each: safetensors refuses views of one.
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        metadata["digest"] = digest(metadata, tensors)
        target = pathlib.Path(path)
        partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
        try:
            save_file(tensors, partial, metadata=metadata)
            os.replace(partial, target)
        except SafetensorError as error:
            raise OSError(f"{op}: {target} cannot be written: {error}") from error
        finally:
            partial.unlink(missing_ok=True)

    def read(self, path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
        """Metadata and tensors of a file whose digest is right."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                kind = metadata.get("format")
                self.check(kind == self.format, "format", repr(self.format), repr(kind))
                version = metadata.get("version")
                self.check(version == self.version, "version", self.version, version)
                names = {"format", "version", "digest", *self.parts}
                self.check_names(metadata, names, "metadata")
                # Copies: what safetensors returns may be the file's own memory.
                tensors = {
                    name: file.get_tensor(name).clone()
                    for name in file.keys()  # noqa: SIM118
                }
        except FileNotFoundError:
            raise
        except (SafetensorError, OSError, UnicodeError, KeyError, RuntimeError) as error:
            raise self.error(f"{self.name}: {path} cannot be read: {error}") from error
        found = digest(metadata, tensors)
        stated = metadata["digest"]
        self.check(found == stated, "digest", f"{found}, that of the content", stated)
        return metadata, tensors
