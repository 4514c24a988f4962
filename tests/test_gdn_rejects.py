"""Every message of the gated delta rule's ops; a rejected call changes nothing."""

import re

import pytest
import torch

import kvcore
from gdn_cases import Scan, make_scan

NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")
SCAN = Scan(6, 32, 48, 2, 4, in_op_gate=True)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def zeros(*size, dtype=torch.float32):
    return torch.zeros(*size, dtype=dtype)


INPUTS = [
    ({"q": zeros(6, 2, 32)}, "q must be 4-dimensional, got [6, 2, 32]"),
    ({"q": zeros(1, 6, 2, 32).double()}, "q must be float32, float16 or bfloat16, got float64"),
    (
        {"q": zeros(1, 6, 2, 60)},
        "q must be of a last dimension that is a multiple of 16 up to 256, got 60",
    ),
    (
        {"q": zeros(1, 6, 2, 100)},
        "q must be of a last dimension that is a multiple of 16 up to 256, got 100",
    ),
    (
        {"q": zeros(1, 6, 2, 272)},
        "q must be of a last dimension that is a multiple of 16 up to 256, got 272",
    ),
    ({"k": zeros(1, 6, 2, 48)}, "k must be [1, 6, 2, 32], got [1, 6, 2, 48]"),
    ({"k": zeros(1, 6, 2, 32).half()}, "k must be float32 like q, got float16"),
    ({"v": zeros(1, 5, 4, 48)}, "v must be [1, 6, *, *], got [1, 5, 4, 48]"),
    ({"v": zeros(1, 6, 4, 48).half()}, "v must be float32 like q, got float16"),
    (
        {"v": zeros(1, 6, 4, 40)},
        "v must be of a last dimension that is a multiple of 16 up to 256, got 40",
    ),
    ({"v": zeros(1, 6, 3, 48)}, "v must be of a multiple of 2 heads, got 3"),
    (
        {"q": zeros(1, 6, 0, 32), "k": zeros(1, 6, 0, 32)},
        "q must be of at least 1 head, got 0",
    ),
    ({"g": zeros(1, 6, 2)}, "g must be [1, 6, 4], got [1, 6, 2]"),
    ({"g": zeros(1, 6, 4).int()}, "g must be float32, float16 or bfloat16, got int32"),
    ({"beta": zeros(1, 6, 4, 48)}, "beta must be [1, 6, 4], got [1, 6, 4, 48]"),
    ({"A_log": zeros(2)}, "A_log must be [4], got [2]"),
    ({"A_log": zeros(4).half()}, "A_log must be float32, got float16"),
    ({"A_log": None}, "dt_bias must be None without A_log, got [4]"),
    ({"dt_bias": zeros(8)[::2]}, "dt_bias must be contiguous, got strides [2]"),
    (
        {"beta_sigmoid": False, "allow_neg_eigval": True},
        "allow_neg_eigval must be False without beta_sigmoid, got True",
    ),
    ({"scale": float("inf")}, "scale must be finite in float32, got inf"),
]
STATES = [
    (zeros(2, 4, 32, 48), "{} must be [1, 4, 32, 48], got [2, 4, 32, 48]"),
    (zeros(1, 4, 48, 32), "{} must be [1, 4, 32, 48], got [1, 4, 48, 32]"),
    (zeros(1, 4, 32, 48).half(), "{} must be float32, got float16"),
    (
        zeros(1, 4, 48, 32).mT,
        "{} must be contiguous, got strides [6144, 1536, 1, 32]",
    ),
]
PACKED = [
    ({"cu_seqlens": zeros(2, 2).int()}, "cu_seqlens must be [num_seqs + 1], got [2, 2]"),
    ({"cu_seqlens": int32()}, "cu_seqlens must be [num_seqs + 1], got [0]"),
    ({"cu_seqlens": torch.tensor([0, 6])}, "cu_seqlens must be int32, got int64"),
    ({"cu_seqlens": int32(1, 6)}, "cu_seqlens[0] must be 0, got 1"),
    ({"cu_seqlens": int32(0, 4, 3)}, "cu_seqlens[2] must be at least 4, got 3"),
    ({"cu_seqlens": int32(0, -1)}, "cu_seqlens[1] must be at least 0, got -1"),
    ({"cu_seqlens": int32(0, 5)}, "cu_seqlens[1] must be 6, got 5"),
    ({"cu_seqlens": int32(0, 7)}, "cu_seqlens[1] must be 6, got 7"),
    (
        {"cu_seqlens": int32(0, 9, 6)[::2]},
        "cu_seqlens must be contiguous, got strides [2]",
    ),
]


