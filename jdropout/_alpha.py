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

# Minus lambda times alpha of SELU: what its negative part tends to. Klambauer et al. (2017),
# equation 14, to more digits.
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
    """Dropout for SELU: sets elements to its negative floor, and keeps mean 0 and variance 1.

    With ``r = effective_rate(rate)``, floor ``f = -1.7581`` and mask m, ``y = a * (x * m +
    f * (1 - m)) + b`` where ``a = ((1 - r) * (1 + r * f**2)) ** -0.5`` and ``b = -a * r * f``. For
    inputs of mean 0 and variance 1 the output has them too. The backward pass stores the key.

    Args:
      key: a PRNG key, as for `dropout`.
      x: array of any shape, of a real floating-point dtype; activations of SELU.
      rate: probability of setting an element to the floor, as for `dropout`. At 1 the output is
        exactly 0, the limit of the formula.
      deterministic: whether to return `x` as it is; may be traced.
      broadcast_dims: axes along which all elements share their fate.
      start: as for `dropout`.
      global_shape: as for `dropout`.
      precision: bits of the rate, as for `dropout`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: as for `dropout`, or if x is complex.
      ValueError: as for `dropout`.

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
    _checks.check_real("x", x)
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
    inverse_keep = draw.scale(wide)  # 1 where nothing is kept
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
    """`alpha_dropout` of whole channels.

    Args:
      key: a PRNG key, as for `dropout`.
      x: array of two axes or more, of a real floating-point dtype.
      rate: as for `alpha_dropout`.
      channel_axis: the axis of the channels, as for `spatial_dropout`.
      batch_axes: axes along which decisions are independent as well.
      deterministic: whether to return `x` as it is; may be traced.
      start: as for `dropout`.
      global_shape: as for `dropout`.
      precision: bits of the rate, as for `dropout`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: as for `alpha_dropout`.
      ValueError: if an axis does not exist, or as for `alpha_dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> jdropout.feature_alpha_dropout(jax.random.key(0), jnp.ones((1, 2, 4)), 0.5)
      Array([[[-0.7791939,  1.6655988,  1.6655988,  1.6655988],
              [-0.7791939,  1.6655988,  1.6655988,  1.6655988]]], dtype=float32)

    References:
      As for `alpha_dropout`.
    """
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
