"""Lexico: sparse codes over a dictionary, and attention on them (arXiv 2412.08890).

Glossary: ``atoms`` is the number of rows of a dictionary, fp32 ``[atoms, head_dim]``, each of norm
1; ``head_dim`` is 64, 96, 128 or 256. The *codes* of vectors ``[batch, heads, tokens, head_dim]``
are ``indices`` int16 and ``coefficients`` ``[batch, heads, tokens, sparsity]`` and ``scale`` fp16
``[batch, heads, tokens]``; a vector is about ``scale * sum_j coefficients[j] *
dictionary[indices[j]]``. The *store* of one layer keeps codes of K and V: the newest in a *tail*
``[batch, kv_heads, tiles, 64 + 96 * sparsity]`` of tiles of 32 tokens (uint8, new ones are zeros),
every 4096 before in a *block* ``[batch, kv_heads, bytes]``; ``csrc/lexico/README.md`` describes the
bytes. Errors are ``RuntimeError``; their text is ``<op>: <argument> must be
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
        gram: fp32 ``[atoms, atoms]``, ``dictionary @ dictionary.T``, or None. Only for speed: on
            CPUs calls of ``atoms / sparsity`` vectors and more compute their own in 16 bits and do
            not read it (up to 8192 atoms), smaller ones are encoded without what is not given; on
            GPUs what is given is looked up, and never computed.
        sparsity: atoms of a code, at most 64, head_dim and atoms.
        tolerance: stop earlier when the residual's norm is at most this times the vector's;
            0 always takes ``sparsity`` atoms (fewer only where they explain the vector exactly).
        dtype: of the coefficients: int8, which alone the store takes; for export and
            :func:`lexico_reconstruct` also float8_e4m3fn, or float32, which are not rounded and
            have the scale 1.
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


def lexico_append(
    k_indices: Tensor,
    k_coefficients: Tensor,
    k_scale: Tensor,
    v_indices: Tensor,
    v_coefficients: Tensor,
    v_scale: Tensor,
    k_tail: Tensor,
    v_tail: Tensor,
    tail_lens: Tensor,
    *,
    check_values: bool = False,
) -> None:
    """Append new codes to the tails of a store in place.

    A tail of 128 tiles is full with 4096 tokens and is then to be sealed (:func:`lexico_seal`); one
    of fewer tiles may be replaced by a longer one that begins with the same tiles.

    Args:
        k_indices: int16 ``[batch, kv_heads, num_new, k_sparsity]`` from :func:`lexico_encode`.
        k_coefficients: int8, shape of k_indices.
        k_scale: fp16 ``[batch, kv_heads, num_new]``.
        v_indices: int16 ``[batch, kv_heads, num_new, v_sparsity]``.
        v_coefficients: int8, shape of v_indices.
        v_scale: fp16 ``[batch, kv_heads, num_new]``.
        k_tail: uint8 ``[batch, kv_heads, tiles, 64 + 96 * k_sparsity]``; changed.
        v_tail: uint8 ``[batch, kv_heads, tiles, 64 + 96 * v_sparsity]``; changed.
        tail_lens: int32 ``[batch]``, tokens in the tails; changed. Lowering it removes the newest.
        check_values: on devices, synchronise and check tail_lens.
    """
    _ops.lexico_append(
        k_indices,
        k_coefficients,
        k_scale,
        v_indices,
        v_coefficients,
        v_scale,
        k_tail,
        v_tail,
        tail_lens,
        check_values=check_values,
    )


def lexico_seal(k_tail: Tensor, v_tail: Tensor, *, v_atoms: int) -> tuple[Tensor, Tensor]:
    """Blocks of full tails, of what is not zero: tolerance makes codes, and so blocks, shorter.

    How long blocks are depends on the codes, so on a GPU the host waits for it, and a graph cannot
    capture the op: it is called once in 4096 tokens, between replays.

    Args:
        k_tail: uint8 ``[batch, kv_heads, 128, 64 + 96 * k_sparsity]``, 4096 tokens of every
            sequence.
        v_tail: uint8 ``[batch, kv_heads, 128, 64 + 96 * v_sparsity]``.
        v_atoms: atoms of V's dictionary; every index of v_tail is below it.

    Returns:
        ``k_block`` and ``v_block``, uint8 ``[batch, kv_heads, bytes]``.
    """
    return _ops.lexico_seal(k_tail, v_tail, v_atoms=v_atoms)


def lexico_unseal(
    k_block: Tensor, v_block: Tensor, *, k_sparsity: int, v_sparsity: int, v_atoms: int
) -> tuple[Tensor, Tensor]:
    """Full tails from blocks, to rewind into them or to rebuild vectors.

    A block that :func:`lexico_seal` did not make is an error; on a GPU the vectors of such a head
    become NaN and :func:`kvcore.check_errors` raises.

    Args:
        k_block: uint8 ``[batch, kv_heads, bytes]`` from :func:`lexico_seal`.
        v_block: likewise.
        k_sparsity: of the tail of K.
        v_sparsity: of the tail of V.
        v_atoms: as it was sealed with.

    Returns:
        ``k_tail`` and ``v_tail`` of 128 tiles. Pairs of V come back in the order of their atoms,
        and pairs whose coefficient is 0 as index 0.
    """
    return _ops.lexico_unseal(
        k_block, v_block, k_sparsity=k_sparsity, v_sparsity=v_sparsity, v_atoms=v_atoms
    )


def lexico_unpack(tail: Tensor, *, kv_len: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the first tokens of a tail.

    Args:
        tail: uint8 ``[batch, kv_heads, tiles, 64 + 96 * sparsity]``.
        kv_len: tokens wanted, at most 32 a tile.

    Returns:
        ``indices`` int16 and ``coefficients`` int8 ``[batch, kv_heads, kv_len, sparsity]``,
        ``scale`` fp16 ``[batch, kv_heads, kv_len]``.
    """
    return _ops.lexico_unpack(tail, kv_len=kv_len)


