"""Noise from the mask law's uniform numbers."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtri

from jdropout import _checks, _values
from jdropout._draw import Draw
from jdropout._dtypes import wide_dtype
from jdropout._new_draw import UNIFORM, new_draw
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate

# Compiled on its own: inlined, its polynomials' coefficients would become residuals.
_ndtri = jax.jit(ndtri)


def gaussian_dropout(
    key: Key | None,
    x: ArrayLike,
    rate: Rate,
    *,
    deterministic: Flag = False,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
) -> jax.Array:
    """Multiplies by normal noise with mean 1 and the variance of dropout.

    ``y = x * (1 + sqrt(rate / (1 - rate)) * z)`` with z standard normal, so ``E[y] = x`` and
    ``Var[y] = x**2 * rate / (1 - rate)``, as in `dropout`. The backward pass recomputes the
    noise from the key; nothing else is stored.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no noise is
        drawn (``deterministic=True``, or a static rate of 0).
      x: array of any shape, with a real floating-point dtype.
      rate: rate of the dropout with this variance, in [0, 1); a number or a (traced)
        floating-point scalar. Its gradient is zero. A traced rate of 1 gives NaN.
      deterministic: if True, return `x` unchanged; a bool or a (traced) boolean scalar.
      broadcast_dims: axes along which the noise is shared.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.

    Returns:
      An array of x's shape and dtype; `x` itself if `deterministic` is True or a static rate is
      0.

    Raises:
      TypeError: if `x` is not a real floating-point array, or another argument has the wrong
        type, such as a boolean rate.
      ValueError: if the rate is 1, where the variance would be infinite, the rate is not a
        scalar in [0, 1] (a traced one outside gives NaN, and an error under ``checkify``), the
        key is missing or a batch of keys, an axis does not exist, or the part at `start` does
        not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> y = jdropout.gaussian_dropout(jax.random.key(0), jnp.ones((1000, 1000)), 0.2)
      >>> print(f"{y.mean():.3f} {y.var():.3f}")
      1.001 0.250

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 10.
    """
    checked = _checks.check_rate_below_one(_checks.check_rate(rate))
    return apply_noise(
        "gaussian_dropout",
        normal,
        _times,
        key,
        x,
        _deviation(checked),
        rate=checked,
        deterministic=deterministic,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
    )


def _deviation(rate: float | jax.Array) -> float | jax.Array:
    if not isinstance(rate, jax.Array):
        return math.sqrt(rate / (1 - rate))
    rate = jnp.asarray(lax.stop_gradient(rate), jnp.float32)
    return jnp.sqrt(jnp.where(rate < 1, rate / (1 - rate), jnp.nan))


def gaussian_noise(
    key: Key | None,
    x: ArrayLike,
    stddev: Rate,
    *,
    deterministic: Flag = False,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
) -> jax.Array:
    """Adds normal noise: ``y = x + stddev * z`` with z standard normal.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no noise is
        drawn (``deterministic=True``, or a static standard deviation of 0).
      x: array of any shape, with a real floating-point dtype.
      stddev: standard deviation of the noise, in units of `x`; a number of at least 0 or a
        (traced) floating-point scalar, which may be differentiated.
      deterministic: if True, return `x` unchanged; a bool or a (traced) boolean scalar.
      broadcast_dims: axes along which the noise is shared.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.

    Returns:
      An array of x's shape and dtype; `x` itself if `deterministic` is True or `stddev` is a
      static 0.

    Raises:
      TypeError: if `x` is not a real floating-point array, or another argument has the wrong
        type.
      ValueError: if `stddev` is negative or not finite, the key is missing or a batch of keys,
        an axis does not exist, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> y = jdropout.gaussian_noise(jax.random.key(0), jnp.ones((1000, 1000)), 0.5)
      >>> print(f"{y.mean():.3f} {y.std():.3f}")
      1.001 0.500

    References:
      Bishop, "Training with noise is equivalent to Tikhonov regularization", Neural Computation
      7 (1995), section 2.
    """
    return apply_noise(
        "gaussian_noise",
        normal,
        _plus,
        key,
        x,
        _values.check_amount("stddev", stddev),
        deterministic=deterministic,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
    )


def uniform_noise(
    key: Key | None,
    x: ArrayLike,
    amplitude: Rate,
    *,
    deterministic: Flag = False,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
) -> jax.Array:
    """Adds uniform noise between ``-amplitude`` and ``amplitude``.

    Its variance is ``amplitude**2 / 3``.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no noise is
        drawn (``deterministic=True``, or a static amplitude of 0).
      x: array of any shape, with a real floating-point dtype.
      amplitude: largest magnitude of the noise, in units of `x`; a number of at least 0 or a
        (traced) floating-point scalar, which may be differentiated.
      deterministic: if True, return `x` unchanged; a bool or a (traced) boolean scalar.
      broadcast_dims: axes along which the noise is shared.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.

    Returns:
      An array of x's shape and dtype; `x` itself if `deterministic` is True or `amplitude` is a
      static 0.

    Raises:
      TypeError: if `x` is not a real floating-point array, or another argument has the wrong
        type.
      ValueError: if `amplitude` is negative or not finite, the key is missing or a batch of
        keys, an axis does not exist, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> y = jdropout.uniform_noise(jax.random.key(0), jnp.ones((1000, 1000)), 0.5)
      >>> print(f"{y.min():.3f} {y.max():.3f} {y.mean():.3f}")
      0.500 1.500 1.000

    References:
      Widrow and Kollár, "Quantization noise" (2008), chapter 1, for uniform noise as a model of
      rounding.
    """
    return apply_noise(
        "uniform_noise",
        symmetric_uniform,
        _plus,
        key,
        x,
        _values.check_amount("amplitude", amplitude),
        deterministic=deterministic,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
    )


# Pass module-level functions: compiled programs are cached by their identity.
Sample: TypeAlias = Callable[[jax.Array, np.dtype], jax.Array]
Combine: TypeAlias = Callable[[jax.Array, jax.Array, Any], jax.Array]
Evaluate: TypeAlias = Callable[[jax.Array, Any], jax.Array]


def apply_noise(
    kind: str,
    sample: Sample,
    combine: Combine,
    key: Key | None,
    x: ArrayLike,
    strength: Any,
    *,
    evaluate: Evaluate | None = None,
    rate: float | jax.Array | None = None,
    deterministic: Flag,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None,
    global_shape: Sequence[int] | None,
    remake: bool = True,
) -> jax.Array:
    """Combines x with noise, in float32 or float64, and rounds once.

    Args:
      kind: name of the function in an audit.
      sample: maps uniforms (uint32) and a dtype to noise.
      combine: maps x, the noise and the strength to the result.
      key: a PRNG key.
      x: a real floating-point array; checked here.
      strength: a pytree of further arrays and numbers, already checked; may be differentiated.
      evaluate: maps x and the strength to the result in evaluation; None for x itself.
      rate: the rate that an audit reports, if there is one.
      deterministic: a bool or a (traced) boolean scalar.
      broadcast_dims: axes along which the noise is shared.
      start: index of x's first element in the whole array.
      global_shape: shape of the whole array.
      remake: if True, the backward pass always recomputes the noise. If False, XLA may keep the
        result of comparing it instead, which is small if it is a mask.
    """
    x = _checks.check_real("x", x)
    draw = new_draw(
        kind,
        key,
        UNIFORM,
        deterministic,
        jnp.shape(x),
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        off=isinstance(strength, float) and strength == 0,
        reported_rate=rate,
    )
    y = draw.apply(
        _combined,
        x,
        strength,
        kept=_evaluated if evaluate else None,
        remake=remake,
        sample=sample,
        combine=combine,
        evaluate=evaluate,
    )
    return cast("jax.Array", y)


def _combined(
    draw: Draw,
    x: jax.Array,
    strength: Any,
    *,
    sample: Sample,
    combine: Combine,
    evaluate: Evaluate | None,
) -> jax.Array:
    wide = wide_dtype(x)
    noise = noise_like(x, draw, sample)
    return combine(x.astype(wide), noise, _cast(strength, wide)).astype(x.dtype)


def _evaluated(
    draw: Draw,
    x: jax.Array,
    strength: Any,
    *,
    sample: Sample,
    combine: Combine,
    evaluate: Evaluate,
) -> jax.Array:
    wide = wide_dtype(x)
    return evaluate(x.astype(wide), _cast(strength, wide)).astype(x.dtype)


def noise_like(x: jax.Array, draw: Draw, sample: Sample) -> jax.Array:
    """Noise of x's shape, explicit sharding and wide dtype."""
    return draw.placed_like(x, lambda draw: sample(draw.uniform(), wide_dtype(x)))


