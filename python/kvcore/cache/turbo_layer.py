"""One attention layer of a :class:`kvcore.cache.TurboCache`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvcore.cache import compat, reasons, store_files
from kvcore.cache.padding import PaddingTracker
from kvcore.cache.settings import HEAD_DIMS, PAGE_TOKENS, TurboSettings
from kvcore.cache.store import TurboStore, ordinary_tensors
from kvcore.cache.view import LazyKV, Snapshot

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class TurboLayer(CacheLayerMixin):
    """K and V of one layer in the FlashQ store, grown token by token.

    Until a sequence has 64 tokens, K and V are held exactly: K's balance and mean are frozen when
    the store begins, and taken from a handful of tokens they would be noise that every later token
    has to live with. The first update after which some sequence has 64 tokens calibrates on
    all tokens so far and quantizes them.

    :meth:`update` returns exact tensors up to and including that update, so the attention of a
    prompt is exact; afterwards it returns :class:`~kvcore.cache.view.LazyKV`. When K or V needs a
    gradient it returns plain tensors: earlier tokens as stored, those of this call exactly and
    with their gradient.

    An update that fails leaves the layer as it was. A head_dim or dtype that has no kernel is kept
    exactly, as by ``DynamicLayer``, and counted in :func:`kvcore.hf.fallback_reasons`.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self,
        settings: TurboSettings | None = None,
        tracker: PaddingTracker | None = None,
        layer_idx: int = 0,
    ) -> None:
        self.settings = settings or TurboSettings()
        self.tracker = tracker or PaddingTracker()
        self.layer_idx = layer_idx
        self.epoch = 0
        self._clear()
        super().__init__()

    def _clear(self) -> None:
        self.store: TurboStore | None = None
        # K and V as they came, while there is no store; a list, so that they change together.
        self._exact: list[Tensor] | None = None
        self._exact_padding: np.ndarray | None = None
        self._is_away = False  # on another device than the model
        self.unsupported: str | None = None
        self.dtype: torch.dtype | None = None
        self.device: torch.device | None = None
        self._k_shape: tuple[int, ...] | None = None
        self._v_shape: tuple[int, ...] | None = None

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
            return LazyKV(Snapshot(self, self.store.num_tokens), kv_idx)
        return None if self._exact is None else self._exact[kv_idx]

    @property
    def padding(self) -> np.ndarray | None:
        """int64 ``[batch]``: leading tokens of each sequence that were padding."""
        return self._exact_padding if self.store is None else self.store.padding

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """K and V rebuilt from the store, ``[batch, kv_heads, tokens, head_dim]``."""
        self.prefetch()
        return self.store.dequantize(self.dtype)

    def get_seq_length(self, *args: object) -> int:
        """Tokens given to the layer, padding counted."""
        if self.store is not None:
            return self.store.num_tokens
        return 0 if self._exact is None else self._exact[0].shape[2]

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
                    f"TurboLayer: {name} must be [batch, kv_heads, tokens, head_dim], "
                    f"got shape {list(states.shape)}"
                )
        _check("value_states", "dtype", key_states.dtype, value_states.dtype)
        _check("value_states", "device", key_states.device, value_states.device)
        _check("value_states", "shape[:3]", key_states.shape[:3], value_states.shape[:3])
        if self.settings.rotary_dim > key_states.shape[3]:
            raise ValueError(
                f"TurboLayer: rotary_dim must be at most the head_dim of {key_states.shape[3]}, "
                f"got {self.settings.rotary_dim}"
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        self._k_shape = (*key_states.shape[:2], key_states.shape[3])
        self._v_shape = (*value_states.shape[:2], value_states.shape[3])
        self.unsupported = _unsupported(self._k_shape, self._v_shape, self.dtype)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens; returns all K and V.

        Args:
            key_states: ``[batch, kv_heads, num_new, head_dim]``, fp32, fp16 or bf16.
            value_states: shape and dtype of key_states.

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

    @torch.compiler.disable(reason="this update of a TurboCache changes more than tensors")
    def _update_on_host(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self._update(k, v)

    def _step(self, k: Tensor, v: Tensor) -> tuple[LazyKV, LazyKV] | None:
        """An update by tokens that fill no page, or None if it is more than that.

        While a large model runs, code and data leave the caches between two steps, and each look at
        a tensor then costs microseconds. So the op's checks stand for the layer's, except for the
        one that it does not make; when it refuses, the layer's say why.
        """
        store = self.store
        if (
            self._is_away
            or store.may_have_empty
            or self.tracker.native is False
            or torch.is_grad_enabled()
            or k.dtype is not self.dtype
        ):
            return None
        try:
            num_tokens = store.num_tokens + k.shape[2]
            if num_tokens >= store.next_fill:
                return None
            # Before the append: an update that fails has not happened.
            views = LazyKV.pair(Snapshot(self, num_tokens))
            store.append_to_open_page(k, v, num_tokens)
        except Exception:
            self._check_states(k, v)
            raise
        return views

    def _update_store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        store = self.store
        if store.seq_lens.device != self.device:
            self.prefetch()
        num_new = k.shape[2]
        if num_new:
            padding = None
            # Only a sequence without tokens can begin with padding.
            if store.may_have_empty:
                padding = self.tracker.new_padding(
                    store.batch, store.num_tokens, num_new, store.padding
                )
            if _needs_grad(k, v):
                return self._update_with_grad(k, v, padding)
        # Before the append: an update that fails has not happened.
        views = LazyKV.pair(Snapshot(self, store.num_tokens + num_new))
        if num_new:
            store.append(k, v, padding)
        return self._readable(views)

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

    def _update_with_grad(
        self, k: Tensor, v: Tensor, padding: np.ndarray | None
    ) -> tuple[Tensor, Tensor]:
        old = self.dequantize()
        both = [torch.cat([o, new], 2) for o, new in zip(old, (k, v), strict=True)]
        self.store.append(k.detach(), v.detach(), padding)
        return both[0], both[1]

    def _update_exact(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.get_seq_length()
        old_padding = self._exact_padding
        if old_padding is None:
            old_padding = np.zeros(k.shape[0], dtype=np.int64)
        new = self.tracker.new_padding(k.shape[0], seen, k.shape[2], old_padding)
        padding = old_padding if new is None else old_padding + new
        both = [k, v]
        if seen:
            both = [torch.cat([o, n], 2) for o, n in zip(self._exact, both, strict=True)]
        num_tokens = seen + k.shape[2]
        store = exact = None
        if self.unsupported is None and num_tokens - padding.min(initial=num_tokens) >= PAGE_TOKENS:
            store = TurboStore.quantize(*both, padding, self.settings)
        else:
            # Copies: what the caller does to its tensors later is not the cache's business, and a
            # slice would keep a larger tensor alive.
            with ordinary_tensors():
                exact = [tensor.detach().clone() for tensor in both]
        self.store, self._exact, self._exact_padding = store, exact, padding
        return both[0], both[1]

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
            _check(name, "dtype", self.dtype, states.dtype)
            _check(name, "device", self.device, states.device)
            expected = [batch, heads, k.shape[2] if k.ndim == 4 else "tokens", dim]
            _check(name, "shape", expected, list(states.shape))

    # ---- changing what is stored

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens.

        Args:
            tokens_to_remove: negative: how many to drop. Positive: how many to leave, as before
                transformers 5.13. Zero: nothing, or all of them before 5.13.

        Up to 64 tokens the crop is exact; a deeper one leaves what attention would have read.
        """
        seen = self.get_seq_length()
        left = compat.length_after_crop(tokens_to_remove, seen)
        if left >= seen:
            return
        if self.store is not None:
            self.prefetch()
            self.store.rewind(left)
        else:
            with ordinary_tensors():
                self._exact = [tensor[:, :, :left].clone() for tensor in self._exact]
            self._exact_padding = np.minimum(self._exact_padding, left)
        self._changed()

    def reset(self) -> None:
        """Forgets all tokens and the calibration, and returns the memory."""
        self._clear()
        self.is_initialized = False
        self._changed()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes sequence i the former sequence ``beam_idx[i]``; full pages are shared."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences ``indices``, int64 or bool ``[batch]``, in that order."""
        if not self.is_initialized:
            return
        self._select(compat.index_list(indices, self.batch_size))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence ``repeats`` times, in place of it; full pages are shared."""
        if not self.is_initialized:
            return
        self._select([b for b in range(self.batch_size) for _ in range(repeats)])

    def _select(self, indices: list[int]) -> None:
        if indices == list(range(self.batch_size)):
            return
        if self.store is not None:
            self.store.select(indices)
        elif self._exact is not None:
            with ordinary_tensors():
                self._exact = [tensor[indices] for tensor in self._exact]
            self._exact_padding = self._exact_padding[indices]
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
            if self.store.seq_lens.device != device:
                self.store.to(device)
        elif self._exact is not None and self._exact[0].device != device:
            self._exact = [tensor.to(device) for tensor in self._exact]

    # ---- files

    def synced_store(self) -> TurboStore | None:
        """The store, with the host's count of tokens up to date."""
        return self.store

    def restore_store(
        self, row: dict, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Adopts what :func:`~kvcore.cache.store_files.export_store` gave, after it was checked."""
        self._adopt_shape((row["batch"], row["kv_heads"], row["head_dim"]), dtype, device)
        self.store = store_files.restore_store(self.settings, row, tensors, device)

    def restore_exact(self, k: Tensor, v: Tensor, padding: np.ndarray) -> None:
        """Adopts tokens that are held exactly."""
        self.lazy_initialization(k, v)
        self._exact, self._exact_padding = [k, v], padding

    def _adopt_shape(
        self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        none = torch.empty((shape[0], shape[1], 0, shape[2]), dtype=dtype, device=device)
        self.lazy_initialization(none, none)

    # ---- accounting

    def tensors(self) -> dict[str, list[Tensor]]:
        """Every tensor the layer holds, by what it is for."""
        kinds = self.store.tensors() if self.store is not None else {}
        return {**kinds, "exact": list(self._exact or ())}

    def nbytes(self) -> int:
        """Bytes of the memory behind every tensor of the layer, spare room included."""
        return sum(
            tensor.untyped_storage().nbytes() for kind in self.tensors().values() for tensor in kind
        )


def _unsupported(
    k_shape: tuple[int, ...], v_shape: tuple[int, ...], dtype: torch.dtype
) -> str | None:
    """Why K and V of this kind cannot be stored; None if they can."""
    if k_shape != v_shape:
        detail = f"K is {list(k_shape)} and V is {list(v_shape)} without tokens"
        name = "different K and V"
    elif k_shape[2] not in HEAD_DIMS:
        detail = f"got {k_shape[2]}, supported are {', '.join(map(str, HEAD_DIMS))}"
        name = "head_dim"
    elif dtype not in _DTYPES:
        detail = f"got {dtype}, supported are float32, float16 and bfloat16"
        name = "dtype"
    else:
        return None
    reasons.record(f"unsupported {name}", f"{detail}; the layer is cached exactly")
    return name


def _needs_grad(k: Tensor, v: Tensor) -> bool:
    return (k.requires_grad or v.requires_grad) and torch.is_grad_enabled()


def _check(name: str, what: str, expected: object, actual: object) -> None:
    if expected != actual:
        raise ValueError(f"TurboLayer: {name} must have {what} {expected}, got {actual}")


def _refuse_assignment(name: str, value: object) -> None:
    # CacheLayerMixin.__init__ assigns None.
    if value is not None:
        raise AttributeError(f"TurboLayer: {name} cannot be assigned; use update()")
