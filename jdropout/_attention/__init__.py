"""Attention with dropout, computed in blocks: memory is linear in the lengths."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast, overload

import jax
import jax.numpy as jnp

from jdropout import _batch, _checks, _key_kinds, _values
from jdropout._attention._arguments import (
    check_alignment,
    check_attention_inputs,
    check_block_sizes,
    check_kernel_arguments,
    check_kernel_precision,
    check_lengths,
    check_logits_operand,
    check_matmul_precision,
    check_positions,
    check_scale,
    check_segment_ids,
    check_soft_cap,
    check_window,
)
from jdropout._attention._blocks import Inputs, Plan, Plans, cut, default_block_sizes
from jdropout._attention._positions import as_position_functions
from jdropout._attention._softmax import attention
from jdropout._draw import Outcome
from jdropout._implementation import Implementation, check_implementation
from jdropout._new_draw import new_draw
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate
from jdropout.by_position import PositionFunction

Alignment = Literal["top-left", "bottom-right"]
DropoutOn = Literal["probabilities", "logits"]
ByPosition = Callable[..., Any] | PositionFunction | Sequence[Any] | None


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
    query_segment_ids: ArrayLike | None = ...,
    key_value_segment_ids: ArrayLike | None = ...,
    causal_alignment: Alignment = ...,
    bias_fn: ByPosition = ...,
    mask_fn: ByPosition = ...,
    logits_soft_cap: float | None = ...,
    dropout_on: DropoutOn = ...,
    dropout_broadcast_dims: Sequence[int] = ...,
    dropout_precision: int | None = ...,
    start: Sequence[Index] | None = ...,
    global_shape: Sequence[int] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
    block_sizes: tuple[int, int] | None = ...,
    implementation: Implementation | None = ...,
    return_residual: Literal[False] = ...,
    return_weights: Literal[False] = ...,
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
    query_segment_ids: ArrayLike | None = ...,
    key_value_segment_ids: ArrayLike | None = ...,
    causal_alignment: Alignment = ...,
    bias_fn: ByPosition = ...,
    mask_fn: ByPosition = ...,
    logits_soft_cap: float | None = ...,
    dropout_on: DropoutOn = ...,
    dropout_broadcast_dims: Sequence[int] = ...,
    dropout_precision: int | None = ...,
    start: Sequence[Index] | None = ...,
    global_shape: Sequence[int] | None = ...,
    precision: jax.lax.PrecisionLike = ...,
    block_sizes: tuple[int, int] | None = ...,
    implementation: Implementation | None = ...,
    return_residual: bool = ...,
    return_weights: bool = ...,
) -> Any: ...
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
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    causal_alignment: Alignment = "top-left",
    bias_fn: ByPosition = None,
    mask_fn: ByPosition = None,
    logits_soft_cap: float | None = None,
    dropout_on: DropoutOn = "probabilities",
    dropout_broadcast_dims: Sequence[int] = (),
    dropout_precision: int | None = None,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: jax.lax.PrecisionLike = None,
    block_sizes: tuple[int, int] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    return_weights: bool = False,
) -> jax.Array | tuple[jax.Array, ...]:
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
      query_segment_ids: integers of shape (B, T) or (T,): documents packed into one row. A query
        attends only to keys with its own number; padding is a document of its own. Blocks without
        a common document are skipped if the numbers are in order.
      key_value_segment_ids: integers of shape (B, S) or (S,); if T = S, either of the two stands
        for both.
      causal_alignment: "top-left" puts the first query at the position of the first key,
        "bottom-right" the last at the last, of those within the lengths: for queries that follow
        a cache. It moves `is_causal`, the window, and the positions that functions see.
      bias_fn: function ``(query_position, key_position, head)`` of three int32 scalars that
        returns what is added to a logit; or a `jdropout.by_position.PositionFunction`, or several,
        which are added. It is evaluated block by block, and differentiable in its arrays and in
        what it closes over. See `jdropout.by_position` for ready-made ones.
      mask_fn: the same for masks: True where a query may attend to a key; of several, all must
        allow it. Blocks in which nothing is allowed are skipped.
      logits_soft_cap: replace logits by ``cap * tanh(logits / cap)``, after the biases and before
        the masks; a bias of -inf stays -inf. A Python number above 0.
      dropout_on: "probabilities" drops them after the softmax, and scales them. "logits" drops keys
        before the softmax, which then makes the sum of the others 1: not scaled, and not unbiased.
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
      precision: precision of the matrix products, as in `jax.numpy.einsum`. "pallas" takes the
        default and the highest; the products of bfloat16 are always exact.
      block_sizes: number of queries and keys in a block; None chooses them by measurement.
        Where the compiler shards the queries, pass the whole T as the first. "pallas" takes
        multiples of 128.
      implementation: "pallas" runs Pallas kernels, written for a TPU; other platforms interpret
        them, slowly, with the same result up to rounding. They have first derivatives in reverse
        mode only; do not support `bias`, `mask`, their functions, float16 and float64, and
        dropout masks that are shared along queries or keys, or have only one of them; need a
        `start` of the queries at a Python multiple of 4; and a compiler that shards arrays cannot
        cut them: call them on one device, or in a `shard_map` with ``check_vma=False``. "xla" and
        None do all that is written here.
      return_residual: if True, also return the log-sum-exp of the logits.
      return_weights: if True, also return all probabilities, which takes memory of T x S.

    Returns:
      The output, of shape (B, T, N, V) or (T, N, V), in the query's dtype; or a tuple of it and
      what else was asked for, in this order: the log-sum-exp, before dropout of probabilities, of
      shape (B, T, N) or (T, N), float32 (float64 for float64 inputs), differentiable, which is
      what you need to merge results over several parts of the keys; the probabilities, also
      before their dropout, of shape (B, N, T, S) or (N, T, S), in the query's dtype.

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
      Vaswani et al., "Attention is all you need" (2017), section 5.4, for the dropout; Li et al.,
      "DropKey for vision transformer" (2023), section 3.2, for that of logits; Milakov and
      Gimelshein, "Online normalizer calculation for softmax" (2018), and Dao, Fu, Ermon, Rudra and
      Ré, "FlashAttention" (2022), section 3.1, for the blocks; Gemma Team, "Gemma 2" (2024),
      section 2, for the soft cap.
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
    with_weights = _values.check_flag("return_weights", return_weights)
    soft_cap = check_soft_cap(logits_soft_cap)
    _values.check_option("dropout_on", dropout_on, ("probabilities", "logits"))
    query_segment_ids, key_segment_ids = check_segment_ids(
        query_segment_ids, key_value_segment_ids, batch, length, key_length
    )
    examples = math.prod(batch)
    bias_fns = as_position_functions("bias_fn", bias_fn, False, examples)
    mask_fns = as_position_functions("mask_fn", mask_fn, True, examples)
    scale = 1 / math.sqrt(features) if scale is None else check_scale(scale)
    sizes = check_block_sizes(block_sizes)
    check_matmul_precision(precision)
    kernel = check_implementation(implementation)
    first, whole = _checks.check_block(start, global_shape, shape)
    part = _key_kinds.part_of(dropout_key)
    if part:
        shared = _checks.check_broadcast_dims(
            dropout_broadcast_dims, len(shape), "dropout_broadcast_dims"
        )
        axis = 0 if batch else None
        dropout_key, first, whole = _batch.located(
            cast("jax.Array", dropout_key), part, shape, first, whole, axis, shared
        )
    draw = new_draw(
        "attention",
        dropout_key,
        dropout_rate,
        deterministic,
        shape,
        broadcast_dims=dropout_broadcast_dims,
        start=first,
        global_shape=None if first is None else whole,
        precision=dropout_precision,
        batch_axis=0 if batch else None,
        prefix="dropout_",
    )
    if kernel:
        check_kernel_arguments(
            query,
            query_segment_ids,
            sizes,
            draw,
            bias=bias,
            mask=mask,
            bias_fn=bias_fn,
            mask_fn=mask_fn,
        )
        precision = check_kernel_precision(precision, query)
    check_positions(whole)
    first = first or (0,) * len(shape)
    alignment = check_alignment(causal_alignment, whole, query_seq_lengths, key_value_seq_lengths)

    skips = causal or window is not None or query_segment_ids is not None or bool(mask_fns)
    plan_of = functools.partial(
        Plan,
        start=tuple(None if isinstance(index, jax.Array) else int(index) for index in first),
        is_causal=causal,
        window=window,
        soft_cap=soft_cap,
        drops_logits=dropout_on == "logits",
        precision=precision,
    )

    def plan_for(platform: str) -> Plan:
        if kernel:
            from jdropout._attention._kernels import tiles

            return plan_of(*tiles((length, key_length), sizes, features))
        used = sizes or default_block_sizes(query, platform)
        return plan_of(*cut((length, key_length), used, skips))

    plans = Plans(*map(plan_for, Plans._fields))
    inputs = Inputs(
        query=query,
        key=key,
        value=value,
        bias=bias,
        scale=scale,
        mask=mask,
        query_lengths=query_seq_lengths,
        key_lengths=key_value_seq_lengths,
        query_segment_ids=None
        if query_segment_ids is None
        else query_segment_ids.reshape(examples, 1, 1, length, 1),
        key_segment_ids=None
        if key_segment_ids is None
        else key_segment_ids.reshape(examples, 1, 1, 1, key_length),
        bias_fns=bias_fns,
        mask_fns=mask_fns,
        alignment=alignment,
        start=tuple(index if isinstance(index, jax.Array) else None for index in first),
        # `Draw.tile` gives every block its own origin.
        dropout=None,
    )
    if draw.outcome is Outcome.DRAWN:
        dropout = dataclasses.replace(draw.marked(), origin=None)
        inputs = inputs._replace(dropout=dropout.eager(inputs))
    output, residual, weights = attention(inputs, plans, kernel, with_weights)
    if draw.outcome is Outcome.DROPPED:
        output = jnp.zeros_like(output)
    output = cast("jax.Array", draw.result(output))
    more = [residual] * with_residual + [weights] * with_weights
    return (output, *more) if more else output
