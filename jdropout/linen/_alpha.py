"""Alpha dropout as linen modules."""

from collections.abc import Sequence

from jdropout._alpha import alpha_dropout, feature_alpha_dropout
from jdropout._flax import Applied
from jdropout.linen._dropout import Dropping


class AlphaDropout(Dropping):
    """`jdropout.alpha_dropout` as a module: dropout for SELU.

    Call, random streams and flags are those of `Dropout`.

    Attributes:
      rate: probability of setting an element to the floor of SELU, a number in [0, 1].
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      broadcast_dims: axes along which all elements share their fate.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.AlphaDropout(0.1, deterministic=False)
      >>> x = jax.random.normal(jax.random.key(1), (1000, 1000))
      >>> y = layer.apply({}, x, rngs={"dropout": jax.random.key(0)})
      >>> print(f"{abs(y.mean()):.2f} {y.std():.2f}")
      0.00 1.00

    References:
      As for `jdropout.alpha_dropout`.
    """

    _applies = Applied(alpha_dropout, ("broadcast_dims",))

    broadcast_dims: Sequence[int] = ()


class FeatureAlphaDropout(Dropping):
    """`jdropout.feature_alpha_dropout` as a module: `AlphaDropout` of whole channels.

    Call, random streams and flags are those of `Dropout`.

    Attributes:
      rate: as for `AlphaDropout`.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      channel_axis: the axis of the channels, -1 by default.
      batch_axes: axes along which decisions are independent as well, (0,) by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.FeatureAlphaDropout(0.5, deterministic=False)
      >>> y = layer.apply({}, jnp.ones((1, 2, 8)), rngs={"dropout": jax.random.key(0)})
      >>> y.round(2)[..., :4]
      Array([[[ 1.67, -0.78, -0.78, -0.78],
              [ 1.67, -0.78, -0.78, -0.78]]], dtype=float32)

    References:
      As for `jdropout.alpha_dropout`.
    """

    _applies = Applied(feature_alpha_dropout, ("channel_axis", "batch_axes"))

    channel_axis: int = -1
    batch_axes: Sequence[int] = (0,)
