"""linen modules of noise, and of dropout for self-normalising networks."""

from collections.abc import Sequence

import jax
from flax import linen

from jdropout._alpha import alpha_dropout, feature_alpha_dropout
from jdropout._checks import check_amount, check_rate, check_rate_below_one
from jdropout._flax import draws_noise
from jdropout._noise import gaussian_dropout, gaussian_noise
from jdropout._typing import Flag, Key
from jdropout.linen._dropout import Dropping, Layer


class GaussianDropout(Dropping):
    """`jdropout.gaussian_dropout` as a module: multiplies by normal noise.

    Call, random streams and flags are those of `Dropout`.

    Attributes:
      rate: that of the dropout whose variance the noise has, a number in [0, 1).
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      broadcast_dims: axes along which all elements share their noise.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.GaussianDropout(0.2, deterministic=False)
      >>> y = layer.apply({}, jnp.ones((1000, 1000)), rngs={"dropout": jax.random.key(0)})
      >>> print(f"{y.mean():.2f} {y.std():.2f}")
      1.00 0.50

    References:
      As for `jdropout.gaussian_dropout`.
    """

    broadcast_dims: Sequence[int] = ()

    @linen.nowrap
    def _drop(self, key: Key | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return gaussian_dropout(
            key, x, self.rate, deterministic=flag, broadcast_dims=self.broadcast_dims
        )

    @linen.nowrap
    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.rate, flag)

    @linen.nowrap
    def _check_attributes(self) -> None:
        check_rate_below_one(check_rate(self.rate))


class GaussianNoise(Layer, linen.Module):
    """`jdropout.gaussian_noise` as a module: adds normal noise.

    Random streams and flags are those of `Dropout`.

    Attributes:
      stddev: standard deviation of the noise, a number of at least 0.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      broadcast_dims: axes along which all elements share their noise.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.GaussianNoise(0.5, deterministic=False)
      >>> y = layer.apply({}, jnp.ones((1000, 1000)), rngs={"dropout": jax.random.key(0)})
      >>> print(f"{y.mean():.2f} {y.std():.2f}")
      1.00 0.50

    References:
      As for `jdropout.gaussian_noise`.
    """

    stddev: float
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    broadcast_dims: Sequence[int] = ()

    @linen.compact
    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Adds noise; the identity if deterministic.

        Args:
          inputs: array of any shape, of a real floating-point dtype.
          deterministic: as for `Dropout`.
          rng: as for `Dropout`.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ValueError: as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        flag, key = self._resolve(deterministic, rng)
        return gaussian_noise(
            key, inputs, self.stddev, deterministic=flag, broadcast_dims=self.broadcast_dims
        )

    @linen.nowrap
    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.stddev, flag)

    @linen.nowrap
    def _check_attributes(self) -> None:
        check_amount("stddev", self.stddev)


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

    broadcast_dims: Sequence[int] = ()

    @linen.nowrap
    def _drop(self, key: Key | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return alpha_dropout(
            key, x, self.rate, deterministic=flag, broadcast_dims=self.broadcast_dims
        )


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

    channel_axis: int = -1
    batch_axes: Sequence[int] = (0,)

    @linen.nowrap
    def _drop(self, key: Key | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return feature_alpha_dropout(
            key,
            x,
            self.rate,
            channel_axis=self.channel_axis,
            batch_axes=self.batch_axes,
            deterministic=flag,
        )
