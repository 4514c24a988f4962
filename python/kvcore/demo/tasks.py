"""What the demo models are measured on: held-out source text and associative recall across it.

Every function is a pure function of its arguments and of the running Python's standard library: no
global state, no global random generator. Token ids are int64 tensors that any causal language model
of `kvcore.demo.models` takes.
"""

from __future__ import annotations

import json
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvcore.demo import data, models


def held_out_text(root: str | Path | None = None) -> np.ndarray:
    """All held-out bytes, uint8 [num_bytes], in the order of the sorted file names."""
    return data.read_corpus(data.source_files(held_out=True, root=root), root)


def text_chunks(num_chunks: int, length: int, *, root: str | Path | None = None) -> Tensor:
    """Disjoint chunks of held-out text, evenly spread over it: int64 [num_chunks, length]."""
    text = held_out_text(root)
    available = len(text) // length
    if not 1 <= num_chunks <= available:
        raise ValueError(
            f"num_chunks must be in [1, {available}] at length {length}, got {num_chunks}"
        )
    picked = np.linspace(0, available - 1, num_chunks).round().astype(int)
    chunks = text[: available * length].reshape(available, length)[picked]
    return torch.from_numpy(chunks.astype(np.int64))


@dataclass(frozen=True)
class Prompt:
    """The beginning of a held-out file, to be continued."""

    name: str  # of the file, relative to the standard library
    text: bytes


