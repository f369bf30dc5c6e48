"""Variational dropout: a learned variance for every weight or activation."""

import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp

from jdropout import _arrays, _checks, _noise, _values
from jdropout._draw import Draw
from jdropout._dtypes import wide_dtype
from jdropout._new_draw import UNIFORM, new_draw
from jdropout._typing import ArrayLike, Flag, Index, Key
from jdropout._values import is_real

# Molchanov, Ashukha and Vetrov (2017), equation 14.
_K1, _K2, _K3 = 0.63576, 1.87320, 1.48695


_MAX_LOG_ALPHA = 8.0
_LEAST_SQUARE = 1e-16  # added to squared weights: log has no gradient at 0


def variational_dropout(
    key: Key | None,
    x: ArrayLike,
    log_alpha: ArrayLike,
    *,
    threshold: float | None = 3.0,
    deterministic: Flag = False,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
) -> jax.Array:
    """Multiplies by normal noise with mean 1 and a learned variance alpha.

    ``y = x * (1 + sqrt(alpha) * z)`` with z standard normal; for activations or for weights. An
    element whose log-variance exceeds `threshold` is pure noise, and evaluation sets it to 0.
    Train it together with `variational_kl`. The backward pass stores the key and `log_alpha`,
    plus `x` if `log_alpha` is differentiated.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no noise is
        drawn (``deterministic=True``).
      x: array of any shape, with a real floating-point dtype.
      log_alpha: logarithm of the variance, the parameter to learn; a floating-point scalar, or
        an array with as many axes as `x`, each of size 1 or x's size. Clipped to [-8, 8],
        outside of which its gradient is zero.
      threshold: `log_alpha` above which evaluation returns 0; None for never.
      deterministic: if True, evaluate: ``where(log_alpha > threshold, 0, x)``; a bool or a
        (traced) boolean scalar.
      broadcast_dims: axes along which the noise is shared.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.

    Returns:
      An array of x's shape and dtype; `x` itself in evaluation if `threshold` is None.

    Raises:
      TypeError: if `x` or `log_alpha` is not a real floating-point array, or another argument
        has the wrong type.
      ValueError: if `log_alpha` does not broadcast to `x`, the key is missing or a batch of
        keys, an axis does not exist, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> weight, log_alpha = jnp.ones((1, 3)), jnp.array([[-4.0, 0.0, 4.0]])
      >>> print(jdropout.variational_dropout(jax.random.key(0), weight, log_alpha).round(2))
      [[ 1.03  0.38 -1.03]]
      >>> print(jdropout.variational_dropout(None, weight, log_alpha, deterministic=True))
      [[1. 1. 0.]]

    References:
      Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick"
      (NeurIPS 2015), section 3; Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies
      deep neural networks" (ICML 2017), section 4.
    """
    x = _checks.check_real("x", x)
    limit = _check_threshold(threshold)
    return _noise.apply_noise(
        "variational_dropout",
        _noise.normal,
        _times_normal,
        key,
        x,
        (_arrays.check_parameter("log_alpha", log_alpha, jnp.shape(x)), limit),
        evaluate=None if limit is None else _pruned,
        deterministic=deterministic,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
    )


def _times_normal(x: jax.Array, noise: jax.Array, strength: Any) -> jax.Array:
    log_alpha, _ = strength
    return x * (1 + jnp.exp(0.5 * _clipped(log_alpha)) * noise)


def _pruned(x: jax.Array, strength: Any) -> jax.Array:
    log_alpha, threshold = strength
    return jnp.where(log_alpha > threshold, 0, x)


def _clipped(log_alpha: jax.Array) -> jax.Array:
    return jnp.clip(log_alpha, -_MAX_LOG_ALPHA, _MAX_LOG_ALPHA)


