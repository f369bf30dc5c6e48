"""Noise as nnx modules."""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from jdropout._checks import check_rate_below_one
from jdropout._flax import (
    Applied,
    FunctionLayer,
    check_module_amount,
    check_module_rate,
    draws_noise,
)
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

    _applies = Applied(gaussian_dropout, ("broadcast_dims",))

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.rate, flag)

    @classmethod
    def _checked_rate(cls, rate: Any) -> Any:
        return check_rate_below_one(check_module_rate(rate))


class GaussianNoise(FunctionLayer, Layer):
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
    _applies = Applied(gaussian_noise, ("broadcast_dims",), amount="stddev")

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
    ) -> Any:
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
        return self._drop(key, inputs, flag)

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.stddev, flag)
