"""Attention with dropout as a Flax nnx module, and as a function with Flax's signature."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.typing
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jdropout._flax import check_module, check_module_rate
from jdropout._flax_attention import attention, attention_call, check_attention
from jdropout._typing import Flag, Key, Rate
from jdropout._values import check_flag, check_function

# Taken now: users may put our class in its place.
FlaxAttention = nnx.MultiHeadAttention


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Key | None = None,
    dropout_rate: Rate = 0.0,
    deterministic: Flag = False,
    dtype: jax.typing.DTypeLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    module: nnx.Module | None = None,
    promote_dtype: Callable[..., Any] = promote_dtype,
    is_causal: bool = False,
    **options: Any,
) -> jax.Array:
    """`jdropout.dot_product_attention` with the signature of `flax.nnx.dot_product_attention`.

    Pass it as ``attention_fn`` to `flax.nnx.MultiHeadAttention`. Beware of Flax's default
    ``broadcast_dropout=True``: all heads and all examples of a batch then share one T x S mask.
    ``broadcast_dropout=False`` gives each its own, at the same cost here; it is the default of
    `MultiHeadAttention` in this module.

    Args:
      query: array of shape (batch..., T, N, H).
      key: array of shape (batch..., S, K, H).
      value: array of shape (batch..., S, K, V).
      bias: array added to the logits; broadcastable to (batch..., N, T, S).
      mask: True, or nonzero, where a query may attend to a key; broadcastable to (batch..., N,
        T, S). A query that may attend to no key gets an output of zeros, where Flax returns a
        mean of the values.
      broadcast_dropout: if True, share the dropout mask over batch and heads.
      dropout_rng: PRNG key, typed or raw; use a new one for every call. May be None if no mask
        is drawn (``deterministic=True``, or a static rate of 0 or 1).
      dropout_rate: probability of dropping an attention probability, in [0, 1]; a number or a
        (traced) floating-point scalar.
      deterministic: if True, leave dropout out; a bool or a (traced) boolean scalar.
      dtype: dtype of the computation; None infers it. The softmax is computed in float32 at
        least.
      precision: precision of the matrix products, as in `jax.numpy.einsum`.
      module: module that sows the weights before dropout, which are then computed at once: they
        take memory of T x S.
      promote_dtype: function that gives query, key and value a common dtype.
      is_causal: if True, no query attends to a later key.
      **options: further keyword arguments of `jdropout.dot_product_attention`, such as
        ``logits_soft_cap``, ``bias_fn`` and ``dropout_on``; bind them with `functools.partial`.

    Returns:
      An array of shape (batch..., T, N, V).

    Raises:
      TypeError: if an argument has the wrong type or dtype.
      ValueError: if shapes do not match, the rate is not a scalar in [0, 1] (a traced one outside
        gives NaN, and an error under ``checkify``), or the key is missing or a batch of keys.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=4, in_features=16, dropout_rate=0.1, broadcast_dropout=False,
      ...     deterministic=False, decode=False, rngs=nnx.Rngs(0),
      ...     attention_fn=jdropout.nnx.dot_product_attention,
      ... )
      >>> layer(jnp.ones((2, 8, 16))).shape
      (2, 8, 16)

    References:
      Vaswani et al., "Attention is all you need" (2017), section 5.4, for the dropout; Milakov
      and Gimelshein, "Online normalizer calculation for softmax" (2018), and Dao, Fu, Ermon,
      Rudra and Ré, "FlashAttention" (2022), section 3.1, for the blocks.
    """
    query, key, value = check_attention(query, key, value, dtype)
    check_function("promote_dtype", promote_dtype)
    if module is not None:
        check_module("module", module, nnx.Module)
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
    return attention(
        query,
        key,
        value,
        bias,
        mask,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        precision=precision,
        sow=module and functools.partial(module.sow, nnx.Intermediate, "attention_weights"),
        is_causal=is_causal,
        **options,
    )


class MultiHeadAttention(FlaxAttention):
    """`flax.nnx.MultiHeadAttention` in blocks, with a mask per example and head.

    Constructor, call and attributes are Flax's own, with two different defaults:
    ``attention_fn=jdropout.nnx.dot_product_attention`` and ``broadcast_dropout=False``. With a
    cache the dropout mask of a token is the one it has in a pass over the whole length of the cache
    with the same key.

    Args:
      *args: positional arguments of Flax's constructor.
      dropout_rate: probability of dropping an attention probability, a Python number in [0, 1].
      broadcast_dropout: if True, share the dropout mask over batch and heads.
      attention_fn: function with the signature of `dot_product_attention`.
      **options: further keyword arguments of Flax's constructor.

    Raises:
      TypeError: if the rate is not a Python number.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.MultiHeadAttention(
      ...     num_heads=4, in_features=16, dropout_rate=0.1, decode=False, rngs=nnx.Rngs(0)
      ... )
      >>> layer(jnp.ones((2, 8, 16)), deterministic=False).shape
      (2, 8, 16)

    References:
      Vaswani et al., "Attention is all you need" (2017), sections 3.2.2 and 5.4.
    """

    def __init__(
        self,
        *args: Any,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = False,
        attention_fn: Callable[..., jax.Array] = dot_product_attention,
        **options: Any,
    ) -> None:
        check_function("attention_fn", attention_fn)
        super().__init__(
            *args,
            dropout_rate=check_module_rate(dropout_rate, "dropout_rate"),
            broadcast_dropout=broadcast_dropout,
            attention_fn=attention_fn,
            **options,
        )

    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        decode: bool | None = None,
        is_causal: bool = False,
        query_segment_ids: jax.Array | None = None,
        key_value_segment_ids: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Applies attention, as Flax's layer does.

        Args:
          inputs_q: array of shape (batch..., length, in_features).
          inputs_k: array of the keys; None for `inputs_q`.
          inputs_v: array of the values; None for `inputs_k`.
          rngs: overrides the constructor's source of keys; an `nnx.Rngs`, an `nnx.RngStream` or
            a key.
          decode: overrides the constructor's flag: one token a call, with a cache.
          is_causal: if True, no query attends to a later key. With a cache there are none.
          query_segment_ids: integers of shape (batch..., length): documents packed into one row;
            a query attends only to keys with its own number.
          key_value_segment_ids: the same for the keys; if the lengths are equal, either of the two
            stands for both.
          **options: further keyword arguments of the call of Flax's layer.

        Returns:
          An array of shape (batch..., length, out_features).

        Raises:
          ValueError: if shapes do not match, or neither the call nor the constructor gave a flag
            or a source of keys that is needed.
        """
        decoding = self.decode if decode is None else check_flag("decode", decode)
        if check_flag("is_causal", is_causal) and not decoding:
            # Flax 0.12.4 has no such argument, and for a cache it would place the query before all
            # other keys.
            options["is_causal"] = True
        source: Any = (lambda: rngs) if isinstance(rngs, jax.Array) else rngs  # Flax calls it
        index = self.cache_index if decoding else None
        return attention_call(
            functools.partial(
                super().__call__,
                inputs_q,
                inputs_k,
                inputs_v,
                rngs=source,
                decode=decode,
                **options,
            ),
            None if index is None else index[...],
            query_segment_ids=query_segment_ids,
            key_value_segment_ids=key_value_segment_ids,
        )
