"""What tracing sees of every op, on a GPU that is not there: the calls of the self-checks, faked.

Fake tensors need no CUDA build of torch. Ops are found by name, so that a new one is here as soon
as it has its self-check, without which test_doctor fails.
"""

import functools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kvcore.doctor import selfcheck


class Calls(TorchDispatchMode):
    """Keeps the arguments and results of every call of one op."""

    def __init__(self, op):
        super().__init__()
        self.name, self.calls = f"kvcore::{op}", []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name == self.name:
            self.calls.append((func, args, kwargs or {}, result))
        return result


@functools.cache
def calls_of(op):
    recorded = Calls(op)
    with recorded:
        assert selfcheck.check_op(op, "cpu").status == "ok"
    return recorded.calls


@pytest.mark.parametrize("op", selfcheck.op_names())
def test_outputs_on_cuda_are_those_of_the_cpu_elsewhere(op):
    assert calls_of(op)
    for func, args, kwargs, result in calls_of(op):
        # ShapeEnv: the sizes of some outputs depend on values, which a fake tensor has not.
        with FakeTensorMode(shape_env=ShapeEnv()):
            fake_args, fake_kwargs = tree_map_only(
                Tensor,
                lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda"),
                (args, kwargs),
            )
            faked = func(*fake_args, **fake_kwargs)
        real, faked = tree_leaves(result), tree_leaves(faked)
        assert len(real) == len(faked)
        for r, f in zip(real, faked, strict=True):
            if not isinstance(r, Tensor):
                assert f is r is None
                continue
            assert f.device == torch.device("cuda", 0)
            assert f.dtype == r.dtype
            known = [isinstance(size, int) for size in f.shape]
            assert f.dim() == r.dim()
            assert [n for n, is_known in zip(f.shape, known, strict=True) if is_known] == [
                n for n, is_known in zip(r.shape, known, strict=True) if is_known
            ]
            if all(known):
                assert f.stride() == r.stride()
            else:
                assert op in ("turbo_quantize", "lexico_seal")


@pytest.mark.parametrize("op", selfcheck.op_names())
def test_tensors_of_two_devices_are_refused(op):
    func, args, kwargs, _ = calls_of(op)[0]
    tensors = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    if len(tensors) == 1:
        pytest.skip("the op takes one tensor")
    for moved in range(1, len(tensors)):
        numbers = iter(range(len(tensors)))
        with FakeTensorMode(shape_env=ShapeEnv()):
            fake_args = tree_map_only(
                Tensor,
                lambda x, moved=moved, numbers=numbers: torch.empty_strided(
                    x.shape,
                    x.stride(),
                    dtype=x.dtype,
                    device="cpu" if next(numbers) == moved else "cuda",
                ),
                args,
            )
            with pytest.raises(RuntimeError, match=r"must be on cuda:0 like \w+.*, got cpu"):
                func(*fake_args, **kwargs)
