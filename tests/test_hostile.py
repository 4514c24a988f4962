"""Calls that must fail: with the documented error, nothing changed, and the process alive."""

import pytest
import torch

import hostile_lexico
import hostile_turbo
import hostile_turbo_scalars
import hostile_turbo_values
from compare import assert_bitwise_equal
from hostile_lexico import LEXICO
from hostile_turbo import TURBO

OPS = torch.ops.kvcore
# What the sanitizers run. They end the process at sizes that malloc merely refuses.
CALLS = {
    TURBO: [
        *TURBO.calls(),
        *hostile_turbo.of_two_inputs(),
        *hostile_turbo_values.of_indices(),
        *hostile_turbo_values.of_pools(),
        *hostile_turbo_scalars.of_scalars(),
        *hostile_turbo_values.of_overlapping_memory(),
    ],
    LEXICO: [
        *LEXICO.calls(),
        *hostile_lexico.of_other_sizes(),
        *hostile_lexico.of_scalars(),
        *hostile_lexico.of_values(),
        *hostile_lexico.of_codes(),
    ],
}
HUGE_CALLS = {
    TURBO: list(hostile_turbo_values.of_sizes()),
    LEXICO: list(hostile_lexico.of_sizes()),
}


def params(calls):
    return [
        pytest.param(family, call, id=f"{family.name}-{call}")
        for family, of_family in calls.items()
        for call in of_family
    ]


BIGGEST_COPY = 10**6


def tensors_of(args):
    """Every tensor argument that can be copied, by name."""
    named = {}
    for name, value in args.items():
        for i, x in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_quantized:
                named[f"{name}[{i}]"] = x
    return {k: x for k, x in named.items() if x.device.type == "cpu" and x.numel() < BIGGEST_COPY}


def assert_fails(family, call):
    args = family.valid(call.op)
    call.spoil(args)
    before = {name: x.clone() for name, x in tensors_of(args).items()}
    with pytest.raises(call.error) as caught:
        getattr(OPS, family.schema(call.op))(**args)
    assert caught.type is call.error
    text = str(caught.value)
    if call.exact:
        assert text == f"{family.schema(call.op)}: {call.message}"
    else:
        assert call.message in text
    for name, x in tensors_of(args).items():
        assert_bitwise_equal(x, before[name], name)


@pytest.mark.asan
@pytest.mark.parametrize(("family", "call"), params(CALLS))
def test_rejects(family, call):
    assert_fails(family, call)


@pytest.mark.parametrize(("family", "call"), params(HUGE_CALLS))
def test_rejects_what_no_memory_holds(family, call):
    assert_fails(family, call)


each_op = pytest.mark.parametrize(
    ("family", "op"),
    [pytest.param(family, op, id=family.schema(op)) for family in CALLS for op in family.ops],
)


@pytest.mark.asan
@each_op
def test_the_call_that_is_spoiled_is_valid(family, op):
    getattr(OPS, family.schema(op))(**family.valid(op))


@pytest.mark.parametrize("family", CALLS, ids=lambda family: family.name)
def test_there_are_enough_of_them(family):
    names = [str(call) for call in CALLS[family] + HUGE_CALLS[family]]
    assert len(names) == len(set(names)), "two calls have one name"
    assert len(names) >= 300


# ---- Gradients that do not exist must not be zero, or missing, silently


GRADIENTS = {
    TURBO: {
        "attention": ("q", "k", "v", "k_balance", "k_mean"),
        "calibrate": ("k",),
        "head_priority": ("x",),
        "quantize": ("k", "v", "k_balance", "k_mean"),
        "dequantize": ("k_balance", "k_mean"),
        "decode": ("q", "k_balance", "k_mean"),
    },
    LEXICO: {
        "encode": ("x", "dictionary", "gram"),
        "reconstruct": ("scale", "dictionary"),
        "attention": ("q", "k_dictionary", "v_dictionary", "k_buffer", "v_buffer"),
    },
}
# Floats that the op which writes reads.
APPENDED = {TURBO: ("k", "v", "k_balance", "k_mean"), LEXICO: ("k_scale", "v_scale")}


@pytest.mark.parametrize(
    ("family", "op", "name"),
    [
        pytest.param(family, op, name, id=f"{family.schema(op)}-{name}")
        for family, of_family in GRADIENTS.items()
        for op, names in of_family.items()
        for name in names
    ],
)
def test_backward_refuses_by_name(family, op, name):
    schema = family.schema(op)
    args = family.valid(op)
    args[name].requires_grad_()
    results = getattr(OPS, schema)(**args)
    for i, result in enumerate(results if isinstance(results, tuple) else (results,)):
        if not result.is_floating_point():
            continue
        with pytest.raises(RuntimeError, match=f"^{schema}: has no backward; call it under"):
            result.sum().backward(retain_graph=True)
        assert args[name].grad is None, i
    with torch.no_grad():
        results = getattr(OPS, schema)(**args)
    results = results if isinstance(results, tuple) else (results,)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, id=f"{family.name}-{name}")
        for family, names in APPENDED.items()
        for name in names
    ],
)
def test_append_takes_inputs_that_require_gradients(family, name):
    append = getattr(OPS, family.schema("append"))
    plain = family.valid("append")
    tracked = {
        key: [x.clone() for x in value] if isinstance(value, list) else value.clone()
        for key, value in plain.items()
    }
    tracked[name].requires_grad_()
    append(**plain)
    append(**tracked)
    for key, x in tensors_of(tracked).items():
        assert x.requires_grad == (key == f"{name}[0]")
        assert_bitwise_equal(x.detach(), tensors_of(plain)[key], key)
