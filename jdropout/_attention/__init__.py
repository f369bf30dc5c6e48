"""Attention with dropout, computed in blocks: memory is linear in the lengths."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, cast, overload

import jax
import jax.numpy as jnp

from jdropout import _checks, _values
from jdropout._attention._arguments import (
    check_attention_inputs,
    check_block_sizes,
    check_lengths,
    check_logits_operand,
    check_positions,
    check_scale,
    check_window,
)
from jdropout._attention._blocks import Inputs, Plan, cut, default_block_sizes
from jdropout._attention._softmax import attention
from jdropout._draw import Outcome
from jdropout._new_draw import new_draw
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    dropout_key: Key | None,
    dropout_rate: Rate,
    deterministic: Flag = ...,
    is_causal: bool = ...,
    scale: ArrayLike | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    dropout_broadcast_dims: Sequence[int] = ...,
    dropout_precision: int | None = ...,
    start: Sequence[Index] | None = ...,
    global_shape: Sequence[int] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
    block_sizes: tuple[int, int] | None = ...,
    return_residual: Literal[False] = ...,
) -> jax.Array: ...
@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    dropout_key: Key | None,
    dropout_rate: Rate,
    deterministic: Flag = ...,
    is_causal: bool = ...,
    scale: ArrayLike | None = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    dropout_broadcast_dims: Sequence[int] = ...,
    dropout_precision: int | None = ...,
    start: Sequence[Index] | None = ...,
    global_shape: Sequence[int] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
    block_sizes: tuple[int, int] | None = ...,
    return_residual: Literal[True],
) -> tuple[jax.Array, jax.Array]: ...
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    dropout_key: Key | None,
    dropout_rate: Rate,
    deterministic: Flag = False,
    is_causal: bool = False,
    scale: ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    dropout_broadcast_dims: Sequence[int] = (),
    dropout_precision: int | None = None,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: jax.lax.PrecisionLike = None,
    block_sizes: tuple[int, int] | None = None,
    return_residual: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Computes attention with dropout on its probabilities, without ever storing a T x S array.

    ``softmax(scale * query @ key.T + bias)`` over the keys that are not masked, then dropout on
    these probabilities, then the product with the values. The dropout mask is
    ``keep_mask(dropout_key, dropout_rate, (B, N, T, S))``, whatever the block sizes, sharding
    and grouping of heads. It is made block by block, made again in the backward pass, and never
    stored. Names, shapes and behaviour follow `jax.nn.dot_product_attention`, with one
    exception: a query that may attend to no key gets an output of zeros.

    Sizes: batch B, queries T, keys S, query heads N, key and value heads K (N is a multiple of
    K), features H. All modes of differentiation work, to any order. Forward and backward pass
    need memory for the inputs, the output, one number per query and head, and a few blocks.

    Args:
      query: array of shape (B, T, N, H) or (T, N, H); float16, bfloat16, float32 or float64.
      key: array of shape (B, S, K, H) or (S, K, H), with the same dtype.
      value: array of shape (B, S, K, V) or (S, K, V), with the same dtype. V usually equals H.
      bias: floating-point array added to the logits; broadcastable to (B, N, T, S) or (N, T,
        S).
      mask: boolean array, True where a query may attend to a key; broadcastable to (B, N, T, S)
        or (N, T, S).
      dropout_key: PRNG key, typed or raw; use a new one for every call. May be None if no
        dropout mask is drawn (``deterministic=True``, or a static rate of 0 or 1).
      dropout_rate: probability of dropping an attention probability, in [0, 1]; a number or a
        (traced) floating-point scalar.
      deterministic: if True, leave dropout out; a bool or a (traced) boolean scalar.
      is_causal: if True, no query attends to a later key.
      scale: factor of the logits, a number or a (traced) scalar; None for ``1 / sqrt(H)``.
      query_seq_lengths: int32 array of shape (B,); queries beyond these lengths get an output
        of zeros.
      key_value_seq_lengths: int32 array of shape (B,); keys beyond these lengths are masked.
      local_window_size: number of keys to attend to before and after a query's own position; a
        pair for two different numbers, None for no limit.
      dropout_broadcast_dims: axes of (B, N, T, S), or (N, T, S), along which the dropout mask
        is shared; ``(0, 1)`` is what Flax calls ``broadcast_dropout``.
      dropout_precision: bits of the dropout rate, 16 or 32; None uses 32 only where 16 bits
        would miss a static rate by more than 0.1 %.
      start: position (batch, head, query, key) of the first probability within an attention
        matrix of `global_shape`, of which this call computes a part, as in `shard_map`; without
        the batch if the query has none. The dropout mask, `is_causal`, `local_window_size` and
        the lengths then refer to positions in the whole.
      global_shape: shape (B, N, T, S), or (N, T, S), of the whole attention matrix; required
        with `start`.
      precision: precision of the matrix products, as in `jax.numpy.einsum`.
      block_sizes: number of queries and keys in a block; None chooses them by measurement.
        Where the compiler shards the queries, pass the whole T as the first.
      return_residual: if True, also return the log-sum-exp of the logits.

    Returns:
      The output, of shape (B, T, N, V) or (T, N, V), in the query's dtype. With
      `return_residual`, a pair of the output and the log-sum-exp (before dropout), of shape (B,
      T, N) or (T, N), float32 (float64 for float64 inputs); it is differentiable, and it is
      what you need to merge results over several parts of the keys.

    Raises:
      TypeError: if an argument has the wrong type or dtype.
      ValueError: if shapes do not match, the dropout rate is not a scalar in [0, 1] (a traced
        one outside gives NaN, and an error under ``checkify``), the dropout key is missing or a
        batch of keys, an axis does not exist, or the part at `start` does not fit into
        `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> query, key, value = (jax.random.normal(k, (2, 1024, 8, 64)) for k in keys[:3])
      >>> y = jdropout.dot_product_attention(
      ...     query, key, value, dropout_key=keys[3], dropout_rate=0.1, is_causal=True
      ... )
      >>> y.shape
      (2, 1024, 8, 64)

    References:
      Vaswani et al., "Attention is all you need" (2017), section 5.4, for the dropout; Milakov
      and Gimelshein, "Online normalizer calculation for softmax" (2018), and Dao, Fu, Ermon,
      Rudra and Ré, "FlashAttention" (2022), section 3.1, for the blocks.
    """
    query, key, value = check_attention_inputs(query, key, value)
    *batch, length, heads, features = query.shape
    key_length = key.shape[-3]
    shape = (*batch, heads, length, key_length)
    bias = check_logits_operand("bias", bias, shape)
    mask = check_logits_operand("mask", mask, shape)
    query_seq_lengths = check_lengths("query_seq_lengths", query_seq_lengths, batch)
    key_value_seq_lengths = check_lengths("key_value_seq_lengths", key_value_seq_lengths, batch)
    window = check_window(local_window_size)
    causal = _values.check_flag("is_causal", is_causal)
    with_residual = _values.check_flag("return_residual", return_residual)
    scale = 1 / math.sqrt(features) if scale is None else check_scale(scale)
    rows, columns = check_block_sizes(block_sizes) or default_block_sizes(query)
    draw = new_draw(
        "attention",
        dropout_key,
        dropout_rate,
        deterministic,
        shape,
        broadcast_dims=dropout_broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=dropout_precision,
        prefix="dropout_",
    )
    first, whole = _checks.check_block(start, global_shape, shape)
    check_positions(whole)
    first = first or (0,) * len(shape)

    plan = Plan(
        rows=cut(length, rows),
        columns=cut(key_length, columns),
        start=tuple(None if isinstance(index, jax.Array) else int(index) for index in first),
        is_causal=causal,
        window=window,
        precision=precision,
    )
    inputs = Inputs(
        query=query,
        key=key,
        value=value,
        bias=bias,
        scale=scale,
        mask=mask,
        query_lengths=query_seq_lengths,
        key_lengths=key_value_seq_lengths,
        start=tuple(index if isinstance(index, jax.Array) else None for index in first),
        # `Draw.tile` gives every block its own origin.
        dropout=None,
    )
    if draw.outcome is Outcome.DRAWN:
        dropout = dataclasses.replace(draw.marked(), origin=None)
        inputs = inputs._replace(dropout=dropout.eager(inputs))
    output, residual = attention(inputs, plan)
    if draw.outcome is Outcome.DROPPED:
        output = jnp.zeros_like(output)
    output = cast("jax.Array", draw.result(output))
    return (output, residual) if with_residual else output
