"""Comparisons whose failures say what differs: NaN first, then infinities, then where and how."""

import math

import torch
from torch import Tensor


def _coordinates(mask: Tensor, limit: int = 4) -> str:
    found = mask.nonzero()
    shown = ", ".join(str(tuple(index)) for index in found[:limit].tolist())
    return f"{len(found)} of {mask.numel()} at {shown}{', ...' if len(found) > limit else ''}"


def assert_same_form(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """Shape and dtype are equal; devices may differ."""
    assert actual.shape == expected.shape, (
        f"{name}: shape must be {list(expected.shape)}, got {list(actual.shape)}"
    )
    assert actual.dtype == expected.dtype, (
        f"{name}: dtype must be {expected.dtype}, got {actual.dtype}"
    )


def assert_same_nonfinite(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """NaN and infinities, with their signs, are in the same places."""
    assert_same_form(actual, expected, name)
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    for what, test in (
        ("NaN", torch.isnan),
        ("inf", torch.isposinf),
        ("-inf", torch.isneginf),
    ):
        extra, missing = test(actual) & ~test(expected), ~test(actual) & test(expected)
        assert not extra.any(), f"{name}: unexpected {what}: {_coordinates(extra)}"
        assert not missing.any(), f"{name}: missing {what}: {_coordinates(missing)}"


def assert_close(
    actual: Tensor, expected: Tensor, *, rtol: float, atol: float, name: str = "result"
) -> None:
    """``|actual - expected| <= atol + rtol * |expected|`` everywhere, NaN equal to NaN."""
    assert_same_nonfinite(actual, expected, name)
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    finite = e.isfinite()
    a, e = a.where(finite, 0), e.where(finite, 0)
    excess = (a - e).abs() - (atol + rtol * e.abs())
    if excess.numel() and excess.max() > 0:
        worst = torch.unravel_index(excess.argmax(), excess.shape)
        raise AssertionError(
            f"{name}: beyond rtol {rtol:g}, atol {atol:g}: {_coordinates(excess > 0)}; worst at "
            f"{tuple(map(int, worst))}: {a[worst].item():.8g}, expected {e[worst].item():.8g}"
        )


def assert_bitwise_equal(actual: Tensor, expected: Tensor, name: str = "result") -> None:
    """The same bytes; NaN payloads and the sign of zero count."""
    assert_same_form(actual, expected, name)
    a, e = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    if a.numel() == 0:
        return
    element_bytes = a.element_size()
    a_bytes = a.flatten().view(torch.uint8).view(-1, element_bytes)
    e_bytes = e.flatten().view(torch.uint8).view(-1, element_bytes)
    differs = (a_bytes != e_bytes).any(1)
    if differs.any():
        flat = int(differs.nonzero()[0])
        raise AssertionError(
            f"{name}: bytes differ: {_coordinates(differs.view(a.shape))}; first "
            f"{a.flatten()[flat].item()!r} (0x{_hex(a_bytes[flat])}), "
            f"expected {e.flatten()[flat].item()!r} (0x{_hex(e_bytes[flat])})"
        )


def _hex(little_endian: Tensor) -> str:
    return bytes(reversed(little_endian.tolist())).hex()


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` over all elements, in fp64; 0 if both are zero."""
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    error, size = float((a - e).norm()), float(e.norm())
    return error / size if size else (0.0 if error == 0 else math.inf)


def cosine(actual: Tensor, expected: Tensor) -> float:
    """Cosine between all elements as one vector, in fp64; 1 if both are zero."""
    a, e = actual.detach().cpu().double().flatten(), expected.detach().cpu().double().flatten()
    sizes = float(a.norm() * e.norm())
    return float(a @ e) / sizes if sizes else float(a.norm() == e.norm())


def assert_same_attention(
    actual: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    *,
    min_cosine: float = 0.99999,
    max_row_error: float = 0.03,
    lse_atol: float = 1e-3,
    lse_rtol: float = 0,
    name: str = "attention",
) -> None:
    """``(out, lse)`` of two implementations of one specification.

    Args:
        actual: out ``[..., head_dim]`` and lse ``[...]``.
        expected: likewise.
        min_cosine: over all finite elements, and of the same size: the relative L2 error is at
            most ``sqrt(2 (1 - min_cosine))``.
        max_row_error: relative L2 error of a single row. A probability that rounds to the other
            int8 code moves a row by up to 1/119, so this only finds a row gone wrong.
        lse_atol: absolute error of lse.
        lse_rtol: relative error of lse, for scores so large that fp32 resolves no lse_atol.
        name: what is compared.
    """
    assert_same_nonfinite(actual[0], expected[0], f"{name} out")
    out, want = (x.detach().cpu().double() for x in (actual[0], expected[0]))
    finite = want.isfinite()
    out, want = out.where(finite, 0), want.where(finite, 0)
    error, size = (out - want).norm(dim=-1), want.norm(dim=-1)
    wrong = error > max_row_error * size
    if wrong.any():
        worst = torch.unravel_index((error - max_row_error * size).argmax(), error.shape)
        raise AssertionError(
            f"{name} out: rows beyond a relative error of {max_row_error:g}: "
            f"{_coordinates(wrong)}; worst at {tuple(map(int, worst))}: {out[worst][:4].tolist()}, "
            f"expected {want[worst][:4].tolist()}"
        )
    value = cosine(out, want)
    assert value >= min_cosine, f"{name} out: cosine must be >= {min_cosine}, got {value:.8f}"
    bound, value = math.sqrt(2 * (1 - min_cosine)), relative_l2(out, want)
    assert value <= bound, f"{name} out: relative L2 must be <= {bound:.5f}, got {value:.5f}"
    assert_close(actual[1], expected[1], rtol=lse_rtol, atol=lse_atol, name=f"{name} lse")
