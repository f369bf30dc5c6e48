"""Variational dropout as a linen module."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
from flax import linen
from flax.linen.dtypes import promote_dtype

from jdropout._flax import check_dense, check_dense_inputs
from jdropout._typing import Flag, Key
from jdropout._values import check_dtype, check_positive, check_size
from jdropout._variational import variational_dense, variational_kl
from jdropout.linen._dropout import Layer


class VariationalDense(Layer, linen.Module):
    """Layer of `jdropout.variational_dense`: a dense layer with noisy weights of learned variance.

    Its parameters are ``kernel``, ``log_alpha`` and ``bias``; dtypes and initialisation work as
    in `flax.linen.Dense`. Flags, keys and random streams work as in `Dropout`. Add `kl` to the
    loss, divided by the number of training examples if the loss is a mean over them.

    Attributes:
      features: number of outputs.
      deterministic: if True, evaluate without noise and without pruned weights. Set it here or
        in the call, not in both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      use_bias: if True, the default, add a bias.
      threshold: ``log_alpha`` above which evaluation sets a weight to 0, 3 by default; None for
        never.
      dtype: dtype of the computation; None, the default, infers it from inputs and parameters.
      param_dtype: dtype of the parameters, float32 by default.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      log_alpha_init: initializer of ``log_alpha``, -4 by default.

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
      Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural networks" (ICML
      2017), sections 4.1 and 4.3; Kingma, Salimans and Welling (NeurIPS 2015), section 2.3.
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
        """Applies the layer, with noise in training and without pruned weights in evaluation.

        Args:
          inputs: array of shape (..., inputs).
          deterministic: if True, evaluate without noise and without pruned weights; a bool or a
            (traced) boolean scalar. Set it here or in the constructor, not in both.
          rng: PRNG key to use instead of one from the stream.

        Returns:
          An array of shape (..., features).

        Raises:
          ValueError: if the flag was set both here and in the constructor, or in neither.
          TypeError: if the input is not a real floating-point array.
        """
        flag, key = self._resolve(deterministic, rng)
        inputs = check_dense_inputs(inputs, self.dtype, self.param_dtype)
        shape = (check_positive("the last axis of inputs", inputs.shape[-1]), self.features)
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

    @linen.nowrap
    def _check_attributes(self) -> None:
        check_size("features", self.features)
        check_dense(
            self.use_bias,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            log_alpha_init=self.log_alpha_init,
        )
        check_dtype("param_dtype", self.param_dtype)
        if self.dtype is not None:
            check_dtype("dtype", self.dtype)

    def kl(self) -> jax.Array:
        """Returns `jdropout.variational_kl` summed over all weights.

        The layer must have its parameters: call it after `__call__`, or by
        ``apply(..., method="kl")``.

        Returns:
          A scalar, in float32 or float64.
        """
        return variational_kl(self.get_variable("params", "log_alpha")).sum()