def lexico_attention(
    q: Tensor,
    k_blocks: list[Tensor],
    v_blocks: list[Tensor],
    k_tail: Tensor,
    v_tail: Tensor,
    tail_lens: Tensor,
    k_dictionary: Tensor,
    v_dictionary: Tensor,
    k_buffer: Tensor | None = None,
    v_buffer: Tensor | None = None,
    buffer_lens: Tensor | None = None,
    left_padding: Tensor | None = None,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    check_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over the codes of a store and a buffer of recent tokens (section 3.3 of the paper).

    Queries are multiplied by K's dictionary once, and scores are sums of a few of the products;
    weights are summed up for each atom of V, which is multiplied by its weight once. K and V are
    never rebuilt. The context of a sequence is its blocks, its tail and its buffer, in this order.

    Args:
        q: ``[batch, q_heads, q_len, head_dim]``, fp32, fp16 or bf16, any strides.
        k_blocks: uint8 ``[batch, kv_heads, bytes]`` each, 4096 tokens of every sequence.
        v_blocks: as many.
        k_tail: uint8 ``[batch, kv_heads, tiles, 64 + 96 * k_sparsity]``.
        v_tail: uint8 ``[batch, kv_heads, tiles, 64 + 96 * v_sparsity]``.
        tail_lens: int32 ``[batch]``, tokens in the tails.
        k_dictionary: fp32 ``[k_atoms, head_dim]``.
        v_dictionary: fp32 ``[v_atoms, head_dim]``.
        k_buffer: ``[batch, kv_heads, buffer_len, head_dim]`` of q's type, any strides, or None.
        v_buffer: likewise.
        buffer_lens: int32 ``[batch]``, tokens in the buffers; None is buffer_len.
        left_padding: int32 ``[batch]``, leading tokens of each sequence that no query sees.
        causal: query i sees keys ``j <= i + kv_len - q_len`` (bottom-right alignment).
        scale: factor of the scores; None is ``head_dim ** -0.5``.
        window: with causal, a query sees only the last ``window`` keys up to its own.
        check_values: on devices, synchronise and check the lengths.

    Returns:
        ``out`` with shape and dtype of q, and ``lse`` fp32 ``[batch, q_heads, q_len]``, natural
        log. A row that attends no key gives 0 and -inf.
    """
    return _ops.lexico_attention(
        q,
        k_blocks,
        v_blocks,
        k_tail,
        v_tail,
        tail_lens,
        k_dictionary,
        v_dictionary,
        k_buffer,
        v_buffer,
        buffer_lens,
        left_padding,
        causal=causal,
        scale=scale,
        window=window,
        check_values=check_values,
    )