def variational_dense(
    key: Key | None,
    x: ArrayLike,
    weight: ArrayLike,
    log_alpha: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    threshold: float | None = 3.0,
    deterministic: Flag = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
) -> jax.Array:
    """Applies a dense layer whose weights carry multiplicative noise with learned variances.

    With weights ``w * (1 + sqrt(alpha) * z)``, drawn independently for every example, the
    output is normal with mean ``x @ w + bias`` and variance ``x**2 @ (alpha * w**2)``. The
    layer samples this output directly, one number per output instead of one per weight and
    example (the local reparameterisation). A weight with a large alpha is pure noise, and
    evaluation prunes it.

    The variance is computed in float32 (float64 for 64-bit input). The backward pass stores the
    arguments, as any dense layer does, and the variances, an array of the output's shape,
    because recomputing them takes a matrix product. The noise is not stored.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no noise is
        drawn (``deterministic=True``).
      x: array of shape (..., inputs), with a real floating-point dtype.
      weight: array of shape (inputs, outputs), with x's dtype.
      log_alpha: logarithm of the noise's variance, the parameter to learn; a floating-point
        scalar, or an array with axes of size 1 or the weight's size. Clipped to [-8, 8],
        outside of which its gradient is zero. Training is steadier if the additive variance is
        the parameter, see `variational_log_alpha`.
      bias: array of shape (outputs,), with x's dtype; None for no bias.
      threshold: `log_alpha` above which evaluation sets a weight to 0; None for never.
      deterministic: if True, evaluate: ``x @ where(log_alpha > threshold, 0, w) + bias``; a
        bool or a (traced) boolean scalar.
      start: index of the output's first element within an output of `global_shape`, for code
        that sees one part of it, as in `shard_map`.
      global_shape: shape of the whole output; required with `start`.

    Returns:
      An array of shape (..., outputs), with x's dtype.

    Raises:
      TypeError: if an array is not real floating-point, or their dtypes differ.
      ValueError: if the shapes do not match, the key is missing or a batch of keys, or the part
        at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> x, weight = jnp.ones((2, 4)), jnp.ones((4, 3))
      >>> log_alpha = jnp.array([[-8.0], [-8.0], [-8.0], [4.0]])  # the last input is all noise
      >>> y = jdropout.variational_dense(jax.random.key(0), jnp.ones((10000, 4)), weight, log_alpha)
      >>> print(f"{y.mean():.1f} {y.std():.1f}")  # exp(4 / 2) is 7.4
      4.0 7.4
      >>> print(jdropout.variational_dense(None, x, weight, log_alpha, deterministic=True)[0])
      [3. 3. 3.]

    References:
      Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural networks" (ICML
      2017), sections 4.1 and 4.3; Kingma, Salimans and Welling (NeurIPS 2015), section 2.3.
    """
    x, weight, bias = _check_dense(x, weight, bias)
    log_alpha = _arrays.check_parameter("log_alpha", log_alpha, weight.shape)
    limit = _check_threshold(threshold)
    flag = _checks.check_deterministic(deterministic)
    draw = new_draw(
        "variational_dense",
        key,
        UNIFORM,
        flag,
        (*x.shape[:-1], weight.shape[-1]),
        start=start,
        global_shape=global_shape,
    )
    used = weight
    if flag is not False and limit is not None:
        used = jnp.where(flag & (log_alpha > limit), jnp.zeros_like(weight), weight)
    mean = _mean(x, used, bias)
    variance = None if flag is True else _variance(x, weight, log_alpha)
    return cast("jax.Array", draw.apply(_plus_deviate, mean, variance, remake=True)).astype(x.dtype)


@jax.jit
def _mean(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    y = jnp.matmul(x, weight, preferred_element_type=wide_dtype(x.dtype))
    return y if bias is None else y + bias.astype(y.dtype)


@jax.jit
@functools.partial(jax.checkpoint, prevent_cse=False)  # recomputes the squares
def _variance(x: jax.Array, weight: jax.Array, log_alpha: jax.Array) -> jax.Array:
    # Squares in float16 underflow below 2e-4 and overflow above 256.
    x, weight, log_alpha = (a.astype(wide_dtype(x.dtype)) for a in (x, weight, log_alpha))
    return jnp.square(x) @ (jnp.exp(_clipped(log_alpha)) * jnp.square(weight))


def _plus_deviate(draw: Draw, mean: jax.Array, variance: jax.Array) -> jax.Array:
    noise = _noise.noise_like(variance, draw, _noise.normal)
    positive = variance > 0  # sqrt has no gradient at 0
    return mean + jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)) * noise, 0)


