"""Concrete dropout as an nnx module."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
from flax import nnx

from jdropout._concrete import concrete_dropout, concrete_regularizer
from jdropout._flax import check_module_amount, initial_logit
from jdropout._typing import ArrayLike, Flag
from jdropout.nnx._dropout import Layer, attach


class ConcreteDropout(Layer):
    """Layer of `jdropout.concrete_dropout`: learns its rate, whose logit is a parameter.

    Add `regularizer` to the loss. It has no fixed rate and is therefore not a
    `flax.nnx.Dropout`, but flags, views and random streams work as there.

    Args:
      initial_rate: initial drop probability, a number between 0 and 1.
      temperature: temperature of the relaxation, a number above 0; use 2 / 3 for whole
        channels.
      broadcast_dims: axes along which the noise is shared.
      param_dtype: dtype of the logit.
      deterministic: if True, return the input unchanged. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if an argument has the wrong type.
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
      Gal, Hron and Kendall, "Concrete dropout" (NeurIPS 2017), section 3 and equation 5;
      Maddison, Mnih and Teh, "The concrete distribution" (ICLR 2017), for the relaxation.
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
        self.logit: nnx.Param[jax.Array] = nnx.Param(initial_logit(initial_rate, param_dtype))
        self.temperature: float = check_module_amount("temperature", temperature)
        self.broadcast_dims = broadcast_dims
        attach(self, deterministic, rng_collection, rngs)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Drops softly and scales `inputs`; returns them unchanged if deterministic.

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
        """Drop probability learned so far, the sigmoid of the logit."""
        return jax.nn.sigmoid(self.logit[...])

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
            self.logit[...],
            weight_sum_of_squares,
            num_inputs,
            weight_regularizer=weight_regularizer,
            dropout_regularizer=dropout_regularizer,
        )
