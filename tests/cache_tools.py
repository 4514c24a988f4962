"""What the cache tests share: layers, their tensors, a store of one sequence, failing calls."""

import copy
import functools
import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, Qwen3NextConfig

import hf_models
import kvcore
from kvcore.cache import LexicoLayer, LexicoSettings, TurboLayer, TurboSettings
from kvcore.cache.padding import PaddingTracker

HEADS, HEAD_DIM = 2, 64


def plain_config(**arguments):
    """Two layers of full attention."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return LlamaConfig(**{**sizes, **heads, **arguments})


def hybrid_config():
    """Three linear-attention layers and one of full attention."""
    return Qwen3NextConfig(num_hidden_layers=4, hidden_size=32, head_dim=64, num_attention_heads=4,
                           num_key_value_heads=2, linear_num_key_heads=2, linear_num_value_heads=4,
                           linear_key_head_dim=16, linear_value_head_dim=16)  # fmt: skip


def random_kv(generator, batch, tokens, heads=HEADS, head_dim=HEAD_DIM, dtype=torch.float32):
    """K with a different range in every channel, and V."""
    shape = (batch, heads, tokens, head_dim)
    k = torch.randn(shape, generator=generator)
    k = k * torch.linspace(0.2, 3.0, head_dim) + torch.linspace(-2.0, 2.0, head_dim)
    return k.to(dtype), torch.randn(shape, generator=generator).to(dtype)


def turbo_layer(**settings):
    """A layer with a tracker of its own."""
    return TurboLayer(TurboSettings(**settings), PaddingTracker())


def lexico_layer(**settings):
    """A layer of small sizes on the dictionaries of the llama model, as fine as 8 bits."""
    sizes = {"k_sparsity": 64, "v_sparsity": 64, "buffer_tokens": 20, "encode_tokens": 8}
    return LexicoLayer(LexicoSettings(**{**sizes, **settings}), hf_models.dictionaries("llama"))


fine_turbo_layer = functools.partial(turbo_layer, k_bits=8, v_bits=8)
each_layer = pytest.mark.parametrize(
    "make_layer", [turbo_layer, lexico_layer], ids=["turbo", "lexico"]
)
each_fine_layer = pytest.mark.parametrize(
    "make_layer", [fine_turbo_layer, lexico_layer], ids=["turbo", "lexico"]
)


class Module(torch.nn.Module):
    """What an attention function is told of the layer that calls it."""

    is_causal = True
    num_key_value_groups = 2


def stored(layer):
    """K and V as any reader of the layer gets them, ``[2, batch, heads, tokens, head_dim]``."""
    return torch.stack([layer.keys.clone(), layer.values.clone()])


def snapshot(layer):
    """Everything that an update could change, copied."""
    return copy.deepcopy(
        {
            "tensors": layer.tensors(),
            "tokens": layer.get_seq_length(),
            "padding": None if layer.padding is None else layer.padding.tolist(),
            "initialized": layer.is_initialized,
            "values": None if layer.keys is None else stored(layer),
            "codes": codes_of(layer),
        }
    )


def codes_of(layer):
    """How many tokens of a lexico layer are coded, and over how many atoms."""
    codes = getattr(layer.store, "codes", None)
    return None if codes is None else (codes.num_tokens, codes.atoms)


def assert_unchanged(layer, before):
    """The layer reads as it did; spare blocks may have been added."""
    after = snapshot(layer)
    for name in ("tokens", "padding", "initialized", "codes"):
        assert after[name] == before[name], name
    assert (after["values"] is None) == (before["values"] is None)
    if after["values"] is not None:
        assert torch.equal(after["values"], before["values"])
    for kind, tensors in before["tensors"].items():
        # The pool may have grown, and the table may have become wider. What a lexico layer holds
        # behind its tokens means nothing: what it reads was compared above.
        if isinstance(layer, TurboLayer) and kind in ("tail", "calibration", "exact"):
            for old, new in zip(tensors, after["tensors"][kind], strict=True):
                assert torch.equal(old, new), kind


def held_storages(root):
    """Bytes of every tensor storage that is reachable from an object, each once."""
    seen, sizes, queue = set(), {}, [root]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (dict, list, tuple, set)):
            queue += gc.get_referents(item)
        elif type(item).__module__.startswith(("kvcore.cache", "transformers.cache_utils")):
            queue.append(vars(item))
    return sum(sizes.values())


class FailingAllocation(TorchDispatchMode):
    """Raises at the n-th call that makes a tensor or changes a store; counts from 0."""

    def __init__(self, fails_at):
        super().__init__()
        self.fails_at = fails_at
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        allocates = any(
            "Tensor" in str(result.type) and result.alias_info is None
            for result in func._schema.returns
        )
        if allocates or func.namespace == "kvcore":
            self.calls += 1
            if self.calls == self.fails_at + 1:
                raise torch.OutOfMemoryError(f"injected at call {self.fails_at}: {func}")
        return func(*args, **(kwargs or {}))


class Mirror:
    """One sequence in a store of its own: no other sequences, no shared blocks, no growth.

    ``dense`` are its exact tokens, ``[2, heads, tokens, head_dim]``.
    """

    def __init__(self, settings, max_pages=24, heads=HEADS, head_dim=HEAD_DIM):
        self.settings = settings
        self.max_pages = max_pages
        self.dense = torch.empty(2, heads, 0, head_dim)
        self.tensors = None

    def copy(self):
        return copy.deepcopy(self)

    def append(self, kv):
        self.dense = torch.cat([self.dense, kv], 2)
        if self.tensors is not None and kv.shape[2]:
            self._append(kv)

    def quantize(self, head_bits, donor=None):
        """Begins the store with the tokens so far; ``donor`` is the mirror to calibrate like."""
        settings = self.settings
        k = self.dense[0][None]
        if donor is not None:
            balance, mean = donor.tensors["k_balance"], donor.tensors["k_mean"]
        elif k.shape[2] < 16:
            balance, mean = torch.ones(1, *k[0, :, 0].shape), torch.zeros(1, *k[0, :, 0].shape)
        else:
            balance, mean = kvcore.turbo_calibrate(
                k,
                balance=settings.balance,
                subtract_mean=settings.subtract_mean,
                rotary_dim=settings.rotary_dim,
            )
        _, heads, _, head_dim = k.shape
        pool, table = [], torch.full((1, 2, heads, self.max_pages), -1, dtype=torch.int32)
        rows = {8: 0, 4: 0, 2: 0}
        slabs = {8: 0, 4: 1, 2: 2}
        for kv in range(2):
            for head in range(heads):
                for page in range(self.max_pages):
                    bits = 8 if page < settings.sink_pages else int(head_bits[kv][head])
                    table[0, kv, head, page] = (slabs[bits] << 21) | rows[bits]
                    rows[bits] += 1
        for bits, count in rows.items():
            side = 0 if bits == 8 else 2 * head_dim
            pool.append(
                torch.zeros(max(count, 1), 64 + side + 8 * head_dim * bits, dtype=torch.uint8)
            )
        tail = torch.zeros(1, 2, heads, 2, 64 + 64 * head_dim, dtype=torch.uint8)
        tail[..., 4:8] = 255
        per_head = (1, 2, heads)
        tail_scale = torch.zeros(per_head) if donor is None else donor.tail_scale_at_start.clone()
        self.tensors = {
            "pool": pool,
            "block_table": table,
            "tail": tail,
            "tail_scale": tail_scale,
            "clamp_count": torch.zeros(per_head, dtype=torch.int64),
            "seq_lens": torch.zeros(1, dtype=torch.int32),
            "k_balance": balance,
            "k_mean": mean,
        }
        if k.shape[2]:
            self._append(self.dense)
        self.tail_scale_at_start = self.tensors["tail_scale"].clone()

    def _append(self, kv):
        kvcore.turbo_append(
            kv[0][None], kv[1][None], **self.tensors, tail_margin=self.settings.tail_margin
        )

    def crop(self, length):
        self.dense = self.dense[:, :, :length]
        if self.tensors is not None:
            names = ("pool", "block_table", "tail", "seq_lens")
            held = [self.tensors[name] for name in names]
            kvcore.turbo_rewind(*held, torch.tensor([length], dtype=torch.int32))

    def read(self):
        """K and V as stored, ``[2, heads, tokens, head_dim]``."""
        if self.tensors is None:
            return self.dense
        names = ("pool", "block_table", "tail", "seq_lens", "k_balance", "k_mean")
        held = [self.tensors[name] for name in names]
        k, v = kvcore.turbo_dequantize(*held, kv_len=self.dense.shape[2])
        return torch.stack([k[0], v[0]])
