"""Caches by their written names: ``turbo:k4v2``, ``lexico:k7v4:buffer_tokens=48``.

KIND[:WIDTH][:NAME=VALUE]..., several of them with commas between. README and docs/eval.md have the
list; `HELP` is it in a few lines.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from kvcore.eval.caches import FULL, CacheChoice
from kvcore.eval.peers import PRESSES, PressChoice, QuantizedChoice

HELP = (
    "dynamic (the full cache); turbo:8, turbo:4, turbo:2, turbo:k4v2; lexico, or with its "
    "sparsities lexico:8, lexico:k7v4; quantized:fp8, quantized:quanto4, quantized:hqq4 (of "
    f"transformers); kvpress:METHOD:SHARE, which evicts that share (METHOD is one of "
    f"{', '.join(PRESSES)}). Settings follow as :NAME=VALUE, such as turbo:4:sink_pages=0"
)
# What is measured unless caches are named: those of the demo, and transformers' own.
DEFAULT = (
    "dynamic,turbo:8,turbo:4,turbo:k4v2,turbo:2,lexico:k11v5:buffer_tokens=48:encode_tokens=16,"
    "lexico:k7v4:buffer_tokens=48:encode_tokens=16,quantized:fp8,quantized:quanto4,quantized:quanto2,"
    "kvpress:snapkv:0.5,kvpress:streamingllm:0.5"
)
_TYPES = {"int": int, "int | None": int, "float": float, "bool": None}
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_OWN = {
    "turbo": ("sink_pages", "low_bit_heads", "balance", "subtract_mean"),
    "lexico": ("k_tolerance", "v_tolerance", "buffer_tokens", "encode_tokens", "dictionaries"),
}


def _settings(kind: str, words: list[str], spec: str) -> dict[str, Any]:
    types = {field.name: field.type for field in dataclasses.fields(CacheChoice)}
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in _OWN.get(kind, ()):
            allowed = ", ".join(f"{own}=..." for own in _OWN.get(kind, ())) or "nothing more"
            raise ValueError(f"cache {spec}: {kind} takes {allowed}; got {word!r}")
        if name == "dictionaries":
            found[name] = text
            continue
        try:
            found[name] = _BOOLS[text] if types[name] == "bool" else _TYPES[types[name]](text)
        except (KeyError, ValueError) as error:
            expected = {"bool": "true or false", "float": "a number"}.get(types[name], "an integer")
            raise ValueError(f"cache {spec}: {name} must be {expected}, got {text!r}") from error
    return found


def _pair(word: str, spec: str) -> tuple[int, int]:
    """``8`` and ``k4v2`` as a number for K and one for V."""
    match = re.fullmatch(r"(\d+)|k(\d+)v(\d+)", word)
    if match is None:
        raise ValueError(
            f"cache {spec}: after the kind must come a number, or one for K and one for V such as "
            f"k4v2; got {word!r}"
        )
    k, v = match[1] or match[2], match[1] or match[3]
    return int(k), int(v)


def _press(name: str, share: str, spec: str) -> PressChoice:
    try:
        ratio = float(share)
    except ValueError as error:
        raise ValueError(f"cache {spec}: the share must be a number, got {share!r}") from error
    try:
        return PressChoice(name, ratio)
    except ValueError as error:
        raise ValueError(f"cache {spec}: {error}") from error


def parse(spec: str, dictionaries: str | None = None) -> Any:
    """The cache that `spec` names.

    Args:
        spec: see the module.
        dictionaries: folder or file of Lexico's, where the spec itself says nothing of them; None:
            beside the model's weights.

    Raises:
        ValueError: naming the spec, what was expected and what came.
    """
    kind, *words = spec.split(":")
    if kind == "dynamic" and not words:
        return FULL
    if kind == "quantized" and len(words) == 1:
        match = re.fullmatch(r"(fp8)|(quanto|hqq)(\d+)", words[0])
        if match:
            return QuantizedChoice(match[1] or match[2], int(match[3]) if match[3] else None)
    if kind == "kvpress" and len(words) == 2:
        return _press(*words, spec)
    if kind not in ("turbo", "lexico"):
        raise ValueError(f"cache must be one of: {HELP}; got {spec!r}")
    sizes = _pair(words.pop(0), spec) if words and "=" not in words[0] else None
    settings = _settings(kind, words, spec)
    if kind == "turbo":
        k_bits, v_bits = sizes or (4, 4)
        settings |= {"k_bits": k_bits, "v_bits": v_bits}
    else:
        settings.setdefault("dictionaries", dictionaries)
        if sizes:
            settings |= {"k_sparsity": sizes[0], "v_sparsity": sizes[1]}
    try:
        return CacheChoice(kind, **settings)
    except ValueError as error:
        raise ValueError(f"cache {spec}: {str(error).split(': ', 1)[-1]}") from error


def parse_all(specs: str, dictionaries: str | None = None) -> dict[str, Any]:
    """The caches of a list with commas, by their specs.

    Raises:
        ValueError: as `parse`, and for a cache that is named twice.
    """
    found: dict[str, Any] = {}
    for spec in (word.strip() for word in specs.split(",")):
        if spec in found:
            raise ValueError(f"cache {spec} is named twice")
        found[spec] = parse(spec, dictionaries)
    return found
