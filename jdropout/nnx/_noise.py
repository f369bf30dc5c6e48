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
    """Layer of `jdropout.gaussian_dropout`: multiplies by normal noise.

    Flags, keys and random streams work as in `Dropout`.

    Args:
      rate: rate of the dropout with this variance, a Python number in [0, 1).
      broadcast_dims: axes along which the noise is shared.
      deterministic: if True, return the input unchanged. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the rate is not a Python number, or `rngs` has the wrong type.
      ValueError: if the rate is outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> y = jdropout.nnx.GaussianDropout(0.2, rngs=nnx.Rngs(0))(jnp.ones((1000, 1000)))
      >>> print(f"{y.mean():.2f} {y.std():.2f}")
      1.00 0.50

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 10.
    """

    _applies = Applied(gaussian_dropout, ("broadcast_dims",))

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.rate, flag)

    @classmethod
    def _checked_rate(cls, rate: Any) -> Any:
        return check_rate_below_one(check_module_rate(rate))


class GaussianNoise(Layer, FunctionLayer):
    """Layer of `jdropout.gaussian_noise`: adds normal noise.

    It has no rate and is therefore not a `flax.nnx.Dropout`, but flags, views and random
    streams work as there.

    Args:
      stddev: standard deviation of the noise, in units of the input; a Python number of at
        least 0.
      broadcast_dims: axes along which the noise is shared.
      deterministic: if True, return the input unchanged. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the standard deviation is not a Python number, or `rngs` has the wrong type.
      ValueError: if the standard deviation is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> y = jdropout.nnx.GaussianNoise(0.5, rngs=nnx.Rngs(0))(jnp.ones((1000, 1000)))
      >>> print(f"{y.mean():.2f} {y.std():.2f}")
      1.00 0.50

    References:
      Bishop, "Training with noise is equivalent to Tikhonov regularization", Neural Computation
      7 (1995), section 2.
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
        self.stddev: float = check_module_amount("stddev", stddev)
        self.broadcast_dims = broadcast_dims
        attach(self, deterministic, rng_collection, rngs)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Adds noise to `inputs`; returns them unchanged if deterministic.

        Args:
          inputs: array of any shape, with a real floating-point dtype.
          deterministic: overrides the constructor's flag; a bool or a (traced) boolean scalar.
            A traced flag takes a key whatever its value.
          rngs: overrides the constructor's source of keys; an `nnx.Rngs`, an `nnx.RngStream` or
            a key.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ValueError: if neither the call nor the constructor gave a flag, or a source of keys.
          TypeError: if `rngs` has the wrong type.
        """
        flag, key = self._resolve(deterministic, rngs)
        return self._drop(key, inputs, flag)

    def _draws(self, flag: bool | jax.Array) -> bool:
        return draws_noise(self.stddev, flag)
