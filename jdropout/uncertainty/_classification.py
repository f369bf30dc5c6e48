"""Agreement, likelihood and calibration of class predictions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _values
from jdropout._arrays import as_array
from jdropout._typing import ArrayLike
from jdropout.uncertainty._logs import (
    check_categorical,
    check_samples,
    log_mean,
    log_softmax,
    others,
    samples_first,
    wide,
)


def variation_ratio(logits: ArrayLike, *, axis: int = -1, sample_axis: int = 0) -> jax.Array:
    """Computes the fraction of samples that do not predict the most common class.

    ``1 - n / samples``, where n samples have their largest logit at the most common class. Of
    equal logits the first counts. The gradient is zero.

    Args:
      logits: array with an axis of samples and one of classes, with a real floating-point
        dtype; logits or log-probabilities, which are normalised here. A class whose logit is
        -inf is impossible in that sample.
      axis: axis of the classes.
      sample_axis: axis of the samples.

    Returns:
      An array without the two axes, in [0, 1 - 1 / min(samples, classes)], float32 (float64 for
      64-bit logits).

    Raises:
      TypeError: if the logits are not a floating-point array.
      ValueError: if an axis does not exist or has size 0, or both axes are the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> logits = jnp.array([[3.0, 0.0], [1.0, 0.0], [2.0, 1.0], [0.0, 5.0]])
      >>> print(uncertainty.variation_ratio(logits))
      0.25

    References:
      Freeman, "Elementary applied statistics" (1965); Gal, Islam and Ghahramani, "Deep Bayesian
      active learning with image data" (ICML 2017).
    """
    return _variation_ratio(*check_samples(logits, axis, sample_axis))


def log_mean_probabilities(logits: ArrayLike, *, axis: int = -1, sample_axis: int = 0) -> jax.Array:
    """Computes the logarithm of the mean distribution, the prediction of Monte Carlo dropout.

    ``log(mean over t of softmax(logits_t))``, as a log-sum-exp: probabilities too small for
    float32 still have a logarithm, and logarithms of probabilities near 1 keep their precision.
    The result can serve as the logits of one distribution, for `entropy`,
    `expected_calibration_error` or a loss.

    Args:
      logits: array with an axis of samples and one of classes, with a real floating-point
        dtype; logits or log-probabilities, which are normalised here. A class whose logit is
        -inf is impossible in that sample.
      axis: axis of the classes.
      sample_axis: axis of the samples.

    Returns:
      An array without the axis of the samples, at most 0, float32 (float64 for 64-bit logits);
      -inf for a class that is impossible in all samples.

    Raises:
      TypeError: if the logits are not a floating-point array.
      ValueError: if an axis does not exist or has size 0, or both axes are the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> logits = jnp.array([[0.0, 0.0, -300.0], [0.0, -jnp.inf, -300.0]])
      >>> [f"{log_q:.4f}" for log_q in uncertainty.log_mean_probabilities(logits)]
      ['-0.2877', '-1.3863', '-300.2877']

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty
      in deep learning" (ICML 2016), equation 6, for probabilities.
    """
    return _log_mean_probabilities(*check_samples(logits, axis, sample_axis))


def predictive_log_likelihood(
    logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, sample_axis: int = 0
) -> jax.Array:
    """Computes the log-likelihood of each label under the mean distribution.

    ``log(mean over t of softmax(logits_t)[label])``: the entry of `log_mean_probabilities` at
    the label. It is never below the mean of the samples' own log-likelihoods.

    Args:
      logits: array with an axis of samples and one of classes, with a real floating-point
        dtype; logits or log-probabilities, which are normalised here. A class whose logit is
        -inf is impossible in that sample.
      labels: integer array with the shape of the logits without the two axes. A traced label
        that is not a class gives NaN.
      axis: axis of the classes.
      sample_axis: axis of the samples.

    Returns:
      An array of the labels' shape, at most 0, float32 (float64 for 64-bit logits).

    Raises:
      TypeError: if the logits are not a floating-point array, or the labels are not integers.
      ValueError: if an axis does not exist or has size 0, both axes are the same, the labels
        have another shape, or a label whose value is known is not a class.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> logits = jnp.array([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])
      >>> likelihoods = uncertainty.predictive_log_likelihood(logits, jnp.array([0, 1]))
      >>> [f"{likelihood:.4f}" for likelihood in likelihoods]
      ['-0.6931', '-0.6931']

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty
      in deep learning" (ICML 2016), equation 2, by Monte Carlo integration.
    """
    x, axis, sample_axis = check_samples(logits, axis, sample_axis)
    rest = tuple(size for i, size in enumerate(x.shape) if i not in (axis, sample_axis))
    return _log_likelihood(x, _check_labels(labels, rest, x.shape[axis]), axis, sample_axis)


def expected_calibration_error(
    logits: ArrayLike, labels: ArrayLike, *, num_bins: int = 15
) -> jax.Array:
    """Measures how far the confidence of predictions is from their accuracy.

    ``sum over m of |B_m| / n * |acc(B_m) - conf(B_m)|``, where bin B_m holds the examples whose
    most probable class has a probability in ``((m - 1) / num_bins, m / num_bins]``, so errors
    are compared after averaging over a bin. For Monte Carlo dropout, pass
    `log_mean_probabilities`.

    Args:
      logits: array of shape (..., classes), with a real floating-point dtype; one distribution
        per example, as logits or log-probabilities, which are normalised here. For
        probabilities pass their ``jnp.log``.
      labels: integer array of shape (...). A traced label that is not a class gives NaN.
      num_bins: number of bins of equal width, at least 1 and below 2**20.

    Returns:
      A scalar in [0, 1], float32 (float64 for 64-bit logits).

    Raises:
      TypeError: if the logits are not a floating-point array, or the labels or `num_bins` are
        not integers.
      ValueError: if there are no examples, the labels have another shape, a label whose value
        is known is not a class, or `num_bins` is outside [1, 2**20).

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> log_probabilities = jnp.log(jnp.array([[0.75, 0.25]] * 4))
      >>> for labels in ([0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]):
      ...     error = uncertainty.expected_calibration_error(log_probabilities, jnp.array(labels))
      ...     print(f"{error:.4f}")
      0.0000
      0.2500
      0.7500

    References:
      Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks" (ICML 2017),
      equation 3; Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using
      Bayesian binning" (AAAI 2015).
    """
    x, axis = check_categorical(logits, -1)
    _check_any_examples(x.shape)
    labels = _check_labels(labels, x.shape[:-1], x.shape[axis])
    return _calibration_error(x, labels, _values.check_size("num_bins", num_bins, bits=20))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _variation_ratio(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    x = samples_first(logits, axis, sample_axis)
    predicted = jax.nn.one_hot(x.argmax(-1), x.shape[-1], dtype=jnp.int32)
    others = x.shape[0] - predicted.sum(0).max(-1)
    ratio = others.astype(x.dtype) / float(x.shape[0])
    return jnp.where(jnp.isnan(x).any((0, -1)), jnp.nan, ratio)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _log_mean_probabilities(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    log_p = log_softmax(samples_first(logits, axis, sample_axis), -1)
    return jnp.moveaxis(log_mean(log_p), -1, axis - (sample_axis < axis))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _log_likelihood(logits: jax.Array, labels: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    log_p = log_softmax(samples_first(logits, axis, sample_axis), -1)
    index = labels.reshape(1, *labels.shape, 1)
    at_label = jnp.take_along_axis(log_p, index, axis=-1, mode="clip")
    known = _is_class(labels, log_p.shape[-1])
    return jnp.where(known, log_mean(at_label[..., 0]), jnp.nan)


@functools.partial(jax.jit, static_argnums=2)
def _calibration_error(logits: jax.Array, labels: jax.Array, num_bins: int) -> jax.Array:
    x = wide(logits).reshape(-1, logits.shape[-1])
    labels = labels.reshape(-1)
    confidence = 1 / (1 + others(x - x.max(-1, keepdims=True), -1)[:, 0])
    right = (x.argmax(-1).astype(labels.dtype) == labels).astype(x.dtype)
    right = jnp.where(_is_class(labels, x.shape[-1]), right, jnp.nan)
    edges = np.arange(1, num_bins) / num_bins
    bins = jnp.searchsorted(jnp.asarray(edges, x.dtype), confidence)  # number of edges below
    in_bin = bins[None] == jnp.arange(num_bins, dtype=bins.dtype)[:, None]
    gaps = jnp.where(in_bin, (right - confidence)[None], 0).sum(1)
    return jnp.abs(gaps).sum() / x.shape[0]


def _is_class(labels: jax.Array, num_classes: int) -> jax.Array:
    return (labels >= 0) & (labels < num_classes)


def _check_labels(labels: Any, shape: tuple[int, ...], num_classes: int) -> jax.Array:
    """Returns labels as integers of at least 32 bits; their range is checked if concrete."""
    array = as_array("labels", labels)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"labels must be an array of integers, got dtype {array.dtype}. Of one-hot labels "
            "take labels.argmax(axis)."
        )
    if array.shape != shape:
        raise ValueError(
            f"labels must have the shape {shape}, which is that of the logits without classes and "
            f"samples, got {array.shape}."
            " Drop the axes of classes and samples."
        )
    if array.dtype.itemsize < 4:  # too narrow for the number of classes
        array = array.astype(jnp.int32)
    if not isinstance(array, jax.core.Tracer) and array.size:
        known = np.asarray(array)  # under jit, methods of a JAX array would be traced
        lowest, highest = int(known.min()), int(known.max())
        if lowest < 0 or highest >= num_classes:
            raise ValueError(
                f"labels must be from 0 to {num_classes - 1}, the classes of the logits, got "
                f"{lowest if lowest < 0 else highest}. Leave out examples without a label."
            )
    return array


def _check_any_examples(shape: tuple[int, ...]) -> None:
    if 0 in shape:
        raise ValueError(
            f"logits must have at least one example, got shape {shape}. Without one there is no "
            "mean."
        )
