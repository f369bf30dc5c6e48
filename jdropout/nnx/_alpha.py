"""Alpha dropout as nnx modules."""

from collections.abc import Sequence

from flax import nnx

from jdropout._alpha import alpha_dropout, feature_alpha_dropout
from jdropout._flax import Applied
from jdropout._values import check_sequence
from jdropout.nnx._dropout import Dropout


class AlphaDropout(Dropout):
    """Layer of `jdropout.alpha_dropout`: dropout for SELU.

    Flags, keys and random streams work as in `Dropout`.

    Args:
      rate: probability of setting an element to SELU's floor, a Python number in [0, 1].
      broadcast_dims: axes along which the mask is shared.
      deterministic: if True, return the input unchanged. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the rate is not a Python number, or `rngs` has the wrong type.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> x = jax.random.normal(jax.random.key(1), (1000, 1000))
      >>> y = jdropout.nnx.AlphaDropout(0.1, rngs=nnx.Rngs(0))(x)
      >>> print(f"{abs(y.mean()):.2f} {y.std():.2f}")
      0.00 1.00

    References:
      Klambauer, Unterthiner, Mayr and Hochreiter, "Self-normalizing neural networks" (NeurIPS
      2017), section 3, "New dropout technique".
    """

    _applies = Applied(alpha_dropout, ("broadcast_dims",))


class FeatureAlphaDropout(Dropout):
    """Layer of `jdropout.feature_alpha_dropout`: dropout of whole channels for SELU.

    Flags, keys and random streams work as in `Dropout`.

    Args:
      rate: probability of setting a channel to SELU's floor, a Python number in [0, 1].
      channel_axis: axis of the channels; 1 for channels-first layouts.
      batch_axes: axes along which masks are independent; () drops the same channels in every
        example.
      deterministic: if True, return the input unchanged. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the rate is not a Python number, or `rngs` has the wrong type.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.FeatureAlphaDropout(0.5, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 2, 8))).round(2)[..., 2:6]
      Array([[[ 1.67,  1.67, -0.78, -0.78],
              [ 1.67,  1.67, -0.78, -0.78]]], dtype=float32)

    References:
      Klambauer, Unterthiner, Mayr and Hochreiter, "Self-normalizing neural networks" (NeurIPS
      2017), section 3, "New dropout technique".
    """

    _applies = Applied(feature_alpha_dropout, ("channel_axis", "batch_axes"))

    def __init__(
        self,
        rate: float,
        *,
        channel_axis: int = -1,
        batch_axes: Sequence[int] = (0,),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        check_sequence("batch_axes", batch_axes)
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.channel_axis = channel_axis
        self.batch_axes: tuple[int, ...] = tuple(batch_axes)
