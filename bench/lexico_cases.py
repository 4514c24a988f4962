"""Cases of lexico: the encoder against other pursuits, and attention over codes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from peers import lexico as peers
from peers import turbo as dense_peers
from torch import Tensor

import kvcore
from cases import (
    HEAD_DIM,
    KV_HEADS,
    Q_HEADS,
    Case,
    Task,
    Variant,
    _checked,
    _num_bytes,
    _relative_error,
)

ATOMS = 4096
# Some decoding steps' vectors and a prompt's: the second share what a call computes once. Peers get
# as many as make them fast, and their times are of as many as ours: they take vectors one by one
# (scikit-learn), or in batches as large as their memory allows.
ENCODED = (1000, 8192)
ENCODED_SPARSITIES = (8, 16, 32)
SCIKIT_LEARN, BATCHED, PUBLISHED = 32, 128, 1000
# A prompt of 32,768 tokens of 8 kv heads, and 32 tokens; torch keeps a row of products for every
# atom selected: at 32 atoms, 2 GiB for so many vectors.
GPU_PROMPT, GPU_STEP, GPU_BATCHED = 8 * 32768, 8 * 32, 4096
# Of the mean norm of the residual, against the pursuit of the reference in fp64. The peers stop
# nowhere, ours where fp32 ends: on Gaussian vectors that is not before 32 atoms.
MAX_RESIDUAL_ERROR = 1e-3
CHECKED = 16

BLOCK_TOKENS, BUFFER_TOKENS = 4096, 128
SPARSITIES = (4, 8, 12, 16, 32)
MAX_ERROR = 5e-3


def _dictionary(atoms: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(atoms, HEAD_DIM, generator=generator), dim=1)


def _on_one_core(run: Callable[[], object]) -> Callable[[], object]:
    def alone():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return run()
        finally:
            torch.set_num_threads(threads)

    return alone


def _residual_error(x: Tensor, rebuilt: Tensor, dictionary: Tensor, sparsity: int) -> float:
    """Relative difference of the mean residual to that of the reference's pursuit."""
    x, dictionary = x[:CHECKED].double(), dictionary.double()
    pursuit = kvcore.reference.lexico.orthogonal_matching_pursuit
    indices, values = pursuit(x, dictionary, sparsity=sparsity)
    exact = (values[:, :, None] * dictionary[indices]).sum(1)
    expected = (x - exact).norm(dim=1).mean()
    return abs((x - rebuilt[:CHECKED].double()).norm(dim=1).mean() / expected - 1).item()


def _encode(sparsity: int, count: int) -> Case:
    """Vectors of Gaussian channels, a dictionary of random atoms; all on one core."""
    generator = torch.Generator().manual_seed(sparsity)
    x = torch.randn(count, HEAD_DIM, generator=generator)
    dictionary = _dictionary(ATOMS)
    gram = dictionary @ dictionary.T
    shape = {"atoms": ATOMS, "head_dim": HEAD_DIM, "sparsity": sparsity, "vectors": count}
    case = Case(f"encode {count:,} vectors, sparsity {sparsity}, one core", shape, {}, cold=False)

    def add(name: str, vectors: int, run: Callable[[], object], rebuilt: Tensor) -> None:
        error = _residual_error(x, rebuilt, dictionary, sparsity)
        error = _checked(name, error, MAX_RESIDUAL_ERROR)
        case.variants[name] = Variant(_on_one_core(run), 0, error, units=vectors / count)

    for name, run in peers.scikit_learn(x[:SCIKIT_LEARN], dictionary, sparsity).items():
        add(name, SCIKIT_LEARN, run, _on_one_core(run)().float() @ dictionary)

    def batched():
        return peers.batched_omp(x[:BATCHED], dictionary, gram, sparsity)

    indices, values = _on_one_core(batched)()
    add(
        "torch, batched",
        min(count, BATCHED),
        batched,
        (values[:, :, None] * dictionary[indices]).sum(1),
    )

    def ours():
        return kvcore.lexico_encode(x[None, None], dictionary, sparsity=sparsity)

    # All of them: which search is taken depends on how many there are.
    exact = kvcore.lexico_encode(x[None, None], dictionary, sparsity=sparsity, dtype=torch.float32)
    rebuilt = kvcore.lexico_reconstruct(*exact[:3], dictionary)[0, 0]
    add("kvcore", count, ours, rebuilt)
    few = min(count, PUBLISHED)
    arrays = {"x": x[:few], "dictionary": dictionary, "sparsity": torch.tensor(sparsity)}
    case.task = Task("encode", arrays, rebuilt[:few], units=few / count, threads=1)
    return case


