"""The layer of a :class:`kvcore.cache.TurboCache` with ``max_cache_len``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvcore.cache import compat, store_files
from kvcore.cache.padding import PaddingTracker, hides_the_rest
from kvcore.cache.settings import TurboSettings
from kvcore.cache.static_store import StaticStore
from kvcore.cache.tensors import under_autocast
from kvcore.cache.turbo_layer import TurboLayer
from kvcore.cache.view import LazyKV, Snapshot

MASK_ERROR = (
    "kvcore: the attention mask of a compiled step must hide the future and the left padding of "
    "the prompt and nothing else; run steps with other masks eagerly"
)


class StaticView:
    """K or V inside a compiled graph, which cannot hold a :class:`~kvcore.cache.view.LazyKV`."""

    def __init__(self, layer: StaticTurboLayer, kv_idx: int) -> None:
        self.layer = layer
        self.kv_idx = kv_idx

    @property
    def dtype(self) -> torch.dtype:
        return self.layer.dtype


class StaticTurboLayer(TurboLayer):
    """K and V of one layer in memory that is allocated once and changed in place.

    The prompt runs eagerly and its first update calibrates, however few tokens it has: nothing can
    be held back for later in a compiled graph. Compiled steps then store and attend without the
    host: they hold no padding, and a mask that is not causal over what the prompt stored is an
    error (:meth:`check_mask`).

    With an attention implementation other than ``kvcore``, :meth:`update` returns K and V rebuilt
    over the whole capacity, as ``StaticLayer`` does.
    """

    is_compileable = True

    def __init__(
        self,
        settings: TurboSettings | None = None,
        tracker: PaddingTracker | None = None,
        layer_idx: int = 0,
        *,
        max_cache_len: int,
    ) -> None:
        self.max_cache_len = max_cache_len
        # A tensor, so that a compiled step does not depend on its value.
        self.cumulative_length = torch.zeros((), dtype=torch.int64)
        super().__init__(settings, tracker, layer_idx)

    def _clear(self) -> None:
        super()._clear()
        self._shifts: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Adopts batch, heads, head_dim, dtype and device, and allocates everything."""
        super().lazy_initialization(key_states, value_states)
        if self.unsupported is not None:
            raise ValueError(
                f"TurboLayer: max_cache_len needs K and V that can be quantized, got unsupported "
                f"{self.unsupported}"
            )
        self.store = StaticStore(self.settings, self._k_shape, self.max_cache_len, self.device)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._shifts = torch.zeros(self._k_shape[0], dtype=torch.int64, device=self.device)
        if not torch.compiler.is_compiling():
            held = [tensor for kind in self.tensors().values() for tensor in kind]
            for tensor in (*held, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)

    @property
    def can_compile(self) -> bool:
        """After the prompt: its first tokens calibrate, and it alone has padding."""
        return self.store is not None and self.store.is_calibrated

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Stores new tokens; see :class:`TurboLayer`."""
        if not (torch.compiler.is_compiling() and self.can_compile):
            return super().update(key_states, value_states)
        self.store.append_op(*under_autocast(self.dtype, key_states, value_states), None)
        self.cumulative_length.add_(key_states.shape[2])
        if self.tracker.native:
            return StaticView(self, 0), StaticView(self, 1)
        return self.rebuild()

    def _step(self, k: Tensor, v: Tensor) -> None:
        """None: the count of tokens on the device changes too."""

    def _update_store(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        store, num_new = self.store, k.shape[2]
        self._sync()
        first = store.num_tokens == 0 and not store.is_calibrated
        room = (0, 0, 0, self.max_cache_len - num_new)
        if first and not self.tracker.native and room[3] >= 0:
            exact = torch.nn.functional.pad(k, room), torch.nn.functional.pad(v, room)
        else:
            exact = k, v
        padding = self.tracker.new_padding(store.batch, store.num_tokens, num_new, store.padding)
        if padding is None:
            padding = np.zeros(store.batch, dtype=np.int64)
        num_tokens = store.num_tokens + num_new
        if not first:
            width = None if self.tracker.native else self.max_cache_len
            views = LazyKV.pair(Snapshot(self, num_tokens, width))
        # What can fail comes before the append, so that an update that fails has not happened.
        new_padding = store.padding + padding
        try:
            self._publish(num_tokens, new_padding)
            if not store.is_calibrated and num_new:
                store.begin(k.detach(), v.detach(), padding)
            elif num_new:
                store.append(k.detach(), v.detach(), padding if padding.any() else None)
        except BaseException:
            self._publish_store()
            raise
        return exact if first else self._readable(views)

    def check_mask(self, mask: Tensor | None, q_len: int, causal: bool) -> None:
        """Refuses a mask of a compiled step, when it runs, if the store does not attend by it.

        The graph has one way to attend, chosen before the mask's values are known. Eager steps
        take any mask.

        Args:
            mask: ``[batch or 1, heads or 1, q_len or 1, max_cache_len or more]``, bool or additive;
                None shows everything.
            q_len: queries, the newest tokens.
            causal: without later tokens.

        Raises:
            ValueError: while it is traced, for a mask of other keys.
            RuntimeError: from the graph. On CUDA it is an assertion of the device, raised by a
                later call, after which the process can do no more there.
        """
        if mask is None:
            plain = (self._shifts == 0).all()
        elif mask.shape[-1] < self.max_cache_len:
            raise ValueError(
                f"kvcore: attention_mask must be of max_cache_len's {self.max_cache_len} keys, "
                f"got {mask.shape[-1]}"
            )
        else:
            mask = mask.expand(-1, -1, q_len, -1)
            plain = hides_the_rest(mask, self.cumulative_length, self._shifts, causal)
        torch._assert_async(plain, MASK_ERROR)

    def rebuild(self) -> tuple[Tensor, Tensor]:
        """K and V ``[batch, kv_heads, max_cache_len, head_dim]`` without the host's help.

        Columns that hold no token are finite; the mask hides them.
        """
        store = self.store
        k, v = store.dequantize_left(self.max_cache_len, self.dtype)
        columns = torch.arange(self.max_cache_len, device=self.device)
        columns = (columns - self._shifts[:, None]).clamp(min=0)[:, None, :, None].expand_as(k)
        return k.gather(2, columns), v.gather(2, columns)

    def _sync(self) -> None:
        if self.store is not None:
            self.store.sync(int(self.cumulative_length))

    def _publish(self, num_tokens: int, padding: np.ndarray) -> None:
        """Tells the graph what it will find in the store."""
        self.cumulative_length.fill_(num_tokens)
        self._shifts.copy_(torch.from_numpy(padding))

    def _publish_store(self) -> None:
        self._publish(self.store.num_tokens, self.store.padding)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        self._sync()
        return super().dequantize()

    def _read(self, kv_idx: int) -> Tensor | None:
        self._sync()
        return super()._read(kv_idx)

    def get_seq_length(self, *args: object) -> int | Tensor:
        """Tokens given to the layer, padding counted: a tensor once there are any."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """The capacity, and no offset."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int) -> None:
        """Drops the newest tokens; see :meth:`TurboLayer.crop`."""
        if self.store is None:
            return
        self._sync()
        left = compat.length_after_crop(tokens_to_remove, self.store.num_tokens)
        if left < self.store.num_tokens:
            self.store.rewind(left)
            self._publish_store()
            self._changed()

    def reset(self) -> None:
        """Forgets all tokens; the memory stays."""
        if self.store is not None:
            self.store.clear()
            self._publish_store()
        self._changed()

    def _select(self, indices: list[int]) -> None:
        self._sync()
        super()._select(indices)
        self._publish_store()

    def synced_store(self) -> StaticStore | None:
        self._sync()
        return self.store

    def restore_store(
        self, row: dict, tensors: dict[str, Tensor], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._adopt_shape((row["batch"], row["kv_heads"], row["head_dim"]), dtype, device)
        store_files.fill_store(self.store, row, tensors)
        self._publish_store()

    def restore_exact(self, k: Tensor, v: Tensor, padding: np.ndarray) -> None:
        raise ValueError("TurboLayer: a layer with max_cache_len holds nothing exactly")

    def tensors(self) -> dict[str, list[Tensor]]:
        kinds = super().tensors()
        if self._shifts is not None:
            kinds["tail"] = [*kinds["tail"], self._shifts]
        return kinds
