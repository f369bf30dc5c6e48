"""Attention with dropout in blocks: memory is linear in the lengths."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, cast, overload

import jax
import jax.numpy as jnp

from jdropout import _checks
from jdropout._attention._arguments import (
    check_attention_inputs,
    check_block_sizes,
    check_lengths,
    check_logits_operand,
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
    """Attention with dropout on its probabilities, without an array of T x S elements.

    ``softmax(scale * query @ key.T + bias)`` over the keys that are not masked, then dropout on
    these probabilities, then the product with the values. The mask is
    ``keep_mask(dropout_key, dropout_rate, (B, N, T, S))``, whatever the block sizes, sharding
    and grouping of heads. It is made block by block, again in the backward pass, and never
    stored. Names, shapes and behaviour are those of `jax.nn.dot_product_attention`, but for
    queries that may attend to no key: theirs is an output of zeros.

    Sizes: batch B, queries T, keys S, heads N, heads of key and value K (N is a multiple of K),
    features H. All modes of differentiation work, of any order. Forward and backward pass need
    memory for the inputs, the output, one number per query and head, and some blocks.

    Args:
      query: array of shape (B, T, N, H) or (T, N, H); float16, bfloat16, float32 or float64.
      key: array of shape (B, S, K, H) or (S, K, H), of the same dtype.
      value: array of shape (B, S, K, V) or (S, K, V), of the same dtype. V is H for most.
      bias: added to the logits; floating-point, broadcastable to (B, N, T, S) or (N, T, S).
      mask: booleans, True where a query may attend to a key; broadcastable likewise.
      dropout_key: a PRNG key, as for `dropout`; may be None where no mask is drawn.
      dropout_rate: probability of dropping, as for `dropout`.
      deterministic: whether to leave dropout out; may be traced.
      is_causal: whether queries attend to no later key.
      scale: of the logits, a number or (traced) scalar; ``1 / sqrt(H)`` by default.
      query_seq_lengths: int32 array of shape (B,): later queries have an output of zeros.
      key_value_seq_lengths: int32 array of shape (B,): later keys are masked.
      local_window_size: attend to this many keys before and after the own position; a pair for
        two different numbers.
      dropout_broadcast_dims: axes of (B, N, T, S), or (N, T, S), along which dropout's mask is
        shared; ``(0, 1)`` is what Flax calls ``broadcast_dropout``.
      dropout_precision: bits of the rate, as ``precision`` of `dropout`.
      start: position (batch, head, query, key) of the first probability in an attention matrix
        of ``global_shape``, of which this call computes a part, as in ``shard_map``; without
        the batch if the query has none. The dropout mask, ``is_causal``, ``local_window_size``
        and the lengths then refer to positions in the whole.
      global_shape: shape (B, N, T, S), or (N, T, S), of the whole; needed with ``start``.
      precision: of the products, as in `jax.numpy.einsum`.
      block_sizes: numbers of queries and keys in a block; chosen by measurement by default.
        Where the queries are sharded by the compiler, give the whole T for the first.
      return_residual: whether to return also the log-sum-exp of the logits.

    Returns:
      The output, of shape (B, T, N, V) or (T, N, V) and the query's dtype. With
      ``return_residual`` a pair of it and the log-sum-exp (before dropout), of shape (B, T, N)
      or (T, N), float32 (float64 for float64): differentiable, and what is needed to merge
      the results of several parts of the keys.

    Raises:
      TypeError: if an argument has a wrong type or dtype.
      ValueError: if shapes do not fit, or as for `dropout`.

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
    first, _ = _checks.check_block(start, global_shape, shape)
    first = first or (0,) * len(shape)

    plan = Plan(
        rows=cut(length, rows),
        columns=cut(key_length, columns),
        start=tuple(None if isinstance(index, jax.Array) else int(index) for index in first),
        is_causal=bool(is_causal),
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
        # Every block finds its own place.
        dropout=dataclasses.replace(draw.marked(), origin=None)
        if draw.outcome is Outcome.DRAWN
        else None,
    )
    output, residual = attention(inputs, plan)
    if draw.outcome is Outcome.DROPPED:
        output = jnp.zeros_like(output)
    output = cast("jax.Array", draw.result(output))
    return (output, residual) if return_residual else output
