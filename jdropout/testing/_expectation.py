"""Tests the mean of dropout over keys, with stated error rates."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from jdropout import _checks, _values
from jdropout._dtypes import wide_dtype
from jdropout._typing import Key
from jdropout.keys import site_key
from jdropout.testing._checks import check_floating, check_like_input

# Elements per batch of keys: a few MB at most, and enough to hide the cost of the loop.
_BATCH = 1 << 18


def assert_unbiased(
    fn: Callable[[jax.Array, jax.Array], jax.Array],
    x: ArrayLike,
    *,
    key: Key,
    rate: float,
    broadcast_dims: Sequence[int] = (),
    tolerance: float = 1e-3,
    false_alarm_rate: float = 1e-6,
) -> None:
    """Asserts that the mean of ``fn(key, x)`` over keys is x.

    The factors ``z = fn(key, x) / x`` are averaged over many keys and should have mean 1. Let
    ``v = rate / (1 - rate)``, the variance of a factor in dropout (and in Gaussian dropout),
    and ``b = max(1, v)``, the largest distance from 1 that dropout can produce. By Bernstein's
    inequality the mean of `n` independent factors is off by `t` or more with probability at
    most ``2 exp(-n t**2 / (2 v + 2 b t / 3))``. A third of the false-alarm rate goes to each of

    - the mean of all factors, which may be off by ``tolerance / 2``;
    - the mean of every element over the keys, with Bonferroni's correction for ``x.size``
      means;
    - the mean of every call over its elements, with the same correction for the number of
      calls. It detects elements that are dropped together, which leaves all expectations
      correct.

    The number of keys is chosen to make the first bound hold, which takes ``n = (8 v + 4 b
    tolerance / 3) * log(6 / false_alarm_rate) / tolerance**2`` factors, and at least to make
    the second one hold for means that are off by 1/2. A common bias of ``tolerance`` is then
    detected with a probability of about ``1 - false_alarm_rate`` too: by default a missing
    scale, the scale of another rate, or an 8-bit threshold with the scale of the nominal rate
    (-0.17 % at 0.1). The bias of a single element is detected if it is large: for 1024 elements
    at rate 0.1, which take 13 570 keys, from 4 % up.

    Rounding to x's dtype may bias each element by half a unit, which is allowed for: look for
    small biases in float32. Keys are evaluated in batches, so memory does not grow with their
    number. Time does, as ``v / tolerance**2``: rate 0.5 needs 125 million factors, about a
    second.

    Args:
      fn: function of a key and `x` that drops; it must work under `jax.jit` and `jax.vmap`.
      x: array without zeros, with a floating-point dtype; its size hardly affects the time, and
        a few thousand elements work well.
      key: PRNG key, typed or raw, from which all others are made; `fn` gets keys of the same
        kind.
      rate: drop probability of `fn`, or more; below 1.
      broadcast_dims: axes along which the mask is shared.
      tolerance: relative bias to detect.
      false_alarm_rate: probability, over keys, that an unbiased function fails.

    Raises:
      AssertionError: if `fn` is biased, or elements are dropped together; lists every mean that
        is off.
      TypeError: if `x` is not a floating-point array, or another argument has the wrong type.
      ValueError: if `x` has zeros or no elements, the result has another shape, or an argument
        is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> from jdropout.testing import assert_unbiased
      >>> def layer(key, x):
      ...     return jdropout.dropout(key, x, 0.1)
      >>> assert_unbiased(layer, jnp.ones((32, 32)), key=jax.random.key(0), rate=0.1)

    References:
      Boucheron, Lugosi and Massart, "Concentration inequalities" (2013), corollary 2.11, for
      Bernstein's inequality; Srivastava et al., JMLR 15 (2014), section 10, for Gaussian
      dropout.
    """
    _values.check_function("fn", fn)
    x = _check_factors_defined(check_floating(x))
    key = _checks.check_key(key)
    noise = _Noise.of_dropout(_check_static_rate(rate))
    shared = _checks.check_broadcast_dims(broadcast_dims, x.ndim)
    _values.check_fraction("tolerance", tolerance)
    _values.check_fraction("false_alarm_rate", false_alarm_rate)
    check_like_input("fn(key, x)", jax.eval_shape(fn, key, x), x)

    decisions = math.prod(size for axis, size in enumerate(x.shape) if axis not in shared)
    level = false_alarm_rate / 3
    calls = max(
        math.ceil(noise.sample_size(tolerance / 2, level) / decisions),
        math.ceil(noise.sample_size(0.5, level / x.size)),
    )
    _check_number_of_keys(calls, tolerance)
    batch = min(calls, max(1, _BATCH // x.size))
    batches = -(-calls // batch)
    calls = batch * batches
    sums, extreme = _deviations(fn, key, x, batch, batches)

    elements = np.asarray(sums, np.float64) / calls
    rounding = float(jnp.finfo(x.dtype).eps) / 2 + float(jnp.finfo(jnp.float32).eps)
    of_all = tolerance / 2 + rounding
    of_element = noise.bound(calls, level / x.size) + rounding
    of_call = noise.bound(decisions, level / calls) + rounding
    biased = ~(np.abs(elements) <= of_element)  # NaN counts as biased
    found = []
    if not abs(elements.mean()) <= of_all:
        found.append(
            f"the mean over all elements and keys is {1 + elements.mean():.6g}, and may be off by "
            f"{of_all:.2g}. Are kept elements divided by the probability of keeping?"
        )
    if biased.any():
        farthest = np.unravel_index(np.argmax(np.abs(elements)), elements.shape)
        index = tuple(int(i) for i in farthest)
        found.append(
            f"{np.count_nonzero(biased)} of {x.size} elements have a mean over the keys that is "
            f"off by more than {of_element:.2g}, {1 + elements[index]:.6g} at {index}. Does the "
            "mask change with the key, everywhere?"
        )
    if not abs(extreme) <= of_call:
        found.append(
            f"the mean over the elements of one call is {1 + extreme:.6g}, and may be off by "
            f"{of_call:.2g}. Are elements dropped together along axes that are not in "
            f"broadcast_dims, or is more dropped than {rate}?"
        )
    if found:
        raise AssertionError(
            f"fn(key, x) / x should have mean 1 and independent elements. With {calls} keys, "
            + " Also, ".join(found)
        )


class _Noise(NamedTuple):
    """Independent factors of mean 1, whose means obey Bernstein's inequality."""

    variance: float
    reach: float

    @classmethod
    def of_dropout(cls, rate: float) -> "_Noise":
        dropped = rate + 2.0**-17  # rounding to 16 bits may drop that much more
        variance = dropped / (1 - dropped)
        return cls(variance, max(1.0, variance))

    def sample_size(self, deviation: float, level: float) -> float:
        """How many factors keep their mean within ``deviation`` of 1, but for probability level."""
        spread = self.variance + self.reach * deviation / 3
        return 2 * math.log(2 / level) * spread / deviation**2

    def bound(self, count: int, level: float) -> float:
        """The inverse: how far the mean of ``count`` factors strays, but for probability level."""
        tail = math.log(2 / level)
        linear = tail * self.reach / 3
        return (linear + math.sqrt(linear**2 + 2 * tail * self.variance * count)) / count


