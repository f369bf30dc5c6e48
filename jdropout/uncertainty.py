"""Measures of uncertainty, from the samples of a prediction under several masks."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _checks
from jdropout._typing import ArrayLike, Rate

__all__ = [
    "entropy",
    "expected_calibration_error",
    "expected_entropy",
    "gaussian_log_likelihood",
    "gaussian_nll",
    "log_mean_probabilities",
    "model_precision",
    "mutual_information",
    "predictive_entropy",
    "predictive_log_likelihood",
    "variation_ratio",
]


def entropy(logits: ArrayLike, *, axis: int = -1) -> jax.Array:
    """The entropy of a categorical distribution, in nats.

    ``-sum over c of p_c * log(p_c)`` with ``p = softmax(logits)``. No term is negative, and one of
    probability 0 is 0. The logarithm of a probability near 1 keeps its digits.

    With running means in place of samples, average `entropy` beside the probabilities. From the
    means follow ``predictive = entropy(jnp.log(probabilities))``, the mean of the entropies, and
    their difference, the mutual information, down to about 1e-6 (see `mutual_information`).

    Args:
      logits: array of shape (..., classes, ...), of a real floating-point dtype: logits or
        log-probabilities, which are normalised here. A class whose logit is -inf is impossible.
      axis: the axis of the classes.

    Returns:
      An array without that axis, in [0, log(classes)], float32 (float64 for 64-bit logits).

    Raises:
      TypeError: if the logits are no floating-point array.
      ValueError: if the axis does not exist, or has size 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> logits = jnp.array([[0.0, 0.0], [0.0, 20.0], [0.0, -jnp.inf]])
      >>> [f"{h:.4g}" for h in uncertainty.entropy(logits)]
      ['0.6931', '4.328e-08', '0']

    References:
      Shannon, "A mathematical theory of communication", Bell System Technical Journal 27 (1948),
      section 6.
    """
    return _entropy(*_checks.check_categorical(logits, axis))


def predictive_entropy(logits: ArrayLike, *, axis: int = -1, sample_axis: int = 0) -> jax.Array:
    """The entropy of the mean distribution: all uncertainty of a prediction, in nats.

    ``-sum over c of q_c * log(q_c)`` with ``q = mean over t of softmax(logits_t)``. It is
    `expected_entropy`, which more data about the same inputs would leave, plus
    `mutual_information`, which it would take away.

    Args:
      logits: array with an axis of samples and one of classes, of a real floating-point dtype:
        logits or log-probabilities, which are normalised here. A class whose logit is -inf is
        impossible in that sample.
      axis: the axis of the classes.
      sample_axis: the axis of the samples.

    Returns:
      An array without the two axes, in [0, log(classes)], float32 (float64 for 64-bit logits).

    Raises:
      TypeError: if the logits are no floating-point array.
      ValueError: if an axis does not exist or has size 0, or the two are the same.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> from jdropout import uncertainty
      >>> x, root = jnp.array([[2.0, 1.0, 0.0], [9.0, 1.0, 0.0]]), jax.random.key(0)
      >>> keys = [jdropout.keys.at_site(root, i) for i in range(100)]
      >>> logits = jnp.stack([jdropout.dropout(key, x, 0.5) for key in keys])
      >>> [f"{h:.4f}" for h in uncertainty.predictive_entropy(logits)]
      ['0.9249', '0.9085']
      >>> [f"{h:.4f}" for h in uncertainty.expected_entropy(logits)]
      ['0.5648', '0.4477']
      >>> [f"{h:.4f}" for h in uncertainty.mutual_information(logits)]
      ['0.3601', '0.4608']

    References:
      Gal, Islam and Ghahramani, "Deep Bayesian active learning with image data", ICML 2017.
    """
    return _predictive_entropy(*_checks.check_samples(logits, axis, sample_axis))


def expected_entropy(logits: ArrayLike, *, axis: int = -1, sample_axis: int = 0) -> jax.Array:
    """The mean of the samples' entropies: the uncertainty that all samples agree on, in nats.

    ``mean over t of entropy(logits_t)``. It is called aleatoric: more data about the same inputs
    would not take it away.

    Args:
      logits: as for `predictive_entropy`.
      axis: the axis of the classes.
      sample_axis: the axis of the samples.

    Returns:
      An array without the two axes, in [0, log(classes)], float32 (float64 for 64-bit logits).

    Raises:
      TypeError: as for `predictive_entropy`.
      ValueError: as for `predictive_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> contradicting = jnp.array([[50.0, 0.0], [0.0, 50.0]])  # two samples of one prediction
      >>> print(f"{uncertainty.expected_entropy(contradicting):.4g}")
      9.837e-21

    References:
      Gal, Islam and Ghahramani, "Deep Bayesian active learning with image data", ICML 2017: the
      second term of BALD.
    """
    return _expected_entropy(*_checks.check_samples(logits, axis, sample_axis))


def mutual_information(logits: ArrayLike, *, axis: int = -1, sample_axis: int = 0) -> jax.Array:
    """How far the samples disagree: BALD, the mutual information of class and mask, in nats.

    ``predictive_entropy - expected_entropy``, which is ``mean over t of KL(p_t || q)`` with
    ``p_t = softmax(logits_t)`` and ``q = mean over t of p_t``. It is called epistemic: more data
    about the same inputs would take it away.

    Computed as the mean of the sums over c of ``p * log(p / q) - p + q``, no term of which is
    negative. The ratios come from differences of logits, and the terms from a series where p is
    near q, so that nothing cancels: samples that nearly agree have a small result with nearly all
    its digits, where a difference of two entropies in float32 has an error of 1e-7, of either
    sign. Equal samples give exactly 0 and gradient 0.

    Args:
      logits: as for `predictive_entropy`.
      axis: the axis of the classes.
      sample_axis: the axis of the samples.

    Returns:
      An array without the two axes, in [0, log(min(samples, classes))], float32 (float64 for
      64-bit logits).

    Raises:
      TypeError: as for `predictive_entropy`.
      ValueError: as for `predictive_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> contradicting = jnp.array([[50.0, 0.0], [0.0, 50.0]])  # two samples of one prediction
      >>> agreeing = jnp.array([[1.0, 0.0], [1.0001, 0.0]])
      >>> print(f"{uncertainty.mutual_information(contradicting):.4g}")
      0.6931
      >>> print(f"{uncertainty.mutual_information(agreeing):.4g}")
      2.458e-10

    References:
      Houlsby, Huszár, Ghahramani and Lengyel, "Bayesian active learning for classification and
      preference learning" (2011); Gal, Islam and Ghahramani, "Deep Bayesian active learning with
      image data", ICML 2017.
    """
    return _mutual_information(*_checks.check_samples(logits, axis, sample_axis))


def variation_ratio(logits: ArrayLike, *, axis: int = -1, sample_axis: int = 0) -> jax.Array:
    """The part of the samples that do not predict the class that most of them predict.

    ``1 - n / samples``, where n samples have their largest logit at the most common class. Of
    equal logits the first counts. Its gradient is zero.

    Args:
      logits: as for `predictive_entropy`.
      axis: the axis of the classes.
      sample_axis: the axis of the samples.

    Returns:
      An array without the two axes, in [0, 1 - 1 / min(samples, classes)], float32 (float64 for
      64-bit logits).

    Raises:
      TypeError: as for `predictive_entropy`.
      ValueError: as for `predictive_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> logits = jnp.array([[3.0, 0.0], [1.0, 0.0], [2.0, 1.0], [0.0, 5.0]])
      >>> print(uncertainty.variation_ratio(logits))
      0.25

    References:
      Freeman, "Elementary applied statistics" (1965); Gal, Islam and Ghahramani, "Deep Bayesian
      active learning with image data", ICML 2017.
    """
    return _variation_ratio(*_checks.check_samples(logits, axis, sample_axis))


def log_mean_probabilities(logits: ArrayLike, *, axis: int = -1, sample_axis: int = 0) -> jax.Array:
    """The logarithm of the mean distribution, which is the prediction of Monte Carlo dropout.

    ``log(mean over t of softmax(logits_t))``, as a log-sum-exp: probabilities that float32 does
    not hold have a logarithm, and that of a probability near 1 keeps its digits. The result serves
    as the logits of one distribution, for `entropy`, `expected_calibration_error` or a loss.

    Args:
      logits: as for `predictive_entropy`.
      axis: the axis of the classes.
      sample_axis: the axis of the samples.

    Returns:
      An array without the axis of the samples, none of it above 0, float32 (float64 for 64-bit
      logits); -inf for a class that is impossible in all samples.

    Raises:
      TypeError: as for `predictive_entropy`.
      ValueError: as for `predictive_entropy`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> logits = jnp.array([[0.0, 0.0, -300.0], [0.0, -jnp.inf, -300.0]])
      >>> [f"{log_q:.4f}" for log_q in uncertainty.log_mean_probabilities(logits)]
      ['-0.2877', '-1.3863', '-300.2877']

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty in
      deep learning", ICML 2016, equation 6, of probabilities.
    """
    return _log_mean_probabilities(*_checks.check_samples(logits, axis, sample_axis))


def predictive_log_likelihood(
    logits: ArrayLike, labels: ArrayLike, *, axis: int = -1, sample_axis: int = 0
) -> jax.Array:
    """The log-likelihood of labels under the mean distribution, one for each label.

    ``log(mean over t of softmax(logits_t)[label])``: what `log_mean_probabilities` has at the
    label, and never below the mean of the samples' own log-likelihoods.

    Args:
      logits: as for `predictive_entropy`.
      labels: array of integers, in the shape of the logits without the two axes. A traced label
        that is no class gives NaN.
      axis: the axis of the classes.
      sample_axis: the axis of the samples.

    Returns:
      An array of the labels' shape, none of it above 0, float32 (float64 for 64-bit logits).

    Raises:
      TypeError: as for `predictive_entropy`, or if the labels are no integers.
      ValueError: as for `predictive_entropy`, or if the labels have another shape, or one that is
        known is no class.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> logits = jnp.array([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 2.0], [0.0, 0.0]]])
      >>> likelihoods = uncertainty.predictive_log_likelihood(logits, jnp.array([0, 1]))
      >>> [f"{likelihood:.4f}" for likelihood in likelihoods]
      ['-0.6931', '-0.6931']

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty in
      deep learning", ICML 2016, equation 2, by Monte Carlo integration.
    """
    x, axis, sample_axis = _checks.check_samples(logits, axis, sample_axis)
    rest = tuple(size for i, size in enumerate(x.shape) if i not in (axis, sample_axis))
    return _log_likelihood(x, _checks.check_labels(labels, rest, x.shape[axis]), axis, sample_axis)


def expected_calibration_error(
    logits: ArrayLike, labels: ArrayLike, *, num_bins: int = 15
) -> jax.Array:
    """How far the confidence of predictions is from how often they are right.

    ``sum over m of |B_m| / n * |acc(B_m) - conf(B_m)|``, where the bin B_m has the examples whose
    most probable class has a probability in ``((m - 1) / num_bins, m / num_bins]``: the error is
    that of the average over a bin. For Monte Carlo dropout pass `log_mean_probabilities`.

    Args:
      logits: array of shape (..., classes), of a real floating-point dtype: one distribution for
        each example, as logits or log-probabilities, which are normalised here. Pass ``jnp.log``
        of probabilities.
      labels: array of integers, of shape (...). A traced label that is no class gives NaN.
      num_bins: number of bins of equal width, at least 1.

    Returns:
      A scalar in [0, 1], float32 (float64 for 64-bit logits).

    Raises:
      TypeError: if the logits are no floating-point array, or the labels or num_bins no integers.
      ValueError: if there are no examples, the labels have another shape, one that is known is no
        class, or num_bins is below 1.

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
      Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", ICML 2017,
      equation 3; Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using
      Bayesian binning", AAAI 2015.
    """
    x, axis = _checks.check_categorical(logits, -1)
    _checks.check_any_examples(x.shape)
    labels = _checks.check_labels(labels, x.shape[:-1], x.shape[axis])
    return _calibration_error(x, labels, _checks.check_positive("num_bins", num_bins))


def gaussian_log_likelihood(
    samples: ArrayLike,
    y: ArrayLike,
    precision: ArrayLike,
    *,
    sample_axis: int = 0,
    output_axes: Sequence[int] = (),
) -> jax.Array:
    """The log-likelihood of a regression's targets under the mean of the samples' Gaussians.

    ``log(mean over t of N(y; f_t, 1 / precision))``, which is ``logsumexp over t of
    (-precision / 2 * (y - f_t)**2) - log(samples) - log(2 * pi) / 2 + log(precision) / 2``: a
    mixture of as many Gaussians as there are samples. `gaussian_nll` takes one Gaussian of the
    same mean and variance instead.

    Args:
      samples: array of predictions f_t, of a real floating-point dtype.
      y: array of targets, in the shape of the samples without their axis.
      precision: that of the noise, one over its variance, above 0: a number, or an array with axes
        of y's sizes or 1, such as one for each output. See `model_precision`. A traced one that
        is below 0 gives NaN.
      sample_axis: the axis of the samples.
      output_axes: axes of y whose elements are predicted together: of these the densities are
        multiplied before the mean, since one mask made them all. The result is not the sum of
        the elements' own.

    Returns:
      An array of y's shape without the output axes, float32 (float64 for 64-bit samples or y).

    Raises:
      TypeError: if samples, y or the precision are not floating-point numbers.
      ValueError: if y has another shape, an axis does not exist or has size 0, or a precision that
        is known is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout.uncertainty import gaussian_log_likelihood
      >>> samples, y = jnp.array([[0.0, 1.0], [2.0, 1.0]]), jnp.array([2.0, 1.0])
      >>> [f"{likelihood:.4f}" for likelihood in gaussian_log_likelihood(samples, y, 4.0)]
      ['-0.9186', '-0.2258']
      >>> print(f"{gaussian_log_likelihood(samples, y, 4.0, output_axes=(0,)):.4f}")
      -1.1444

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty in
      deep learning", ICML 2016, equation 8, which is that of one output.
    """
    f = _checks.check_floating_array("samples", samples)
    sample_axis = _checks.check_axis("sample_axis", sample_axis, f.ndim)
    _checks.check_has_samples(f.shape[sample_axis])
    shape = f.shape[:sample_axis] + f.shape[sample_axis + 1 :]
    target = _checks.check_target(y, shape, "samples without their axis")
    axes = _checks.check_axes("output_axes", output_axes, target.ndim)
    tau = _checks.check_above_zero("precision", precision, shape)
    return _gaussian_log_likelihood(f, target, tau, sample_axis, axes)


def gaussian_nll(mean: ArrayLike, variance: ArrayLike, y: ArrayLike) -> jax.Array:
    """The negative log-likelihood of targets under Gaussians of given moments.

    ``(y - mean)**2 / (2 * variance) + log(variance) / 2 + log(2 * pi) / 2``, for each element.

    For Monte Carlo dropout the variance is that of the samples plus that of the noise, one over the
    `model_precision`: ``samples.var(0) + 1 / precision``. That of the samples alone says how far
    the masks disagree, not how far the target is. It needs no samples, only their moments.

    Args:
      mean: array of predictive means, of a real floating-point dtype.
      variance: predictive variance, above 0: a number, or an array with axes of the mean's sizes
        or 1. A traced one that is below 0 gives NaN.
      y: array of targets, of the mean's shape.

    Returns:
      An array of the mean's shape, float32 (float64 for a 64-bit mean or y).

    Raises:
      TypeError: if an argument is no floating-point array.
      ValueError: if y has another shape, or a variance that is known is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> samples, precision = jnp.array([0.0, 2.0]), 4.0
      >>> variance = samples.var() + 1 / precision
      >>> print(f"{uncertainty.gaussian_nll(samples.mean(), variance, jnp.array(2.0)):.4f}")
      1.4305

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty in
      deep learning", ICML 2016, section 4, for the variance.
    """
    center = _checks.check_floating_array("mean", mean)
    target = _checks.check_target(y, center.shape, "mean")
    return _gaussian_nll(
        center, _checks.check_above_zero("variance", variance, center.shape), target
    )


def model_precision(
    rate: Rate, *, length_scale: float, weight_decay: float, num_examples: int
) -> float | jax.Array:
    """The precision of the noise that a regression with dropout and weight decay assumes.

    ``tau = p * length_scale**2 / (2 * num_examples * weight_decay)`` with ``p = 1 - rate``, the
    probability of keeping. ``1 / tau`` is the variance of the noise, which a prediction's variance
    has in addition to that of the samples.

    The weight decay is the factor of the weights' squared norm, without a half, in a loss whose
    other term is half the squared error, summed over outputs and averaged over examples:
    ``sum((y - f)**2) / (2 * num_examples) + weight_decay * sum(w**2)``. From other conventions:

    - a squared error without the half: pass half of its weight decay;
    - a gradient to which ``d * w`` is added, as by ``optax.add_decayed_weights(d)`` before plain
      gradient descent: pass ``d / 2``; decoupled from an adaptive step, as in ``optax.adamw``, it
      is no such term;
    - a mean over outputs as well: multiply by their number.

    The masks of the formula are zeros and ones. Where dropout also scales by ``1 / p``, as
    `jdropout.dropout` does, its weights are those of the layer over p, and its weight decay that of
    the layer times ``p**2``. The published experiments leave this factor out; it can also be seen
    as a part of the length scale, which is chosen anyway, by the likelihood of held-out data.

    Args:
      rate: probability of dropping, in [0, 1): a number, or a (traced) floating-point scalar.
      length_scale: the prior of the weights has the variance ``1 / length_scale**2``; above 0.
      weight_decay: the weight decay lambda, as above; above 0.
      num_examples: number of the examples in training, at least 1.

    Returns:
      A float for a static rate; a float32 scalar for an array.

    Raises:
      TypeError: if an argument is no number, or `num_examples` no integer.
      ValueError: if the rate is outside [0, 1), or another number not above 0.

    Example:
      >>> from jdropout import uncertainty
      >>> uncertainty.model_precision(0.5, length_scale=1.0, weight_decay=1e-4, num_examples=1000)
      2.5

    References:
      Gal and Ghahramani, "Dropout as a Bayesian approximation: representing model uncertainty in
      deep learning", ICML 2016, equations 1, 4 and 7.
    """
    checked = _checks.check_rate_that_keeps(_checks.check_rate(rate))
    scale = _checks.check_positive_number("length_scale", length_scale)
    decay = _checks.check_positive_number("weight_decay", weight_decay)
    factor = scale**2 / (2 * _checks.check_positive("num_examples", num_examples) * decay)
    if isinstance(checked, jax.Array):
        return (1 - checked.astype(jnp.float32)) * factor
    return (1 - checked) * factor


@functools.partial(jax.jit, static_argnums=1)
def _entropy(logits: jax.Array, axis: int) -> jax.Array:
    return _entropy_of_logs(_log_softmax(_wide(logits), axis), axis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _predictive_entropy(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    x = _samples_first(logits, axis, sample_axis)
    return _entropy_of_logs(_log_mean(_log_softmax(x, -1)), -1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _expected_entropy(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    x = _samples_first(logits, axis, sample_axis)
    return _entropy_of_logs(_log_softmax(x, -1), -1).mean(0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mutual_information(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    x = _samples_first(logits, axis, sample_axis)
    q = jnp.exp(_log_mean(_log_softmax(x, -1)))
    # From here on relative to the largest logits of all samples: what the samples have in common
    # leaves as a difference of logits, which is exact where they are near.
    reference = lax.stop_gradient(x.max(0, keepdims=True))
    possible = ~jnp.isneginf(reference)
    x = x - jnp.where(possible, reference, 0)
    x = x - lax.stop_gradient(x.max(-1, keepdims=True))
    ratios = jnp.where(possible, x - _log_mean_exp(x, _log_softmax(reference, -1), -1), 0)
    ratios = ratios - lax.stop_gradient(ratios.max(0, keepdims=True))
    ratios = ratios - _log_mean_exp(ratios, -math.log(x.shape[0]), 0)  # log(p_t / q)
    return (q * _divergence_term(ratios).mean(0)).sum(-1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _variation_ratio(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    x = _samples_first(logits, axis, sample_axis)
    predicted = jax.nn.one_hot(x.argmax(-1), x.shape[-1], dtype=jnp.int32)
    others = x.shape[0] - predicted.sum(0).max(-1)
    return others.astype(x.dtype) / x.shape[0]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _log_mean_probabilities(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    log_mean = _log_mean(_log_softmax(_samples_first(logits, axis, sample_axis), -1))
    return jnp.moveaxis(log_mean, -1, axis - (sample_axis < axis))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _log_likelihood(logits: jax.Array, labels: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    log_p = _log_softmax(_samples_first(logits, axis, sample_axis), -1)
    index = labels.reshape(1, *labels.shape, 1)
    at_label = jnp.take_along_axis(log_p, index, axis=-1, mode="clip")
    known = _is_class(labels, log_p.shape[-1])
    return jnp.where(known, _log_mean(at_label[..., 0]), jnp.nan)


@functools.partial(jax.jit, static_argnums=2)
def _calibration_error(logits: jax.Array, labels: jax.Array, num_bins: int) -> jax.Array:
    x = _wide(logits).reshape(-1, logits.shape[-1])
    labels = labels.reshape(-1)
    confidence = 1 / (1 + _others(x - x.max(-1, keepdims=True), -1)[:, 0])
    right = (x.argmax(-1).astype(labels.dtype) == labels).astype(x.dtype)
    right = jnp.where(_is_class(labels, x.shape[-1]), right, jnp.nan)
    edges = np.arange(1, num_bins) / num_bins
    bins = jnp.searchsorted(jnp.asarray(edges, x.dtype), confidence)  # as many as are below
    in_bin = bins[None] == jnp.arange(num_bins, dtype=bins.dtype)[:, None]
    gaps = jnp.where(in_bin, (right - confidence)[None], 0).sum(1)
    return jnp.abs(gaps).sum() / x.shape[0]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _gaussian_log_likelihood(
    samples: jax.Array,
    y: jax.Array,
    precision: jax.Array,
    sample_axis: int,
    output_axes: tuple[int, ...],
) -> jax.Array:
    dtype = _wide_dtype(samples, y)
    tau = jnp.broadcast_to(precision.astype(dtype), y.shape)
    f = jnp.moveaxis(samples, sample_axis, 0).astype(dtype)
    errors = jnp.square(y[None].astype(dtype) - f)
    exponents = (-tau[None] / 2 * errors).sum([axis + 1 for axis in output_axes])
    factors = (jnp.log(tau) - math.log(2 * math.pi)).sum(output_axes) / 2
    return _log_mean(exponents) + factors


@jax.jit
def _gaussian_nll(mean: jax.Array, variance: jax.Array, y: jax.Array) -> jax.Array:
    dtype = _wide_dtype(mean, y)
    variance = jnp.broadcast_to(variance.astype(dtype), y.shape)
    errors = jnp.square(y.astype(dtype) - mean.astype(dtype))
    return (errors / variance + jnp.log(variance) + math.log(2 * math.pi)) / 2


def _entropy_of_logs(log_p: jax.Array, axis: int) -> jax.Array:
    return (jnp.exp(log_p) * jnp.where(jnp.isneginf(log_p), 0, -log_p)).sum(axis)


def _divergence_term(d: jax.Array) -> jax.Array:
    """``d * exp(d) - exp(d) + 1``, which is ``(p * log(p / q) - p + q) / q`` at ``d = log(p / q)``.

    Near 0 by its series, the sum of ``(n - 1) / n! * d**n``.
    """
    d = jnp.maximum(d, -1e4)  # where p is 0; it is 1 there already
    near = jnp.abs(d) < 0.25
    series = [(n - 1) / math.factorial(n) for n in range(12, 1, -1)]
    small, large = jnp.where(near, d, 0), jnp.where(near, 1, d)
    by_series = jnp.polyval(jnp.asarray(series, d.dtype), small) * jnp.square(small)
    return jnp.where(near, by_series, large * jnp.exp(large) - jnp.expm1(large))


def _log_mean(log_p: jax.Array) -> jax.Array:
    """The logarithm of the mean of exp(log_p), none of it above 0, over the first axis."""
    return _log_mean_exp(log_p, -math.log(log_p.shape[0]), 0)[0]


def _log_mean_exp(x: jax.Array, log_weights: jax.Array | float, axis: int) -> jax.Array:
    """The logarithm of the weighted mean of exp(x), for x of at most 0; keeps the axis.

    The result has the relative precision of x, also where all are near 0.
    """
    change = (jnp.exp(log_weights) * jnp.expm1(x)).sum(axis, keepdims=True)
    near = change > -0.5
    terms = x + log_weights
    possible = ~jnp.isneginf(terms.max(axis, keepdims=True))
    far = jax.nn.logsumexp(jnp.where(possible, terms, 0), axis, keepdims=True)
    far = jnp.where(possible, far, -jnp.inf)
    return jnp.where(near, jnp.log1p(jnp.where(near, change, 0)), far)


def _log_softmax(x: jax.Array, axis: int) -> jax.Array:
    """Differs from `jax.nn.log_softmax` near 0: of a probability near 1 it keeps the digits."""
    x = x - lax.stop_gradient(x.max(axis, keepdims=True))
    return x - jnp.log1p(_others(x, axis))


def _others(x: jax.Array, axis: int) -> jax.Array:
    """The sum of exp(x), but for the 1 of the largest, for a largest x of 0; keeps the axis."""
    top = x.argmax(axis, keepdims=True).astype(jnp.int32)
    at_top = lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim) == top
    return jnp.where(at_top, jnp.expm1(x), jnp.exp(x)).sum(axis, keepdims=True)


def _is_class(labels: jax.Array, num_classes: int) -> jax.Array:
    return (labels >= 0) & (labels < num_classes)


def _samples_first(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    """Of shape (samples, ..., classes), in float32 at least."""
    return jnp.moveaxis(_wide(logits), (sample_axis, axis), (0, -1))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(_wide_dtype(x))


def _wide_dtype(*arrays: jax.Array) -> np.dtype:
    wide = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if wide else jnp.float32)
