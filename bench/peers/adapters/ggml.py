"""Adapter for worker.py: ggml's attention and gated delta rule, through its C interface."""

from __future__ import annotations

import ctypes
import pathlib
import sys
from collections.abc import Callable

import numpy as np

F32, F16 = 0, 1
FORMATS = {"f16": F16, "q8_0": 8, "q4_0": 2}  # of enum ggml_type
GRAPH_BYTES = 1 << 24  # for tensors' descriptions and a graph of one node


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def _library() -> ctypes.CDLL:
    """libggml-cpu with the signatures of what is used; libggml-base is what it needs."""
    folder = pathlib.Path(sys.prefix) / "lib"
    ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    pointer, size, real, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    signatures = {
        "ggml_init": (pointer, [_InitParams]),
        "ggml_new_tensor_4d": (pointer, [pointer, whole, *[size] * 4]),
        "ggml_get_data": (pointer, [pointer]),
        "ggml_quantize_chunk": (ctypes.c_size_t, [whole, pointer, pointer, *[size] * 3, pointer]),
        "ggml_flash_attn_ext": (pointer, [*[pointer] * 5, *[real] * 3]),
        "ggml_gated_delta_net": (pointer, [*[pointer] * 7, size]),
        "ggml_new_graph": (pointer, [pointer]),
        "ggml_build_forward_expand": (None, [pointer, pointer]),
        "ggml_backend_cpu_init": (pointer, []),
        "ggml_backend_cpu_set_n_threads": (None, [pointer, whole]),
        "ggml_backend_graph_compute": (whole, [pointer, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class _Context:
    """Tensors in memory of ggml's, and graphs of one op over them."""

    def __init__(self, num_bytes: int, threads: int) -> None:
        self.library = _library()
        self._context = self.library.ggml_init(_InitParams(num_bytes + GRAPH_BYTES, None, False))
        self._backend = self.library.ggml_backend_cpu_init()
        self.library.ggml_backend_cpu_set_n_threads(self._backend, threads)

    def tensor(self, values: np.ndarray, kind: int = F32) -> int:
        """A tensor of a C-contiguous fp32 array of 4 dimensions, whose last is ggml's first."""
        values = np.ascontiguousarray(values, np.float32)
        tensor = self.library.ggml_new_tensor_4d(self._context, kind, *reversed(values.shape))
        data, source = self.library.ggml_get_data(tensor), values.ctypes.data
        if kind == F32:
            ctypes.memmove(data, source, values.nbytes)
        else:
            row = values.shape[-1]
            self.library.ggml_quantize_chunk(kind, source, data, 0, values.size // row, row, None)
        return tensor

    def op(self, function: str, *arguments: object) -> tuple[Callable[[], None], int]:
        """Computes a new tensor, and the address of its data."""
        tensor = getattr(self.library, function)(self._context, *arguments)
        graph = self.library.ggml_new_graph(self._context)
        self.library.ggml_build_forward_expand(graph, tensor)

        def compute() -> None:
            if self.library.ggml_backend_graph_compute(self._backend, graph) != 0:
                raise RuntimeError(f"{function} failed")

        return compute, self.library.ggml_get_data(tensor)


def _floats(address: int, *shape: int) -> np.ndarray:
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, shape)


def _decode(arrays: dict, threads: int) -> dict[str, Callable[[], np.ndarray]]:
    q, k, v = (arrays[name] for name in "qkv")
    batch, q_heads, q_len, head_dim = q.shape
    kv_len, scale = k.shape[2], head_dim**-0.5
    variants = {}
    for name, kind in FORMATS.items():
        # Of k and v as fp16, which is the most; of q, the mask and the result.
        num_bytes = 2 * (k.size + v.size) + 8 * q.size + 2 * q_len * kv_len
        context = _Context(num_bytes, threads)
        tensors = [context.tensor(q), context.tensor(k, kind), context.tensor(v, kind)]
        mask = None
        if q_len > 1:
            later = np.triu(np.ones((q_len, kv_len), bool), kv_len - q_len + 1)
            mask = context.tensor(np.where(later, -np.inf, 0)[None, None], F16)
        compute, address = context.op("ggml_flash_attn_ext", *tensors, mask, scale, 0.0, 0.0)
        out = _floats(address, batch, q_len, q_heads, head_dim).transpose(0, 2, 1, 3)

        def run(compute=compute, out=out):
            compute()
            return out

        variants[name] = run
    return variants


def _delta_rule(arrays: dict, threads: int) -> dict[str, Callable[[], np.ndarray]]:
    """Keys and queries are normalised and repeated beforehand, which favours the peer."""
    q, k, v, g, beta = (arrays[name] for name in ("q", "k", "v", "g", "beta"))
    batch, tokens, heads, dim = v.shape
    group = heads // k.shape[2]
    q, k = (np.repeat(x / np.linalg.norm(x, axis=-1, keepdims=True), group, 2) for x in (q, k))
    state = arrays.get("state")
    if state is None:
        state = np.zeros((batch, heads, dim, dim), np.float32)
    num_bytes = 4 * (q.size + k.size + 2 * v.size + 2 * g.size + 2 * state.size)
    context = _Context(num_bytes, threads)
    tensors = [context.tensor(x) for x in (q, k, v, g[..., None], beta[..., None])]
    # It keeps a state with the value's channel first.
    tensors.append(context.tensor(state.transpose(0, 1, 3, 2)))
    compute, address = context.op("ggml_gated_delta_net", *tensors, 1)
    out = _floats(address, batch, tokens, heads, dim)

    def run():
        compute()
        return out

    return {"fp32": run}


WORK = {"decode": _decode, "gdn_forward": _delta_rule, "gdn_decode": _delta_rule}


def load(arrays: dict, *, work: str, threads: int, device: str) -> dict[str, Callable]:
    """Attention over K and V in each of ggml's formats, or the delta rule, which has one."""
    return WORK[work](arrays, threads)
