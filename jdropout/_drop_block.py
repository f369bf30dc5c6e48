"""DropBlock: dropout of contiguous blocks of a feature map."""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jdropout import _checks, _threshold, _values
from jdropout._draw import Draw, Outcome
from jdropout._dropout import select_scaled
from jdropout._dtypes import wide_dtype
from jdropout._new_draw import new_draw
from jdropout._typing import ArrayLike, Flag, Key, Rate
from jdropout._values import as_integer


def drop_block(
    key: Key | None,
    x: ArrayLike,
    rate: Rate,
    *,
    block_size: int | Sequence[int],
    spatial_axes: Sequence[int] = (1, 2),
    channel_axis: int = -1,
    shared_channels: bool = True,
    scale: Literal["expected", "realised"] = "expected",
    deterministic: Flag = False,
    precision: int | None = 32,
) -> jax.Array:
    """Drops contiguous blocks of a feature map in one, two or three dimensions.

    Wherever a whole block fits, a block starts with probability gamma, and every element inside
    any block is dropped. The paper's gamma,
    ``rate / block area * map area / number of corners``, ignores that blocks overlap. The gamma
    used here makes the expected dropped fraction *equal* to the rate: with ``c[i]`` the number
    of blocks that can cover element i, it solves
    ``mean over i of (1 - gamma) ** c[i] = 1 - rate``; see `drop_block_gamma`. Fewer blocks can
    cover an element near the border, so it is dropped less often than one in the middle.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      x: array such as (batch, height, width, channels), with a floating-point or complex dtype.
      rate: expected fraction of elements to drop, in [0, 1]; a number or a (traced)
        floating-point scalar. The gamma of a traced rate is computed on the device, and agrees
        between backends up to rounding.
      block_size: size of a block in elements; one number for all spatial axes, or one for each.
        Sizes larger than the map are clipped to it.
      spatial_axes: axes of the map; ``(1,)`` for a sequence, ``(1, 2, 3)`` for a volume. All
        remaining axes except the channels count examples.
      channel_axis: axis of the channels.
      shared_channels: if True, all channels of an example get the same blocks.
      scale: ``'expected'`` multiplies kept elements by the inverse of the expected kept
        fraction, ``1 / (1 - rate)``, which keeps the mean of a constant map in expectation.
        ``'realised'`` multiplies by the ratio of all elements of `x` to those that this
        particular mask keeps, as in the paper, which keeps the mean of a constant `x` exactly
        unless nothing is kept; under a sharding it sums over all devices.
      deterministic: if True, return `x` unchanged; a bool or a (traced) boolean scalar.
      precision: bits of gamma, 16 or 32; 32 by default because gamma is small. None uses 32
        only where 16 bits would miss a static gamma by more than 0.1 %.

    Returns:
      An array of x's shape and dtype; `x` itself if `deterministic` is True or a static rate
      rounds to 0.

    Raises:
      TypeError: if `x` is not a floating-point or complex array, or another argument has the
        wrong type, such as a boolean rate.
      ValueError: if an axis or option does not exist, an axis is given two roles, a block size
        is below 1, the rate is not a scalar in [0, 1] (a traced one outside gives NaN, and an
        error under ``checkify``), or the key is missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> y = jdropout.drop_block(
      ...     jax.random.key(2), jnp.ones((1, 4, 8, 1)), 0.25, block_size=2, scale="realised"
      ... )
      >>> (y[0, :, :, 0] > 0).astype(int)
      Array([[1, 1, 1, 0, 0, 1, 1, 1],
             [1, 1, 1, 0, 0, 1, 1, 1],
             [1, 1, 0, 0, 0, 0, 1, 1],
             [1, 1, 0, 0, 0, 0, 1, 1]], dtype=int32)

    References:
      Ghiasi, Lin and Le, "DropBlock: a regularization method for convolutional networks"
      (NeurIPS 2018), section 3 and equation 1.
    """
    x = _checks.check_input(x)
    _values.check_option("scale", scale, ("expected", "realised"))
    shared = _values.check_flag("shared_channels", shared_channels)
    checked = _checks.check_rate(rate)
    flag = _checks.check_deterministic(deterministic)
    shape = jnp.shape(x)
    spatial = _values.check_axes("spatial_axes", spatial_axes, len(shape))
    channel = _values.check_axis("channel_axis", channel_axis, len(shape))
    _values.check_apart("channel_axis", channel, "spatial_axes", spatial)
    sizes = _check_sizes("block_size", block_size, len(spatial))
    block = [1] * len(shape)
    for axis, size in zip(spatial, sizes, strict=True):
        block[axis] = max(1, min(size, shape[axis]))
    corners = tuple(max(n - size + 1, 0) for n, size in zip(shape, block, strict=True))

    gamma = _gamma(checked, tuple(shape[a] for a in spatial), tuple(block[a] for a in spatial))
    examples = [a for a in range(len(shape)) if a != channel and a not in spatial]
    draw = new_draw(
        "drop_block",
        key,
        gamma,
        flag,
        corners,
        broadcast_dims=[channel] if shared else [],
        precision=precision,
        batch_axis=examples[0] if examples else None,
        reported_rate=checked,
        reported_shape=shape,
    )
    return cast(
        "jax.Array",
        draw.apply(
            _without_blocks,
            x,
            _static_scale(draw, shape, tuple(block)),
            size=tuple(block),
            channel=channel,
            realised=scale == "realised",
        ),
    )


