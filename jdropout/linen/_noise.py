"""Noise as linen modules."""

from collections.abc import Sequence

import jax
from flax import linen

from jdropout._checks import check_rate, check_rate_below_one
from jdropout._flax import Applied, FunctionLayer, draws_noise
from jdropout._noise import gaussian_dropout, gaussian_noise
from jdropout._typing import Flag, Key
from jdropout._values import check_amount
from jdropout.linen._dropout import Dropping, Layer


class GaussianDropout(Dropping):
    """Layer of `jdropout.gaussian_dropout`: multiplies by normal noise.

    Flags, keys and random streams work as in `Dropout`.

    Attributes:
      rate: rate of the dropout with this variance, a number in [0, 1).
      deterministic: if True, return the input unchanged. Set it here or in the call, not in
        both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      broadcast_dims: axes along which the noise is shared.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.GaussianDropout(0.2, deterministic=False)
      >>> y = layer.apply({}, jnp.ones((1000, 1000)), rngs={"dropout": jax.random.key(0)})
      >>> print(f"{y.mean():.2f} {y.std():.2f}")
      1.00 0.50

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 10.
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
    """Layer of `jdropout.gaussian_noise`: adds normal noise.

    Flags, keys and random streams work as in `Dropout`.

    Attributes:
      stddev: standard deviation of the noise, in units of the input; a number of at least 0.
      deterministic: if True, return the input unchanged. Set it here or in the call, not in
        both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      broadcast_dims: axes along which the noise is shared.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.GaussianNoise(0.5, deterministic=False)
      >>> y = layer.apply({}, jnp.ones((1000, 1000)), rngs={"dropout": jax.random.key(0)})
      >>> print(f"{y.mean():.2f} {y.std():.2f}")
      1.00 0.50

    References:
      Bishop, "Training with noise is equivalent to Tikhonov regularization", Neural Computation
      7 (1995), section 2.
    """

    _applies = Applied(gaussian_noise, ("broadcast_dims",), amount="stddev")

    stddev: float
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    broadcast_dims: Sequence[int] = ()

    @linen.compact
    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Adds noise to `inputs`; returns them unchanged if deterministic.

        Args:
          inputs: array of any shape, with a real floating-point dtype.
          deterministic: if True, return the input unchanged; a bool or a (traced) boolean
            scalar. Set it here or in the constructor, not in both.
          rng: PRNG key to use instead of one from the stream.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ValueError: if the flag was set both here and in the constructor or in neither, or the
            standard deviation is negative.
          TypeError: if the standard deviation is not a number, or the input is not real
            floating-point.
        """
        flag, key = self._resolve(deterministic, rng)
        return self._drop(key, inputs, flag)

    @linen.nowrap
    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.stddev, flag)

    @linen.nowrap
    def _check_attributes(self) -> None:
        check_amount("stddev", self.stddev)