def _encode_on_gpu(sparsity: int, count: int, device: torch.device) -> Case:
    """As many vectors as a prompt has, or as a decoding step encodes at once."""
    generator = torch.Generator().manual_seed(sparsity)
    x = torch.randn(count, HEAD_DIM, generator=generator)
    dictionary = _dictionary(ATOMS)
    on_gpu, atoms = x.to(device), dictionary.to(device)
    gram = atoms @ atoms.T
    shape = {"atoms": ATOMS, "head_dim": HEAD_DIM, "sparsity": sparsity, "vectors": count}
    case = Case(f"encode {count} vectors, sparsity {sparsity}", shape, {}, cold=False)

    def batched():
        with device:
            return peers.batched_omp(on_gpu[:GPU_BATCHED], atoms, gram, sparsity)

    def encode(dtype: torch.dtype = torch.int8) -> tuple[Tensor, ...]:
        return kvcore.lexico_encode(on_gpu[None, None], atoms, sparsity=sparsity, dtype=dtype)

    def add(name: str, vectors: int, run: Callable[[], object], rebuilt: Tensor) -> None:
        error = _residual_error(x, rebuilt.cpu(), dictionary, sparsity)
        error = _checked(name, error, MAX_RESIDUAL_ERROR)
        case.variants[name] = Variant(run, 0, error, units=vectors / count)

    indices, values = batched()
    rebuilt = (values[:CHECKED, :, None] * atoms[indices[:CHECKED]]).sum(1)
    add("torch, batched", min(count, GPU_BATCHED), batched, rebuilt)
    exact = encode(torch.float32)[:3]
    add("kvcore", count, encode, kvcore.lexico_reconstruct(*exact, atoms)[0, 0])
    # Multiply-adds of the search, counted twice.
    case.operations = 2 * count * sparsity * ATOMS * HEAD_DIM
    return case


