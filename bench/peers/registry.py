"""Peers with an environment of their own: what each offers, and how its variants join a case.

`install.sh NAME` makes an environment, `adapters/NAME.py` runs in it; docs/benchmarks.md has them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Collection, Iterator, Mapping

import torch
from remote import Remote, RemoteError, installed, interpreter, stored
from report import is_ours
from torch import Tensor

from cases import Case, Task, Variant, _relative_error

ADAPTERS = pathlib.Path(__file__).resolve().parent / "adapters"
INSTALL = "bash bench/peers/install.sh"
NOT_INSTALLED = "not installed"
SMALL_TOKENS = 512
# One call of a peer that takes longer is said, and not repeated.
MAX_CALL_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Offer:
    """A variant of a peer.

    ``key`` is what the adapter calls it. ``max_error``: relative L2 against fp32 beyond which it
    computes something else. K and V take ``bits`` an element, and ``vector_bits`` each vector.
    """

    key: str
    max_error: float
    bits: float = 0.0
    vector_bits: float = 0.0
    ceiling: str | None = None

    def stored_bytes(self, k: Tensor) -> int:
        """What K and V take, both of the shape of ``k``."""
        vectors, head_dim = 2 * k.numel() // k.shape[-1], k.shape[-1]
        return round(vectors * (head_dim * self.bits + self.vector_bits) / 8)


@dataclasses.dataclass(frozen=True)
class Peer:
    """``offers``: for each kind of work, its variants by the names that results have."""

    what: str
    device: str
    offers: Mapping[str, Mapping[str, Offer]]


def _vllm_name() -> str:
    """What its kernels are made for is AMX; without it a slower path is taken."""
    path = pathlib.Path("/proc/cpuinfo")
    has_amx = path.exists() and "amx_bf16" in path.read_text()
    return "vLLM CPU" + ("" if has_amx else ", without AMX")


# fp32 throughout, or products of bf16 with sums in fp32: ten times what those lose.
_FP32, _BF16 = 1e-3, 1e-2
# 8 bits lose 1 % on Gaussian data, 4 bits 11 to 13 %, as ours do: the same bounds.
_INT8, _INT4 = 0.03, 0.18
# ggml adds up V's rows in fp16, one after the other: on data whose sum stays small, what that loses
# grows with the root of their number, from 0.5 % at 1,024 tokens to 5 % at 131,072.
_FP16_SUMS = 0.06
_FP8 = 0.06  # e4m3 rounds to 3 bits: 2.6 % of K and of V

PEERS: dict[str, Peer] = {
    "ggml": Peer(
        "ggml (llama.cpp): flash attention over f16, q8_0 and q4_0; gated delta rule",
        "cpu",
        {
            "decode": {
                "ggml f16": Offer("f16", _FP16_SUMS, 16),
                "ggml q8_0": Offer("q8_0", _INT8, 8.5),
                "ggml q4_0": Offer("q4_0", _INT4, 4.5),
            },
            "gdn_forward": {"ggml gated delta rule": Offer("fp32", _FP32)},
            "gdn_decode": {"ggml gated delta rule": Offer("fp32", _FP32)},
        },
    ),
    "onnxruntime": Peer(
        "ONNX Runtime: GroupQueryAttention",
        "cpu",
        {
            "decode": {
                "ONNX Runtime GQA fp32": Offer("fp32", _FP32, 32),
                "ONNX Runtime GQA fp16": Offer("fp16", _BF16, 16),
            }
        },
    ),
    "executorch": Peer(
        "ExecuTorch: attention over int8, gated delta rule",
        "cpu",
        {
            # A scale in fp32 and a zero point of 8 bits for each vector.
            "decode": {"ExecuTorch int8 SDPA": Offer("int8", _INT8, 8, 40)},
            "gdn_forward": {"ExecuTorch gated delta rule": Offer("fp32", _FP32)},
            "gdn_decode": {"ExecuTorch gated delta rule": Offer("fp32", _FP32)},
        },
    ),
    "vllm": Peer(
        "vLLM's CPU build: gated delta rule",
        "cpu",
        {
            "gdn_forward": {_vllm_name(): Offer("bf16", _BF16)},
            "gdn_decode": {_vllm_name(): Offer("bf16", _BF16)},
        },
    ),
    "lexico": Peer(
        "Lexico's published code: matching pursuit in torch",
        "cpu",
        {"encode": {"Lexico's published code": Offer("omp", _FP8)}},
    ),
    "fla": Peer(
        "flash-linear-attention: gated delta rule in Triton",
        "cuda",
        {
            "gdn_forward": {"FLA Triton": Offer("bf16", _BF16)},
            "gdn_decode": {"FLA Triton": Offer("bf16", _BF16)},
        },
    ),
    "flashinfer": Peer(
        "FlashInfer: attention over bf16 and fp8",
        "cuda",
        {
            "decode": {
                "FlashInfer bf16": Offer("bf16", _BF16, 16),
                "FlashInfer fp8": Offer("fp8", _FP8, 8),
            },
            "prefill": {"FlashInfer bf16": Offer("bf16", _BF16, ceiling="bf16 matmul")},
        },
    ),
    "sageattention": Peer(
        "SageAttention: prefill with int8 products",
        "cuda",
        {"prefill": {"SageAttention int8": Offer("int8", _INT8, ceiling="int8 matmul")}},
    ),
}


def of_device(device: str) -> tuple[str, ...]:
    """Names of the peers that run on a device."""
    return tuple(name for name, peer in PEERS.items() if peer.device == device)


def choose(text: str | None, device: str) -> tuple[str, ...]:
    """The peers that ``--peers`` asks for: all of the device by default, installed or not.

    Raises:
        ValueError: if one that is asked for is unknown, of another device, or not installed.
    """
    known = of_device(device)
    if text is None:
        return known
    if text == "none":
        return ()
    names = known if text == "all" else tuple(text.split(","))
    for name in names:
        if name not in known:
            raise ValueError(
                f"--peers must be all, none, or some of {', '.join(known)} on {device}, got {name}"
            )
        if installed(name) is None:
            raise ValueError(f"--peers: {name} is not installed; {INSTALL} {name}")
    return names


def versions(names: Collection[str]) -> dict[str, str]:
    """What the environments of those that are installed were made of."""
    found = {name: installed(name) for name in names}
    return {name: text for name, text in found.items() if text is not None}


@contextlib.contextmanager
def attached(case: Case, names: Collection[str]) -> Iterator[None]:
    """Adds peers' variants to a case for as long as it lasts, before ours.

    Each is checked against fp32. What is not installed, fails or is wrong goes to ``case.absent``.
    """
    with contextlib.ExitStack() as processes:
        if case.task is not None:
            _attach(case, case.task, names, processes)
            ours = {n: case.variants.pop(n) for n in list(case.variants) if is_ours(n)}
            case.variants |= ours
        yield


def _attach(
    case: Case, task: Task, names: Collection[str], processes: contextlib.ExitStack
) -> None:
    able = {name: PEERS[name].offers.get(task.work, {}) for name in names}
    present = {name: python for name in names if able[name] and (python := interpreter(name))}
    for name in names:
        if name not in present:
            case.absent |= dict.fromkeys(able[name], NOT_INSTALLED)
    if not present:
        return
    threads = task.threads or torch.get_num_threads()
    # They shall see their own environment only, and as many threads as ours has.
    env = {"PYTHONPATH": "", "OMP_NUM_THREADS": str(threads)}
    with stored(task.arrays, _small(task)) as folder:
        for name, python in present.items():
            arguments = {"work": task.work, "threads": threads, "device": PEERS[name].device}
            try:
                remote = Remote(python, ADAPTERS / f"{name}.py", arguments, folder, env)
            except RemoteError as error:
                case.absent |= dict.fromkeys(able[name], f"failed: {error}")
                continue
            processes.callback(remote.close)
            for variant, offer in able[name].items():
                case.absent |= _add(case, task, remote, variant, offer)
            if remote.ended():  # one took the others with it
                for variant in able[name]:
                    case.variants.pop(variant, None)
                    case.absent.setdefault(variant, "failed: its process ended")


def _small(task: Task) -> dict[str, Tensor]:
    """A part of the inputs that is enough for every thread to work on."""
    cut = {
        "decode": lambda name, x: x[:1] if name == "q" else x[:1, :, -SMALL_TOKENS:],
        "gdn_forward": lambda name, x: x[:, :SMALL_TOKENS],
        "gdn_decode": lambda name, x: x[:1],
    }.get(task.work)
    return {name: cut(name, x) for name, x in task.arrays.items()} if cut else {}


def _add(case: Case, task: Task, remote: Remote, name: str, offer: Offer) -> dict[str, str]:
    """Adds a variant, or returns why it cannot be."""
    if offer.key not in remote.names:
        return {name: "not for this shape"}
    run = remote.variant(offer.key)
    begin = time.perf_counter()
    try:
        error = _relative_error(run().to(task.expected.device), task.expected)
    except RemoteError as failure:
        return {name: f"failed: {failure}"}
    if not error <= offer.max_error:
        return {name: f"wrong: relative error {error:.4f} exceeds {offer.max_error}"}
    seconds = time.perf_counter() - begin
    if seconds > MAX_CALL_SECONDS:
        return {name: f"not repeated: a call took {seconds:.0f} s"}
    num_bytes = offer.stored_bytes(task.arrays["k"]) if offer.bits else task.state_bytes
    case.variants[name] = Variant(run, num_bytes, error, offer.ceiling, task.units)
    return {}
