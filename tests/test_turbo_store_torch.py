"""The store's ops inside torch: opcheck, fake tensors, torch.compile, autograd, wrappers."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import cases
import kvcore
from compare import assert_bitwise_equal
from stores import make_kv

OPS = torch.ops.kvcore


def i32(*values):
    return torch.tensor(values, dtype=torch.int32)


def arguments(op):
    """Positional and keyword arguments of a small call that flushes a page."""
    k, v = make_kv(64, 70, kv_heads=2, batch=2)
    balance, mean = OPS.turbo_calibrate(k)
    padding = i32(0, 9)
    if op == "calibrate":
        return (k, padding), {"rotary_dim": 32}
    if op == "head_priority":
        return (v, padding), {}
    if op == "quantize":
        return (k, v, balance, mean, None), {"k_bits": [4, 2], "v_bits": [8], "sink_pages": 0}
    store = cases.empty_store(2, 2, 64, 2, v_bits=2)
    OPS.turbo_append(k, v, *store.writable, balance, mean)
    if op == "append":
        return (k, v, *store.writable, balance, mean, padding), {}
    if op == "rewind":
        return (*store.readable, i32(5, 70)), {}
    return (*store.readable, balance, mean), {"kv_len": 75, "right_align": True}


ALL_OPS = ("calibrate", "head_priority", "quantize", "append", "rewind", "dequantize")
each_op = pytest.mark.parametrize("op", ALL_OPS)


@each_op
def test_opcheck(op):
    args, kwargs = arguments(op)
    results = torch.library.opcheck(getattr(OPS, f"turbo_{op}"), args, kwargs)
    assert set(results.values()) == {"SUCCESS"}


def fake_like(x, device):
    if isinstance(x, list):
        return [fake_like(y, device) for y in x]
    if x is None:
        return None
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


@each_op
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_have_the_form_of_the_results(op, device):
    args, kwargs = arguments(op)
    function = getattr(OPS, f"turbo_{op}")
    with FakeTensorMode():
        fake = [fake_like(x, device) for x in args]
        faked = function(*fake, **kwargs)
    real = function(*args, **kwargs)
    if real is None:
        assert faked is None
        return
    real, faked = (x if isinstance(x, tuple) else (x,) for x in (real, faked))
    for r, f in zip(real, faked, strict=True):
        assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride())
        assert f.device.type == device


def test_fake_quantize_with_padding_has_sizes_that_depend_on_it():
    args, kwargs = arguments("quantize")
    with FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()) as mode:
        fake = [x if x is None else mode.from_tensor(x) for x in (*args[:4], i32(0, 9))]
        pools = OPS.turbo_quantize(*fake, **kwargs)[:3]
    assert [pool.shape[1] for pool in pools] == [4160, 2240, 1216]
    assert all(isinstance(pool.shape[0], torch.SymInt) for pool in pools)


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_append_and_dequantize_equal_eager(compiler):
    """Without graph breaks, and without a copy of the store that is lost."""

    def step(k, v, pool, table, tail, tail_scale, clamp_count, seq_lens, balance, mean):
        state = (pool, table, tail, tail_scale, clamp_count, seq_lens)
        OPS.turbo_append(k * 2, v + 1, *state, balance, mean)
        read = OPS.turbo_dequantize(pool, table, tail, seq_lens, balance, mean, kv_len=150)
        return [x + 1 for x in read]

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    k, v = make_kv(64, 150, kv_heads=2)
    balance, mean = OPS.turbo_calibrate(k * 2)
    eager_store, compiled_store = (cases.empty_store(1, 2, 64, 3) for _ in range(2))
    for new in (slice(0, 60), slice(60, 120)):  # twice the same shape: no recompilation
        args = (k[:, :, new], v[:, :, new])
        want = step(*args, *eager_store.writable, balance, mean)
        got = compiled(*args, *compiled_store.writable, balance, mean)
        for a, e in zip(got, want, strict=True):
            assert_bitwise_equal(a, e)
        named = eager_store.named()
        for name, tensor in compiled_store.named().items():
            assert_bitwise_equal(tensor, named[name], name)
    assert eager_store.seq_lens.tolist() == [120]


def test_compiled_quantize_without_padding():
    compiled = torch.compile(OPS.turbo_quantize, fullgraph=True, backend="aot_eager")
    args, kwargs = arguments("quantize")
    for a, e in zip(compiled(*args, **kwargs), OPS.turbo_quantize(*args, **kwargs), strict=True):
        assert_bitwise_equal(a, e)


@pytest.mark.parametrize("op", ["calibrate", "head_priority", "quantize", "dequantize"])
def test_no_op_has_a_backward(op):
    args, kwargs = arguments(op)
    # Dequantize takes gradients only towards its calibration.
    args = [x.requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
    result = getattr(OPS, f"turbo_{op}")(*args, **kwargs)
    result = [x for x in (result if isinstance(result, tuple) else (result,)) if x.requires_grad]
    assert result
    with pytest.raises(RuntimeError, match=f"^turbo_{op}: has no backward"):
        result[0].sum().backward()


@each_op
def test_wrappers_call_the_ops(op):
    """The thin wrappers pass every argument on."""
    results = []
    for namespace in (OPS, kvcore):
        args, kwargs = arguments(op)
        result = getattr(namespace, f"turbo_{op}")(*args, **kwargs)
        result = result if isinstance(result, tuple) else (result,)
        results.append([*result, *(x for x in args if torch.is_tensor(x))])
    for a, e in zip(*results, strict=True):
        if a is not None:
            assert_bitwise_equal(a, e)


@pytest.mark.parametrize("op", ["append", "rewind"])
def test_version_counters_stay_as_documented(op):
    """If torch should begin to move them, the wrappers' documentation is to be changed."""
    args, kwargs = arguments(op)
    tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg])]
    before = [x._version for x in tensors]
    getattr(OPS, f"turbo_{op}")(*args, **kwargs)
    assert [x._version for x in tensors] == before
    torch.autograd.graph.increment_version(tensors)
    assert all(x._version > old for x, old in zip(tensors, before, strict=True))
