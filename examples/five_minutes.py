"""A first walk through kvcore: a model, its caches, what they hold, and one of them on disk.

    python examples/five_minutes.py

Needs nothing but `pip install ".[hf]"`: the model is the small one of `kvcore demo`. Read it from
top to bottom; it prints what each part shows.
"""

from __future__ import annotations

import pathlib
import tempfile

import torch
from transformers import DynamicCache

import kvcore
from kvcore.cache import Dictionaries, LexicoCache, TurboCache
from kvcore.demo import models

model = models.load("control")
source = pathlib.Path(torch.__file__).with_name("functional.py").read_text()
prompt = torch.tensor([models.encode(source[:1500])])

# 1. Attention of the model's layers now runs in kvcore's ops. Generation with a full cache is what
#    it was before.
kvcore.hf.enable(model)


def generate(cache) -> str:
    tokens = model.generate(prompt, past_key_values=cache, max_new_tokens=60, do_sample=False)
    return models.decode(tokens[0, prompt.shape[1] :].tolist())


full = generate(DynamicCache(config=model.config))
print(f"full cache: {full!r}\n")

# 2. The same model over compressed caches. Nothing else changes in the call.
dictionaries = Dictionaries.load(model.name_or_path)
caches = {
    "8 bit": TurboCache(model.config, k_bits=8, v_bits=8),
    "4 bit": TurboCache(model.config, k_bits=4, v_bits=4),
    "2 bit": TurboCache(model.config, k_bits=2, v_bits=2),
    "11+5 atoms": LexicoCache(model.config, dictionaries, k_sparsity=11, v_sparsity=5),
}
for name, cache in caches.items():
    text = generate(cache)
    same = next((i for i, (a, b) in enumerate(zip(text, full, strict=False)) if a != b), len(full))
    print(
        f"{name:10s}: {cache.nbytes():9,} bytes; the first {same} of {len(full)} characters agree"
    )

# 3. What a cache holds, layer by layer, and where it fell back to something else.
report = caches["4 bit"].memory_report()
print(f"\n4 bit: {report['bits_per_element']:.2f} bits an element of K and V, all in")

# 4. A cache goes to a file and comes back: a long prompt is read once.
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "prompt.safetensors"
    caches["4 bit"].save(path)
    loaded = TurboCache.load(path, model.config)
    print(f"saved {path.stat().st_size:,} bytes, loaded {loaded.get_seq_length()} tokens")

# 5. How far the output of one layer is from exact attention, with the op alone.
q, k, v = torch.randn(1, 8, 1, 64), *torch.randn(2, 1, 2, 1000, 64)
balance, mean = kvcore.turbo_calibrate(k)
for bits in (8, 4, 2):
    store = kvcore.turbo_quantize(k, v, balance, mean, k_bits=[bits], v_bits=[bits])
    pool = [slab for slab in store[:3] if slab.shape[0]]
    out, _ = kvcore.turbo_decode(q, pool, store[3], store[4], store[7], balance, mean)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    print(f"{bits} bit, Gaussian K and V: relative error {(out - exact).norm() / exact.norm():.3f}")

kvcore.hf.disable(model)
