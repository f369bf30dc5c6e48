"""Attention with dropout as a Flax linen module, and with the signature that Flax has for it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.typing
from flax import linen
from flax.linen.dtypes import promote_dtype

from jdropout._flax import attention
from jdropout._typing import Flag, Key, Rate


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
) -> jax.Array:
    """`jdropout.dot_product_attention` with the signature of `flax.linen.dot_product_attention`.

    To be used as ``attention_fn`` of `flax.linen.MultiHeadDotProductAttention`. Beware of
    Flax's default ``broadcast_dropout=True``: all heads and all examples of a batch then share
    one T x S mask. ``broadcast_dropout=False`` gives each its own, at the same cost here; it is
    the default of `MultiHeadDotProductAttention` in this module.

    Args:
      query: array of shape (batch..., T, N, H).
      key: array of shape (batch..., S, K, H).
      value: array of shape (batch..., S, K, V).
      bias: added to the logits; broadcastable to (batch..., N, T, S).
      mask: True, or not zero, where a query may attend to a key; broadcastable likewise. A
        query that may attend to no key has an output of zeros; Flax's is a mean of values.
      broadcast_dropout: whether to share dropout's mask over batch and heads.
      dropout_rng: a PRNG key.
      dropout_rate: probability of dropping.
      deterministic: whether to leave dropout out; may be traced.
      dtype: of the computation; inferred by default.
      precision: of the products.
      module: must be None, since there are no weights to sow.
      force_fp32_for_softmax: has no effect: the softmax always is in float32 at least.
      einsum_dot_general: must be None, as must be the two other replacements of einsum.
      qk_attn_weights_einsum: must be None.
      attn_weights_value_einsum: must be None.

    Returns:
      An array of shape (batch..., T, N, V).

    Raises:
      TypeError: as for `jdropout.dot_product_attention`.
      ValueError: as for `jdropout.dot_product_attention`, or if an argument that must be None
        is not.

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
      As for `jdropout.dot_product_attention`.
    """
    replacements = {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    for name, function in replacements.items():
        if function is not None:
            raise ValueError(
                f"{name} must be None: attention in blocks computes its own products. To replace "
                "them use the attention_fn of Flax itself."
            )
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
        module=module,
    )


class MultiHeadDotProductAttention(linen.MultiHeadDotProductAttention):
    """`flax.linen.MultiHeadDotProductAttention` in blocks, a mask for every example and head.

    Attributes and call are Flax's own, with two other defaults.

    Attributes:
      broadcast_dropout: whether to share dropout's mask over batch and heads; False by default.
      attention_fn: `dot_product_attention` of this module by default.

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
