"""nnx modules of noise, and of dropout for self-normalising networks."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jdropout._alpha import alpha_dropout, feature_alpha_dropout
from jdropout._checks import check_rate_below_one
from jdropout._flax import check_module_amount, check_module_rate, draws_noise
from jdropout._noise import gaussian_dropout, gaussian_noise
from jdropout._typing import Flag
from jdropout.nnx._dropout import Dropout, Layer, attach


class GaussianDropout(Dropout):
    """`jdropout.gaussian_dropout` as a module: multiplies by normal noise.

    Call, random streams and flags are those of `Dropout`.

    Args:
      rate: that of the dropout whose variance the noise has, a number in [0, 1).
      broadcast_dims: axes along which all elements share their noise.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: as for `Dropout`.
      ValueError: if the rate is 1, or as for `Dropout`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> y = jdropout.nnx.GaussianDropout(0.2, rngs=nnx.Rngs(0))(jnp.ones((1000, 1000)))
      >>> print(f"{y.mean():.2f} {y.std():.2f}")
      1.00 0.50

    References:
      As for `jdropout.gaussian_dropout`.
    """

    def _drop(self, key: jax.Array | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return gaussian_dropout(
            key, x, self.rate, deterministic=flag, broadcast_dims=self.broadcast_dims
        )

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.rate, flag)

    @classmethod
    def _checked_rate(cls, rate: Any) -> Any:
        return check_rate_below_one(check_module_rate(rate))


class GaussianNoise(Layer):
    """`jdropout.gaussian_noise` as a module: adds normal noise.

    It has no rate, and so is no `flax.nnx.Dropout`; flags, views and streams work as there.

    Args:
      stddev: standard deviation of the noise, a number of at least 0.
      broadcast_dims: axes along which all elements share their noise.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: if the standard deviation is not a number, or ``rngs`` has another type.
      ValueError: if the standard deviation is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> y = jdropout.nnx.GaussianNoise(0.5, rngs=nnx.Rngs(0))(jnp.ones((1000, 1000)))
      >>> print(f"{y.mean():.2f} {y.std():.2f}")
      1.00 0.50

    References:
      As for `jdropout.gaussian_noise`.
    """

    _arguments = "stddev"

    def __init__(
        self,
        stddev: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        self.stddev = check_module_amount("stddev", stddev)
        self.broadcast_dims = broadcast_dims
        attach(self, deterministic, rng_collection, rngs)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Adds noise; the identity if deterministic.

        Args:
          inputs: array of any shape, of a real floating-point dtype.
          deterministic: as for `Dropout`.
          rngs: as for `Dropout`.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ValueError: as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        flag, key = self._resolve(deterministic, rngs)
        return gaussian_noise(
            key, inputs, self.stddev, deterministic=flag, broadcast_dims=self.broadcast_dims
        )

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.stddev, flag)


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

    def _drop(self, key: jax.Array | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return alpha_dropout(
            key, x, self.rate, deterministic=flag, broadcast_dims=self.broadcast_dims
        )


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

    def _drop(self, key: jax.Array | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return feature_alpha_dropout(
            key,
            x,
            self.rate,
            channel_axis=self.channel_axis,
            batch_axes=self.batch_axes,
            deterministic=flag,
        )