def _deviations(
    fn: Callable[[jax.Array, jax.Array], jax.Array],
    key: Key,
    x: jax.Array,
    batch: int,
    batches: int,
) -> tuple[jax.Array, float]:
    """Sums of ``fn(key, x) / x - 1`` over the keys, and the farthest mean of one call.

    Summing deviations from 1 keeps the digits that sums of the factors would round away.
    """
    wide = wide_dtype(x)

    @jax.jit
    def total(key: Key, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(step: jax.Array) -> jax.Array:
            y = fn(site_key(key, step=step, site="jdropout.testing"), x)
            return y.astype(wide) / x.astype(wide) - 1

        def add(
            number: jax.Array, totals: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            sums, extreme = totals
            off = jax.vmap(one)(number * batch + jnp.arange(batch))
            means = jnp.append(off.reshape(batch, -1).mean(axis=1), extreme)
            return sums + off.sum(axis=0), means[jnp.argmax(jnp.abs(means))]

        return lax.fori_loop(0, batches, add, (jnp.zeros(x.shape, wide), jnp.zeros((), wide)))

    sums, extreme = total(key, x)
    return sums, float(extreme)


def _check_factors_defined(x: jax.Array) -> jax.Array:
    if x.size == 0:
        raise ValueError(
            f"x must have elements, got shape {x.shape}. Pass jnp.ones(shape), for example."
        )
    wrong = ~np.asarray(jnp.isfinite(x) & (x != 0))
    if wrong.any():
        raise ValueError(
            "x must be finite and without zeros, since results are divided by it, got "
            f"{np.asarray(x)[wrong][0]}. Pass jnp.ones(shape), for example."
        )
    return x


def _check_static_rate(rate: Any) -> float:
    """Returns a static rate below 1."""
    rate = _checks.check_rate(rate)
    if isinstance(rate, jax.Array):
        raise TypeError("rate must be a Python number, got an array. Convert it with float(rate).")
    if rate > 1 - 2**-16:
        raise ValueError(
            f"rate must be below 1, got {rate}: if everything is dropped, the mean cannot be x."
            " Test with a rate such as 0.5."
        )
    return rate


def _check_number_of_keys(number: int, tolerance: float) -> None:
    if number > 2**30:
        raise ValueError(
            f"a tolerance of {tolerance} takes {number} keys, too many to count. Raise it, or pass "
            "an x with more elements."
        )
