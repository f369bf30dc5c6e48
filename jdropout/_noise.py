"""Noise made of the mask law's uniform numbers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtri

from jdropout import _checks, _mask, _record
from jdropout._dtypes import wide_dtype
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate

# Compiled on its own, its coefficients are no residuals.
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
    """Multiplies by normal noise with mean 1 and the variance that dropout has.

    ``y = x * (1 + sqrt(rate / (1 - rate)) * z)`` with z standard normal: ``E[y] = x``, and
    ``Var[y] = x**2 * rate / (1 - rate)`` as in `dropout`. The noise is made again in the backward
    pass; nothing but the key is stored.

    Args:
      key: a PRNG key, as for `dropout`.
      x: array of any shape, of a real floating-point dtype.
      rate: as for `dropout`, in [0, 1). Its gradient is zero. A traced rate of 1 gives NaN.
      deterministic: whether to return `x` as it is; may be traced.
      broadcast_dims: axes along which all elements share their noise.
      start: as for `dropout`.
      global_shape: as for `dropout`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: as for `dropout`, or if x is complex.
      ValueError: if the rate is 1, at which the noise would have no finite variance, or as for
        `dropout`.

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
    return noisy(
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
      key: a PRNG key, as for `dropout`; may be None for a static standard deviation of 0.
      x: array of any shape, of a real floating-point dtype.
      stddev: standard deviation of the noise, in units of x: a number of at least 0, or a (traced)
        floating-point scalar, which may be differentiated.
      deterministic: whether to return `x` as it is; may be traced.
      broadcast_dims: axes along which all elements share their noise.
      start: as for `dropout`.
      global_shape: as for `dropout`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: if x is not a real floating-point array, or as for `dropout`.
      ValueError: if the standard deviation is negative, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> y = jdropout.gaussian_noise(jax.random.key(0), jnp.ones((1000, 1000)), 0.5)
      >>> print(f"{y.mean():.3f} {y.std():.3f}")
      1.001 0.500

    References:
      Bishop, "Training with noise is equivalent to Tikhonov regularization", Neural Computation 7
      (1995), section 2.
    """
    return noisy(
        "gaussian_noise",
        normal,
        _plus,
        key,
        x,
        _checks.check_amount("stddev", stddev),
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
    """Adds uniform noise between ``-amplitude`` and ``amplitude``, of variance amplitude^2 / 3.

    Args:
      key: a PRNG key, as for `dropout`; may be None for a static amplitude of 0.
      x: array of any shape, of a real floating-point dtype.
      amplitude: in units of x: a number of at least 0, or a (traced) floating-point scalar, which
        may be differentiated.
      deterministic: whether to return `x` as it is; may be traced.
      broadcast_dims: axes along which all elements share their noise.
      start: as for `dropout`.
      global_shape: as for `dropout`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: if x is not a real floating-point array, or as for `dropout`.
      ValueError: if the amplitude is negative, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> y = jdropout.uniform_noise(jax.random.key(0), jnp.ones((1000, 1000)), 0.5)
      >>> print(f"{y.min():.3f} {y.max():.3f} {y.mean():.3f}")
      0.500 1.500 1.000

    References:
      Widrow and Kollár, "Quantization noise" (2008), chapter 1, for its use as that of rounding.
    """
    return noisy(
        "uniform_noise",
        symmetric_uniform,
        _plus,
        key,
        x,
        _checks.check_amount("amplitude", amplitude),
        deterministic=deterministic,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
    )


Combine: TypeAlias = Callable[[jax.Array, jax.Array, Any], jax.Array]


def noisy(
    kind: str,
    sample: Callable[[jax.Array, np.dtype], jax.Array],
    combine: Combine,
    key: Key | None,
    x: ArrayLike,
    strength: Any,
    *,
    evaluate: Callable[[jax.Array, Any], jax.Array] | None = None,
    rate: float | jax.Array | None = None,
    deterministic: Flag,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None,
    global_shape: Sequence[int] | None,
    remade: bool = True,
) -> jax.Array:
    """What all functions that add or multiply noise have in common.

    Args:
      kind: the name of the function in an audit.
      sample: from the uniform numbers, uint32, and a dtype to the noise.
      combine: from x, the noise and the strength, all in float32 or float64, to the result.
      key: as for `dropout`.
      x: as for `dropout`, checked here.
      strength: what is traced, and may be differentiated, besides x: a pytree, checked already.
      evaluate: from x and the strength to the result where deterministic; None for x itself.
      rate: the rate, if there is one.
      deterministic: as for `dropout`, and so are the others.
      broadcast_dims: axes that share noise.
      start: of the block.
      global_shape: of the whole.
      remade: whether the noise is made again in the backward pass in any case. Else the compiler
        may keep what was made of it, which is well where that is a mask.
    """
    _checks.check_real("x", x)
    flag = _checks.check_deterministic(deterministic)
    shape = jnp.shape(x)
    mask, operands = None, None
    if flag is not True and not (isinstance(strength, float) and strength == 0):
        mask, operands = _mask.describe_uniform(key, shape, broadcast_dims, start, global_shape)
        operands = operands._replace(deterministic=flag if isinstance(flag, jax.Array) else None)
    site = _record.site(kind, shape, rate, flag, mask, operands)
    if mask is not None and operands is not None:
        marked = site.operands(operands)
        return site.result(_combined(marked, x, strength, mask, sample, combine, evaluate, remade))
    if evaluate is not None:
        return site.result(_evaluated(x, strength, evaluate))
    return site.result(cast("jax.Array", x))  # the very object, whatever array type it has


@functools.partial(jax.jit, static_argnames=("mask", "sample", "combine", "evaluate", "remade"))
def _combined(
    operands: _mask.Operands,
    x: jax.Array,
    strength: Any,
    mask: _mask.Mask,
    sample: Callable[[jax.Array, np.dtype], jax.Array],
    combine: Combine,
    evaluate: Callable[[jax.Array, Any], jax.Array] | None,
    remade: bool,
) -> jax.Array:
    """Noise is made again in the backward pass; unlike a mask, it is too large to be shared."""

    @functools.partial(jax.checkpoint, prevent_cse=remade)
    def combined(operands: _mask.Operands, x: jax.Array, strength: Any) -> jax.Array:
        wide = wide_dtype(x.dtype)
        noise = noise_like(x, operands, mask, lambda bits: sample(bits, wide))
        y = combine(x.astype(wide), noise, _cast(strength, wide)).astype(x.dtype)
        if operands.deterministic is None:
            return y
        evaluated = x if evaluate is None else _evaluated(x, strength, evaluate)
        return lax.select(operands.deterministic, evaluated, y)

    return combined(_mask.with_words(operands), x, strength)


@functools.partial(jax.jit, static_argnames="evaluate")
def _evaluated(
    x: jax.Array, strength: Any, evaluate: Callable[[jax.Array, Any], jax.Array]
) -> jax.Array:
    wide = wide_dtype(x.dtype)
    return evaluate(x.astype(wide), _cast(strength, wide)).astype(x.dtype)


def noise_like(
    x: jax.Array,
    operands: _mask.Operands,
    mask: _mask.Mask,
    sample: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """What is sampled from the uniform numbers, with the explicit sharding of x."""
    return _mask.placed_like(x, lambda operands: sample(_mask.uniform(operands, mask)), operands)


def _cast(strength: Any, dtype: np.dtype) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), strength)


def _times(x: jax.Array, noise: jax.Array, deviation: jax.Array) -> jax.Array:
    return x * (1 + deviation * noise)


def _plus(x: jax.Array, noise: jax.Array, strength: jax.Array) -> jax.Array:
    return x + strength * noise


def symmetric_uniform(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Uniform numbers between -1 and 1: the middles of 2^32 equal cells."""
    # The signed integer keeps the numbers around 0 exact.
    centred = lax.bitcast_convert_type(bits ^ np.uint32(1 << 31), jnp.int32)
    return (centred.astype(dtype) + 0.5) * 2.0**-31


def normal(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Standard normal deviates; they reach 6.34 standard deviations."""
    return quantile(_ndtri, bits, dtype)


def quantile(
    inverse: Callable[[jax.Array], jax.Array], bits: jax.Array, dtype: np.dtype
) -> jax.Array:
    """Quantiles of a symmetric distribution, at the middles of 2^32 equal cells.

    The half with the smaller probability is computed, where floating-point numbers are dense, and
    the other one by symmetry: both tails are exact, and no probability is rounded to 0 or 1.
    """
    upper = (bits >> np.uint32(31)) != 0
    half = jnp.where(upper, ~bits, bits)
    value = inverse((half.astype(dtype) + 0.5) * 2.0**-32)
    return jnp.where(upper, -value, value)
