"""Attention with dropout as a Flax linen module, and as a function with Flax's signature."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.typing
from flax import linen
from flax.linen.dtypes import promote_dtype

from jdropout._flax import check_module
from jdropout._flax_attention import attention, attention_call, check_attention
from jdropout._typing import Flag, Key, Rate
from jdropout._values import check_flag, type_name

# Taken now: users may put our classes in their place.
FlaxAttention = linen.MultiHeadDotProductAttention
FlaxSelfAttention = linen.SelfAttention


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
    module: linen.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable[..., jax.Array] | None = None,
    qk_attn_weights_einsum: Callable[..., jax.Array] | None = None,
    attn_weights_value_einsum: Callable[..., jax.Array] | None = None,
    **options: Any,
) -> jax.Array:
    """`jdropout.dot_product_attention` with the signature of `flax.linen.dot_product_attention`.

    Pass it as ``attention_fn`` to `flax.linen.MultiHeadDotProductAttention`. Beware of Flax's
    default ``broadcast_dropout=True``: all heads and all examples of a batch then share one T x
    S mask. ``broadcast_dropout=False`` gives each its own, at the same cost here; it is the
    default of `MultiHeadDotProductAttention` in this module.

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
      force_fp32_for_softmax: has no effect; the softmax is always computed in float32 at least.
      einsum_dot_general: must be None; the products are computed block by block.
      qk_attn_weights_einsum: must be None; the products are computed block by block.
      attn_weights_value_einsum: must be None; the products are computed block by block.
      **options: further keyword arguments of `jdropout.dot_product_attention`, such as
        ``logits_soft_cap``, ``bias_fn`` and ``dropout_on``; bind them with `functools.partial`.

    Returns:
      An array of shape (batch..., T, N, V).

    Raises:
      TypeError: if an argument has the wrong type or dtype.
      ValueError: if shapes do not match, an argument that must be None is given, the rate is
        not a scalar in [0, 1] (a traced one outside gives NaN, and an error under
        ``checkify``), or the key is missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> layer = linen.MultiHeadDotProductAttention(
      ...     num_heads=4, dropout_rate=0.1, broadcast_dropout=False, deterministic=False,
      ...     attention_fn=jdropout.linen.dot_product_attention,
      ... )
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> layer.init_with_output(keys, jnp.ones((2, 8, 16)))[0].shape
      (2, 8, 16)

    References:
      Vaswani et al., "Attention is all you need" (2017), section 5.4, for the dropout; Milakov
      and Gimelshein, "Online normalizer calculation for softmax" (2018), and Dao, Fu, Ermon,
      Rudra and Ré, "FlashAttention" (2022), section 3.1, for the blocks.
    """
    replacements = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, function in replacements.items():
        if function is not None:
            raise ValueError(
                f"{name} must be None, got {type_name(function)}: attention in blocks computes its "
                "own products. To replace them use Flax's own attention_fn."
            )
    query, key, value = check_attention(query, key, value, dtype)
    check_flag("force_fp32_for_softmax", force_fp32_for_softmax)
    if module is not None:
        check_module("module", module, linen.Module)
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
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
        sow=module and functools.partial(module.sow, "intermediates", "attention_weights"),
        **options,
    )


class _Call(linen.Module):
    """Adds arguments to the call of Flax's layers."""

    def __call__(
        self,
        *args: Any,
        query_segment_ids: jax.Array | None = None,
        key_value_segment_ids: jax.Array | None = None,
        **options: Any,
    ) -> jax.Array:
        """Applies attention, as Flax's layer does.

        Args:
          *args: arguments of Flax's layer.
          query_segment_ids: integers of shape (batch..., length): documents packed into one row;
            a query attends only to keys with its own number.
          key_value_segment_ids: the same for the keys; if the lengths are equal, either of the two
            stands for both.
          **options: keyword arguments of Flax's layer.

        Returns:
          An array of shape (batch..., length, out_features).

        Raises:
          ValueError: if shapes do not match, or neither the call nor the constructor gave a flag
            or a source of keys that is needed.
        """
        cached = self.decode and self.has_variable("cache", "cache_index")
        return attention_call(
            functools.partial(super().__call__, *args, **options),
            self.get_variable("cache", "cache_index") if cached else None,
            query_segment_ids=query_segment_ids,
            key_value_segment_ids=key_value_segment_ids,
        )


class MultiHeadDotProductAttention(_Call, FlaxAttention):
    """`flax.linen.MultiHeadDotProductAttention` in blocks, with a mask per example and head.

    Attributes and call are Flax's own, with two different defaults.

    Attributes:
      broadcast_dropout: if True, share the dropout mask over batch and heads; False by default.
      attention_fn: function that computes the attention, this module's `dot_product_attention`
        by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.MultiHeadDotProductAttention(
      ...     num_heads=4, dropout_rate=0.1, deterministic=False
      ... )
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> layer.init_with_output(keys, jnp.ones((2, 8, 16)))[0].shape
      (2, 8, 16)

    References:
      Vaswani et al., "Attention is all you need" (2017), sections 3.2.2 and 5.4.
    """

    broadcast_dropout: bool = False
    attention_fn: Callable[..., Any] = dot_product_attention


class MultiHeadAttention(MultiHeadDotProductAttention):
    """`MultiHeadDotProductAttention` under the other name that Flax has for it.

    Attributes:
      broadcast_dropout: if True, share the dropout mask over batch and heads; False by default.
      attention_fn: function that computes the attention, this module's `dot_product_attention`
        by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.MultiHeadAttention(
      ...     num_heads=4, dropout_rate=0.1, deterministic=False
      ... )
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> layer.init_with_output(keys, jnp.ones((2, 8, 16)))[0].shape
      (2, 8, 16)

    References:
      Vaswani et al., "Attention is all you need" (2017), sections 3.2.2 and 5.4.
    """


class SelfAttention(_Call, FlaxSelfAttention):
    """`flax.linen.SelfAttention` in blocks, with a mask per example and head.

    Attributes and call are Flax's own, with two different defaults.

    Attributes:
      broadcast_dropout: if True, share the dropout mask over batch and heads; False by default.
      attention_fn: function that computes the attention, this module's `dot_product_attention`
        by default.

    Example:
      >>> import flax.linen
      >>> import jdropout.linen
      >>> issubclass(jdropout.linen.SelfAttention, flax.linen.SelfAttention)
      True

    References:
      Vaswani et al., "Attention is all you need" (2017), sections 3.2.2 and 5.4.
    """

    broadcast_dropout: bool = False
    attention_fn: Callable[..., Any] = dot_product_attention