def ids(cases):
    return [message for _, message in cases]


def rejected(op, message, arguments):
    tensors = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor)}
    before = {n: x.clone() for n, x in tensors.items()}
    with pytest.raises(RuntimeError, match=re.escape(f"{op}: {message}") + "$"):
        getattr(kvcore, op)(**arguments)
    for name, x in tensors.items():
        assert torch.equal(x, before[name]), name


def scan_arguments(**changes):
    arguments = dict(zip(NAMES, make_scan(SCAN), strict=True))
    return arguments | SCAN.options | changes


@pytest.mark.asan
@pytest.mark.parametrize(("changes", "message"), INPUTS + PACKED, ids=ids(INPUTS + PACKED))
def test_scan_rejects(changes, message):
    changes = {"initial_state": None} | changes
    rejected("gdn_chunk_scan", message, scan_arguments(**changes))


@pytest.mark.parametrize(("state", "message"), STATES, ids=ids(STATES))
def test_scan_rejects_states(state, message):
    arguments = scan_arguments(initial_state=state)
    rejected("gdn_chunk_scan", message.format("initial_state"), arguments)


def test_scan_rejects_packed_batches():
    arguments = dict(zip(NAMES, make_scan(Scan(6, batch=2)), strict=True))
    arguments |= {"cu_seqlens": int32(0, 6)}
    rejected("gdn_chunk_scan", "q must be of batch 1 with cu_seqlens, got 2", arguments)


def backward_arguments(**changes):
    arguments = scan_arguments()
    inputs = [arguments[n] for n in NAMES]
    g_cumsum, x_inverse, rstd = kvcore.gdn_chunk_scan(*inputs, **SCAN.options)[2:]
    arguments |= {"g_cumsum": g_cumsum, "x_inverse": x_inverse, "rstd": rstd}
    return {"d_out": zeros(1, 6, 4, 48)} | arguments | changes


BACKWARD = [
    ({"d_out": zeros(1, 6, 4, 32)}, "d_out must be [1, 6, 4, 48], got [1, 6, 4, 32]"),
    ({"d_out": zeros(1, 6, 4, 48).half()}, "d_out must be float32 like q, got float16"),
    ({"g_cumsum": zeros(0)}, "g_cumsum must be [1, 6, 4], got [0]"),
    ({"x_inverse": zeros(1, 6, 4, 32)}, "x_inverse must be [1, 6, 4, 64], got [1, 6, 4, 32]"),
    ({"rstd": zeros(0)}, "rstd must be [2, 1, 6, 2], got [0]"),
    (
        {"d_final_state": zeros(1, 4, 48, 32)},
        "d_final_state must be [1, 4, 32, 48], got [1, 4, 48, 32]",
    ),
    ({"initial_state": zeros(1)}, "initial_state must be [1, 4, 32, 48], got [1]"),
    ({"cu_seqlens": int32(0, 7)}, "cu_seqlens[1] must be 6, got 7"),
]


@pytest.mark.parametrize(("changes", "message"), BACKWARD, ids=ids(BACKWARD))
def test_backward_rejects(changes, message):
    rejected("gdn_chunk_scan_backward", message, backward_arguments(**changes))


def step_arguments(**changes):
    arguments = scan_arguments()
    state = arguments.pop("initial_state")
    del arguments["cu_seqlens"]
    return arguments | {"state": state} | changes


BATCH_OF_ONE = zeros(3, 4, 32, 48)
STEP = [
    ({"state": zeros(4, 32, 48)}, "state must be 4-dimensional, got [4, 32, 48]"),
    ({"state": BATCH_OF_ONE}, "state must be of 1 slots without state_indices, got 3"),
    ({"num_accepted": int32(1)}, "num_accepted must be None without state_indices, got [1]"),
    *(
        ({"state": BATCH_OF_ONE, **changes}, message)
        for changes, message in (
            (
                {"state_indices": zeros(1, 1, 6).int()},
                "state_indices must be [batch] or [batch, columns], got [1, 1, 6]",
            ),
            ({"state_indices": int32(0, 1)}, "state_indices must be [1], got [2]"),
            ({"state_indices": torch.tensor([0])}, "state_indices must be int32, got int64"),
            ({"state_indices": int32(3)}, "state_indices[0] must be in [-1, 3), got 3"),
            ({"state_indices": int32(-2)}, "state_indices[0] must be in [-1, 3), got -2"),
            (
                {"state_indices": int32(0, 1, 2)[None]},
                "state_indices must be of 1 column or at least 6, got 3",
            ),
            (
                {"state_indices": int32(0, 1, 2, -1, -1, 1)[None]},
                "state_indices[0, 5] must be a slot that no other entry names, got 1",
            ),
            (
                {"state_indices": int32(0), "num_accepted": int32(0)},
                "num_accepted[0] must be in [1, 1], got 0",
            ),
            (
                {"state_indices": int32(0), "num_accepted": int32(1, 1)},
                "num_accepted must be [1], got [2]",
            ),
        )
    ),
]


