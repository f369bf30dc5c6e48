"""Variational dropout as a linen module."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
from flax import linen
from flax.linen.dtypes import promote_dtype

from jdropout._typing import Flag, Key
from jdropout._variational import variational_dense, variational_kl
from jdropout.linen._dropout import Layer


class VariationalDense(Layer, linen.Module):
    """A dense layer with noisy weights, whose variances are learned: `jdropout.variational_dense`.

    Parameters are ``kernel``, ``log_alpha`` and ``bias``, whose dtypes and initialisation work as
    in `flax.linen.Dense`. Random streams and flags are those of `Dropout`. Add `kl` to the loss,
    divided by the number of samples where that is a mean.

    Attributes:
      features: number of outputs.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      use_bias: whether to add a bias; True by default.
      threshold: log_alpha above which evaluation sets a weight to 0, 3 by default; None for never.
      dtype: of the computation; inferred by default.
      param_dtype: of the parameters, float32 by default.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      log_alpha_init: initializer of log_alpha, -4 by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.VariationalDense(8, deterministic=False)
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> y, variables = layer.init_with_output(keys, jnp.ones((2, 4)))
      >>> loss = (y**2).mean() + layer.apply(variables, method="kl") / 1000
      >>> y.shape
      (2, 8)

    References:
      As for `jdropout.variational_dense` and `jdropout.variational_kl`.
    """

    features: int
    deterministic: bool | None = None
    rng_collection: str = "dropout"
    use_bias: bool = True
    threshold: float | None = 3.0
    dtype: jax.typing.DTypeLike | None = None
    param_dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: Any = linen.initializers.lecun_normal()
    bias_init: Any = linen.initializers.zeros_init()
    log_alpha_init: Any = linen.initializers.constant(-4.0)

    @linen.compact
    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """The dense layer, with noise in training and without what is pruned in evaluation.

        Args:
          inputs: array of shape (..., inputs).
          deterministic: as for `Dropout`.
          rng: as for `Dropout`.

        Returns:
          An array of shape (..., features).

        Raises:
          ValueError: as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        flag, key = self._resolve(deterministic, rng)
        shape = (jnp.shape(inputs)[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        log_alpha = self.param("log_alpha", self.log_alpha_init, shape, self.param_dtype)
        bias = (
            self.param("bias", self.bias_init, shape[1:], self.param_dtype)
            if self.use_bias
            else None
        )
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return variational_dense(
            key, inputs, kernel, log_alpha, bias, threshold=self.threshold, deterministic=flag
        )

    def kl(self) -> jax.Array:
        """The divergence of all weights from the prior: the sum of `jdropout.variational_kl`.

        For a layer that has its parameters: after a call, or in ``apply(..., method="kl")``.

        Returns:
          A scalar, in float32 or float64.
        """
        return variational_kl(self.get_variable("params", "log_alpha")).sum()