def drop_block_gamma(
    rate: Rate, map_shape: Sequence[int], block_size: int | Sequence[int]
) -> float | jax.Array:
    """Returns the probability with which `drop_block` starts a block wherever one fits.

    With it the expected dropped fraction misses the rate by rounding alone, 1e-15 for a float
    and 1e-6 for an array; `drop_block` then rounds gamma to 32 bits.

    Args:
      rate: expected fraction of elements to drop, in [0, 1]; a number or a (traced)
        floating-point scalar.
      map_shape: sizes of the spatial axes.
      block_size: size of a block in elements; one number for all spatial axes, or one for each.

    Returns:
      A float for a static rate; a float32 scalar for an array.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if the rate is outside [0, 1], or a size is below 1.

    Example:
      >>> import jdropout
      >>> gamma = jdropout.drop_block_gamma(0.1, (14, 14), 7)
      >>> print(f"{gamma:.6f}, the paper's {0.1 / 7**2 * 14**2 / 8**2:.6f}")
      0.006764, the paper's 0.006250

    References:
      Ghiasi, Lin and Le, "DropBlock: a regularization method for convolutional networks"
      (NeurIPS 2018), section 3; its equation 1 is the first order of this gamma.
    """
    sizes = _values.check_shape("map_shape", map_shape)
    for size in sizes:
        _values.check_positive("map_shape", size)
    block = _check_sizes("block_size", block_size, len(sizes))
    fitting = tuple(min(a, b) for a, b in zip(block, sizes, strict=True))
    return _gamma(_checks.check_rate(rate), sizes, fitting)


def _gamma(
    rate: float | jax.Array, sizes: tuple[int, ...], block: tuple[int, ...]
) -> float | jax.Array:
    if isinstance(rate, jax.Array):
        return _traced_gamma(rate, sizes, block)
    return rate if rate in (0, 1) else _static_gamma(rate, sizes, block)