def variational_log_alpha(weight: ArrayLike, log_variance: ArrayLike) -> jax.Array:
    """Returns the ``log_alpha`` of weights whose noise has a given additive variance.

    ``log_variance - log(weight**2 + 1e-16)``. With weights and `log_variance` as the
    parameters, the gradient with respect to a weight has a small variance, however large alpha
    is.

    Args:
      weight: array of any shape, with a real floating-point dtype.
      log_variance: logarithm of the variance of a weight's noise, ``alpha * weight**2``; a
        scalar, or an array with axes of size 1 or the weight's size. Start at -10.

    Returns:
      An array of the weight's shape, in float32 or float64, for `variational_dense` and
      `variational_kl`.

    Raises:
      TypeError: if an argument is not a real floating-point array.
      ValueError: if `log_variance` does not broadcast to the weight.

    Example:
      >>> import jax.numpy as jnp, jdropout
      >>> print(jdropout.variational_log_alpha(jnp.array([1.0, 0.1, 0.01]), -4.0).round(2))
      [-4.    0.61  5.21]

    References:
      Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural networks" (ICML
      2017), section 4.1.
    """
    weight = _arrays.check_floating_array("weight", weight)
    wide = wide_dtype(weight.dtype)
    variance = _arrays.check_parameter("log_variance", log_variance, weight.shape)
    return variance.astype(wide) - jnp.log(jnp.square(weight.astype(wide)) + _LEAST_SQUARE)


def variational_kl(log_alpha: ArrayLike) -> jax.Array:
    """Returns each noisy weight's divergence from the log-uniform prior; sum it for the loss.

    ``k1 - k1 * sigmoid(k2 + k3 * log_alpha) + log(1 + 1 / alpha) / 2`` with k1 = 0.63576, k2 =
    1.8732 and k3 = 1.48695, an approximation with an error of at most 0.0095. It falls to 0 as
    alpha grows, which turns weights that the data do not need into pure noise. Divide the sum
    by the number of training examples if the loss is a mean over examples.

    Args:
      log_alpha: logarithm of the noise's variance, a floating-point array of any shape. Clipped
        to [-8, 8], outside of which its gradient is zero.

    Returns:
      An array of the same shape, in float32 or float64, above 0.

    Raises:
      TypeError: if `log_alpha` is not a real floating-point array.

    Example:
      >>> import jax.numpy as jnp, jdropout
      >>> print([f"{kl:.3f}" for kl in jdropout.variational_kl(jnp.array([-8.0, 0.0, 3.0]))])
      ['4.636', '0.431', '0.025']

    References:
      Molchanov, Ashukha and Vetrov, "Variational dropout sparsifies deep neural networks" (ICML
      2017), equation 14.
    """
    log_alpha = _arrays.check_floating_array("log_alpha", log_alpha)
    clipped = _clipped(log_alpha.astype(wide_dtype(log_alpha.dtype)))
    return _K1 * jax.nn.sigmoid(-_K2 - _K3 * clipped) + 0.5 * jax.nn.softplus(-clipped)


def _check_threshold(threshold: Any) -> float | None:
    if threshold is None:
        return None
    if not is_real(threshold) or math.isnan(_values.as_float("threshold", threshold)):
        raise TypeError(
            f"threshold must be None or a number, got {threshold!r}. It is a log_alpha, such as 3."
        )
    return float(threshold)


def _check_dense(x: Any, weight: Any, bias: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Checks a dense layer's arrays; returns them, the bias with as many axes as the output."""
    x = _checks.check_real("x", x)
    x, weight = jnp.asarray(x), _arrays.check_floating_array("weight", weight)
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            "x and weight must have the shapes (..., inputs) and (inputs, outputs), got "
            f"{x.shape} and {weight.shape}."
            " The last axis of x is multiplied by the first of the weight."
        )
    if bias is not None:
        bias = _arrays.check_floating_array("bias", bias)
        if bias.shape != weight.shape[1:]:
            raise ValueError(
                f"bias must have the shape {weight.shape[1:]}, got {bias.shape}."
                " Pass one number per output."
            )
    for name, array in (("weight", weight), ("bias", bias)):
        if array is not None and array.dtype != x.dtype:
            raise TypeError(
                f"{name} must have the dtype of x, {x.dtype}, got {array.dtype}. Convert it with "
                f"{name}.astype(x.dtype)."
            )
    if bias is not None:
        bias = bias.reshape((1,) * (x.ndim - 1) + bias.shape)
    return x, weight, bias
