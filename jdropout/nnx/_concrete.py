"""Concrete dropout as an nnx module."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
from flax import nnx

from jdropout._concrete import concrete_dropout, concrete_regularizer
from jdropout._flax import initial_logit
from jdropout._typing import ArrayLike, Flag
from jdropout.nnx._dropout import Layer, attach


class ConcreteDropout(Layer):
    """Dropout whose rate is learned: `jdropout.concrete_dropout` with its logit as a parameter.

    It has no fixed rate, and so is no `flax.nnx.Dropout`; flags, views and streams work as there.
    Add `regularizer` to the loss.

    Args:
      initial_rate: probability of dropping to begin with, a number between 0 and 1.
      temperature: of the relaxation, a number above 0; 2 / 3 for whole channels.
      broadcast_dims: axes along which all elements share their noise.
      param_dtype: of the logit.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: if an argument has a wrong type.
      ValueError: if the initial rate is not between 0 and 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> rngs = nnx.Rngs(0)
      >>> dropout = jdropout.nnx.ConcreteDropout(0.1, rngs=rngs)
      >>> linear = nnx.Linear(4, 8, rngs=rngs)
      >>> y = linear(dropout(jnp.ones((2, 4))))
      >>> loss = (y**2).mean() + dropout.regularizer((linear.kernel**2).sum(), 4)
      >>> print(f"{dropout.rate:.2f}")
      0.10

    References:
      As for `jdropout.concrete_dropout`.
    """

    _arguments = "initial_rate"

    def __init__(
        self,
        initial_rate: float = 0.1,
        *,
        temperature: float = 0.1,
        broadcast_dims: Any = (),
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        self.logit = nnx.Param(initial_logit(initial_rate, param_dtype))
        self.temperature = float(temperature)
        self.broadcast_dims = broadcast_dims
        attach(self, deterministic, rng_collection, rngs)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Drops, softly, and scales; the identity if deterministic.

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
        return concrete_dropout(
            key,
            inputs,
            self.logit[...],
            temperature=self.temperature,
            deterministic=flag,
            broadcast_dims=self.broadcast_dims,
        )

    @property
    def rate(self) -> jax.Array:
        """The probability of dropping that is learned so far."""
        return jax.nn.sigmoid(self.logit[...])

    def regularizer(
        self,
        weight_sum_of_squares: ArrayLike,
        num_inputs: int,
        *,
        weight_regularizer: float | jax.Array = 1e-6,
        dropout_regularizer: float | jax.Array = 1e-5,
    ) -> jax.Array:
        """What is added to the loss: `jdropout.concrete_regularizer` of the logit.

        Args:
          weight_sum_of_squares: sum of the squares of the weights that follow.
          num_inputs: number of features that are dropped.
          weight_regularizer: as for the function.
          dropout_regularizer: as for the function.

        Returns:
          A scalar.

        Raises:
          TypeError: as for the function.
          ValueError: as for the function.
        """
        return concrete_regularizer(
            self.logit[...],
            weight_sum_of_squares,
            num_inputs,
            weight_regularizer=weight_regularizer,
            dropout_regularizer=dropout_regularizer,
        )