@functools.lru_cache(maxsize=256)  # the bisection is too slow for every eager call
def _static_gamma(rate: float, sizes: tuple[int, ...], block: tuple[int, ...]) -> float:
    counts, weights = _coverage(sizes, block)
    low, high = 0.0, 1.0
    while True:  # bisect until low and high are neighbouring floats
        gamma = (low + high) / 2
        if not low < gamma < high:
            return gamma
        dropped = -float(weights @ np.expm1(counts * math.log1p(-gamma)))
        low, high = (gamma, high) if dropped < rate else (low, gamma)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _traced_gamma(rate: jax.Array, sizes: tuple[int, ...], block: tuple[int, ...]) -> jax.Array:
    """Bisects -log(1 - gamma), which resolves small and large gammas equally well."""
    counts, weights = (array.astype(np.float32) for array in _coverage(sizes, block))
    rate = lax.stop_gradient(rate.astype(jnp.float32))

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # bounds of -log(1 - gamma)
        middle = (low + high) / 2
        dropped = -(weights * jnp.expm1(-counts * middle)).sum()
        less = dropped < rate
        return jnp.where(less, middle, low), jnp.where(less, high, middle)

    start = (jnp.zeros_like(rate), jnp.full_like(rate, 64.0))
    low, high = lax.fori_loop(0, 48, halve, start)
    gamma = -jnp.expm1(-(low + high) / 2)
    inside = (rate > 0) & (rate < 1)
    return jnp.where(inside, gamma, rate)  # 0, 1 and invalid rates pass through


_MOST_COUNTS = 2**22
"""More would take seconds and gigabytes, and drop a fourth of an axis of millions at once."""


