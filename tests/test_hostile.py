"""Calls that must fail: with the documented error, nothing changed, and the process alive."""

import pytest
import torch

import hostile_calls
import hostile_scalars
import hostile_values
from compare import assert_bitwise_equal
from hostile_calls import valid

OPS = torch.ops.kvcore
# What the sanitizers run. They end the process at sizes that malloc merely refuses.
CALLS = [
    *hostile_calls.all_of_forms(),
    *hostile_values.of_indices(),
    *hostile_values.of_pools(),
    *hostile_scalars.of_scalars(),
    *hostile_scalars.of_types(),
    *hostile_values.of_shared_memory(),
]
HUGE_CALLS = list(hostile_values.of_sizes())
BIGGEST_COPY = 10**6


def tensors_of(args):
    """Every tensor argument that can be copied, by name."""
    named = {}
    for name, value in args.items():
        for i, x in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_quantized:
                named[f"{name}[{i}]"] = x
    return {k: x for k, x in named.items() if x.device.type == "cpu" and x.numel() < BIGGEST_COPY}


def assert_fails(call):
    args = valid(call.op)
    call.spoil(args)
    before = {name: x.clone() for name, x in tensors_of(args).items()}
    op = getattr(OPS, hostile_calls.schema_name(call.op))
    with pytest.raises(call.error) as caught:
        op(**args)
    assert caught.type is call.error
    text = str(caught.value)
    if call.exact:
        assert text == f"{hostile_calls.schema_name(call.op)}: {call.message}"
    else:
        assert call.message in text
    for name, x in tensors_of(args).items():
        assert_bitwise_equal(x, before[name], name)


@pytest.mark.asan
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_rejects(call):
    assert_fails(call)


@pytest.mark.parametrize("call", HUGE_CALLS, ids=str)
def test_rejects_what_no_memory_holds(call):
    assert_fails(call)


@pytest.mark.asan
@pytest.mark.parametrize("op", [*hostile_calls.TENSORS, "attention_packed"])
def test_the_call_that_is_spoiled_is_valid(op):
    getattr(OPS, hostile_calls.schema_name(op))(**valid(op))


def test_there_are_enough_of_them():
    names = [str(call) for call in CALLS + HUGE_CALLS]
    assert len(names) == len(set(names)), "two calls have one name"
    assert len(names) >= 300


# ---- Gradients that do not exist must not be zero, or missing, silently


GRADIENTS = [
    *(("attention", name) for name in ("q", "k", "v", "k_balance", "k_mean")),
    ("calibrate", "k"),
    ("head_priority", "x"),
    *(("quantize", name) for name in ("k", "v", "k_balance", "k_mean")),
    *(("dequantize", name) for name in ("k_balance", "k_mean")),
    *(("decode", name) for name in ("q", "k_balance", "k_mean")),
]


@pytest.mark.parametrize(("op", "name"), GRADIENTS, ids="-".join)
def test_backward_refuses_by_name(op, name):
    args = valid(op)
    args[name].requires_grad_()
    results = getattr(OPS, f"turbo_{op}")(**args)
    for i, result in enumerate(results if isinstance(results, tuple) else (results,)):
        if not result.is_floating_point():
            continue
        with pytest.raises(RuntimeError, match=f"^turbo_{op}: has no backward; call it under"):
            result.sum().backward(retain_graph=True)
        assert args[name].grad is None, i
    with torch.no_grad():
        results = getattr(OPS, f"turbo_{op}")(**args)
    results = results if isinstance(results, tuple) else (results,)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("name", ["k", "v", "k_balance", "k_mean"])
def test_append_takes_inputs_that_require_gradients(name):
    plain = valid("append")
    tracked = {
        key: [x.clone() for x in value] if isinstance(value, list) else value.clone()
        for key, value in plain.items()
    }
    tracked[name].requires_grad_()
    OPS.turbo_append(**plain)
    OPS.turbo_append(**tracked)
    for key, x in tensors_of(tracked).items():
        assert x.requires_grad == (key == f"{name}[0]")
        assert_bitwise_equal(x.detach(), tensors_of(plain)[key], key)
