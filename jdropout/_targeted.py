"""Targeted dropout: drops among the weights of smallest magnitude."""

import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _checks, _values
from jdropout._draw import Draw
from jdropout._dtypes import wide_dtype
from jdropout._new_draw import new_draw
from jdropout._typing import ArrayLike, Flag, Key, Rate
from jdropout._values import is_real, type_name


def targeted_dropout(
    key: Key | None,
    w: ArrayLike,
    rate: Rate,
    *,
    target_fraction: float,
    unit_axis: int | None = None,
    output_axis: int = -1,
    deterministic: Flag = False,
    precision: int | None = None,
) -> jax.Array:
    """Drops among the weights that matter least, to prepare a network for pruning.

    Of the n weights of an output unit, the ``floor(target_fraction * n)`` with the smallest
    magnitudes are candidates, and each candidate is set to 0 with probability
    ``effective_rate(rate)``. With `unit_axis`, whole units are chosen and dropped instead,
    those with the smallest Euclidean norms. Ties are broken by index. Nothing is scaled,
    weights that are not candidates do not change, and the gradient of a dropped weight is 0.
    The backward pass stores the key and `w`, and finds the candidates again.

    Evaluation returns `w`, which is trained to survive pruning. To prune, as the authors' code
    does in evaluation, use a rate of 1, which needs no key.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      w: array such as (inputs, units) or (height, width, channels, units), with a
        floating-point or complex dtype.
      rate: probability of dropping a candidate, in [0, 1]; a number or a (traced)
        floating-point scalar.
      target_fraction: fraction of the weights, or units, that are candidates, a number in [0,
        1].
      unit_axis: axis of the units to drop as a whole; None for single weights. The backend sums
        the norms, so its rounding decides which of two equally large units counts as smaller.
      output_axis: for single weights, axis of the units that each have their own candidates.
      deterministic: if True, return `w` unchanged; a bool or a (traced) boolean scalar.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      An array of w's shape and dtype.

    Raises:
      TypeError: if `w` is not a floating-point or complex array, the fraction is not a number,
        or another argument has the wrong type, such as a boolean rate.
      ValueError: if the fraction is outside [0, 1], an axis does not exist, `w` has fewer than
        two axes without `unit_axis`, the rate is not a scalar in [0, 1] (a traced one outside
        gives NaN, and an error under ``checkify``), or the key is missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> w = jnp.array([[1.0, -8.0], [-2.0, 7.0], [3.0, 6.0], [4.0, 5.0]])
      >>> jdropout.targeted_dropout(None, w, 1.0, target_fraction=0.5)
      Array([[ 0., -8.],
             [ 0.,  7.],
             [ 3.,  0.],
             [ 4.,  0.]], dtype=float32)

    References:
      Gomez, Zhang, Kamalakara, Madaan, Swersky, Gal and Hinton, "Learning sparse networks using
      targeted dropout" (2019), sections 3 and 4.
    """
    w = _checks.check_input(w, "w")
    fraction = _check_target_fraction(target_fraction)
    shape = jnp.shape(w)
    _values.check_integer("output_axis", output_axis)
    if unit_axis is None:
        _check_has_inputs(w)
        axis = _values.check_axis("output_axis", output_axis, len(shape))
        members = math.prod(shape[:axis] + shape[axis + 1 :])
    else:
        axis = _values.check_axis("unit_axis", unit_axis, len(shape))
        members = shape[axis]
    _values.check_indexable("w", members)
    count = math.floor(round(fraction * members, 6))  # 0.29 * 100 is 28.999999999999996
    whole = unit_axis is not None
    draw = new_draw(
        "targeted_dropout",
        key,
        rate,
        deterministic,
        shape,
        broadcast_dims=[a for a in range(len(shape)) if a != axis] if whole else [],
        precision=precision,
        off=count == 0 and not isinstance(rate, jax.Array),
        batch_axis=None,
    )
    thinned = draw.apply(_thinned, w, dropped=_thinned, axis=axis, count=count, whole=whole)
    return cast("jax.Array", thinned)


