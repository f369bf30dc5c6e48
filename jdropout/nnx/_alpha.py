"""Alpha dropout as nnx modules."""

from collections.abc import Sequence

from flax import nnx

from jdropout._alpha import alpha_dropout, feature_alpha_dropout
from jdropout._flax import Applied
from jdropout.nnx._dropout import Dropout


class AlphaDropout(Dropout):
    """`jdropout.alpha_dropout` as a module: dropout for SELU.

    Call, random streams and flags are those of `Dropout`, and so is the constructor.

    Args:
      rate: probability of setting an element to the floor of SELU, a number in [0, 1].
      broadcast_dims: axes along which all elements share their fate.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: as for `Dropout`.
      ValueError: as for `Dropout`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> x = jax.random.normal(jax.random.key(1), (1000, 1000))
      >>> y = jdropout.nnx.AlphaDropout(0.1, rngs=nnx.Rngs(0))(x)
      >>> print(f"{abs(y.mean()):.2f} {y.std():.2f}")
      0.00 1.00

    References:
      As for `jdropout.alpha_dropout`.
    """

    _applies = Applied(alpha_dropout, ("broadcast_dims",))


class FeatureAlphaDropout(Dropout):
    """`jdropout.feature_alpha_dropout` as a module: `AlphaDropout` of whole channels.

    Call, random streams and flags are those of `Dropout`.

    Args:
      rate: as for `AlphaDropout`.
      channel_axis: the axis of the channels.
      batch_axes: axes along which decisions are independent as well.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: as for `Dropout`.
      ValueError: as for `Dropout`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.FeatureAlphaDropout(0.5, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 2, 8))).round(2)[..., 2:6]
      Array([[[ 1.67,  1.67, -0.78, -0.78],
              [ 1.67,  1.67, -0.78, -0.78]]], dtype=float32)

    References:
      As for `jdropout.alpha_dropout`.
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
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.channel_axis = channel_axis
        self.batch_axes = tuple(batch_axes)
