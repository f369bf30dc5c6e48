"""Alpha dropout, for self-normalising networks."""

from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp

from jdropout import _checks
from jdropout._draw import Draw
from jdropout._dtypes import wide_dtype
from jdropout._new_draw import new_draw
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate

# The limit of SELU's negative part, -lambda * alpha. Klambauer et al. (2017) give fewer digits in
# equation 14.
_SELU_FLOOR = -1.7580993408473766


def alpha_dropout(
    key: Key | None,
    x: ArrayLike,
    rate: Rate,
    *,
    deterministic: Flag = False,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> jax.Array:
    """Sets elements to SELU's negative floor, keeping mean 0 and variance 1.

    With ``r = effective_rate(rate)``, floor ``f = -1.7581`` and mask m,
    ``y = a * (x * m + f * (1 - m)) + b`` where ``a = ((1 - r) * (1 + r * f**2)) ** -0.5`` and
    ``b = -a * r * f``. An input with mean 0 and variance 1 gives an output with mean 0 and
    variance 1. The backward pass stores only the key.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      x: array of any shape, with a real floating-point dtype; activations of SELU.
      rate: probability of setting an element to the floor, in [0, 1]; a number or a (traced)
        floating-point scalar. At 1 the output is exactly 0, the limit of the formula.
      deterministic: if True, return `x` unchanged; a bool or a (traced) boolean scalar.
      broadcast_dims: axes along which the mask is shared.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      An array of x's shape and dtype; `x` itself if `deterministic` is True or a static rate
      rounds to 0.

    Raises:
      TypeError: if `x` is not a real floating-point array, or another argument has the wrong
        type, such as a boolean rate.
      ValueError: if the rate is not a scalar in [0, 1] (a traced one outside gives NaN, and an
        error under ``checkify``), the key is missing or a batch of keys, an axis does not
        exist, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> x = jax.random.normal(jax.random.key(1), (1000, 1000))
      >>> y = jdropout.alpha_dropout(jax.random.key(0), x, 0.1)
      >>> print(f"{abs(y.mean()):.2f} {y.std():.2f}")
      0.00 1.00

    References:
      Klambauer, Unterthiner, Mayr and Hochreiter, "Self-normalizing neural networks" (NeurIPS
      2017), section 3, "New dropout technique".
    """
    x = _checks.check_real("x", x)
    _checks.check_order(x, rate)
    draw = new_draw(
        "alpha_dropout",
        key,
        rate,
        deterministic,
        jnp.shape(x),
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=precision,
    )
    return cast("jax.Array", draw.apply(_masked_affine, x))


def _masked_affine(draw: Draw, x: jax.Array) -> jax.Array:
    wide = wide_dtype(x)
    inverse_keep = draw.scale(wide)  # 1 if nothing is kept
    rate = draw.drop_probability(wide)
    a = jnp.sqrt(inverse_keep / (1 + rate * _SELU_FLOOR**2))
    b = -a * rate * _SELU_FLOOR
    y = a * jnp.where(draw.keep_like(x), x.astype(wide), _SELU_FLOOR) + b
    return jnp.where(rate == 1, 0, y).astype(x.dtype)


def feature_alpha_dropout(
    key: Key | None,
    x: ArrayLike,
    rate: Rate,
    *,
    channel_axis: int = -1,
    batch_axes: Sequence[int] = (0,),
    deterministic: Flag = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> jax.Array:
    """Applies `alpha_dropout` to whole channels, keeping mean 0 and variance 1.

    With ``r = effective_rate(rate)``, floor ``f = -1.7581`` and a mask m with one decision per
    example and channel, ``y = a * (x * m + f * (1 - m)) + b`` where
    ``a = ((1 - r) * (1 + r * f**2)) ** -0.5`` and ``b = -a * r * f``.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      x: array with at least two axes, with a real floating-point dtype; activations of SELU.
      rate: probability of setting a channel to the floor, in [0, 1]; a number or a (traced)
        floating-point scalar. At 1 the output is exactly 0, the limit of the formula.
      channel_axis: axis of the channels; 1 for channels-first layouts.
      batch_axes: axes along which masks are independent; () drops the same channels in every
        example.
      deterministic: if True, return `x` unchanged; a bool or a (traced) boolean scalar.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      An array of x's shape and dtype; `x` itself if `deterministic` is True or a static rate
      rounds to 0.

    Raises:
      TypeError: if `x` is not a real floating-point array, or another argument has the wrong
        type, such as a boolean rate.
      ValueError: if an axis does not exist or is given two roles, the rate is not a scalar in
        [0, 1] (a traced one outside gives NaN, and an error under ``checkify``), the key is
        missing or a batch of keys, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> jdropout.feature_alpha_dropout(jax.random.key(0), jnp.ones((1, 2, 4)), 0.5)
      Array([[[-0.7791939,  1.6655988,  1.6655988,  1.6655988],
              [-0.7791939,  1.6655988,  1.6655988,  1.6655988]]], dtype=float32)

    References:
      Klambauer, Unterthiner, Mayr and Hochreiter, "Self-normalizing neural networks" (NeurIPS
      2017), section 3, "New dropout technique".
    """
    x = _checks.check_real("x", x)
    return alpha_dropout(
        key,
        x,
        rate,
        deterministic=deterministic,
        broadcast_dims=_checks.check_channels(channel_axis, batch_axes, jnp.ndim(x)),
        start=start,
        global_shape=global_shape,
        precision=precision,
    )