def _codes(
    batch: int, tokens: int, sparsity: int, atoms: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes over atoms that are all used alike, none twice in a code."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, KV_HEADS, tokens)
    first = torch.randint(0, atoms, (*shape, 1), generator=generator)
    # A step that has no divisor in common with a power of two.
    indices = (first + 787 * torch.arange(sparsity)) % atoms
    coefficients = torch.randint(1, 128, (*shape, sparsity), generator=generator)
    coefficients *= 2 * torch.randint(0, 2, coefficients.shape, generator=generator) - 1
    scale = torch.full(shape, HEAD_DIM**0.5 / (74 * sparsity**0.5))  # norms of Gaussian vectors
    return indices.short().to(device), coefficients.char().to(device), scale.half().to(device)


def _decode(kv_len: int, atoms: int, device: torch.device, batch: int = 1) -> Case:
    generator = torch.Generator().manual_seed(kv_len)

    def normal(heads: int, tokens: int) -> Tensor:
        return torch.randn(batch, heads, tokens, HEAD_DIM, generator=generator).to(device)

    q, k, v = normal(Q_HEADS, 1), normal(KV_HEADS, kv_len), normal(KV_HEADS, kv_len)
    shape = {"kv_len": kv_len, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    shape |= {"batch": batch, "atoms": atoms}
    of_batch = "" if batch == 1 else f", batch {batch}"
    case = Case(f"decode, {kv_len} tokens, {atoms} atoms{of_batch}", shape, {})
    dense = dense_peers.sdpa_decode(q, k, v)
    expected = dense["SDPA fp32, enable_gqa"]()
    for name, run in dense.items():
        error = _checked(name, _relative_error(run(), expected), 0.01)
        size = 2 if "bf16" in name else 4
        case.variants[name] = Variant(run, 2 * k.numel() * size, error)
    buffers = [x[:, :, -BUFFER_TOKENS:].bfloat16().contiguous() for x in (k, v)]
    for sparsity in SPARSITIES:
        name, variant = _decode_codes(q.bfloat16(), kv_len, atoms, sparsity, buffers)
        case.variants[name] = variant
    case.operations = 4 * batch * Q_HEADS * kv_len * HEAD_DIM
    return case


def _decode_codes(
    q: Tensor, kv_len: int, atoms: int, sparsity: int, buffers: list[Tensor]
) -> tuple[str, Variant]:
    """Attention over blocks, a tail and a buffer of the newest tokens."""
    batch, device = q.shape[0], q.device
    dictionaries = [_dictionary(atoms, seed).to(device) for seed in (1, 2)]
    tiles = BLOCK_TOKENS // 32
    blocks: tuple[list[Tensor], list[Tensor]] = ([], [])
    vectors: tuple[list[Tensor], list[Tensor]] = ([], [])
    left, seed = kv_len - BUFFER_TOKENS, 0
    while True:
        tokens = min(left, BLOCK_TOKENS)
        codes = [_codes(batch, tokens, sparsity, atoms, seed + i, device) for i in range(2)]
        for kept, code, dictionary in zip(vectors, codes, dictionaries, strict=True):
            kept.append(kvcore.lexico_reconstruct(*code, dictionary))
        tail = torch.zeros(
            batch, KV_HEADS, tiles, 64 + 96 * sparsity, dtype=torch.uint8, device=device
        )
        tails = [tail, tail.clone()]
        lens = torch.zeros(batch, dtype=torch.int32, device=device)
        kvcore.lexico_append(*codes[0], *codes[1], *tails, lens)
        left, seed = left - tokens, seed + 2
        if tokens < BLOCK_TOKENS:
            break
        for kept, block in zip(blocks, kvcore.lexico_seal(*tails, v_atoms=atoms), strict=True):
            kept.append(block)

    def run():
        return kvcore.lexico_attention(q, *blocks, *tails, lens, *dictionaries, *buffers)[0]

    k, v = (
        torch.cat([*kept, buffer.float()], 2) for kept, buffer in zip(vectors, buffers, strict=True)
    )
    expected = F.scaled_dot_product_attention(q.float(), k, v, enable_gqa=True)
    stored = _num_bytes(*blocks[0], *blocks[1])
    stored += batch * KV_HEADS * -(-int(lens[0]) // 32) * 2 * tails[0].shape[3]
    name = f"kvcore, sparsity {sparsity}"
    error = _checked(name, _relative_error(run(), expected), MAX_ERROR)
    per_vector = stored / (2 * batch * KV_HEADS * (kv_len - BUFFER_TOKENS))
    read = stored + _num_bytes(*dictionaries, *buffers)
    return f"{name}, {per_vector:.1f} bytes a vector", Variant(run, read, error)


def lexico(quick: bool, device: torch.device) -> Iterator[Callable[[], Case]]:
    """Cases of the lexico family, each built only when its turn comes."""
    for sparsity in (8,) if quick else ENCODED_SPARSITIES:
        if device.type == "cpu":
            for count in ENCODED[:1] if quick else ENCODED:
                yield functools.partial(_encode, sparsity, count)
        else:
            yield functools.partial(_encode_on_gpu, sparsity, GPU_PROMPT, device)
            yield functools.partial(_encode_on_gpu, sparsity, GPU_STEP, device)
    yield lambda: _decode(4096, 4096, device)
    if quick:
        return
    for kv_len, atoms in ((1024, 4096), (4096, 1024), (32768, 4096), (32768, 1024)):
        yield functools.partial(_decode, kv_len, atoms, device)
    yield lambda: _decode(131072, 4096, device)
    yield lambda: _decode(4096, 4096, device, batch=8)
