"""Rates as integers: the mask law's thresholds, and the probabilities that they stand for."""

import functools
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DIGIT_BITS = 16
_DIGIT = 1 << DIGIT_BITS


class Threshold(NamedTuple):
    """Keep iff ``u < t``, with `t` written as base-2^16 digits: ``high`` may reach 2^16.

    The fields are integers for a static rate and uint32 scalars for a traced one; ``low``
    is None if one digit decides.
    """

    high: int | jax.Array
    low: int | jax.Array | None = None

    @property
    def digits(self) -> int:
        return 1 if self.low is None else 2


@functools.lru_cache(maxsize=1024)  # exact fractions are too slow for every eager call
def static_threshold(rate: float, precision: int | None) -> Threshold:
    """Rounds a rate to the law's integer threshold, in exact arithmetic, ties to even."""
    keep_probability = 1 - Fraction(rate)
    one_digit = round(keep_probability * _DIGIT)
    if precision is None:
        miss = abs(Fraction(one_digit, _DIGIT) - keep_probability)
        precision = 16 if miss * 1000 <= Fraction(rate) else 32
    if precision == 16:
        return Threshold(one_digit)
    return Threshold(*divmod(round(keep_probability * _DIGIT**2), _DIGIT))


def traced_threshold(rate: jax.Array, precision: int | None) -> Threshold:
    """`static_threshold` of a traced rate, read as float32; outside [0, 1] it keeps everything.

    All steps are exact in float32: a product with 2^16, a split, and one rounding.
    """
    valid = (rate >= 0) & (rate <= 1)
    scaled = jnp.where(valid, rate, 0).astype(jnp.float32) * np.float32(_DIGIT)
    if precision != 32:
        return Threshold(np.uint32(_DIGIT) - jnp.round(scaled).astype(jnp.uint32))
    high = jnp.floor(scaled)
    low = jnp.round((scaled - high) * np.float32(_DIGIT)).astype(jnp.uint32)
    borrow = jnp.minimum(low, np.uint32(1))
    return Threshold(
        np.uint32(_DIGIT) - high.astype(jnp.uint32) - borrow,
        (np.uint32(_DIGIT) - low) & np.uint32(_DIGIT - 1),
    )


@functools.lru_cache(maxsize=1024)
def static_numbers(threshold: Threshold) -> jax.Array:
    """A static threshold as an operand: its digits, then 1 / keep and 1 - keep as float32 bits.

    It is kept on the device: to move it there would take a fifth of an eager call.
    """
    kept = keep_probability(threshold)
    factors = np.array([1 / kept if kept else 1, 1 - kept], np.float32)
    digits = np.array([threshold.high, threshold.low or 0], np.uint32)
    with jax.ensure_compile_time_eval():
        return jax.device_put(np.concatenate([digits, factors.view(np.uint32)]))


def keep_all_if(flag: jax.Array, threshold: Threshold) -> Threshold:
    """A threshold that keeps everything if a traced flag is True."""
    low = threshold.low
    return Threshold(
        jnp.where(flag, np.uint32(_DIGIT), jnp.uint32(threshold.high)),
        None if low is None else jnp.where(flag, np.uint32(0), jnp.uint32(low)),
    )


@functools.lru_cache(maxsize=1024)
def keep_probability(threshold: Threshold) -> Fraction:
    """The keep probability of a static threshold: t / 2^16 or t / 2^32."""
    if threshold.low is None:
        return Fraction(int(threshold.high), _DIGIT)
    return Fraction(int(threshold.high) * _DIGIT + int(threshold.low), _DIGIT**2)


def traced_keep_probability(threshold: Threshold, dtype: jnp.dtype) -> jax.Array:
    """The keep probability of a traced threshold, in float32 or float64."""
    kept = jnp.asarray(threshold.high).astype(dtype)
    if threshold.low is not None:
        kept = kept + jnp.asarray(threshold.low).astype(dtype) / _DIGIT
    return kept / _DIGIT


def traced_drop_probability(threshold: Threshold) -> jax.Array:
    """1 - keep in float32, without cancellation."""
    dropped = (np.uint32(_DIGIT) - jnp.asarray(threshold.high)).astype(jnp.float32)
    if threshold.low is not None:
        dropped = dropped - jnp.asarray(threshold.low).astype(jnp.float32) / _DIGIT
    return dropped / _DIGIT


def below(threshold: Threshold, digits: list[jax.Array]) -> jax.Array:
    """``u < t``, most significant digit first."""
    first = digits[0]
    high = jnp.uint32(threshold.high)
    if threshold.low is None:
        return first < high
    return (first < high) | ((first == high) & (digits[1] < jnp.uint32(threshold.low)))