@pytest.mark.asan
@pytest.mark.parametrize("op", ["gdn_recurrent_step", "gdn_recurrent_step_"])
@pytest.mark.parametrize(("changes", "message"), INPUTS + STEP, ids=ids(INPUTS + STEP))
def test_step_rejects(op, changes, message):
    rejected(op, message, step_arguments(**changes))


@pytest.mark.parametrize(("state", "message"), STATES[1:], ids=ids(STATES[1:]))
def test_step_rejects_states(state, message):
    rejected("gdn_recurrent_step_", message.format("state"), step_arguments(state=state))


def test_step_rejects_slots_named_twice():
    arguments = dict(zip(NAMES, make_scan(Scan(1, batch=3)), strict=True))
    arguments = {n: arguments[n] for n in NAMES[:5]}
    arguments |= {"state": zeros(3, 2, 64, 64), "state_indices": int32(2, 0, 2)}
    message = "state_indices[2] must be a slot that no other entry names, got 2"
    rejected("gdn_recurrent_step_", message, arguments)


def test_step_rejects_shared_memory():
    memory = zeros(1, 4, 32, 48)
    v = memory.view(-1)[: 6 * 4 * 48].view(1, 6, 4, 48)
    message = "state must be in memory of its own, got that of v"
    rejected("gdn_recurrent_step_", message, step_arguments(state=memory, v=v))
    kvcore.gdn_recurrent_step(**step_arguments(state=memory, v=v))


def conv_arguments(**changes):
    return {"x": zeros(2, 5, 6), "weight": zeros(5, 4), "bias": zeros(5)} | changes


CONV = [
    ({"x": zeros(5, 6)}, "x must be 3-dimensional, got [5, 6]"),
    ({"x": zeros(2, 5, 6).double()}, "x must be float32, float16 or bfloat16, got float64"),
    ({"weight": zeros(5)}, "weight must be [5, *], got [5]"),
    ({"weight": zeros(6, 4)}, "weight must be [5, *], got [6, 4]"),
    ({"weight": zeros(5, 4).int()}, "weight must be float32, float16 or bfloat16, got int32"),
    ({"weight": zeros(5, 1)}, "weight must be of a width of 2 to 4, got 1"),
    ({"weight": zeros(5, 5)}, "weight must be of a width of 2 to 4, got 5"),
    ({"bias": zeros(4)}, "bias must be [5], got [4]"),
    ({"bias": zeros(5).int()}, "bias must be float32, float16 or bfloat16, got int32"),
]
CONV_STATE = [
    ({"conv_state": zeros(2, 4, 3)}, "conv_state must be [*, 5, *], got [2, 4, 3]"),
    ({"conv_state": zeros(2, 5, 2)}, "conv_state must be of at least 3 tokens, got 2"),
    (
        {"conv_state": zeros(2, 5, 3).double()},
        "conv_state must be float32, float16 or bfloat16, got float64",
    ),
    (
        {"conv_state": zeros(2, 3, 5).mT},
        "conv_state must be contiguous, got strides [15, 1, 5]",
    ),
    (
        {"conv_state": zeros(3, 5, 3)},
        "conv_state must be of 2 slots without state_indices, got 3",
    ),
    ({"state_indices": int32(0)}, "state_indices must be [2], got [1]"),
    ({"state_indices": int32(0, 2)}, "state_indices[1] must be in [-1, 2), got 2"),
    (
        {"state_indices": int32(1, 1)},
        "state_indices[1] must be a slot that no other entry names, got 1",
    ),
]


@pytest.mark.asan
@pytest.mark.parametrize(("changes", "message"), CONV, ids=ids(CONV))
def test_conv_rejects(changes, message):
    rejected("gdn_conv1d", message, conv_arguments(**changes))
    rejected("gdn_conv1d_backward", message, conv_arguments(d_out=zeros(2, 5, 6), **changes))
    state = {"conv_state": zeros(2, 5, 3)}
    rejected("gdn_conv1d_update", message, conv_arguments(**changes, **state))


