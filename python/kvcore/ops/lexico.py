"""Lexico: sparse codes over a dictionary, and attention on them (arXiv 2412.08890).

Glossary: ``atoms`` is the number of rows of a dictionary, fp32 ``[atoms, head_dim]``, each of norm
1; ``head_dim`` is 64, 96, 128 or 256. The *codes* of vectors ``[batch, heads, tokens, head_dim]``
are ``indices`` int16 and ``coefficients`` ``[batch, heads, tokens, sparsity]`` and ``scale`` fp16
``[batch, heads, tokens]``; a vector is about ``scale * sum_j coefficients[j] *
dictionary[indices[j]]``. Errors are ``RuntimeError``; their text is ``<op>: <argument> must be
<expected>, got <actual>``, and a rejected call changes nothing. On CPU tensors values are always
checked; on devices ``check_values=True`` synchronises and checks. Scratch memory that cannot be had
is a ``MemoryError``.
"""

import torch
from torch import Tensor

_ops = torch.ops.kvcore


def lexico_encode(
    x: Tensor,
    dictionary: Tensor,
    gram: Tensor | None = None,
    *,
    sparsity: int,
    tolerance: float = 0.0,
    dtype: torch.dtype = torch.int8,
    check_values: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Orthogonal matching pursuit of every vector (section 3.2 of the paper).

    The atom most correlated with the residual joins the code and all coefficients are fitted again,
    until there are ``sparsity`` atoms or the residual is small enough. Keys are encoded after their
    rotary embedding.

    Args:
        x: ``[batch, heads, tokens, head_dim]``, fp32, fp16 or bf16, any strides.
        dictionary: fp32 ``[atoms, head_dim]``, at most 32,768 atoms of norm 1 (to 1e-4).
        gram: fp32 ``[atoms, atoms]``, ``dictionary @ dictionary.T``, or None. Only for speed: many
            vectors at once have it computed, few are encoded without it.
        sparsity: atoms of a code, at most 64, head_dim and atoms.
        tolerance: stop earlier when the residual's norm is at most this times the vector's;
            0 always takes ``sparsity`` atoms (fewer only where they explain the vector exactly).
        dtype: of the coefficients: int8, float8_e4m3fn, or float32, which are not rounded and have
            the scale 1.
        check_values: on devices, synchronise and check the norms of the atoms.

    Returns:
        ``indices`` int16 ``[batch, heads, tokens, sparsity]`` in the order of selection;
        ``coefficients`` of the same shape, 0 (with index 0) past the last atom; ``scale`` fp16
        ``[batch, heads, tokens]``; ``residual`` fp32, the norm of the residual over that of the
        vector, before coefficients are rounded. A zero vector has scale 0 and residual 0. One that
        is not finite, or too large for the scale, has the scale NaN and no coefficients.
    """
    return _ops.lexico_encode(
        x,
        dictionary,
        gram,
        sparsity=sparsity,
        tolerance=tolerance,
        dtype=dtype,
        check_values=check_values,
    )


def lexico_reconstruct(
    indices: Tensor,
    coefficients: Tensor,
    scale: Tensor,
    dictionary: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    check_values: bool = False,
) -> Tensor:
    """Vectors from their codes, for code that cannot work on the codes.

    Args:
        indices: int16 ``[batch, heads, tokens, sparsity]``, each in ``[0, atoms)``.
        coefficients: of the same shape, int8, float8_e4m3fn or float32.
        scale: fp16 ``[batch, heads, tokens]``; NaN makes the vector NaN.
        dictionary: fp32 ``[atoms, head_dim]``.
        dtype: of the result: fp32, fp16 or bf16.
        check_values: on devices, synchronise and check the indices.

    Returns:
        ``[batch, heads, tokens, head_dim]``.
    """
    return _ops.lexico_reconstruct(
        indices, coefficients, scale, dictionary, dtype=dtype, check_values=check_values
    )
