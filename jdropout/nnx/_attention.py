"""Attention with dropout as a Flax nnx module, and with the signature that Flax has for it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.typing
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jdropout._flax import attention, check_module_rate
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
    module: nnx.Module | None = None,
    promote_dtype: Callable[..., Any] = promote_dtype,
    is_causal: bool = False,
) -> jax.Array:
    """`jdropout.dot_product_attention` with the signature of `flax.nnx.dot_product_attention`.

    To be used as ``attention_fn`` of `flax.nnx.MultiHeadAttention`. Beware of Flax's default
    ``broadcast_dropout=True``: all heads and all examples of a batch then share one T x S mask.
    ``broadcast_dropout=False`` gives each its own, at the same cost here; it is the default of
    `MultiHeadAttention` in this module.

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
      dtype: of the computation; inferred by default. The softmax is in float32 at least.
      precision: of the products.
      module: must be None, since there are no weights to sow.
      promote_dtype: makes query, key and value of one dtype.
      is_causal: whether queries attend to no later key.

    Returns:
      An array of shape (batch..., T, N, V).

    Raises:
      TypeError: as for `jdropout.dot_product_attention`.
      ValueError: as for `jdropout.dot_product_attention`, or if ``module`` is given.

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
      As for `jdropout.dot_product_attention`.
    """
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
        module=module,
        is_causal=is_causal,
    )


class MultiHeadAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` in blocks, with a mask for every example and head.

    Constructor, call and attributes are Flax's own, with two other defaults:
    ``attention_fn=jdropout.nnx.dot_product_attention`` and ``broadcast_dropout=False``.

    Args:
      *args: positional arguments of Flax's constructor.
      dropout_rate: probability of dropping an attention weight, a number in [0, 1].
      broadcast_dropout: whether to share dropout's mask over batch and heads.
      attention_fn: a function with the signature of `dot_product_attention`.
      **options: further keyword arguments of Flax's constructor.

    Raises:
      TypeError: if the rate is not a number.
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
        super().__init__(
            *args,
            dropout_rate=check_module_rate(dropout_rate, "dropout_rate"),
            broadcast_dropout=broadcast_dropout,
            attention_fn=attention_fn,
            **options,
        )
