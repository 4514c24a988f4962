"""Which tokens are padding, and whether a mask says no more than that."""

from __future__ import annotations

import weakref

import numpy as np
import torch
from torch import Tensor


class PaddingTracker:
    """The attention mask of the running forward pass, shared by the layers of one cache.

    ``Cache.update`` is not told about padding. ``kvcore.hf.enable`` hooks the model and announces
    its mask here before any layer is updated; it is used only if its width is that of the tokens
    seen, so a mask that was left over, or means something else, is ignored. What attention does is
    never decided here alone: the mask it is given is compared by :meth:`is_plain`.
    """

    def __init__(self) -> None:
        # Whether the model that announced it attends over compressed caches itself; None: no model
        # has announced anything.
        self.native: bool | None = None
        self._announced: Tensor | None = None
        self._lead: tuple[tuple[int, int, int], np.ndarray | None] | None = None
        self._verdict: tuple | None = None

    def __getstate__(self) -> dict:
        # A weak reference cannot be pickled, and a copy has masks of its own.
        return {**vars(self), "_verdict": None}

    def announce(self, attention_mask: object, *, native: bool) -> None:
        """Takes the mask of a forward pass: ``[batch, tokens]``, ``[batch, 1, q_len, tokens]``, a
        dict of the latter by layer type, or None."""
        self.native = native
        if isinstance(attention_mask, dict):
            attention_mask = attention_mask.get("full_attention")
        self._announced = attention_mask if isinstance(attention_mask, Tensor) else None
        self._lead = self._verdict = None

    def forget(self) -> None:
        """Drops the announced mask: the tokens it was about are not those that come next."""
        self._announced = self._lead = None

    def new_padding(self, batch: int, seen: int, num_new: int, padding: np.ndarray):
        """Leading padding among ``num_new`` tokens that follow ``seen`` ones.

        Args:
            batch: sequences.
            seen: tokens so far, padding counted.
            num_new: tokens that come now.
            padding: int64 ``[batch]``, padding so far.

        Returns:
            int64 ``[batch]``, or None if there is none or nothing is known.
        """
        # Only a sequence without tokens can begin with padding: decode steps end here.
        if self._announced is None or (seen and not (padding == seen).any()):
            return None
        key = (batch, seen, num_new)
        if self._lead is None or self._lead[0] != key:
            self._lead = (key, self._leading_padding(batch, seen, num_new))
        lead = self._lead[1]
        if lead is None:
            return None
        new = np.where(padding == seen, np.clip(lead - seen, 0, num_new), 0)
        return new if new.any() else None

    def _leading_padding(self, batch: int, seen: int, num_new: int) -> np.ndarray | None:
        """int64 ``[batch]``: how many leading ones of all tokens may be padding."""
        mask = self._announced
        begin = 0
        if mask.ndim == 4:
            # Whatever else a mask hides, a token that is not padding sees itself.
            if mask.shape[2] != num_new or mask.shape[3] < seen + num_new:
                return None
            mask = mask[:, 0, :, seen : seen + num_new].diagonal(dim1=1, dim2=2)
            shown = mask if mask.dtype == torch.bool else mask == 0
            shown, begin = shown.expand(batch, num_new) if len(shown) == 1 else shown, seen
        else:
            shown = mask != 0
        if tuple(shown.shape) != (batch, seen + num_new - begin):
            return None
        first = torch.where(shown.any(-1), shown.int().argmax(-1), shown.shape[1])
        return begin + first.cpu().numpy().astype(np.int64)

    def is_plain(
        self, mask: Tensor, q_len: int, num_tokens: int, padding: np.ndarray, causal: bool
    ) -> bool:
        """Whether a mask hides exactly the future and the padding that is not stored.

        The answer is kept for the other layers of the same forward pass.

        Args:
            mask: ``[batch or 1, heads or 1, q_len, at least num_tokens]``, bool (True is shown) or
                additive (0 is shown).
            q_len: queries; they are the newest tokens.
            num_tokens: keys, padding counted.
            padding: int64 ``[batch]``.
            causal: False if queries see later tokens too.
        """
        # Tensors of inference mode do not count their changes; the next forward pass asks anew.
        version = None if mask.is_inference() else mask._version
        key = (version, q_len, num_tokens, padding.tobytes(), causal)
        if self._verdict is not None and self._verdict[0]() is mask and self._verdict[1] == key:
            return self._verdict[2]
        plain = _is_plain(mask, q_len, num_tokens, padding, causal)
        self._verdict = (weakref.ref(mask), key, plain)
        return plain


def _is_plain(mask: Tensor, q_len: int, num_tokens: int, padding: np.ndarray, causal: bool) -> bool:
    if mask.ndim != 4 or mask.shape[0] not in (1, len(padding)) or mask.shape[2] != q_len:
        return False
    if mask.shape[3] < num_tokens or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return False
    left = torch.from_numpy(padding).to(mask.device)
    return bool(hides_the_rest(mask[..., :num_tokens], num_tokens, left, causal))


def hides_the_rest(mask: Tensor, num_tokens: int | Tensor, left: Tensor, causal: bool) -> Tensor:
    """Whether a mask shows the newest tokens what is stored before them, and nothing else.

    Works inside compiled graphs: nothing depends on values.

    Args:
        mask: ``[batch or 1, heads or 1, q_len, keys]``, bool (True is shown) or additive (0 is
            shown).
        num_tokens: tokens, padding counted; the queries are the newest.
        left: int64 ``[batch]``, leading tokens of each sequence that are padding.
        causal: False if queries see later tokens too.

    Returns:
        A bool scalar.
    """
    q_len, num_keys = mask.shape[2:]
    shown = mask if mask.dtype == torch.bool else mask == 0
    keys = torch.arange(num_keys, device=mask.device)
    rows = torch.arange(q_len, device=mask.device) + (num_tokens - q_len)
    left = left[:, None, None]
    expected = (keys >= left) & (keys <= rows[:, None] if causal else keys < num_tokens)
    # What a padding token sees is of no use to anyone; libraries differ about it.
    is_padding = rows[:, None] < left
    plain = ((shown == expected[:, None]) | is_padding[:, None]).all()
    if mask.dtype == torch.bool:
        return plain
    # Anything between shown and hidden is a bias.
    return plain & (shown | (mask <= torch.finfo(mask.dtype).min / 2)).all()
