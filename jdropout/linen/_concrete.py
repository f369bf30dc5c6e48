"""Concrete dropout as a linen module."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import jax.typing
from flax import linen

from jdropout._concrete import concrete_dropout, concrete_regularizer
from jdropout._flax import initial_logit
from jdropout._typing import ArrayLike, Flag, Key
from jdropout.linen._dropout import Layer


class ConcreteDropout(Layer, linen.Module):
    """Dropout whose rate is learned: `jdropout.concrete_dropout` with its logit as a parameter.

    Random streams and flags are those of `Dropout`. Add `regularizer` to the loss.

    Attributes:
      initial_rate: probability of dropping to begin with, a number between 0 and 1; 0.1 by default.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      temperature: of the relaxation, 0.1 by default; 2 / 3 for whole channels.
      broadcast_dims: axes along which all elements share their noise.
      param_dtype: of the logit, float32 by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> class Model(linen.Module):
      ...     @linen.compact
      ...     def __call__(self, x):
      ...         dropout = jdropout.linen.ConcreteDropout(deterministic=False)
      ...         dense = linen.Dense(8)
      ...         y = dense(dropout(x))
      ...         kernel = dense.variables["params"]["kernel"]
      ...         return y, dropout.regularizer((kernel**2).sum(), 4)
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> (y, cost), variables = Model().init_with_output(keys, jnp.ones((2, 4)))
      >>> print(variables["params"]["ConcreteDropout_0"]["logit"].round(3))
      -2.197

    References:
      As for `jdropout.concrete_dropout`.
    """

    initial_rate: float = 0.1
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    temperature: float = 0.1
    broadcast_dims: Sequence[int] = ()
    param_dtype: jax.typing.DTypeLike = jnp.float32

    def setup(self) -> None:
        """Makes the parameter."""
        self.logit = self.param(
            "logit", lambda _: initial_logit(self.initial_rate, self.param_dtype)
        )

    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Drops, softly, and scales; the identity if deterministic.

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
        return concrete_dropout(
            key,
            inputs,
            self.logit,
            temperature=self.temperature,
            deterministic=flag,
            broadcast_dims=self.broadcast_dims,
        )

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
            self.logit,
            weight_sum_of_squares,
            num_inputs,
            weight_regularizer=weight_regularizer,
            dropout_regularizer=dropout_regularizer,
        )

    @linen.nowrap
    def _check_attributes(self) -> None:
        initial_logit(self.initial_rate, self.param_dtype)