def source_prompt(num_bytes: int, *, root: str | Path | None = None) -> Prompt:
    """The first `num_bytes` bytes of the shortest held-out file that has twice as many.

    ValueError if no held-out file is that long.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    names = data.source_files(held_out=True, root=root)
    sizes = {name: (root / name).stat().st_size for name in names}
    enough = [name for name in names if sizes[name] >= 2 * num_bytes]
    if num_bytes < 1 or not enough:
        longest = max(sizes.values(), default=0)
        raise ValueError(f"num_bytes must be in [1, {longest // 2}], got {num_bytes}")
    name = min(enough, key=lambda name: (sizes[name], name))
    return Prompt(name, (root / name).read_bytes()[:num_bytes])


@dataclass(frozen=True)
class RecallPrompts:
    """Bindings, text, then queries, which stand at the same positions in all rows.

    The prediction made at `query_positions[j]`, a query's key symbol, should favour `answers[b,
    j]`, which is also the next token of row b. Tokens before `context_len` hold no query.
    """

    tokens: Tensor  # int64 [num_prompts, length]
    context_len: int
    query_positions: Tensor  # int64 [num_pairs]
    answers: Tensor  # int64 [num_prompts, num_pairs]
    # Tokens from the key symbol of the binding to that of the query.
    distances: Tensor  # int64 [num_prompts, num_pairs]


def recall_prompts(
    num_prompts: int,
    *,
    num_pairs: int = 32,
    min_distance: int = 1500,
    max_distance: int = 2000,
    before: int = 64,
    seed: int = 0,
    root: str | Path | None = None,
) -> RecallPrompts:
    """Key-value pairs, held-out text, then one query of every key in another order.

    Every distance lies in [min_distance, max_distance], which must be at least 4 * num_pairs - 4
    wide. At least `before` bytes of text stand before the bindings, more where there is less text
    after them. Each key is queried once: no query can be answered from an earlier query.
    """
    if not 1 <= num_pairs <= models.NUM_KEYS:
        raise ValueError(f"num_pairs must be in [1, {models.NUM_KEYS}], got {num_pairs}")
    # A distance is 2 * num_pairs + between + 2 * (query index - pair index).
    lowest, highest = max(0, min_distance - 2), max_distance - 4 * num_pairs + 2
    if lowest > highest or min_distance < 2 or before < 0:
        raise ValueError(
            "min_distance, max_distance must be 2 or more and leave 4 * num_pairs - 4 tokens "
            "between them, before must be 0 or more; "
            f"got {min_distance}, {max_distance}, {before} with num_pairs {num_pairs}"
        )
    rng = np.random.default_rng(seed)
    text = held_out_text(root)
    size = before + highest
    context_len = size + 2 * num_pairs
    query_positions = np.arange(context_len, context_len + 2 * num_pairs, 2)
    rows = []
    for _ in range(num_prompts):
        values = rng.integers(models.NUM_VALUES, size=models.NUM_KEYS)
        start = size - int(rng.integers(lowest, highest + 1))
        slots, keys = data.gap_events(rng, models.NUM_KEYS, num_pairs, start, size - start)
        tokens, _ = data.weave(data.window(rng, text, size), slots, keys, values)
        bound = {key: start + 2 * i for i, key in enumerate(keys[:num_pairs])}
        distances = query_positions - np.array([bound[key] for key in keys[num_pairs:]])
        rows.append((tokens, tokens[query_positions + 1], distances))
    tokens, answers, distances = (
        torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True)
    )
    return RecallPrompts(tokens, context_len, torch.from_numpy(query_positions), answers, distances)


@torch.no_grad()
def next_token_nats(model: Any, ids: Tensor) -> Tensor:
    """-log p(ids[:, t + 1] | ids[:, : t + 1]) without a cache: fp32 [batch, length - 1]."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@torch.no_grad()
def recall_hits(model: Any, prompts: RecallPrompts, rows_per_batch: int = 4) -> Tensor:
    """Whether each answer is the most likely next token: bool [num_prompts, num_pairs]."""
    hits = []
    for tokens, answers in zip(
        prompts.tokens.split(rows_per_batch), prompts.answers.split(rows_per_batch), strict=True
    ):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        best = model.lm_head(hidden[:, prompts.query_positions]).argmax(-1)
        hits.append(best == answers)
    return torch.cat(hits)


def context_gain(
    model: Any,
    num_chunks: int = 24,
    *,
    first: int = 1500,
    length: int = 2048,
    cut: int = 512,
    block: int = 64,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """How much worse text is predicted when the context is cut: a dict of paired figures.

    The targets are positions first .. length - 1 of each held-out chunk, once with all that
    precedes them and once in windows where a target sees at least `cut` and at most cut + block - 1
    bytes.
    """
    chunks = text_chunks(num_chunks, length, root=root)
    count = (length - first) // block * block
    full, short = [], []
    for chunk in chunks:
        nats = next_token_nats(model, chunk[None])[0]
        full.append(nats[first - 1 : first - 1 + count])
        starts = range(first - cut, first - cut + count, block)
        windows = torch.stack([chunk[s : s + cut + block] for s in starts])
        parts = [next_token_nats(model, part)[:, cut - 1 :] for part in windows.split(4)]
        short.append(torch.cat(parts).reshape(-1))
    full, short = (torch.stack(x).double().mean(1) / math.log(2) for x in (full, short))
    # The chunk is the unit of resampling: bytes of one file are far from independent.
    gain = (short - full) / full.mean()
    return {
        "full_bits_per_byte": full.mean().item(),
        "cut_bits_per_byte": short.mean().item(),
        "worse_percent": 100 * gain.mean().item(),
        "standard_error_percent": 100 * gain.std().item() / len(gain) ** 0.5,
        "chunks": num_chunks,
        "target_bytes": full.numel() * count,
        "positions": [first, first + count - 1],
        "cut_context_bytes": [cut, cut + block - 1],
    }


def _windowed_attention(module, query, key, value, attention_mask, window=512, **kwargs):
    """SDPA in which a query sees only the last `window` positions; for `local_attention`."""
    length = query.shape[2]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    mask = (distance >= 0) & (distance < window)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask.to(query.device), scale=kwargs["scaling"], enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def recall_accuracy(
    model: Any, num_prompts: int = 128, *, num_pairs: int = 32, seed: int = 1, **distance: int
) -> dict[str, Any]:
    """Recall accuracy over num_prompts * num_pairs queries: a dict with the distances they had."""
    prompts = recall_prompts(num_prompts, num_pairs=num_pairs, seed=seed, **distance)
    hits = recall_hits(model, prompts).double()
    return {
        "accuracy_percent": 100 * hits.mean().item(),
        "standard_error_percent": 100 * hits.mean(1).std().item() / num_prompts**0.5,
        "queries": hits.numel(),
        "pairs_per_prompt": num_pairs,
        "distances": [prompts.distances.min().item(), prompts.distances.max().item()],
        "chance_percent": 100 / num_pairs,
    }


def check(folder: str | Path) -> int:
    """Measure the model in `folder` into its training.json; 0 if all bounds hold, else 1."""
    from transformers import AttentionInterface

    from kvcore.demo.fast import fast
    from kvcore.demo.train import write_json

    folder = Path(folder)
    record = json.loads((folder / "training.json").read_text())
    model = models.load(folder)
    with fast(model):
        measured = {
            "context": context_gain(model),
            "recall": recall_accuracy(model),
            "recall_64_pairs": recall_accuracy(model, 12, num_pairs=64),
        }
        # Where the answers come from: with attention cut to 512 positions only a recurrent state
        # can reach back to the bindings.
        AttentionInterface.register("kvcore_demo_window", _windowed_attention)
        model.set_attn_implementation("kvcore_demo_window")
        measured["recall_attention_cut_to_512"] = recall_accuracy(model, 12)
    bounds = {
        "context_worse_percent_at_least": 1.0,
        "recall_accuracy_percent_at_least": 90.0,
    }
    passed = (
        measured["context"]["worse_percent"] >= bounds["context_worse_percent_at_least"]
        and measured["recall"]["accuracy_percent"] >= bounds["recall_accuracy_percent_at_least"]
    )
    record["checks"] = {**measured, "bounds": bounds, "passed": passed}
    write_json(folder / "training.json", record)
    for name, figures in measured.items():
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
        print(f"{name}: {shown}")
    print("passed" if passed else "FAILED")
    return 0 if passed else 1
