"""Alpha dropout as linen modules."""

from collections.abc import Sequence

from jdropout._alpha import alpha_dropout, feature_alpha_dropout
from jdropout._flax import Applied
from jdropout.linen._dropout import Dropping


class AlphaDropout(Dropping):
    """Layer of `jdropout.alpha_dropout`: dropout for SELU.

    Flags, keys and random streams work as in `Dropout`.

    Attributes:
      rate: probability of setting an element to SELU's floor, a number in [0, 1] or a (traced)
        floating-point scalar.
      deterministic: if True, return the input unchanged. Set it here or in the call, not in
        both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      broadcast_dims: axes along which the mask is shared.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.AlphaDropout(0.1, deterministic=False)
      >>> x = jax.random.normal(jax.random.key(1), (1000, 1000))
      >>> y = layer.apply({}, x, rngs={"dropout": jax.random.key(0)})
      >>> print(f"{abs(y.mean()):.2f} {y.std():.2f}")
      0.00 1.00

    References:
      Klambauer, Unterthiner, Mayr and Hochreiter, "Self-normalizing neural networks" (NeurIPS
      2017), section 3, "New dropout technique".
    """

    _applies = Applied(alpha_dropout, ("broadcast_dims",))

    broadcast_dims: Sequence[int] = ()


class FeatureAlphaDropout(Dropping):
    """Layer of `jdropout.feature_alpha_dropout`: dropout of whole channels for SELU.

    Flags, keys and random streams work as in `Dropout`.

    Attributes:
      rate: probability of setting a channel to SELU's floor, a number in [0, 1] or a (traced)
        floating-point scalar.
      deterministic: if True, return the input unchanged. Set it here or in the call, not in
        both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      channel_axis: axis of the channels, -1 by default; 1 for channels-first layouts.
      batch_axes: axes along which masks are independent, (0,) by default; () drops the same
        channels in every example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.FeatureAlphaDropout(0.5, deterministic=False)
      >>> y = layer.apply({}, jnp.ones((1, 2, 8)), rngs={"dropout": jax.random.key(0)})
      >>> y.round(2)[..., :4]
      Array([[[ 1.67, -0.78, -0.78, -0.78],
              [ 1.67, -0.78, -0.78, -0.78]]], dtype=float32)

    References:
      Klambauer, Unterthiner, Mayr and Hochreiter, "Self-normalizing neural networks" (NeurIPS
      2017), section 3, "New dropout technique".
    """

    _applies = Applied(feature_alpha_dropout, ("channel_axis", "batch_axes"))

    channel_axis: int = -1
    batch_axes: Sequence[int] = (0,)