def _thinned(draw: Draw, w: jax.Array, *, axis: int, count: int, whole: bool) -> jax.Array:
    kept = draw.keep_like(w) | ~_candidates(w, axis, count, whole)
    return lax.select(kept, w, jnp.zeros_like(w))


def _candidates(w: jax.Array, axis: int, count: int, whole: bool) -> jax.Array:
    """True for the ``count`` smallest weights at each index of an axis, or smallest indices."""
    sharding = jax.typeof(w).sharding
    explicit = sharding.mesh.explicit_axes
    find = functools.partial(_smallest, axis=axis, count=count, whole=whole)
    w = lax.stop_gradient(w)
    if explicit:  # selection crosses devices: let XLA insert the communication
        return jax.sharding.auto_axes(find, axes=explicit, out_sharding=sharding)(w)
    return find(w)


def _smallest(w: jax.Array, axis: int, count: int, whole: bool) -> jax.Array:
    size = jnp.abs(w) if jnp.iscomplexobj(w) else jnp.abs(w.astype(wide_dtype(w)))
    others = tuple(a for a in range(w.ndim) if a != axis)
    if whole:
        norms = jnp.square(size).sum(others, keepdims=True)
        return jnp.broadcast_to(_lowest(norms, (axis,), count), w.shape)
    return _lowest(size, others, count)


def _lowest(size: jax.Array, axes: tuple[int, ...], count: int) -> jax.Array:
    """True for the ``count`` smallest of numbers of at least 0 along axes; NaN is largest.

    Finds the smallest number that is not chosen bit by bit, by counting how many are below a
    candidate, and then in the same way the index up to which numbers equal to it are chosen. Some
    forty reductions of the array are together far faster than sorting it.
    """
    dtype = jnp.uint64 if jnp.finfo(size.dtype).bits == 64 else jnp.uint32
    bits = lax.bitcast_convert_type(size, dtype)  # ordered like the numbers

    def number_of(chosen: jax.Array) -> jax.Array:
        return chosen.sum(axes, keepdims=True, dtype=jnp.int32)

    def last(few_enough: Callable[[jax.Array], jax.Array], width: int) -> jax.Array:
        """The largest number of ``width`` bits that, like all below it, passes the test."""

        def with_bit(step: jax.Array, found: jax.Array) -> jax.Array:
            bit = lax.shift_left(dtype(1), (width - 1 - step).astype(dtype))
            return jnp.where(few_enough(found | bit), found | bit, found)

        zeros = number_of(bits < 0).astype(dtype)
        return lax.fori_loop(0, width, with_bit, zeros)

    bound = last(lambda bound: number_of(bits < bound) <= count, bits.dtype.itemsize * 8 - 1)
    equal = bits == bound
    missing = count - number_of(bits < bound)
    shape = [n if a in axes else 1 for a, n in enumerate(size.shape)]
    index = lax.iota(dtype, math.prod(shape)).reshape(shape)
    end = last(
        lambda end: number_of(equal & (index < end)) <= missing, math.prod(shape).bit_length()
    )
    return (bits < bound) | (equal & (index < end))


def _check_target_fraction(fraction: Any) -> float:
    if isinstance(fraction, jax.Array):
        raise TypeError(
            "target_fraction must be a Python number, got an array: how many weights are "
            "candidates is static. Convert it with float(target_fraction)."
        )
    if not is_real(fraction):
        raise TypeError(
            f"target_fraction must be a number, got {fraction!r} of type {type_name(fraction)}."
            " Pass a Python float such as 0.5."
        )
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"target_fraction must be in [0, 1], got {fraction}. It is the part of the weights "
            "that may be dropped."
        )
    return float(fraction)


def _check_has_inputs(w: Any) -> None:
    if np.ndim(w) < 2:
        raise ValueError(
            f"w must have two axes or more to choose among each unit's weights, got shape "
            f"{np.shape(w)}. To choose among the elements of a vector pass unit_axis=0."
        )
