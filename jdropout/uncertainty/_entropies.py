"""Entropies of a predictive distribution over classes, and mutual information."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jdropout._typing import ArrayLike
from jdropout.uncertainty._logs import (
    check_categorical,
    check_samples,
    divergence_term,
    entropy_of_logs,
    log_mean,
    log_mean_exp,
    log_softmax,
    samples_first,
    wide,
)


def entropy(logits: ArrayLike, *, axis: int = -1) -> jax.Array:
    """Computes the entropy of a categorical distribution, in nats.

    ``-sum over c of p_c * log(p_c)`` with ``p = softmax(logits)``. No term is negative, and a
    class of probability 0 contributes 0. Logarithms of probabilities near 1 keep their
    precision.

    If you keep running means instead of samples, average `entropy` along with the
    probabilities. The means then give ``predictive = entropy(jnp.log(probabilities))``, the
    mean of the entropies, and their difference, the mutual information, accurate to about 1e-6
    (`mutual_information` is more accurate).

    Args:
      logits: array of shape (..., classes, ...), with a real floating-point dtype; logits or
        log-probabilities, which are normalised here. A class whose logit is -inf is impossible.
      axis: axis of the classes.

    Returns:
      An array without that axis, in [0, log(classes)], float32 (float64 for 64-bit logits).

    Raises:
      TypeError: if the logits are not a floating-point array.
      ValueError: if the axis does not exist or has size 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> logits = jnp.array([[0.0, 0.0], [0.0, 20.0], [0.0, -jnp.inf]])
      >>> [f"{h:.4g}" for h in uncertainty.entropy(logits)]
      ['0.6931', '4.328e-08', '0']

    References:
      Shannon, "A mathematical theory of communication", Bell System Technical Journal 27
      (1948), section 6.
    """
    return _entropy(*check_categorical(logits, axis))


def predictive_entropy(logits: ArrayLike, *, axis: int = -1, sample_axis: int = 0) -> jax.Array:
    """Computes the entropy of the mean distribution, a prediction's total uncertainty, in nats.

    ``-sum over c of q_c * log(q_c)`` with ``q = mean over t of softmax(logits_t)``. It is the
    sum of `expected_entropy`, which more data about the same inputs would not remove, and
    `mutual_information`, which it would.

    Args:
      logits: array with an axis of samples and one of classes, with a real floating-point
        dtype; logits or log-probabilities, which are normalised here. A class whose logit is
        -inf is impossible in that sample.
      axis: axis of the classes.
      sample_axis: axis of the samples.

    Returns:
      An array without the two axes, in [0, log(classes)], float32 (float64 for 64-bit logits).

    Raises:
      TypeError: if the logits are not a floating-point array.
      ValueError: if an axis does not exist or has size 0, or both axes are the same.

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
      Gal, Islam and Ghahramani, "Deep Bayesian active learning with image data" (ICML 2017).
    """
    return _predictive_entropy(*check_samples(logits, axis, sample_axis))


def expected_entropy(logits: ArrayLike, *, axis: int = -1, sample_axis: int = 0) -> jax.Array:
    """Computes the mean entropy of the samples, the uncertainty they agree on, in nats.

    ``mean over t of entropy(logits_t)``. This part is called aleatoric: more data about the
    same inputs would not remove it.

    Args:
      logits: array with an axis of samples and one of classes, with a real floating-point
        dtype; logits or log-probabilities, which are normalised here. A class whose logit is
        -inf is impossible in that sample.
      axis: axis of the classes.
      sample_axis: axis of the samples.

    Returns:
      An array without the two axes, in [0, log(classes)], float32 (float64 for 64-bit logits).

    Raises:
      TypeError: if the logits are not a floating-point array.
      ValueError: if an axis does not exist or has size 0, or both axes are the same.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import uncertainty
      >>> contradicting = jnp.array([[50.0, 0.0], [0.0, 50.0]])  # two samples of one prediction
      >>> print(f"{uncertainty.expected_entropy(contradicting):.4g}")
      9.837e-21

    References:
      Gal, Islam and Ghahramani, "Deep Bayesian active learning with image data" (ICML 2017),
      the second term of BALD.
    """
    return _expected_entropy(*check_samples(logits, axis, sample_axis))


def mutual_information(logits: ArrayLike, *, axis: int = -1, sample_axis: int = 0) -> jax.Array:
    """Computes the mutual information of class and mask (BALD), in nats.

    It measures how far the samples disagree: ``predictive_entropy - expected_entropy``, which
    is ``mean over t of KL(p_t || q)`` with ``p_t = softmax(logits_t)`` and
    ``q = mean over t of p_t``. This part is called epistemic: more data about the same inputs
    would remove it.

    It is computed as the mean of the sums over c of ``p * log(p / q) - p + q``, no term of
    which is negative. The ratios come from differences of logits, and the terms from a series
    where p is near q, so nothing cancels: samples that nearly agree give a small result that is
    accurate to nearly all digits, where the difference of two float32 entropies is off by 1e-7
    in either direction. Equal samples give exactly 0 and gradient 0.

    Args:
      logits: array with an axis of samples and one of classes, with a real floating-point
        dtype; logits or log-probabilities, which are normalised here. A class whose logit is
        -inf is impossible in that sample.
      axis: axis of the classes.
      sample_axis: axis of the samples.

    Returns:
      An array without the two axes, in [0, log(min(samples, classes))], float32 (float64 for
      64-bit logits).

    Raises:
      TypeError: if the logits are not a floating-point array.
      ValueError: if an axis does not exist or has size 0, or both axes are the same.

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
      preference learning" (2011); Gal, Islam and Ghahramani, "Deep Bayesian active learning
      with image data" (ICML 2017).
    """
    return _mutual_information(*check_samples(logits, axis, sample_axis))


@functools.partial(jax.jit, static_argnums=1)
def _entropy(logits: jax.Array, axis: int) -> jax.Array:
    return entropy_of_logs(log_softmax(wide(logits), axis), axis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _predictive_entropy(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    x = samples_first(logits, axis, sample_axis)
    return entropy_of_logs(log_mean(log_softmax(x, -1)), -1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _expected_entropy(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    x = samples_first(logits, axis, sample_axis)
    return entropy_of_logs(log_softmax(x, -1), -1).mean(0)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _mutual_information(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    x = samples_first(logits, axis, sample_axis)
    q = jnp.exp(log_mean(log_softmax(x, -1)))
    # From here on relative to each class's largest logit over the samples: subtracting logits that
    # nearly agree is exact, and removes their common part before any rounding.
    reference = lax.stop_gradient(x.max(0, keepdims=True))
    possible = ~jnp.isneginf(reference)
    x = x - jnp.where(possible, reference, 0)
    x = x - lax.stop_gradient(x.max(-1, keepdims=True))
    ratios = jnp.where(possible, x - log_mean_exp(x, log_softmax(reference, -1), -1), 0)
    ratios = ratios - lax.stop_gradient(ratios.max(0, keepdims=True))
    ratios = ratios - log_mean_exp(ratios, -math.log(x.shape[0]), 0)  # log(p_t / q)
    return (q * divergence_term(ratios).mean(0)).sum(-1)