def _coverage(sizes: tuple[int, ...], block: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of blocks that can cover an element, and the fraction of elements with each."""
    together = Counter({1: 1})
    for n, size in zip(sizes, block, strict=True):
        most = min(size, n - size + 1)  # blocks that can cover an element in the middle
        if most * len(together) > _MOST_COUNTS:
            raise ValueError(
                f"block_size must leave at most {_MOST_COUNTS} numbers of blocks that can cover an "
                f"element, got blocks of {block} in {sizes}. Use smaller blocks."
            )
        axis = Counter(dict.fromkeys(range(1, most), 2))
        axis[most] += n - 2 * (most - 1)
        product: Counter[int] = Counter()
        for a, m in together.items():
            for b, n in axis.items():
                product[a * b] += m * n
        together = product
    elements = max(1, math.prod(sizes))
    counts = np.array(list(together), np.float64)
    return counts, np.array([number / elements for number in together.values()], np.float64)


def _without_blocks(
    draw: Draw,
    x: jax.Array,
    static_scale: Any,
    *,
    size: tuple[int, ...],
    channel: int,
    realised: bool,
) -> jax.Array:
    """Zeroes blocks of x. The draw's mask holds their corners: True where no block starts.

    ``size`` is a block's size along every axis of x.
    """
    wide = wide_dtype(x)
    outside = functools.partial(_outside, shape=x.shape, size=size, channel=channel)
    if realised:
        own = (*x.shape[:channel], draw.description.block[channel], *x.shape[channel + 1 :])
        fraction = functools.partial(
            _kept_fraction, shape=own, size=size, channel=channel, dtype=wide
        )
        kept_fraction = draw.placed_like(x, fraction, PartitionSpec())
        factor = 1 / jnp.where(kept_fraction > 0, kept_fraction, 1)
    else:
        factor = _expected_scale(draw, x.shape, size, wide, static_scale)
    return select_scaled(draw.placed_like(x, outside), x, factor)


def _static_scale(draw: Draw, shape: tuple[int, ...], size: tuple[int, ...]) -> float | None:
    """1 / (expected kept fraction), computed from the rounded gamma that the law uses."""
    if draw.outcome is not Outcome.DRAWN or draw.rate is not None:
        return None
    counts, weights = _coverage(shape, size)
    free = float(_threshold.keep_probability(draw.threshold()))
    kept = float(weights @ free**counts)
    return 1 / kept if kept else 1.0


def _expected_scale(
    draw: Draw, shape: tuple[int, ...], size: tuple[int, ...], dtype: np.dtype, static_scale: Any
) -> jax.Array:
    if draw.rate is None:
        return jnp.asarray(static_scale).astype(dtype)
    counts, weights = _coverage(shape, size)
    gamma = draw.drop_probability(dtype)
    powers = jnp.exp(counts.astype(dtype) * jnp.log1p(-gamma))
    traced_kept = (weights.astype(dtype) * powers).sum()
    return 1 / jnp.where(traced_kept == 0, 1, traced_kept)


def _kept_fraction(
    draw: Draw, shape: tuple[int, ...], size: tuple[int, ...], channel: int, dtype: np.dtype
) -> jax.Array:
    """Kept fraction of this mask, counted once if channels share it; XLA merges the equal masks."""
    kept = _outside(draw, shape, size, channel)
    # Count in integers: adding ones in float32 stops at 2^24.
    counts = kept.sum(axis=tuple(range(1, kept.ndim)), dtype=jnp.uint32)
    return counts.astype(dtype).sum() / max(1, kept.size)


def _outside(draw: Draw, shape: tuple[int, ...], size: tuple[int, ...], channel: int) -> jax.Array:
    """True where an element lies in no block."""
    # Not broadcast yet: if channels share their blocks, the window slides over a single channel.
    free = draw.of_shape(draw.description.block).keep()
    channels = free.shape[channel]
    if channels > 1:  # eight channels at a time: faster, and 1 bit per element
        free = _pack(free, channel)
    whole = True if free.dtype == jnp.bool_ else np.uint8(0xFF)
    for axis, length in enumerate(size):  # a box is separable: one axis at a time
        if length > 1:
            window = [length if a == axis else 1 for a in range(free.ndim)]
            padding = [(length - 1, length - 1) if a == axis else (0, 0) for a in range(free.ndim)]
            strides = (1,) * free.ndim
            free = lax.reduce_window(free, whole, lax.bitwise_and, window, strides, padding)
    if channels > 1:
        free = lax.slice_in_dim(_unpack(free, channel), 0, channels, axis=channel)
    return jnp.broadcast_to(free, shape)


def _pack(mask: jax.Array, axis: int) -> jax.Array:
    """Packs eight neighbours along an axis into the bits of a byte."""
    bytes_ = -(-mask.shape[axis] // 8)
    missing = [(0, 8 * bytes_ - mask.shape[axis] if a == axis else 0, 0) for a in range(mask.ndim)]
    shape = (*mask.shape[:axis], bytes_, 8, *mask.shape[axis + 1 :])
    bits = lax.reshape(lax.pad(mask, False, missing), shape).astype(jnp.uint8)
    weighted = bits << lax.broadcasted_iota(jnp.uint8, shape, axis + 1)
    return lax.reduce(weighted, np.uint8(0), lax.bitwise_or, (axis + 1,))


def _unpack(packed: jax.Array, axis: int) -> jax.Array:
    shape = (*packed.shape[: axis + 1], 8, *packed.shape[axis + 1 :])
    dimensions = [a for a in range(len(shape)) if a != axis + 1]
    byte = lax.broadcast_in_dim(packed, shape, dimensions)
    mask = ((byte >> lax.broadcasted_iota(jnp.uint8, shape, axis + 1)) & np.uint8(1)).astype(bool)
    return lax.reshape(
        mask, (*packed.shape[:axis], 8 * packed.shape[axis], *packed.shape[axis + 1 :])
    )


def _check_sizes(name: str, sizes: Any, count: int) -> tuple[int, ...]:
    """Returns one size of at least 1 per axis; a single number stands for all axes."""
    if as_integer(sizes) is not None:
        return (_values.check_positive(name, sizes),) * count
    if not isinstance(sizes, Sequence) or isinstance(sizes, str | bytes):
        raise TypeError(
            f"{name} must be an integer or a sequence of integers, got {sizes!r}."
            " Write 7, or (7, 7) for one size per axis."
        )
    if len(sizes) != count:
        raise ValueError(
            f"{name} must be one number, or one for each of {count} axes, got {tuple(sizes)}."
            " Pass one number for all of them, or one for each."
        )
    return tuple(_values.check_positive(name, size) for size in sizes)