@pytest.mark.asan
@pytest.mark.parametrize(("changes", "message"), CONV_STATE, ids=ids(CONV_STATE))
def test_conv_update_rejects(changes, message):
    arguments = conv_arguments(conv_state=zeros(2, 5, 3)) | changes
    rejected("gdn_conv1d_update", message, arguments)


def test_conv_rejects_the_rest():
    packed = conv_arguments(cu_seqlens=int32(0, 6))
    rejected("gdn_conv1d", "x must be of batch 1 with cu_seqlens, got 2", packed)
    packed = conv_arguments(x=zeros(1, 5, 6), cu_seqlens=int32(0, 5))
    rejected("gdn_conv1d", "cu_seqlens[1] must be 6, got 5", packed)
    arguments = conv_arguments(d_out=zeros(2, 5, 5))
    rejected("gdn_conv1d_backward", "d_out must be [2, 5, 6], got [2, 5, 5]", arguments)
    memory = zeros(2, 5, 6)
    arguments = conv_arguments(x=memory, conv_state=memory)
    rejected(
        "gdn_conv1d_update", "conv_state must be in memory of its own, got that of x", arguments
    )


def norm_arguments(**changes):
    return {"x": zeros(2, 3, 6), "weight": zeros(6), "gate": zeros(2, 3, 6)} | changes


NORM = [
    ({"x": zeros(())}, "x must be at least 1-dimensional, got []"),
    ({"x": zeros(2, 3, 6).double()}, "x must be float32, float16 or bfloat16, got float64"),
    ({"x": zeros(2, 0)}, "x must be of a last dimension of 1 to 16384, got 0"),
    ({"x": zeros(1, 16385)}, "x must be of a last dimension of 1 to 16384, got 16385"),
    ({"weight": zeros(5)}, "weight must be [6], got [5]"),
    ({"weight": zeros(1, 6)}, "weight must be [6], got [1, 6]"),
    ({"weight": zeros(6).int()}, "weight must be float32, float16 or bfloat16, got int32"),
    ({"gate": zeros(2, 3, 5)}, "gate must be [2, 3, 6], got [2, 3, 5]"),
    ({"gate": zeros(6, 6)}, "gate must be [2, 3, 6], got [6, 6]"),
    ({"gate": zeros(2, 3, 6).half()}, "gate must be float32 like x, got float16"),
    ({"weight_offset": float("nan")}, "weight_offset must be finite, got nan"),
]


@pytest.mark.asan
@pytest.mark.parametrize(("changes", "message"), NORM, ids=ids(NORM))
def test_norm_rejects(changes, message):
    rejected("gdn_rms_norm", message, norm_arguments(**changes))
    arguments = norm_arguments(d_out=zeros(2, 3, 6), rstd=zeros(2, 3), **changes)
    rejected("gdn_rms_norm_backward", message, arguments)


NORM_BACKWARD = [
    ({"d_out": zeros(3, 6)}, "d_out must be [2, 3, 6], got [3, 6]"),
    ({"d_out": zeros(2, 3, 6).half()}, "d_out must be float32 like x, got float16"),
    ({"rstd": zeros(2, 3, 1)}, "rstd must be [2, 3], got [2, 3, 1]"),
    ({"rstd": zeros(2, 3).double()}, "rstd must be float32, got float64"),
    ({"rstd": zeros(3, 2).mT}, "rstd must be contiguous, got strides [1, 2]"),
]


@pytest.mark.asan
@pytest.mark.parametrize(("changes", "message"), NORM_BACKWARD, ids=ids(NORM_BACKWARD))
def test_norm_backward_rejects(changes, message):
    arguments = norm_arguments(d_out=zeros(2, 3, 6), rstd=zeros(2, 3)) | changes
    rejected("gdn_rms_norm_backward", message, arguments)


@pytest.mark.parametrize("eps", [-1e-6, float("inf"), float("nan")])
def test_norm_rejects_eps(eps):
    message = f"eps must be finite and at least 0, got {eps:g}"
    rejected("gdn_rms_norm", message, norm_arguments(eps=eps))


def test_norm_rejects_devices():
    message = "weight must be on cpu like x, got meta"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        kvcore.gdn_rms_norm(zeros(2, 6), zeros(6).to("meta"))
