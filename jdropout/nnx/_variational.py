"""Variational dropout as an nnx module."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.typing
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jdropout._flax import check_dense, check_dense_inputs
from jdropout._typing import Flag
from jdropout._values import check_dtype, check_size, type_name
from jdropout._variational import variational_dense, variational_kl
from jdropout.nnx._dropout import Layer, attach

_KERNEL_INIT = nnx.initializers.lecun_normal()


_BIAS_INIT = nnx.initializers.zeros_init()


_LOG_ALPHA_INIT = nnx.initializers.constant(-4.0)


class VariationalDense(Layer):
    """Layer of `jdropout.variational_dense`: a dense layer with noisy weights of learned variance.

    Its parameters are ``kernel``, ``log_alpha`` and ``bias``; dtypes and initialisation work as
    in `flax.nnx.Linear`. Add `kl` to the loss, divided by the number of training examples if
    the loss is a mean over them. It has no rate and is therefore not a `flax.nnx.Dropout`, but
    flags, views and random streams work as there.

    Args:
      in_features: number of inputs.
      out_features: number of outputs.
      use_bias: if True, add a bias.
      threshold: `log_alpha` above which evaluation sets a weight to 0; None for never.
      dtype: dtype of the computation; None infers it from inputs and parameters.
      param_dtype: dtype of the parameters.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
      log_alpha_init: initializer of ``log_alpha``.
      deterministic: if True, evaluate without noise and without pruned weights. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: an `nnx.Rngs` for the parameters; the stream of the noise is forked from it.

    Raises:
      TypeError: if `rngs` has the wrong type.

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
      Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural networks" (ICML
      2017), sections 4.1 and 4.3; Kingma, Salimans and Welling (NeurIPS 2015), section 2.3.
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
        shape = (
            check_size("in_features", in_features),
            check_size("out_features", out_features),
        )
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(
                f"rngs must be an nnx.Rngs, got {type_name(rngs)}, since it makes the parameters "
                "too. Write rngs=nnx.Rngs(0)."
            )
        check_dense(
            use_bias, kernel_init=kernel_init, bias_init=bias_init, log_alpha_init=log_alpha_init
        )
        check_dtype("param_dtype", param_dtype)
        if dtype is not None:
            check_dtype("dtype", dtype)
        self.kernel: nnx.Param[jax.Array]
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.log_alpha: nnx.Param[jax.Array]
        self.log_alpha = nnx.Param(log_alpha_init(rngs.params(), shape, param_dtype))
        self.bias: nnx.Param[jax.Array] | None
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
        """Applies the layer, with noise in training and without pruned weights in evaluation.

        Args:
          inputs: array of shape (..., in_features).
          deterministic: overrides the constructor's flag; a bool or a (traced) boolean scalar.
            A traced flag takes a key whatever its value.
          rngs: overrides the constructor's source of keys; an `nnx.Rngs`, an `nnx.RngStream` or
            a key.

        Returns:
          An array of shape (..., out_features).

        Raises:
          ValueError: if neither the call nor the constructor gave a flag, or a source of keys.
          TypeError: if `rngs` has the wrong type.
        """
        flag, key = self._resolve(deterministic, rngs)
        inputs = check_dense_inputs(inputs, self.dtype, self.kernel[...].dtype)
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
        """Returns `jdropout.variational_kl` summed over all weights.

        Returns:
          A scalar, in float32 or float64.
        """
        return variational_kl(self.log_alpha[...]).sum()
