"""Sums and means of log-probabilities that keep their digits near 0."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jdropout import _arrays, _values
from jdropout._dtypes import wide_dtype


def entropy_of_logs(log_p: jax.Array, axis: int) -> jax.Array:
    return (jnp.exp(log_p) * jnp.where(jnp.isneginf(log_p), 0, -log_p)).sum(axis)


def divergence_term(d: jax.Array) -> jax.Array:
    """``d * exp(d) - exp(d) + 1``, which is ``(p * log(p / q) - p + q) / q`` at ``d = log(p / q)``.

    Near 0 it is computed as a series, the sum of ``(n - 1) / n! * d**n``.
    """
    d = jnp.maximum(d, -1e4)  # d is -inf if p is 0; the result is 1 long before
    near = jnp.abs(d) < 0.25
    series = [(n - 1) / math.factorial(n) for n in range(12, 1, -1)]
    small, large = jnp.where(near, d, 0), jnp.where(near, 1, d)
    by_series = jnp.polyval(jnp.asarray(series, d.dtype), small) * jnp.square(small)
    return jnp.where(near, by_series, large * jnp.exp(large) - jnp.expm1(large))


def log_mean(log_p: jax.Array) -> jax.Array:
    """log(mean(exp(log_p))) over the first axis, for log_p of at most 0."""
    return log_mean_exp(log_p, -math.log(log_p.shape[0]), 0)[0]


def log_mean_exp(x: jax.Array, log_weights: jax.Array | float, axis: int) -> jax.Array:
    """log(sum(weight * exp(x))), for x of at most 0 and weights that sum to 1; keeps the axis.

    The result has the relative precision of x, even if all x are near 0.
    """
    change = (jnp.exp(log_weights) * jnp.expm1(x)).sum(axis, keepdims=True)
    near = change > -0.5
    terms = x + log_weights
    possible = ~jnp.isneginf(terms.max(axis, keepdims=True))
    far = jax.nn.logsumexp(jnp.where(possible, terms, 0), axis, keepdims=True)
    far = jnp.where(possible, far, -jnp.inf)
    return jnp.where(near, jnp.log1p(jnp.where(near, change, 0)), far)


def log_softmax(x: jax.Array, axis: int) -> jax.Array:
    """`jax.nn.log_softmax`, but keeps the digits of results near 0 (probabilities near 1)."""
    x = x - lax.stop_gradient(x.max(axis, keepdims=True))
    return x - jnp.log1p(others(x, axis))


def others(x: jax.Array, axis: int) -> jax.Array:
    """sum(exp(x)) - 1, without cancellation, if the largest x is 0; keeps the axis."""
    top = x.argmax(axis, keepdims=True).astype(jnp.int32)
    at_top = lax.broadcasted_iota(jnp.int32, x.shape, axis % x.ndim) == top
    return jnp.where(at_top, jnp.expm1(x), jnp.exp(x)).sum(axis, keepdims=True)


def samples_first(logits: jax.Array, axis: int, sample_axis: int) -> jax.Array:
    """Moves axes to (samples, ..., classes), and widens to at least float32."""
    return jnp.moveaxis(wide(logits), (sample_axis, axis), (0, -1))


def wide(x: jax.Array) -> jax.Array:
    return x.astype(wide_dtype(x))


def check_categorical(logits: Any, axis: Any) -> tuple[jax.Array, int]:
    array = _arrays.check_floating_array("logits", logits)
    if not array.ndim:
        raise ValueError("logits must have an axis of classes, got shape (). Pass an array.")
    axis = _values.check_axis("axis", axis, array.ndim)
    if array.shape[axis] == 0:
        raise ValueError(
            f"logits must have classes, got shape {array.shape} with none on axis {axis}. Pass "
            "the axis of the classes as axis."
        )
    return array, axis


def check_samples(logits: Any, axis: Any, sample_axis: Any) -> tuple[jax.Array, int, int]:
    array, axis = check_categorical(logits, axis)
    sample_axis = _values.check_axis("sample_axis", sample_axis, array.ndim)
    if axis == sample_axis:
        raise ValueError(
            f"axis and sample_axis must differ, got axis {axis} of shape {array.shape} for both. "
            "Stack the samples on an axis of their own, such as the first."
        )
    check_has_samples(array.shape[sample_axis])
    return array, axis, sample_axis


def check_has_samples(count: int) -> None:
    if count == 0:
        raise ValueError(
            "sample_axis must have at least one sample, got size 0."
            " Pass the samples of mc_predict(..., return_samples=True)."
        )
    if count >= 2**31:
        raise ValueError(
            f"sample_axis must have fewer than 2**31 samples, got {count}. Check which axis has "
            "them."
        )
