"""Dropout, its mask, and its effective rate."""

import functools
from collections.abc import Sequence
from typing import cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _checks, _threshold, _values
from jdropout._batch import KEYS_AXIS
from jdropout._draw import Draw
from jdropout._dtypes import wide_dtype
from jdropout._implementation import Implementation, check_implementation, check_supported
from jdropout._new_draw import new_draw
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate


def dropout(
    key: Key | None,
    x: ArrayLike,
    rate: Rate,
    *,
    deterministic: Flag = False,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Zeroes elements at random and scales up the rest, keeping the mean.

    ``y = x * m / (1 - r)`` with ``m ~ Bernoulli(1 - r)`` and ``r = effective_rate(rate)``, so
    ``E[y] = x`` exactly, up to rounding. The multiplication by ``1 / (1 - r)`` is done in
    float32 (float64 for 64-bit input), and its result rounded to x's dtype.

    The mask is a pure function of key and position: the same bits on every device and sharding,
    for every dtype, in every version. The backward pass recomputes it from the key; nothing
    else is stored.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      x: array of any shape, with a floating-point or complex dtype.
      rate: probability of dropping, in [0, 1]; a number or a (traced) floating-point scalar,
        which is read as float32. Its gradient is zero. A traced rate outside [0, 1] gives NaN,
        and an error under ``checkify``.
      deterministic: if True, return `x` unchanged; a bool or a (traced) boolean scalar.
      broadcast_dims: axes along which the mask is shared.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`. One integer or (traced) integer scalar per axis; a
        traced index outside the array yields the mask of another place. Makes no difference on
        axes in `broadcast_dims`.
      global_shape: shape of the whole array; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %. More bits never reshuffle a mask.
      implementation: "pallas" runs a Pallas kernel, written for a TPU; other platforms interpret
        it, slowly, with the same result. From JAX 0.10.2 on, CUDA GPUs get a kernel of their own,
        for Hopper or later; it has been compiled and interpreted, never run. A kernel has
        derivatives in reverse mode only; needs float32 or bfloat16, two last axes that are longer
        than 1 and do not share a mask, and a `start` of the second-to-last one at a Python multiple
        of 4; and a compiler that shards arrays cannot cut it: call it on one device, or in a
        `shard_map` with ``check_vma=False``. "xla" and None leave the loop to the compiler, which
        can fuse it with its neighbours.

    Returns:
      An array of x's shape and dtype; `x` itself if `deterministic` is True or a static rate
      rounds to 0.

    Raises:
      TypeError: if `x` is not a floating-point or complex array, or another argument has the
        wrong type, such as a boolean rate.
      ValueError: if the rate is not a scalar in [0, 1] (a traced one outside gives NaN, and an
        error under ``checkify``), the key is missing or a batch of keys, an axis does not
        exist, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> jdropout.dropout(jax.random.key(0), jnp.ones((2, 8)), 0.5)
      Array([[0., 2., 2., 0., 2., 2., 2., 0.],
             [2., 2., 2., 2., 2., 2., 0., 0.]], dtype=float32)

    References:
      Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, "Dropout: a simple way to
      prevent neural networks from overfitting", JMLR 15 (2014), sections 4 and 10.
    """
    return masked(
        "dropout",
        key,
        x,
        rate,
        deterministic=deterministic,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=precision,
        kernel=check_implementation(implementation),
    )


def masked(
    kind: str,
    key: Key | None,
    x: ArrayLike,
    rate: Rate,
    *,
    deterministic: Flag = False,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
    site: tuple[str | int, ...] = (),
    scaled: bool = True,
    batch_axis: int | None = KEYS_AXIS,
    kernel: bool = False,
) -> jax.Array:
    """`dropout` with the options of its relatives; ``kind`` is their name in an audit."""
    x = _checks.check_input(x)
    _checks.check_order(x, rate)
    draw = new_draw(
        kind,
        key,
        rate,
        deterministic,
        jnp.shape(x),
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=precision,
        site=site,
        batch_axis=batch_axis,
    )
    if kernel:
        from jdropout._dropout_kernel import kernel_formula

        check_supported({"x": jnp.asarray(x)}, draw)
        return cast("jax.Array", draw.apply(kernel_formula, x))
    return cast("jax.Array", draw.apply(_masked_scale, x, scaled=scaled))


def _masked_scale(draw: Draw, x: jax.Array, *, scaled: bool) -> jax.Array:
    """``m * x / keep``, or ``m * x``. Linear in x, so the only residual is the draw."""
    wide = wide_dtype(x)
    factor = draw.scale(wide) if scaled else jnp.ones((), wide)
    return select_scaled(draw.keep_like(x), x, factor)


def select_scaled(kept: jax.Array, x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x * factor`` where kept, else 0, in the factor's dtype and then rounded to x's."""
    product = wide_product(x, factor)
    # Select before rounding: XLA:CPU has no bfloat16 select, and would round twice.
    return lax.select(kept, product, jnp.zeros_like(product)).astype(x.dtype)


def wide_product(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x * factor`` in the factor's dtype, or the complex one of its width."""
    if jnp.iscomplexobj(x):  # a complex product would make NaN of inf * 0
        return lax.complex(lax.real(x) * factor, lax.imag(x) * factor)
    return x.astype(factor.dtype) * factor


def keep_mask(
    key: Key | None,
    rate: Rate,
    shape: Sequence[int],
    *,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> jax.Array:
    """Returns the mask that `dropout` applies: True where an element is kept.

    Each element is kept with probability ``1 - effective_rate(rate)``, independently of the
    others. One key gives nested masks at different rates: an element that is kept at the higher
    rate is kept at the lower rate too.

    Args:
      key: PRNG key, typed or raw; use a new one for every mask. May be None for a static rate
        of 0 or 1.
      rate: probability of dropping, in [0, 1]; a number or a (traced) floating-point scalar.
      shape: shape of the mask; of the part at `start` if `global_shape` is given.
      broadcast_dims: axes along which the mask is shared.
      start: index of the part's first element within a mask of `global_shape`, for code that
        sees one part of it, as in `shard_map`.
      global_shape: shape of the whole mask; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      A boolean array of shape `shape`.

    Raises:
      TypeError: if an argument has the wrong type, such as a boolean rate.
      ValueError: if the rate is not a scalar in [0, 1] (under ``jit`` only ``checkify`` reports
        a traced one outside), the key is missing or a batch of keys, an axis does not exist, or
        the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jdropout
      >>> key = jax.random.key(0)
      >>> jdropout.keep_mask(key, 0.5, (2, 6))
      Array([[False,  True,  True, False,  True,  True],
             [ True,  True,  True,  True,  True,  True]], dtype=bool)
      >>> jdropout.keep_mask(key, 0.5, (1, 3), start=(0, 2), global_shape=(2, 6))
      Array([[ True, False,  True]], dtype=bool)

    References:
      The mask law, in the documentation; Salmon, Moraes, Dror and Shaw, "Parallel random
      numbers: as easy as 1, 2, 3" (SC 2011), for its cipher.
    """
    draw = new_draw(
        "mask",
        key,
        rate,
        False,
        _values.check_shape("shape", shape),
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=precision,
    )
    return cast("jax.Array", draw.apply(Draw.keep, kept=Draw.keep, dropped=Draw.keep))


@overload
def effective_rate(rate: float | np.floating, *, precision: int | None = None) -> float: ...
@overload
def effective_rate(rate: jax.Array, *, precision: int | None = None) -> jax.Array: ...
def effective_rate(rate: Rate, *, precision: int | None = None) -> float | jax.Array:
    """Returns the drop probability that `dropout` uses: the rate, rounded to 16 or 32 bits.

    It is ``1 - t / 2**16`` with the integer threshold ``t = round((1 - rate) * 2**16)`` of the
    mask law, or the same with ``2**32``.

    Args:
      rate: probability of dropping, in [0, 1]; a number or a (traced) floating-point scalar.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      A float for a static rate; a float32 scalar for an array.

    Raises:
      TypeError: if the rate is not a number or a floating-point scalar.
      ValueError: if the rate is not a scalar in [0, 1], or `precision` is not None, 16 or 32.

    Example:
      >>> import jdropout
      >>> jdropout.effective_rate(0.1)
      0.100006103515625
      >>> jdropout.effective_rate(0.5)
      0.5

    References:
      The mask law, step 5, in the documentation.
    """
    rate = _checks.check_rate(rate)
    precision = _checks.check_precision(precision)
    if isinstance(rate, jax.Array):
        return _traced_effective_rate(rate, precision)
    return float(1 - _threshold.keep_probability(_threshold.static_threshold(rate, precision)))


@functools.partial(jax.jit, static_argnums=1)
def _traced_effective_rate(rate: jax.Array, precision: int | None) -> jax.Array:
    return _threshold.traced_drop_probability(_threshold.traced_threshold(rate, precision))