def _cast(strength: Any, dtype: np.dtype) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), strength)


def _times(x: jax.Array, noise: jax.Array, deviation: jax.Array) -> jax.Array:
    return x * (1 + deviation * noise)


def _plus(x: jax.Array, noise: jax.Array, strength: jax.Array) -> jax.Array:
    return x + strength * noise


def symmetric_uniform(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Uniform numbers between -1 and 1: the midpoints of 2^32 equal cells."""
    # Through a signed integer, which keeps numbers near 0 exact.
    centred = lax.bitcast_convert_type(bits ^ np.uint32(1 << 31), jnp.int32)
    return (centred.astype(dtype) + 0.5) * 2.0**-31


def normal(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Standard normal deviates, up to 6.34 in magnitude."""
    return quantile(_ndtri, bits, dtype)


def quantile(
    inverse: Callable[[jax.Array], jax.Array], bits: jax.Array, dtype: np.dtype
) -> jax.Array:
    """Quantiles of a symmetric distribution, at the midpoints of 2^32 equal cells.

    The half below probability 1/2, where floats are dense, is computed, and the other is its
    mirror image: both tails are exact, and no probability rounds to 0 or 1.
    """
    upper = (bits >> np.uint32(31)) != 0
    half = jnp.where(upper, ~bits, bits)
    value = inverse((half.astype(dtype) + 0.5) * 2.0**-32)
    return jnp.where(upper, -value, value)
