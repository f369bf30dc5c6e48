"""Noise as linen modules."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import linen

from jdropout._checks import check_amount, check_rate, check_rate_below_one
from jdropout._flax import Applied, FunctionLayer, draws_noise
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

    _applies = Applied(gaussian_dropout, ("broadcast_dims",))

    broadcast_dims: Sequence[int] = ()

    @linen.nowrap
    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.rate, flag)

    @linen.nowrap
    def _check_attributes(self) -> None:
        check_rate_below_one(check_rate(self.rate))


class GaussianNoise(FunctionLayer, Layer, linen.Module):
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

    _applies = Applied(gaussian_noise, ("broadcast_dims",), amount="stddev")

    stddev: float
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    broadcast_dims: Sequence[int] = ()

    @linen.compact
    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> Any:
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
        return self._drop(key, inputs, flag)

    @linen.nowrap
    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.stddev, flag)

    @linen.nowrap
    def _check_attributes(self) -> None:
        check_amount("stddev", self.stddev)
