"""The coded K and V of one layer and the newest tokens, which are not coded. No transformers."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from kvcore import ops
from kvcore.cache.adaptive import SessionPair
from kvcore.cache.calibration import left_padding_tensor
from kvcore.cache.codes import Codes, encoder_workspace
from kvcore.cache.dictionaries import Pair
from kvcore.cache.lexico_settings import BLOCK_TOKENS, LexicoSettings
from kvcore.cache.tensors import ordinary_tensors


@dataclasses.dataclass(frozen=True)
class Context:
    """What attention reads: codes of the older tokens, and the newer ones as they came.

    It stays readable while the store that it is of only takes more tokens.
    """

    codes: Codes
    buffer: Tensor  # [2, batch, kv_heads, tokens, head_dim], K and V
    left_padding: Tensor | None  # int32 [batch]
    pair: Pair | SessionPair

    def decode(self, q: Tensor, *, scale: float | None, causal: bool) -> Tensor:
        """Attention of ``q`` ``[batch, q_heads, q_len, head_dim]``, shape of q."""
        codes = self.codes
        return ops.lexico_attention(
            q,
            [block.k for block in codes.blocks],
            [block.v for block in codes.blocks],
            codes.k_tail,
            codes.v_tail,
            codes.tail_lens,
            self.pair.k[: codes.atoms[0]],
            # Whole: blocks of V were sealed for all of its rows.
            self.pair.v,
            self.buffer[0],
            self.buffer[1],
            None,
            self.left_padding,
            causal=causal,
            scale=scale,
        )[0]

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """K and V ``[batch, kv_heads, tokens, head_dim]``; padding is zero."""
        with torch.no_grad():
            coded = self.codes.reconstruct(self.pair, self.buffer.dtype)
            both = torch.cat([torch.stack(coded), self.buffer], 3)
            if self.left_padding is not None:
                both = _without_padding(both, 0, self.left_padding)
        return both[0], both[1]


class LexicoStore:
    """Codes of all but the newest tokens of one layer, and those in a buffer.

    ``num_tokens`` counts every token the layer was given, the leading ``padding[b]`` of sequence b
    too: blocks are of all sequences, so padding takes its place, but it is coded as zeros and
    hidden from attention.

    The buffer keeps ``buffer_tokens`` (n_b of the paper) at least and grows by up to
    ``encode_tokens`` (n_a); then its oldest n_a tokens are coded together. More tokens than that at
    once are coded at once, but the context that :meth:`append` returns has all of them, and the n_b
    before them, as they came.
    """

    def __init__(
        self,
        settings: LexicoSettings,
        pair: Pair | SessionPair,
        codes: Codes,
        buffer: Tensor,
        buffer_len: int,
        padding: np.ndarray,
    ) -> None:
        self.settings = settings
        self.pair = pair
        self._most_coded = 0
        self.padding = self.left_padding = None
        self._adopt(codes, buffer, buffer_len, padding)

    def _adopt(self, codes: Codes, buffer: Tensor, buffer_len: int, padding: np.ndarray) -> Context:
        """Becomes a store of these; what attention reads of it. What fails has not happened."""
        num_tokens = codes.num_tokens + buffer_len
        left_padding = self.left_padding
        # In a decoding step it is what it was: on a device, making it would be a copy a layer.
        if padding is not self.padding or buffer.device != self.device:
            left_padding = left_padding_tensor(padding, buffer.device)
        may_have_empty = bool((padding == num_tokens).any())
        context = Context(codes, buffer[:, :, :, :buffer_len], left_padding, self.pair)
        # Nothing fails from here on.
        self.codes = codes
        self.buffer = buffer  # [2, batch, kv_heads, capacity, head_dim]
        self.buffer_len = buffer_len
        self.padding = padding
        self.num_tokens = num_tokens
        self.left_padding = left_padding
        # Asked in every step, so kept as plain values.
        self.is_padded = left_padding is not None
        self.may_have_empty = may_have_empty
        return context

    @classmethod
    def empty(
        cls,
        settings: LexicoSettings,
        pair: Pair | SessionPair,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> LexicoStore:
        """A store without tokens.

        Args:
            settings: sparsity, tolerance and sizes.
            pair: the dictionaries of the model.
            shape: batch, kv_heads and head_dim.
            dtype: of K and V.
            device: of K, V and the dictionaries.
        """
        atoms = (len(pair.k), len(pair.v))
        codes = Codes.empty(*shape[:2], settings, device, atoms)
        rooms = settings.room(atoms, shape[2])
        with ordinary_tensors():
            pair = SessionPair.of(pair, rooms) if any(rooms) else pair
            buffer = _new_buffer(settings, shape, dtype, device)
        return cls(settings, pair, codes, buffer, 0, np.zeros(shape[0], dtype=np.int64))

    @property
    def device(self) -> torch.device:
        return self.buffer.device

    @property
    def batch(self) -> int:
        return self.buffer.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.buffer.shape[2]

    @property
    def head_dim(self) -> int:
        return self.buffer.shape[4]

    def lens(self) -> np.ndarray:
        """int64 ``[batch]``: tokens of each sequence, padding left out."""
        return self.num_tokens - self.padding

    def context(self) -> Context:
        """What attention reads."""
        recent = self.buffer[:, :, :, : self.buffer_len]
        return Context(self.codes, recent, self.left_padding, self.pair)

    def append(self, k: Tensor, v: Tensor, new_padding: np.ndarray | None = None) -> Context:
        """Stores ``num_new`` tokens per sequence; what their attention reads.

        Args:
            k: ``[batch, kv_heads, num_new, head_dim]``, not requiring a gradient.
            v: shape and dtype of k.
            new_padding: int64 ``[batch]``, how many leading ones of each sequence are padding; only
                a sequence without tokens can have any.

        If anything fails, the store is as it was.
        """
        padding = self.padding if new_padding is None else self.padding + new_padding
        num_new, settings = k.shape[2], self.settings
        total = self.buffer_len + num_new
        with ordinary_tensors():
            self._leave_inference_mode()
            if num_new > settings.encode_tokens and total > settings.capacity:
                recent = self._with(k, v)
                seen = Context(
                    self.codes, recent, left_padding_tensor(padding, k.device), self.pair
                )
                num_coded = total - settings.buffer_tokens
                codes, buffer = self._coded(recent, num_coded, padding)
                buffer_len = settings.buffer_tokens
            else:
                seen, codes, buffer, num_coded = None, self.codes, self.buffer, 0
                if total > settings.capacity:
                    recent = buffer[:, :, :, : self.buffer_len]
                    num_coded = min(settings.encode_tokens, self.buffer_len)
                    codes, buffer = self._coded(recent, num_coded, padding)
                buffer_len = total - num_coded
                # Behind what the store and its contexts see of the buffer.
                buffer[0, :, :, buffer_len - num_new : buffer_len] = k
                buffer[1, :, :, buffer_len - num_new : buffer_len] = v
            context = self._adopt(codes, buffer, buffer_len, padding)
        return seen or context

    def _leave_inference_mode(self) -> None:
        """A copy of the store that was made there has tensors that cannot be changed elsewhere."""
        if self.buffer.is_inference():
            buffer, pair = self.buffer.clone(), self.pair
            if isinstance(pair, SessionPair):
                pair = SessionPair(*(tensor.clone() for tensor in pair))
            self.buffer, self.pair = buffer, pair

    def _with(self, k: Tensor, v: Tensor) -> Tensor:
        """The buffer's tokens and more of them, ``[2, batch, kv_heads, tokens, head_dim]``."""
        before = self.buffer[:, :, :, : self.buffer_len]
        shape = list(before.shape)
        shape[3] += k.shape[2]
        both = before.new_empty(shape)
        both[:, :, :, : self.buffer_len] = before
        both[0, :, :, self.buffer_len :] = k
        both[1, :, :, self.buffer_len :] = v
        return both

    def _coded(self, recent: Tensor, count: int, padding: np.ndarray) -> tuple[Codes, Tensor]:
        """The codes with ``count`` more tokens, the first of ``recent``, and a buffer of the rest.

        The buffer is a new one: contexts read the old one.
        """
        shape = (self.batch, self.kv_heads, self.head_dim)
        buffer = _new_buffer(self.settings, shape, recent.dtype, recent.device)
        buffer[:, :, :, : recent.shape[3] - count] = recent[:, :, :, count:]
        oldest = recent[:, :, :, :count]
        if padding.max(initial=0) > self.codes.num_tokens:
            left_padding = left_padding_tensor(padding, recent.device)
            oldest = _without_padding(oldest, self.codes.num_tokens, left_padding)
        codes = self.codes.extended(*oldest, self.pair)
        self._most_coded = max(self._most_coded, count)
        return codes, buffer

    def decode(self, q: Tensor, *, scale: float | None, causal: bool) -> Tensor:
        """Attention of ``q`` ``[batch, q_heads, q_len, head_dim]`` over the store, shape of q."""
        return self.context().decode(q, scale=scale, causal=causal)

    def dequantize(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """K and V ``[batch, kv_heads, num_tokens, head_dim]``; padding is zero."""
        k, v = self.context().dequantize()
        return k.to(dtype), v.to(dtype)

    def restore(self, codes: Codes, recent: Tensor, padding: np.ndarray) -> None:
        """Makes an empty store one of these codes and of these tokens behind them."""
        with ordinary_tensors():
            self.buffer[:, :, :, : recent.shape[3]] = recent
        self._adopt(codes, self.buffer, recent.shape[3], padding)

    def rewind(self, num_tokens: int) -> None:
        """Drops the newest tokens, so that ``num_tokens`` stay (padding counted)."""
        padding = np.minimum(self.padding, num_tokens)
        codes = self.codes.cut(min(num_tokens, self.codes.num_tokens), self.pair)
        self._adopt(codes, self.buffer, num_tokens - codes.num_tokens, padding)

    def select(self, indices: list[int]) -> None:
        """Makes sequence i the former sequence ``indices[i]``."""
        codes = self.codes.selected(indices)
        with ordinary_tensors():
            buffer = self.buffer[:, indices]
        self._adopt(codes, buffer, self.buffer_len, self.padding[indices])

    def to(self, device: torch.device) -> None:
        """Moves every tensor but the dictionaries to a device."""
        codes = self.codes.to(device)
        with ordinary_tensors():
            buffer = self.buffer.to(device)
        self._adopt(codes, buffer, self.buffer_len, self.padding)

    def report(self) -> dict:
        """What the memory report says of the store beside bytes and tokens."""
        vectors = self.batch * self.kv_heads * min(self._most_coded, BLOCK_TOKENS)
        workspace = encoder_workspace(self.settings, self.pair, vectors)
        return {
            "coded_tokens": self.codes.num_tokens,
            "encoder_workspace": workspace,
            "atoms": list(self.codes.atoms),
        }

    def tensors(self) -> dict[str, list[Tensor]]:
        """Every tensor of the store but the model's dictionaries, by what it is for."""
        lens = [] if self.left_padding is None else [self.left_padding]
        grown = list(self.pair) if isinstance(self.pair, SessionPair) else []
        return {**self.codes.tensors(), "buffer": [self.buffer, *lens], "session": grown}


def _new_buffer(
    settings: LexicoSettings,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    batch, kv_heads, head_dim = shape
    # Zeros: what lies behind the tokens is copied with them.
    shape = (2, batch, kv_heads, settings.capacity, head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)


def _without_padding(x: Tensor, first: int, left_padding: Tensor) -> Tensor:
    """``x`` ``[2, batch, kv_heads, tokens, head_dim]`` of the tokens from ``first`` on, with zeros
    where they are padding."""
    tokens = torch.arange(first, first + x.shape[3], device=x.device)
    is_padding = tokens < left_padding[:, None]
    return x.masked_fill(is_padding[None, :, None, :, None], 0)
