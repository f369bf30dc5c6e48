"""Likelihoods for regression, and the precision of its noise."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _arrays, _checks, _values
from jdropout._dtypes import wide_dtype
from jdropout._typing import ArrayLike, Rate
from jdropout._values import is_real, type_name
from jdropout.uncertainty._logs import check_has_samples, log_mean


def gaussian_log_likelihood(
    samples: ArrayLike,
    y: ArrayLike,
    precision: ArrayLike,
    *,
    sample_axis: int = 0,
    output_axes: Sequence[int] = (),
) -> jax.Array:
    """Computes the log-likelihood of regression targets under a mixture of Gaussians.

    ``log(mean over t of N(y; f_t, 1 / precision))``, which is ``logsumexp over t of (-precision
    / 2 * (y - f_t)**2) - log(samples) - log(2 * pi) / 2 + log(precision) / 2``: a mixture of
    one Gaussian per sample. `gaussian_nll` instead uses a single Gaussian with the same mean
    and variance.

    Args:
      samples: array of predictions f_t, with a real floating-point dtype.
      y: array of targets, with the shape of `samples` without the sample axis.
      precision: precision of the noise (one over its variance), above 0; a number, or an array
        with axes of y's sizes or 1, such as one for each output. See `model_precision`. A
        traced precision below 0 gives NaN.
      sample_axis: axis of the samples.
      output_axes: axes of `y` whose elements are predicted jointly: their densities are
        multiplied before taking the mean, since one mask produced them all. The result is not
        the sum of the elements' own log-likelihoods.

    Returns:
      An array of y's shape without the output axes, float32 (float64 for 64-bit samples or y).

    Raises:
      TypeError: if `samples`, `y` or the precision are not floating-point numbers.
      ValueError: if `y` has another shape, an axis does not exist or has size 0, or a precision
        whose value is known is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout.uncertainty import gaussian_log_likelihood
      >>> samples, y = jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.array([2.0, 1.0])
      >>> [f"{likelihood:.4f}" for likelihood in gaussian_log_likelihood(samples, y, 4.0)]
      ['-0.9186', '-0.2258']
      >>> print(f"{gaussian_log_likelihood(samples, y, 4.0, output_axes=(0,)):.4f}")
      -1.1444

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty
      in deep learning" (ICML 2016), equation 8, for one output.
    """
    f = _arrays.check_floating_array("samples", samples)
    sample_axis = _values.check_axis("sample_axis", sample_axis, f.ndim)
    check_has_samples(f.shape[sample_axis])
    shape = f.shape[:sample_axis] + f.shape[sample_axis + 1 :]
    target = _check_target(y, shape, "samples without their axis")
    axes = _values.check_axes("output_axes", output_axes, target.ndim)
    tau = _check_above_zero("precision", precision, shape)
    return _gaussian_log_likelihood(f, target, tau, sample_axis, axes)


def gaussian_nll(mean: ArrayLike, variance: ArrayLike, y: ArrayLike) -> jax.Array:
    """Computes the negative log-likelihood of targets under Gaussians.

    ``(y - mean)**2 / (2 * variance) + log(variance) / 2 + log(2 * pi) / 2``, for each element.

    For Monte Carlo dropout the variance is the variance of the samples plus the variance of the
    noise, one over the `model_precision`: ``samples.var(0) + 1 / precision``. The samples'
    variance alone measures how far the masks disagree, not how far away the target is. Only the
    moments are needed, not the samples.

    Args:
      mean: array of predictive means, with a real floating-point dtype.
      variance: predictive variance, above 0; a number, or an array with axes of the mean's
        sizes or 1. A traced variance below 0 gives NaN.
      y: array of targets, of the mean's shape.

    Returns:
      An array of the mean's shape, float32 (float64 for a 64-bit mean or y).

    Raises:
      TypeError: if an argument is not a floating-point array.
      ValueError: if `y` has another shape, or a variance whose value is known is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> samples, precision = jnp.array([0.0, 2.0]), 4.0
      >>> variance = samples.var() + 1 / precision
      >>> print(f"{uncertainty.gaussian_nll(samples.mean(), variance, jnp.array(2.0)):.4f}")
      1.4305

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty
      in deep learning" (ICML 2016), section 4, for the variance.
    """
    center = _arrays.check_floating_array("mean", mean)
    target = _check_target(y, center.shape, "mean")
    return _gaussian_nll(center, _check_above_zero("variance", variance, center.shape), target)


def model_precision(
    rate: Rate, *, length_scale: float, weight_decay: float, num_examples: int
) -> float | jax.Array:
    """Returns the precision of the noise that a regression with dropout and weight decay implies.

    ``tau = p * length_scale**2 / (2 * num_examples * weight_decay)`` with the keep probability
    ``p = 1 - rate``. ``1 / tau`` is the variance of the noise, which adds to the variance of
    the samples in a prediction.

    The weight decay is the factor of the weights' squared norm, without a half, in a loss whose
    other term is half the squared error, summed over outputs and averaged over examples:
    ``sum((y - f)**2) / (2 * num_examples) + weight_decay * sum(w**2)``. From other conventions:

    - for a squared error without the half, pass half of its weight decay;
    - for a gradient to which ``d * w`` is added, as by ``optax.add_decayed_weights(d)`` before
      plain gradient descent, pass ``d / 2``; decoupled from an adaptive step, as in
      ``optax.adamw``, the decay is not a term of this kind;
    - for a mean over outputs as well, multiply by their number.

    The formula assumes masks of zeros and ones. If dropout also scales by ``1 / p``, as
    `jdropout.dropout` does, the formula's weights are the layer's divided by p, and its weight
    decay is the layer's times ``p**2``. The published experiments leave this factor out; you
    can also see it as part of the length scale, which has to be chosen anyway, by the
    likelihood of held-out data.

    Args:
      rate: probability of dropping, in [0, 1); a number or a (traced) floating-point scalar.
      length_scale: prior length scale; the weights have the prior variance
        ``1 / length_scale**2``; above 0.
      weight_decay: weight decay in the convention above; above 0.
      num_examples: number of training examples, at least 1.

    Returns:
      A float for a static rate; a float32 scalar for an array.

    Raises:
      TypeError: if an argument is not a number, or `num_examples` is not an integer.
      ValueError: if the rate is outside [0, 1), or another number is not above 0.

    Example:
      >>> from jdropout import uncertainty
      >>> uncertainty.model_precision(0.5, length_scale=1.0, weight_decay=1e-4, num_examples=1000)
      2.5

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty
      in deep learning" (ICML 2016), equations 1, 4 and 7.
    """
    checked = _check_rate_that_keeps(_checks.check_rate(rate))
    scale = _check_positive_number("length_scale", length_scale)
    decay = _check_positive_number("weight_decay", weight_decay)
    examples = _values.as_float(
        "num_examples", _values.check_positive("num_examples", num_examples)
    )
    factor = scale * scale / (2 * examples * decay)
    if not 0 < factor < math.inf:
        raise ValueError(
            f"length_scale {length_scale}, weight_decay {weight_decay} and num_examples "
            f"{num_examples} give a precision of {factor}. Use numbers nearer to 1."
        )
    if isinstance(checked, jax.Array):
        return (1 - checked.astype(jnp.float32)) * factor
    return (1 - checked) * factor


@functools.partial(jax.jit, static_argnums=(3, 4))
def _gaussian_log_likelihood(
    samples: jax.Array,
    y: jax.Array,
    precision: jax.Array,
    sample_axis: int,
    output_axes: tuple[int, ...],
) -> jax.Array:
    dtype = wide_dtype(samples, y)
    tau = jnp.broadcast_to(precision.astype(dtype), y.shape)
    f = jnp.moveaxis(samples, sample_axis, 0).astype(dtype)
    errors = jnp.square(y[None].astype(dtype) - f)
    exponents = (-tau[None] / 2 * errors).sum([axis + 1 for axis in output_axes])
    factors = (jnp.log(tau) - math.log(2 * math.pi)).sum(output_axes) / 2
    return log_mean(exponents) + factors


@jax.jit
def _gaussian_nll(mean: jax.Array, variance: jax.Array, y: jax.Array) -> jax.Array:
    dtype = wide_dtype(mean, y)
    variance = jnp.broadcast_to(variance.astype(dtype), y.shape)
    errors = jnp.square(y.astype(dtype) - mean.astype(dtype))
    return (errors / variance + jnp.log(variance) + math.log(2 * math.pi)) / 2


def _check_target(y: Any, shape: tuple[int, ...], source: str) -> jax.Array:
    array = _arrays.check_floating_array("y", y)
    if array.shape != shape:
        raise ValueError(
            f"y must have the shape {shape}, which is that of {source}, got {array.shape}. "
            "Reshape or broadcast it."
        )
    return array


def _check_above_zero(name: str, value: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns a scalar or an array that broadcasts to a shape; concrete ones must be above 0."""
    array = _arrays.check_parameter(name, float(value) if is_real(value) else value, shape)
    if not isinstance(array, jax.core.Tracer) and array.size:
        lowest = float(np.asarray(array).min())  # under jit, array.min() would be traced
        if not lowest > 0:  # also catches NaN
            raise ValueError(
                f"{name} must be above 0, got {lowest}. The variance of a prediction is that of "
                "its samples plus that of the noise, which is 1 / precision."
            )
    return array


def _check_positive_number(name: str, value: Any) -> float:
    if not is_real(value):
        raise TypeError(
            f"{name} must be a number, got {value!r} of type {type_name(value)}. Convert it with "
            f"float({name})."
        )
    if not 0 < value < math.inf:
        raise ValueError(
            f"{name} must be a finite number above 0, got {value}. Pass a Python float such as 1.0."
        )
    return _values.as_float(name, value)


def _check_rate_that_keeps(rate: float | jax.Array) -> float | jax.Array:
    if not isinstance(rate, jax.core.Tracer) and float(rate) == 1:
        raise ValueError(
            "rate must be below 1, got 1: if everything is dropped there is no precision. Pass the "
            "rate that the network was trained with."
        )
    return rate
