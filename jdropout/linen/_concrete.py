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
    """Layer of `jdropout.concrete_dropout`: learns its rate, whose logit is a parameter.

    Add `regularizer` to the loss. Flags, keys and random streams work as in `Dropout`.

    Attributes:
      initial_rate: initial drop probability, a number between 0 and 1; 0.1 by default.
      deterministic: if True, return the input unchanged. Set it here or in the call, not in
        both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      temperature: temperature of the relaxation, 0.1 by default; use 2 / 3 for whole channels.
      broadcast_dims: axes along which the noise is shared.
      param_dtype: dtype of the logit, float32 by default.

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
      Gal, Hron and Kendall, "Concrete dropout" (NeurIPS 2017), section 3 and equation 5;
      Maddison, Mnih and Teh, "The concrete distribution" (ICLR 2017), for the relaxation.
    """

    initial_rate: float = 0.1
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    temperature: float = 0.1
    broadcast_dims: Sequence[int] = ()
    param_dtype: jax.typing.DTypeLike = jnp.float32

    def setup(self) -> None:
        """Creates the parameter."""
        self.logit: jax.Array = self.param(
            "logit", lambda _: initial_logit(self.initial_rate, self.param_dtype)
        )

    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Drops softly and scales `inputs`; returns them unchanged if deterministic.

        Args:
          inputs: array of any shape, with a real floating-point dtype.
          deterministic: if True, return the input unchanged; a bool or a (traced) boolean
            scalar. Set it here or in the constructor, not in both.
          rng: PRNG key to use instead of one from the stream.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ValueError: if the flag was set both here and in the constructor, or in neither.
          TypeError: if the input is not a real floating-point array.
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
        """Returns the term to add to the loss: `jdropout.concrete_regularizer` of the logit.

        Args:
          weight_sum_of_squares: sum of the squares of the weights that the dropped inputs feed
            into.
          num_inputs: number of features that are dropped, at least 1.
          weight_regularizer: weight of the term that favours a low rate, at least 0;
            ``l**2 / N`` for N training examples and a prior of length scale l, see
            `jdropout.concrete_regularizer`.
          dropout_regularizer: weight of the term that favours a high rate, at least 0;
            ``2 / N`` for N training examples, see `jdropout.concrete_regularizer`.

        Returns:
          A scalar.

        Raises:
          TypeError: if an argument is not a floating-point array or a number.
          ValueError: if a regularizer is negative, or `num_inputs` is below 1.
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
