"""What the tests of lexico share."""

import dataclasses

import pytest
import torch

import cases
import kvcore
from cases import F32, normal
from compare import assert_close
from kvcore.reference import lexico

CODES = ("indices", "coefficients", "scale", "residual")
GOALS = pytest.mark.parametrize(("sparsity", "share"), [(8, 0.995), (16, 0.995), (32, 0.98)])


def make_dictionary(atoms, head_dim, seed=7):
    """Random atoms of norm 1."""
    dictionary = normal(atoms, head_dim, seed=seed)
    return dictionary / dictionary.norm(dim=1, keepdim=True)


def random_codes(batch, kv_heads, tokens, sparsity, atoms, seed):
    """Codes as if of a pursuit: distinct atoms, some coefficients zero."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, kv_heads, tokens)
    # Distinct within a code, since the step is coprime to any number of atoms above sparsity.
    first = torch.randint(0, atoms, (*shape, 1), generator=generator)
    indices = (first + torch.arange(sparsity)) % atoms
    coefficients = torch.randint(-127, 128, (*shape, sparsity), generator=generator)
    coefficients[torch.rand(*shape, sparsity, generator=generator) < 0.1] = 0
    scale = torch.rand(shape, generator=generator) * 0.02 + 0.005
    return indices.short(), coefficients.char(), scale.half()


def on(device, values):
    """Tensors, lists of them and None, on a device."""
    return [
        x if x is None else on(device, x) if isinstance(x, list) else x.to(device) for x in values
    ]


def run(backend, op, *tensors, **scalars):
    """An op on a backend, tensors given on the CPU; results back on the CPU."""
    results = getattr(backend.ops, op)(*on(backend.device, tensors), **scalars)
    return tuple(x.cpu() for x in results)


def append(backend, codes, store, **scalars):
    """lexico_append on a backend; the tails and lengths of ``store`` are changed."""
    moved = on(backend.device, store)
    backend.ops.lexico_append(*on(backend.device, codes), *moved, **scalars)
    for x, y in zip(store, moved, strict=True):
        x.copy_(y)


@dataclasses.dataclass
class Problem:
    """Queries, a store of codes and a buffer."""

    q: torch.Tensor
    k_blocks: list
    v_blocks: list
    k_tail: torch.Tensor
    v_tail: torch.Tensor
    tail_lens: torch.Tensor
    k_dictionary: torch.Tensor
    v_dictionary: torch.Tensor
    k_buffer: torch.Tensor | None = None
    v_buffer: torch.Tensor | None = None
    buffer_lens: torch.Tensor | None = None
    left_padding: torch.Tensor | None = None

    def tensors(self):
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def run(self, backend=cases.CPU, **scalars):
        return run(backend, "lexico_attention", *self.tensors(), **scalars)

    def expected(self, **scalars):
        return lexico.lexico_attention(*self.tensors(), **scalars)


def make_problem(
    shape,
    *,
    blocks=0,
    buffer=0,
    k_sparsity=5,
    v_sparsity=6,
    atoms=(70, 90),
    tail_lens=None,
    buffer_lens=None,
    left_padding=None,
    seed=0,
):
    """A store whose tails hold ``shape.kv_len`` tokens behind ``blocks`` sealed blocks."""
    b, h, d = shape.batch, shape.kv_heads, shape.head_dim
    k_blocks, v_blocks = [], []

    def tails(tokens, tiles, seed):
        k = lexico.empty_tail(b, h, tiles, k_sparsity)
        v = lexico.empty_tail(b, h, tiles, v_sparsity)
        lens = torch.zeros(b, dtype=torch.int32)
        codes = random_codes(b, h, tokens, k_sparsity, atoms[0], seed)
        codes += random_codes(b, h, tokens, v_sparsity, atoms[1], seed + 1)
        kvcore.lexico_append(*codes, k, v, lens)
        return k, v, lens

    for i in range(blocks):
        k, v, _ = tails(4096, 128, 100 + seed + 2 * i)
        k, v = kvcore.lexico_seal(k, v, v_atoms=atoms[1])
        k_blocks.append(k)
        v_blocks.append(v)
    k_tail, v_tail, lens = tails(shape.kv_len, -(-shape.kv_len // 32) + 1, seed)
    if tail_lens is not None:
        lens = torch.tensor(tail_lens, dtype=torch.int32)
    size = (b, h, buffer, d)
    int32 = lambda x: None if x is None else torch.tensor(x, dtype=torch.int32)  # noqa: E731
    return Problem(
        2 * normal(b, shape.q_heads, shape.q_len, d, seed=seed + 3, dtype=shape.dtype),
        k_blocks,
        v_blocks,
        k_tail,
        v_tail,
        lens,
        make_dictionary(atoms[0], d),
        make_dictionary(atoms[1], d, seed=8),
        normal(*size, seed=seed + 4, dtype=shape.dtype) if buffer else None,
        normal(*size, seed=seed + 5, dtype=shape.dtype) if buffer else None,
        int32(buffer_lens),
        int32(left_padding),
    )


def changed(name, where, value):
    """A change of the arguments of a call: another value at one place of a tensor."""

    def change(values):
        tensor = values[name].clone()
        tensor[where] = value
        return {name: tensor}

    return change


def same_support(actual, expected):
    """Share of the vectors whose codes name the same set of atoms."""
    a, e = (x.long().sort(-1).values for x in (actual, expected))
    return (a == e).all(-1).float().mean().item()


def assert_same_codes(actual, expected, x, dictionary, share=0.995):
    """Codes of one specification.

    Few vectors may have two atoms that are equally good to fp32 rounding, and then other
    coefficients; how well they are explained must be the same.
    """
    for a, e, name in zip(actual, expected, CODES, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype), name
    actual = [a.cpu() for a in actual]
    assert same_support(actual[0], expected[0]) >= share
    assert_close(actual[3], expected[3], rtol=1e-3, atol=1e-5, name="residual")
    assert torch.equal(actual[2].isnan(), expected[2].isnan())
    same = (actual[0] == expected[0]).all(-1)
    if actual[1].dtype == F32:
        bound = 1e-4 * expected[1].abs().amax(-1, keepdim=True)
        assert ((actual[1] - expected[1]).abs() <= bound)[same].all()
    elif actual[1].dtype == torch.int8:
        # A coefficient half way between two codes may be rounded to either.
        assert ((actual[1].int() - expected[1].int()).abs() <= 1)[same].all()
        assert (actual[1] == expected[1])[same].float().mean() >= 0.99
    assert_close(actual[2].float()[same], expected[2].float()[same], rtol=2e-3, atol=6e-8)
