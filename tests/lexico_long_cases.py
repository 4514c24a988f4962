"""Random problems of the lexico ops, so small that 10,000 can be compared with the reference."""

import torch

from cases import DTYPES, Shape
from compare import assert_bitwise_equal, assert_close, assert_same_attention
from kvcore.reference import lexico
from lexico_cases import CODES, make_dictionary, make_problem, random_codes
from long_cases import Problem

OPS = torch.ops.kvcore
COEFFICIENTS = (torch.int8, torch.float8_e4m3fn, torch.float32)


class Vectors(Problem):
    """Vectors to code, a dictionary, and how they are to be coded."""

    def __init__(self, case):
        super().__init__(case)
        atoms = self.rng.choice((1, 2, 7, 33, 64, 65, 100, 150))
        self.dictionary = make_dictionary(atoms, self.head_dim, seed=7 + self.seed % 1000)
        self.x = self.values(self.kv_heads, min(self.kv_len, 40))
        self.options = {
            "sparsity": self.rng.randint(1, min(atoms, 10)),
            "tolerance": self.rng.choice((0.0, 0.0, 0.3, 0.7)),
            "dtype": self.rng.choice(COEFFICIENTS),
        }
        self.gram = self.dictionary @ self.dictionary.T if self.rng.random() < 0.3 else None


def check_encode(case):
    problem = Vectors(case)
    args = (problem.x, problem.dictionary)
    actual = OPS.lexico_encode(*args, problem.gram, **problem.options)
    expected = lexico.lexico_encode(*args, **problem.options)
    for a, e, name in zip(actual, expected, CODES, strict=True):
        assert (a.shape, a.dtype) == (e.shape, e.dtype), name
    assert torch.equal(actual[2].isnan(), expected[2].isnan())
    same = (actual[0] == expected[0]).all(-1)
    for place in (~same).nonzero().tolist():
        explain(problem, place, actual[0][tuple(place)], expected[0][tuple(place)])
    assert_close(actual[3][same], expected[3][same], rtol=1e-3, atol=1e-5, name="residual")
    a, e = (codes[1][same].double() for codes in (actual, expected))
    largest = e.abs().amax(-1, keepdim=True)
    # Half way between two codes either is right; E4M3 has 3 bits of mantissa.
    step = {
        torch.int8: torch.ones_like(e),
        torch.float8_e4m3fn: (e.abs() / 8).clamp(min=2**-9),
        torch.float32: 1e-4 * largest.expand_as(e),
    }[problem.options["dtype"]]
    assert ((a - e).abs() <= step).all(), "coefficients"
    assert_close(actual[2].float()[same], expected[2].float()[same], rtol=2e-3, atol=6e-8)


def explain(problem, place, actual, expected):
    """Another choice than the reference's was as good: at the first step in which they differ."""
    atoms = problem.dictionary.double()
    x = problem.x[tuple(place)].double()
    x = x / x.abs().max()
    k = int((actual != expected).nonzero()[0])
    chosen = atoms[expected[:k].long()]
    if k:
        x_in = chosen.T @ torch.linalg.lstsq(chosen.T, x[:, None]).solution[:, 0]
    else:
        x_in = torch.zeros_like(x)
    residual = x - x_in
    c = (atoms @ residual).abs() / x.norm()
    best = c.max()
    ended = [int(codes[k]) == 0 and bool((codes[k:] == 0).all()) for codes in (actual, expected)]
    if any(ended):
        # At the tolerance, or where what is left, or what it adds to the others, is rounding: fp32
        # tells a residual from none down to 2^-11 of the norm.
        left = float(residual.norm() / x.norm())
        at_bound = abs(left - problem.options["tolerance"]) <= 1e-5
        negligible = left <= 2.0**-10 or _is_spanned(atoms, chosen, c, best)
        # Or it was atom 0, not an end.
        assert at_bound or negligible or c[0] >= best - 1e-5, f"code {place} ended at step {k}"
        return
    for codes in (actual, expected):
        assert c[int(codes[k])] >= best - 1e-5 * max(float(best), 1e-2), f"code {place}, step {k}"


def _is_spanned(atoms, chosen, c, best):
    """Whether the best atom is about as near to the span of the others as ends a code."""
    new = atoms[int((c == best).nonzero()[0])]
    if not len(chosen):
        return False
    rest = new - chosen.T @ torch.linalg.lstsq(chosen.T, new[:, None]).solution[:, 0]
    return bool(rest.square().sum() <= 2.0**-15)


def check_reconstruct(case):
    problem = Vectors(case)
    dtype = problem.options["dtype"]
    codes = list(lexico.lexico_encode(problem.x, problem.dictionary, **problem.options)[:3])
    if codes[0].numel():
        # Any codes will do: atoms twice, a scale that is not finite.
        codes[0] = codes[0][..., torch.randperm(codes[0].shape[-1], generator=problem.generator)]
        codes[0] = codes[0].contiguous()
        if problem.rng.random() < 0.3:
            codes[0][0] = problem.rng.randrange(len(problem.dictionary))
        if problem.rng.random() < 0.2:
            codes[2][-1, -1, -1] = problem.rng.choice((torch.nan, 0.0, 6e4))
    out_dtype = problem.dtype
    actual = OPS.lexico_reconstruct(*codes, problem.dictionary, dtype=out_dtype)
    expected = lexico.lexico_reconstruct(*codes, problem.dictionary, dtype=out_dtype)
    rtol = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[out_dtype]
    # Sums of a vector may cancel.
    size = codes[2].float().abs().nan_to_num() * codes[1].float().abs().sum(-1)
    atol = 1e-6 * float(size.max()) if size.numel() else 0.0
    # The smallest numbers have steps: results, and, before they are scaled, the sums of the pairs.
    step = {t: torch.finfo(t).smallest_normal * torch.finfo(t).eps for t in DTYPES}
    atol += step[out_dtype]
    if size.numel():
        largest = float(codes[2].float().nan_to_num().max())
        atol += step[torch.float32] * codes[0].shape[-1] * largest
    name = f"{dtype} codes to {out_dtype}"
    assert_close(actual, expected, rtol=rtol, atol=atol, name=name)


