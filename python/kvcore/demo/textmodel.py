"""Language models that turn text into text: the shipped ones by name, any other by path or id."""

from __future__ import annotations

import abc
import codecs
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvcore.demo import models

DTYPES = ("auto", "float32", "bfloat16", "float16")


class TextDecoder(abc.ABC):
    """Text of tokens that arrive one at a time; what is not complete yet is held back."""

    @abc.abstractmethod
    def push(self, token: int) -> str:
        """The text that `token` completes, possibly empty."""

    @abc.abstractmethod
    def finish(self) -> str:
        """What was held back."""


class ByteDecoder(TextDecoder):
    """For the shipped models: bytes of UTF-8, and recall symbols as `<k12>` and `<v3>`."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token < models.NUM_BYTES:
            return self._utf8.decode(bytes([token]))
        return self.finish() + models.decode([token])

    def finish(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class TokenizerDecoder(TextDecoder):
    """For a tokenizer whose tokens do not map to text one by one."""

    # A token may change how the one before it is spelt (spaces, joined bytes), so the newest tokens
    # are decoded together; at a line break they are settled, so that a long text costs no more.
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = 0

    def _text(self) -> str:
        return self._tokenizer.decode(self._tokens, skip_special_tokens=True)

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._text()
        if text.endswith("\ufffd"):  # the first bytes of a character
            return ""
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        if text.endswith("\n"):
            self._tokens, self._shown = [], 0
        return new

    def finish(self) -> str:
        rest = self._text()[self._shown :]
        self._tokens, self._shown = [], 0
        return rest


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A model of transformers in evaluation mode, with its way from text to ids and back.

    ``encode`` returns int64 ``[1, tokens]``.
    """

    name: str
    model: Any
    encode: Callable[[str], Tensor]
    decoder: Callable[[], TextDecoder]
    max_positions: int | None

    def decode(self, tokens: Iterable[int]) -> str:
        decoder = self.decoder()
        return "".join([*map(decoder.push, tokens), decoder.finish()])


def _load_shipped(name: str, dtype: str, device: str) -> TextModel:
    dtype = "float32" if dtype == "auto" else dtype
    model = models.load(name, dtype=dtype, device=device)
    encode = lambda text: torch.tensor([models.encode(text)], device=device)  # noqa: E731
    return TextModel(name, model, encode, ByteDecoder, models.MAX_POSITIONS)


def _load_checkpoint(name: str, dtype: str, device: str, chat: bool) -> TextModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        )
    except (OSError, ValueError) as error:
        shipped = ", ".join(models.NAMES)
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model must be {shipped}, a folder with a checkpoint, or a model id of the Hugging "
            f"Face hub, got {name!r}: {reason}"
        ) from error
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"the tokenizer of {name} has no chat template")

    def encode(text: str) -> Tensor:
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        # A chat template writes its own special tokens.
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat).input_ids
        return ids.to(device)

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return TextModel(
        name, model.to(device).eval(), encode, lambda: TokenizerDecoder(tokenizer), limit
    )


def load(name: str, *, dtype: str = "auto", device: str = "cpu", chat: bool = False) -> TextModel:
    """A model by name (``hybrid`` or ``control``, shipped with kvcore), path, or hub id.

    Args:
        name: a name, the folder of a checkpoint with its tokenizer, or an id, which transformers
            downloads unless it has it (``HF_HUB_OFFLINE=1`` forbids that).
        dtype: "auto" is what the checkpoint says, float32 for the shipped models.
        device: a torch device.
        chat: wrap prompts in the tokenizer's chat template.

    Raises:
        ValueError: for a model, dtype or template that does not exist.
        FileNotFoundError: where a shipped model's weights are missing.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    if name in models.NAMES:
        if chat:
            raise ValueError(f"{name} is no chat model")
        return _load_shipped(name, dtype, device)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"no config.json in {name}")
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise ValueError(f"there is no folder {name}")
    return _load_checkpoint(name, dtype, device, chat)
