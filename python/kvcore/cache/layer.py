"""What the layers of every compressed cache share."""

from __future__ import annotations

import abc

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcore.cache import compat, reasons
from kvcore.cache.exact import ExactTokens, why_unsupported
from kvcore.cache.layer_files import LayerFiles
from kvcore.cache.padding import PaddingTracker
from kvcore.cache.tensors import storage_bytes, under_autocast
from kvcore.cache.view import LazyKV, Snapshot


class CompressedLayer(LayerFiles, CacheLayerMixin):
    """K and V of one layer in a store, grown token by token.

    A subclass says when the store begins (:meth:`_begin`) and how it takes tokens
    (:meth:`_append`). Before, K and V are held exactly; a head_dim or dtype that has no kernel is
    held so for good, as by ``DynamicLayer``, and counted in :func:`kvcore.hf.fallback_reasons`.

    :meth:`update` returns exact tensors up to and including the update that begins the store, so
    the attention of a prompt is exact; afterwards it returns :class:`~kvcore.cache.view.LazyKV`.
    When K or V needs a gradient it returns plain tensors: earlier tokens as stored, those of this
    call exactly and with their gradient.

    An update that fails leaves the layer as it was.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False
    # Of the class, for messages.
    title: str
    # Of what the store's tensors are for, those that memory_report() counts by name.
    store_kinds: tuple[str, ...]

    def __init__(self, settings: object, tracker: PaddingTracker | None, layer_idx: int) -> None:
        self.settings = settings
        self.tracker = tracker or PaddingTracker()
        self.layer_idx = layer_idx
        self.epoch = 0
        self._clear()
        super().__init__()

    def _clear(self) -> None:
        self.store = None
        # While there is no store.
        self._exact: ExactTokens | None = None
        self._is_away = False  # on another device than the model
        self.unsupported: str | None = None
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self._k_shape: tuple[int, ...] | None = None
        self._v_shape: tuple[int, ...] | None = None

    # ---- what a subclass adds

    @abc.abstractmethod
    def _begin(self, k: Tensor, v: Tensor, padding: np.ndarray) -> object | None:
        """The store of the first tokens, or None if there are too few of them yet.

        Args:
            k: ``[batch, kv_heads, tokens, head_dim]``.
            v: shape and dtype of k.
            padding: int64 ``[batch]``, leading tokens of each sequence that are padding.
        """

    @abc.abstractmethod
    def _append(self, k: Tensor, v: Tensor, padding: np.ndarray | None) -> tuple[LazyKV, LazyKV]:
        """Stores new tokens without gradients; views of all. What fails has not happened.

        ``padding`` is that among the new tokens, int64 ``[batch]`` or None.
        """

    def _check_first(self, k: Tensor) -> None:
        """Refuses K that does not fit the settings; called once, before anything is adopted."""

    def _step(self, k: Tensor, v: Tensor) -> tuple[LazyKV, LazyKV] | None:
        """A fast update for the most common case, or None if this is not it."""
        return None

    # ---- reading

    @property
    def can_compile(self) -> bool:
        """Whether an update inside a compiled graph needs nothing of the host."""
        return False

    @property
    def keys(self) -> Tensor | None:
        """K as :meth:`update` returns it; None before the first update."""
        return self._read(0)

    @property
    def values(self) -> Tensor | None:
        """V as :meth:`update` returns it; None before the first update."""
        return self._read(1)

    @keys.setter
    def keys(self, value: None) -> None:
        _refuse_assignment("keys", value)

    @values.setter
    def values(self, value: None) -> None:
        _refuse_assignment("values", value)

    def _read(self, kv_idx: int) -> Tensor | None:
        if self.store is not None:
            return LazyKV(self._snapshot(), kv_idx)
        return None if self._exact is None else self._exact.tensors[kv_idx]

    def _snapshot(self) -> Snapshot:
        """What the store holds now."""
        return Snapshot(self, self.store.num_tokens)

    @property
    def padding(self) -> np.ndarray | None:
        """int64 ``[batch]``: leading tokens of each sequence that were padding."""
        held = self._exact if self.store is None else self.store
        return None if held is None else held.padding

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """K and V rebuilt from the store, ``[batch, kv_heads, tokens, head_dim]``."""
        self.prefetch()
        return self.store.dequantize(self.dtype)

    def get_seq_length(self, *args: object) -> int:
        """Tokens given to the layer, padding counted."""
        if self.store is not None:
            return self.store.num_tokens
        return 0 if self._exact is None else self._exact.num_tokens

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Keys of the next update's mask, and their offset."""
        return self.get_seq_length() + compat.query_length(query_length), 0

    def get_max_length(self) -> int:
        """-1: the layer grows without bound."""
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.18

    def shape_of(self, num_tokens: int) -> tuple[int, int, int, int]:
        """Shape of K and of V with so many tokens."""
        batch, kv_heads, head_dim = self._k_shape
        return batch, kv_heads, num_tokens, head_dim

    @property
    def batch_size(self) -> int:
        if self._k_shape is None:
            raise AttributeError("batch_size is not known before the first update")
        return self._k_shape[0]

    # ---- writing

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Adopts batch, heads, head_dim, dtype and device; nothing is allocated."""
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            if states.ndim != 4:
                raise ValueError(
                    f"{self.title}: {name} must be [batch, kv_heads, tokens, head_dim], "
                    f"got shape {list(states.shape)}"
                )
        self._check("value_states", "dtype", key_states.dtype, value_states.dtype)
        self._check("value_states", "device", key_states.device, value_states.device)
        self._check("value_states", "shape[:3]", key_states.shape[:3], value_states.shape[:3])
        self._check_first(key_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self._k_shape = (*key_states.shape[:2], key_states.shape[3])
        self._v_shape = (*value_states.shape[:2], value_states.shape[3])
        self.unsupported = why_unsupported(self._k_shape, self._v_shape, self.dtype)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens; returns all K and V.

        Args:
            key_states: ``[batch, kv_heads, num_new, head_dim]``, fp32, fp16 or bf16.
            value_states: shape and dtype of key_states. Under autocast both may be of any dtype.

        Returns:
            K and V ``[batch, kv_heads, tokens, head_dim]``, exact or lazy (see the class).

        Raises:
            ValueError: if shape, dtype or device are not those of the first update.
        """
        if torch.compiler.is_compiling():
            return self._update_on_host(key_states, value_states)
        return self._update(key_states, value_states)

    def _update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.store is not None and (views := self._step(k, v)) is not None:
            return views
        k, v = under_autocast(self.dtype, k, v)
        first = not self.is_initialized
        try:
            if first:
                self.lazy_initialization(k, v)
            self._check_states(k, v)
            if _needs_grad(k, v) and self.get_seq_length():
                reasons.record(
                    "gradients",
                    "K and V require gradients, which reach the tokens of the current call only, "
                    "and attention is exact. Use torch.no_grad() for inference",
                )
            if self.store is None:
                return self._update_exact(k, v)
            return self._update_store(k, v)
        except BaseException:
            if first:
                self._clear()
                self.is_initialized = False
            raise

    @torch.compiler.disable(reason="this update of a kvcore cache changes more than tensors")
    def _update_on_host(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(k, v)

    def _update_store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        store = self.store
        if store.device != self.device:
            self.prefetch()
        padding = None
        if k.shape[2]:
            # Only a sequence without tokens can begin with padding.
            if store.may_have_empty:
                padding = self.tracker.new_padding(
                    store.batch, store.num_tokens, k.shape[2], store.padding
                )
            if _needs_grad(k, v):
                old = self.dequantize()
                both = [torch.cat([o, new], 2) for o, new in zip(old, (k, v), strict=True)]
                self._append(k.detach(), v.detach(), padding)
                return both[0], both[1]
        return self._readable(self._append(k, v, padding))

    def _readable(self, views: tuple[LazyKV, LazyKV]) -> tuple[Tensor, Tensor]:
        if self.tracker.native is not False:
            return views
        # The model reads them at once, perhaps with flex_attention, which compiles itself and takes
        # plain tensors only.
        try:
            return views[0].materialize(), views[1].materialize()
        except (RuntimeError, MemoryError):
            # The tokens are stored, so this is for the reader of the views to raise.
            return views

    def _update_exact(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        held = self._exact
        padding = np.zeros(k.shape[0], dtype=np.int64) if held is None else held.padding
        seen = 0 if held is None else held.num_tokens
        new = self.tracker.new_padding(k.shape[0], seen, k.shape[2], padding)
        padding = padding if new is None else padding + new
        if seen:
            k, v = (torch.cat([o, n], 2) for o, n in zip(held.tensors, (k, v), strict=True))
        store = self._begin(k, v, padding) if self.unsupported is None else None
        self._exact = ExactTokens.copy_of(k, v, padding) if store is None else None
        self.store = store
        return k, v

    def _check_states(self, k: Tensor, v: Tensor) -> None:
        if (
            k.dtype == v.dtype == self.dtype
            and k.ndim == v.ndim == 4
            and (k.shape[0], k.shape[1], k.shape[3]) == self._k_shape
            and (v.shape[0], v.shape[1], v.shape[3]) == self._v_shape
            and k.shape[2] == v.shape[2]
            and k.device == v.device == self.device
        ):
            return
        shapes = (("key_states", k, self._k_shape), ("value_states", v, self._v_shape))
        for name, states, (batch, heads, dim) in shapes:
            self._check(name, "dtype", self.dtype, states.dtype)
            self._check(name, "device", self.device, states.device)
            expected = [batch, heads, k.shape[2] if k.ndim == 4 else "tokens", dim]
            self._check(name, "shape", expected, list(states.shape))

    def _check(self, name: str, what: str, expected: object, actual: object) -> None:
        if expected != actual:
            raise ValueError(f"{self.title}: {name} must have {what} {expected}, got {actual}")

    # ---- changing what is stored

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens.

        Args:
            tokens_to_remove: negative: how many to drop. Positive: how many to leave, as before
                transformers 5.13. Zero: nothing, or all of them before 5.13.

        Within the newest tokens a crop is exact; a deeper one leaves what attention would read.
        """
        seen = self.get_seq_length()
        left = compat.length_after_crop(tokens_to_remove, seen)
        if left >= seen:
            return
        if self.store is not None:
            self.prefetch()
            self.store.rewind(left)
        else:
            self._exact = self._exact.cut(left)
        self._changed()

    def reset(self) -> None:
        """Forgets all tokens and what was measured on them, and returns the memory."""
        self._clear()
        self.is_initialized = False
        self._changed()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes sequence i the former sequence ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences ``indices``, int64 or bool ``[batch]``, in that order."""
        if not self.is_initialized:
            return
        self._select(compat.index_list(indices, self.batch_size))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence ``repeats`` times, in place of it."""
        if not self.is_initialized:
            return
        self._select([b for b in range(self.batch_size) for _ in range(repeats)])

    def _select(self, indices: list[int]) -> None:
        if indices == list(range(self.batch_size)):
            return
        if self.store is not None:
            self.store.select(indices)
        elif self._exact is not None:
            self._exact = self._exact.selected(indices)
        self._k_shape = (len(indices), *self._k_shape[1:])
        self._v_shape = (len(indices), *self._v_shape[1:])
        self._changed()

    def _changed(self) -> None:
        """Ends the views of what was stored, and the mask that was announced for it."""
        self.epoch += 1
        self.tracker.forget()

    def offload(self) -> None:
        """Moves the stored tokens to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Moves the stored tokens back to the device of the model."""
        if self.device is not None:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        self._is_away = device != self.device
        if self.store is not None:
            if self.store.device != device:
                self.store.to(device)
        elif self._exact is not None:
            self._exact = self._exact.to(device)

    # ---- accounting

    def tensors(self) -> dict[str, list[Tensor]]:
        """Every tensor the layer holds, by what it is for."""
        kinds = self.store.tensors() if self.store is not None else {}
        return {**kinds, "exact": [] if self._exact is None else self._exact.tensors}

    def nbytes(self) -> int:
        """Bytes of the memory behind every tensor of the layer, spare room included."""
        return storage_bytes([tensor for kind in self.tensors().values() for tensor in kind])

    def report(self) -> dict:
        """The layer's part of :func:`kvcore.cache.report.report`."""
        kinds = {name: [] for name in self.store_kinds} | self.tensors()
        row = {name: storage_bytes(kinds[name]) for name in (*self.store_kinds, "exact")}
        if self.store is None:
            padding = self.padding
            row["tokens"] = [] if padding is None else (self.get_seq_length() - padding).tolist()
            per_token = sum(tensor.shape[1] * tensor.shape[3] for tensor in kinds["exact"])
            return {**row, "elements": sum(row["tokens"]) * per_token}
        row["tokens"] = self.store.lens().tolist()
        row["elements"] = 2 * sum(row["tokens"]) * self.store.kv_heads * self.store.head_dim
        return {**row, **self.store.report()}


def _needs_grad(k: Tensor, v: Tensor) -> bool:
    return (k.requires_grad or v.requires_grad) and torch.is_grad_enabled()


def _refuse_assignment(name: str, value: object) -> None:
    # CacheLayerMixin.__init__ assigns None.
    if value is not None:
        raise AttributeError(f"kvcore: {name} cannot be assigned; use update()")