def check_store(case):
    """Appends and cuts in any order, the tails equal to the bit after each; rarely, a block."""
    problem = Problem(case)
    rng = problem.rng
    batch, heads = problem.batch, problem.kv_heads
    widths = [rng.choice((1, 2, 5, 17)) for _ in range(2)]
    atoms = [rng.choice((1, 50, 3000)) for _ in range(2)]
    is_long = rng.random() < 0.01
    tiles = 128 if is_long else 5
    tails = [lexico.empty_tail(batch, heads, tiles, width) for width in widths]
    expected = [*tails, torch.zeros(batch, dtype=torch.int32)]
    actual = [x.clone() for x in expected]
    steps = [4096] if is_long else [rng.choice((0, 1, 1, 2, 31, 32, 33, 70)) for _ in range(4)]
    for num_new in steps:
        if rng.random() < 0.4:
            most = rng.randint(0, 90)
            for lens in (actual[2], expected[2]):
                lens.clamp_(max=most)
        if int(expected[2].max()) + num_new > 32 * tiles:
            continue
        codes = []
        for width, count in zip(widths, atoms, strict=True):
            seed = rng.randrange(2**31)
            codes += _codes(batch, heads, num_new, width, count, seed)
        OPS.lexico_append(*codes, *actual)
        lexico.lexico_append(*codes, *expected)
        for name, a, e in zip(("k_tail", "v_tail", "tail_lens"), actual, expected, strict=True):
            assert_bitwise_equal(a, e, f"{name} after {num_new} more")
    kv_len = rng.randint(0, 32 * tiles)
    for tail in actual[:2]:
        opened = OPS.lexico_unpack(tail, kv_len=kv_len)
        for a, e in zip(opened, lexico.lexico_unpack(tail, kv_len=kv_len), strict=True):
            assert_bitwise_equal(a, e)
    if is_long:
        sizes = {"k_sparsity": widths[0], "v_sparsity": widths[1], "v_atoms": atoms[1]}
        blocks = OPS.lexico_seal(*actual[:2], v_atoms=atoms[1])
        wanted = lexico.lexico_seal(*expected[:2], v_atoms=atoms[1])
        opened = OPS.lexico_unseal(*blocks, **sizes)
        want_opened = lexico.lexico_unseal(*wanted, **sizes)
        for a, e in zip((*blocks, *opened), (*wanted, *want_opened), strict=True):
            assert_bitwise_equal(a, e)


def _codes(batch, heads, tokens, width, atoms, seed):
    indices, coefficients, scale = random_codes(
        batch, heads, tokens, width, max(atoms, width), seed
    )
    return indices.clamp(max=atoms - 1), coefficients, scale


def check_attention(case):
    problem = Problem(case)
    rng = problem.rng
    buffer, q_len = rng.choice((0, 0, 1, 7, 40)), rng.choice((1, 1, 2, 5, 17))
    batch = problem.batch
    shape = Shape(
        problem.head_dim,
        problem.kv_len,
        q_len,
        problem.kv_heads,
        problem.group,
        batch,
        problem.dtype,
    )
    lens = [rng.randint(0, problem.kv_len) for _ in range(batch)]
    blocks = int(rng.random() < 0.02)
    buffer_lens = left_padding = None
    if buffer and rng.random() < 0.5:
        buffer_lens = [rng.randint(0, buffer) for _ in range(batch)]
    if rng.random() < 0.3:
        left_padding = [rng.randint(0, 40) for _ in range(batch)]
    store = make_problem(
        shape,
        blocks=blocks,
        buffer=buffer,
        k_sparsity=rng.choice((1, 3, 8)),
        v_sparsity=rng.choice((1, 4, 9)),
        atoms=(rng.choice((9, 64, 130)), rng.choice((9, 64, 130))),
        tail_lens=lens,
        buffer_lens=buffer_lens,
        left_padding=left_padding,
        seed=problem.seed % 10_000,
    )
    if store.left_padding is not None:
        held = torch.full((batch,), buffer) if store.buffer_lens is None else store.buffer_lens
        most = 4096 * blocks + torch.tensor(lens) + held
        store.left_padding = torch.minimum(store.left_padding, most.int())
    # Scores of huge queries differ by more than 1 in their last bit.
    kind = "plain" if problem.kind == "huge" else problem.kind
    problem.kind = kind
    store.q = problem.values(problem.kv_heads * problem.group, q_len)
    window = rng.choice((None, None, 1, 5, 33, 200))
    options = {
        "causal": window is not None or rng.random() < 0.6,
        "window": window,
        "scale": rng.choice((None, None, 0.02, -0.1)),
    }
    actual, expected = store.run(**options), store.expected(**options)
    assert_same_attention(actual, expected, lse_atol=1e-4, lse_rtol=1e-5, max_row_error=0.01)


CHECKS = {
    "encode": check_encode,
    "reconstruct": check_reconstruct,
    "store": check_store,
    "attention": check_attention,
}
