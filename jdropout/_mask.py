"""A mask and its scale: what is static about them, what may be traced, and how to make them."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _checks, _law, _threshold
from jdropout._typing import Index, Key, Rate


class Mask(NamedTuple):
    """All that is static about a mask."""

    shape: tuple[int, ...]
    """Shape of the block; broadcast axes have size 1."""
    full_shape: tuple[int, ...]
    whole: tuple[int, ...]
    """Shape of the mask that the block is a part of; broadcast axes have size 1."""
    layout: _law.Layout
    threshold: _threshold.Threshold | None
    """None if it depends on a traced rate or flag."""
    precision: int | None


class Operands(NamedTuple):
    """All that may be traced about a mask. What is None is no residual."""

    key: Key
    """A key; inside of compiled functions its words (`with_words`)."""
    rate: jax.Array | None
    deterministic: jax.Array | None
    origin: _law.Origin | None


def describe(
    key: Key | None,
    rate: Rate,
    deterministic: bool | jax.Array,
    shape: tuple[int, ...],
    broadcast_dims: Sequence[int],
    start: Sequence[Index] | None,
    global_shape: Sequence[int] | None,
    precision: int | None,
    prefix: str = "",
) -> tuple[Mask | None, Operands | None]:
    """Checks the arguments; a missing mask keeps everything, missing operands drop everything.

    ``prefix`` is that of the arguments' names in errors.
    """
    rate = _checks.check_rate(rate, f"{prefix}rate")
    precision = _checks.check_precision(precision)
    shared = _checks.check_broadcast_dims(broadcast_dims, len(shape))
    first, whole = _checks.check_block(start, global_shape, shape)

    def unshared(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(1 if axis in shared else size for axis, size in enumerate(sizes))

    traced_rate = rate if isinstance(rate, jax.Array) else None
    threshold = (
        None if isinstance(rate, jax.Array) else _threshold.static_threshold(rate, precision)
    )
    kept = None if threshold is None else _threshold.keep_probability(threshold)
    if kept == 1 or deterministic is True:
        return None, None
    _checks.check_static_shape(shape)
    whole = unshared(whole)
    layout, origin = _law.locate(whole, unshared(shape), first)
    mask = Mask(unshared(shape), shape, whole, layout, threshold, precision)
    if kept == 0 and deterministic is False:
        return mask, None
    flag = deterministic if isinstance(deterministic, jax.Array) else None
    return mask, Operands(_checks.check_key(key, f"{prefix}key"), traced_rate, flag, origin)


def tile(
    operands: Operands,
    mask: Mask,
    shape: tuple[int, ...],
    start: tuple[Index, ...] | None,
    index: tuple[Index, ...],
) -> tuple[Operands, Mask]:
    """The tile of ``shape`` at ``start + index * shape`` in the same whole mask."""
    block = tuple(1 if whole == 1 else size for whole, size in zip(mask.whole, shape, strict=True))
    layout, origin = _law.locate(mask.whole, block, start, index)
    tiled = mask._replace(shape=block, full_shape=shape, layout=layout)
    return operands._replace(origin=origin), tiled


def with_words(operands: Operands) -> Operands:
    return operands._replace(key=_law.spent_key_words(operands.key))


def keep_like(x: jax.Array, operands: Operands, mask: Mask) -> jax.Array:
    """The mask with the explicit sharding of x: the compiler places it, no device gathers it."""
    sharding = jax.typeof(x).sharding
    explicit = sharding.mesh.explicit_axes
    if not explicit:
        return keep(operands, mask)
    placed = functools.partial(keep, mask=mask)
    return jax.sharding.auto_axes(placed, axes=explicit, out_sharding=sharding)(operands)


@functools.partial(jax.jit, static_argnames="mask")
def keep(operands: Operands, mask: Mask) -> jax.Array:
    if 0 in mask.full_shape:
        return jnp.zeros(mask.full_shape, bool)
    if operands.rate is None:
        assert mask.threshold is not None  # a rate is either static or traced
        threshold = mask.threshold
    else:
        threshold = _threshold.traced_threshold(operands.rate, mask.precision)
    if operands.deterministic is not None:
        threshold = _threshold.keep_all_if(operands.deterministic, threshold)
    assert isinstance(operands.key, jax.Array)  # its words, see with_words()
    kept = _law.keep(operands.key, threshold, mask.layout, operands.origin)
    return jnp.broadcast_to(lax.reshape(kept, mask.shape), mask.full_shape)


def scale(operands: Operands, mask: Mask, dtype: np.dtype) -> jax.Array:
    """1 / keep, rounded once to float32 or float64; NaN for a traced rate outside [0, 1]."""
    if operands.rate is None:
        assert mask.threshold is not None
        kept = _threshold.keep_probability(mask.threshold)
        factor = jnp.asarray(float(1 / kept) if kept else 1.0, dtype)
    else:
        rate = operands.rate
        threshold = _threshold.traced_threshold(rate, mask.precision)
        traced_kept = _threshold.traced_keep_probability(threshold, dtype)
        factor = 1 / jnp.where(traced_kept > 0, traced_kept, 1)
        factor = jnp.where((rate >= 0) & (rate <= 1), factor, jnp.nan)
    if operands.deterministic is not None:
        factor = jnp.where(operands.deterministic, jnp.ones_like(factor), factor)
    return factor
