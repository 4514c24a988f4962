"""Adapter for worker.py: ONNX Runtime's GroupQueryAttention, whose cache grows in place."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

OPSET, IR_VERSION = 21, 10
TYPES = {"fp32": np.float32, "fp16": np.float16}


def _model(dtype: type, q_heads: int, kv_heads: int, scale: float) -> bytes:
    """A graph of the one op; all sizes are free."""
    from onnx import TensorProto, helper

    real = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    kinds = {"seqlens_k": (TensorProto.INT32, 1), "total": (TensorProto.INT32, 1)}
    inputs = ["query", "key", "value", "past_key", "past_value", "seqlens_k", "total"]
    outputs = ["output", "present_key", "present_value"]

    def described(name: str):
        kind, rank = kinds.get(name, (real, 4 if "_" in name else 3))
        return helper.make_tensor_value_info(name, kind, [f"{name}_{i}" for i in range(rank)])

    node = helper.make_node(
        "GroupQueryAttention",
        inputs,
        outputs,
        domain="com.microsoft",
        num_heads=q_heads,
        kv_num_heads=kv_heads,
        scale=scale,
    )
    graph = helper.make_graph(
        [node], "attention", [described(x) for x in inputs], [described(x) for x in outputs]
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()


@functools.cache
def _session(dtype: type, q_heads: int, kv_heads: int, scale: float, threads: int):
    """One for inputs of all sizes: each session has threads of its own."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    model = _model(dtype, q_heads, kv_heads, scale)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def load(arrays: dict, *, work: str, threads: int, device: str) -> dict[str, Callable]:
    """The newest tokens join the cache, always at the same place, and attend over all of it."""
    import onnxruntime as ort

    q, k, v = (arrays[name] for name in "qkv")
    batch, q_heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    variants = {}
    for name, dtype in TYPES.items():
        session = _session(dtype, q_heads, kv_heads, head_dim**-0.5, threads)
        # Copies: what it attends to shall lie in memory of its own.
        caches = {"key": k.astype(dtype), "value": v.astype(dtype)}
        values = {"query": q, "key": k[:, :, -q_len:], "value": v[:, :, -q_len:]}
        feeds = {
            n: x.astype(dtype).transpose(0, 2, 1, 3).reshape(batch, q_len, -1)
            for n, x in values.items()
        }
        feeds["seqlens_k"] = np.full(batch, kv_len - 1, np.int32)
        feeds["total"] = np.array([kv_len], np.int32)
        feeds["output"] = np.zeros_like(feeds["query"])
        held = {n: ort.OrtValue.ortvalue_from_numpy(x) for n, x in feeds.items()}
        binding = session.io_binding()
        for n, value in held.items():
            bind = binding.bind_ortvalue_output if n == "output" else binding.bind_ortvalue_input
            bind(n, value)
        for n, cache in caches.items():
            value = held[f"past_{n}"] = ort.OrtValue.ortvalue_from_numpy(cache)
            binding.bind_ortvalue_input(f"past_{n}", value)
            binding.bind_ortvalue_output(f"present_{n}", value)

        def run(session=session, binding=binding, held=held, kept=(caches, feeds)):
            session.run_with_iobinding(binding)
            out = held["output"].numpy().reshape(batch, q_len, q_heads, head_dim)
            return out.transpose(0, 2, 1, 3)

        variants[name] = run
    return variants
