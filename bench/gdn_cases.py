"""Cases of the gated delta rule: scan, backward, decode with a pool of states, convolution,
norm."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from memory import FromSystem
from peers import gdn as peers
from torch import Tensor

import kvcore
from cases import Case, Task, Variant, _checked, _relative_error

TORCH = "transformers torch"
K_HEADS, V_HEADS, HEAD_DIM, CHUNK = 16, 32, 128, 64
# The bounds of csrc/gdn/README.md, against transformers' function on fp32 inputs. Rounding the
# output to bf16 alone is 1.7e-3.
MAX_ERROR, MAX_FP32_ERROR, MAX_GRADIENT_ERROR = 4e-3, 1e-5, 8e-3
# Multiply-adds per chunk and value head, from csrc/gdn/README.md.
FORWARD_MACS = 3 * CHUNK * HEAD_DIM**2 + 2 * CHUNK**2 * HEAD_DIM
BACKWARD_MACS = 9 * CHUNK * HEAD_DIM**2 + 6.5 * CHUNK**2 * HEAD_DIM + CHUNK**3


def _inputs(num_tokens: int, batch: int, device: torch.device) -> list[Tensor]:
    """q, k, v and beta in bf16, g in fp32; a quarter of the heads never decays."""
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(heads: int) -> Tensor:
        return torch.randn(batch, num_tokens, heads, HEAD_DIM, generator=generator).bfloat16()

    q, k, v = normal(K_HEADS), normal(K_HEADS), normal(V_HEADS)
    g = F.logsigmoid(torch.randn(batch, num_tokens, V_HEADS, generator=generator)) / 4
    g[..., ::4] = 0
    beta = torch.randn(batch, num_tokens, V_HEADS, generator=generator).sigmoid().bfloat16()
    return [x.to(device) for x in (q, k, v, g, beta)]


def _named(inputs: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(("q", "k", "v", "g", "beta"), inputs, strict=True))


def _shape(num_tokens: int, batch: int = 1) -> dict[str, int]:
    sizes = {"batch": batch, "num_tokens": num_tokens, "k_heads": K_HEADS, "v_heads": V_HEADS}
    return {**sizes, "k_dim": HEAD_DIM, "v_dim": HEAD_DIM}


def _forward(num_tokens: int, device: torch.device) -> Case:
    inputs = _inputs(num_tokens, 1, device)
    case = Case(f"forward, {num_tokens} tokens", _shape(num_tokens), {})
    theirs = peers.transformers_rule()
    q, k, v, g, beta = inputs
    options = {"use_qk_l2norm_in_kernel": True, "output_final_state": True}

    def transformers():
        return theirs(q, k, v, g=g, beta=beta, **options)[0]

    def ours():
        return kvcore.chunk_gated_delta_rule(q, k, v, g, beta, **options)[0]

    wide = [x.float() for x in inputs]
    expected = theirs(*wide[:3], g=wide[3], beta=wide[4], **options)[0]

    def exact():
        return kvcore.chunk_gated_delta_rule(*wide, **options)[0]

    variants = {
        TORCH: (transformers, MAX_ERROR, None),
        "kvcore": (ours, MAX_ERROR, "bf16 matmul"),
        "kvcore, fp32 inputs": (exact, MAX_FP32_ERROR, "fp32 matmul"),
    }
    for name, (run, bound, ceiling) in variants.items():
        error = _checked(name, _relative_error(run(), expected), bound)
        case.variants[name] = Variant(run, 0, error, ceiling)
    if device.type == "cpu":
        case.variants[f"{TORCH}, memory from the system"] = Variant(FromSystem(transformers))
    case.task = Task("gdn_forward", _named(inputs), expected)
    chunks = num_tokens // CHUNK * V_HEADS
    case.operations = 2 * FORWARD_MACS * chunks
    return case


def _backward(num_tokens: int, device: torch.device) -> Case:
    leaves = [x.requires_grad_() for x in _inputs(num_tokens, 1, device)]
    q, k, v, g, beta = leaves
    case = Case(f"backward, {num_tokens} tokens", _shape(num_tokens), {})
    theirs = peers.transformers_rule()
    with torch.enable_grad():
        outs = {
            TORCH: theirs(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0],
            "kvcore": kvcore.chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[
                0
            ],
        }
    d_out = v.detach().flip(1)

    def gradients(out: Tensor) -> Tensor:
        grads = torch.autograd.grad(out, leaves, d_out, retain_graph=True)
        return torch.cat([x.flatten().float() for x in grads[:3]])

    expected = gradients(outs[TORCH])
    for name, out in outs.items():

        def run(out=out):
            return torch.autograd.grad(out, leaves, d_out, retain_graph=True)

        error = _relative_error(gradients(out), expected)
        error = _checked(name, error, MAX_GRADIENT_ERROR)
        of_ours = (error, "bf16 matmul") if name == "kvcore" else ()
        case.variants[name] = Variant(run, 0, *of_ours)
    of_torch = case.variants[TORCH].run
    case.variants[f"{TORCH}, memory from the system"] = Variant(FromSystem(of_torch))
    chunks = num_tokens // CHUNK * V_HEADS
    case.operations = int(2 * BACKWARD_MACS * chunks)
    return case


def _decode(batch: int, device: torch.device) -> Case:
    """One token of every sequence; the states are read and written, and counted once."""
    inputs = _inputs(1, batch, device)
    generator = torch.Generator().manual_seed(batch)
    pool = torch.randn(batch, V_HEADS, HEAD_DIM, HEAD_DIM, generator=generator).to(device)
    slots = torch.randperm(batch, generator=generator, dtype=torch.int32).to(device)
    num_bytes = pool.numel() * pool.element_size()
    name = f"decode, {batch} sequences, {num_bytes / 1e6:.0f} MB of states"
    case = Case(name, _shape(1, batch), {})

    def ours(v_first=False):
        return kvcore.gdn_recurrent_step_(
            *inputs, pool, None, None, slots, qk_l2norm=True, state_v_first=v_first
        )

    states = pool[slots.long()]  # peers' are in the order of the sequences
    out, _ = kvcore.gdn_recurrent_step(*inputs, states, qk_l2norm=True)
    expected = kvcore.gdn_chunk_scan(
        *(x.float() for x in inputs), None, None, states, qk_l2norm=True
    )[0]
    error = _checked(name, _relative_error(out, expected), MAX_ERROR)
    case.task = Task("gdn_decode", {**_named(inputs), "state": states}, expected, num_bytes)
    case.variants["x.mul_(a) of the states"] = Variant(lambda: pool.mul_(0.999), num_bytes)
    case.variants["kvcore in place"] = Variant(ours, num_bytes, error)
    case.variants["kvcore in place, v first"] = Variant(lambda: ours(True), num_bytes)
    return case


def _train(rows: int) -> Case:
    """A step of `python -m kvcore.demo.train --model hybrid` on its longest rows, all of it."""
    from kvcore.demo import data, train
    from kvcore.demo.fast import fast

    corpus = data.read_corpus(data.source_files(held_out=False))
    stage = next(i for i, s in enumerate(train.STAGES) if s.length == 2304 and s.rows == rows)
    length = train.STAGES[stage].length
    name = f"training step of the demo, {rows} rows of {length} tokens"
    case = Case(name, {"rows": rows, "num_tokens": length}, {}, cold=False)
    runs = {}
    for variant in (TORCH, "kvcore"):
        with tempfile.TemporaryDirectory() as out:
            runs[variant] = train.Run("hybrid", out, 60, train.RECIPE)
        runs[variant].state["stage"] = stage

    def theirs():
        with torch.enable_grad():
            return runs[TORCH].step(corpus)[0]

    def ours():
        run = runs["kvcore"]
        with torch.enable_grad(), fast(run.model):
            return run.step(corpus)[0]

    # The first step is the same one: bits per byte before training.
    expected = theirs()
    error = _checked(name, abs(ours() - expected) / expected, MAX_ERROR)
    case.variants[TORCH] = Variant(theirs)
    case.variants["kvcore"] = Variant(ours, 0, error)
    return case


def _conv(num_tokens: int, device: torch.device) -> Case:
    channels = (2 * K_HEADS + V_HEADS) * HEAD_DIM
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, num_tokens, channels, generator=generator).bfloat16().to(device)
    x = x.transpose(1, 2)
    weight = torch.randn(channels, 4, generator=generator).bfloat16().to(device)
    sizes = {"channels": channels, "num_tokens": num_tokens, "width": 4}
    case = Case(f"convolution, {num_tokens} tokens", sizes, {})

    def theirs(x=x, weight=weight):
        y = F.conv1d(x, weight[:, None], padding=3, groups=channels)
        return F.silu(y[:, :, :num_tokens])

    def ours():
        return kvcore.gdn_conv1d(x, weight, silu=True)

    expected = theirs(x.float(), weight.float())
    for name, run in {"torch": theirs, "kvcore": ours}.items():
        error = _checked(name, _relative_error(run(), expected), MAX_ERROR)
        case.variants[name] = Variant(run, 2 * x.numel() * x.element_size(), error)
    return case


def _norm(rows: int, channels: int, gated: bool, device: torch.device) -> Case:
    """RMSNorm of a hybrid model, forward and backward, in bf16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).bfloat16().to(device)

    x, weight, d_out = normal(rows, channels), normal(channels), normal(rows, channels)
    gate = normal(rows, channels) if gated else None
    leaves = [y.requires_grad_() for y in (x, weight, *([gate] if gated else []))]
    kind = "gated norm" if gated else "norm"
    name = f"{kind} and its backward, {rows} rows of {channels}"
    case = Case(name, {"rows": rows, "channels": channels}, {})
    module = peers.transformers_norm(gated)(channels).to(device, torch.bfloat16)

    def theirs(*inputs: Tensor) -> Tensor:
        tensors = {"weight": inputs[1]}
        return torch.func.functional_call(module, tensors, (inputs[0], *inputs[2:]))

    def of_torch(*inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs[0], (channels,), inputs[1], 1e-6)

    def ours(*inputs: Tensor) -> Tensor:
        offset = 0.0 if gated else 1.0
        return kvcore.gdn_rms_norm(*inputs, weight_offset=offset)[0]

    def both(function: Callable, inputs: list[Tensor], d: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            out = function(*inputs)
            return [out, *torch.autograd.grad(out, inputs, d)]

    wide = [y.detach().float().requires_grad_() for y in leaves]
    expected = both(theirs, wide, d_out.float())
    # x, out; x, d_out, dx; with a gate that too, twice, and its gradient.
    num_bytes = (8 if gated else 5) * x.numel() * x.element_size()
    functions = {TORCH: theirs, "kvcore": ours}
    if not gated:
        functions["F.rms_norm"] = of_torch
    for variant, function in functions.items():

        def run(function=function):
            return both(function, leaves, d_out)

        error = None
        if function is not of_torch:  # its weight is the factor itself
            results = zip(run(), expected, strict=True)
            error = max(_relative_error(a, e) for a, e in results)
            error = _checked(variant, error, MAX_GRADIENT_ERROR)
        case.variants[variant] = Variant(run, num_bytes, error)
    return case


def gdn(quick: bool, device: torch.device) -> Iterator[Callable[[], Case]]:
    """Cases of the gdn family, each built only when its turn comes."""
    yield lambda: _forward(512, device)
    yield lambda: _conv(512 if quick else 4096, device)
    yield lambda: _norm(512 * V_HEADS if quick else 4096 * V_HEADS, HEAD_DIM, True, device)
    yield lambda: _norm(512 if quick else 4096, K_HEADS * HEAD_DIM, False, device)
    if quick:
        return
    yield lambda: _forward(4096, device)
    if device.type == "cuda":  # on a CPU the time only grows with the tokens
        yield lambda: _forward(16384, device)
    yield lambda: _backward(4096, device)
    for batch in (1, 8, 300):
        yield lambda batch=batch: _decode(batch, device)
    if device.type == "cpu":  # the demo trains there
        yield lambda: _train(2)
