"""nnx modules whose probabilities are learned."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jdropout._concrete import concrete_dropout, concrete_regularizer
from jdropout._flax import initial_logit
from jdropout._typing import ArrayLike, Flag
from jdropout._variational import variational_dense, variational_kl
from jdropout.nnx._dropout import Layer, attach

_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()
_LOG_ALPHA_INIT = nnx.initializers.constant(-4.0)


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


class VariationalDense(Layer):
    """A dense layer with noisy weights, whose variances are learned: `jdropout.variational_dense`.

    Parameters are ``kernel``, ``log_alpha`` and ``bias``, whose dtypes and initialisation work as
    in `flax.nnx.Linear`. It has no rate, and so is no `flax.nnx.Dropout`; flags, views and streams
    work as there. Add `kl` to the loss, divided by the number of samples where that is a mean.

    Args:
      in_features: number of inputs.
      out_features: number of outputs.
      use_bias: whether to add a bias.
      threshold: log_alpha above which evaluation sets a weight to 0; None for never.
      dtype: of the computation; inferred by default.
      param_dtype: of the parameters.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      log_alpha_init: initializer of log_alpha.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: an `nnx.Rngs`, for the parameters; the stream of the noise is forked from it.

    Raises:
      TypeError: if ``rngs`` has another type.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.VariationalDense(4, 8, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.ones((2, 4)))
      >>> loss = (y**2).mean() + layer.kl() / 1000
      >>> layer(jnp.ones((2, 4)), deterministic=True).shape
      (2, 8)

    References:
      As for `jdropout.variational_dense` and `jdropout.variational_kl`.
    """

    _arguments = "in_features, out_features"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        threshold: float | None = 3.0,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        kernel_init: Any = _KERNEL_INIT,
        bias_init: Any = _BIAS_INIT,
        log_alpha_init: Any = _LOG_ALPHA_INIT,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_features, out_features)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.log_alpha = nnx.Param(log_alpha_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.data(
            nnx.Param(bias_init(rngs.params(), shape[1:], param_dtype)) if use_bias else None
        )
        self.threshold = threshold
        self.dtype = dtype
        attach(self, deterministic, rng_collection, rngs)

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """The dense layer, with noise in training and without what is pruned in evaluation.

        Args:
          inputs: array of shape (..., in_features).
          deterministic: as for `Dropout`.
          rngs: as for `Dropout`.

        Returns:
          An array of shape (..., out_features).

        Raises:
          ValueError: as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        flag, key = self._resolve(deterministic, rngs)
        bias = None if self.bias is None else self.bias[...]
        inputs, kernel, bias = promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        return variational_dense(
            key,
            inputs,
            kernel,
            self.log_alpha[...],
            bias,
            threshold=self.threshold,
            deterministic=flag,
        )

    def kl(self) -> jax.Array:
        """The divergence of all weights from the prior: the sum of `jdropout.variational_kl`.

        Returns:
          A scalar, in float32 or float64.
        """
        return variational_kl(self.log_alpha[...]).sum()
