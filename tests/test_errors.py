"""kvcore.check_errors and the op behind it."""

import pytest
import torch

import cases
import kvcore


def test_nothing_to_raise():
    assert kvcore.check_errors() is None
    assert kvcore.check_errors("cpu") is None


@cases.each_backend
def test_the_op_takes_any_tensor(backend):
    like = torch.empty(0, dtype=torch.int32, device=backend.device)
    assert backend.ops.raise_errors(like) is None


@pytest.mark.cuda
def test_devices_by_name_and_number():
    torch.empty(1, device="cuda")
    for device in (None, 0, "cuda", "cuda:0", torch.device("cuda", 0)):
        assert kvcore.check_errors(device) is None
