"""A mask and its scale: what is static about them, what may be traced, and how to make them."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

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
    part = _part(shape, broadcast_dims, start, global_shape)
    traced_rate = rate if isinstance(rate, jax.Array) else None
    threshold = (
        None if isinstance(rate, jax.Array) else _threshold.static_threshold(rate, precision)
    )
    kept = None if threshold is None else _threshold.keep_probability(threshold)
    if kept == 1 or deterministic is True:
        return None, None
    _checks.check_static_shape(shape)
    layout, origin = _law.locate(*part)
    mask = Mask(part.shape, shape, part.whole, layout, threshold, precision)
    if kept == 0 and deterministic is False:
        return mask, None
    flag = deterministic if isinstance(deterministic, jax.Array) else None
    return mask, Operands(_checks.check_key(key, f"{prefix}key"), traced_rate, flag, origin)


def describe_uniform(
    key: Key | None,
    shape: tuple[int, ...],
    broadcast_dims: Sequence[int],
    start: Sequence[Index] | None,
    global_shape: Sequence[int] | None,
) -> tuple[Mask, Operands]:
    """The same for the uniform numbers that masks are made of, without a rate."""
    part = _part(shape, broadcast_dims, start, global_shape)
    _checks.check_static_shape(shape)
    layout, origin = _law.locate(*part)
    mask = Mask(part.shape, shape, part.whole, layout, None, None)
    return mask, Operands(_checks.check_key(key), None, None, origin)


class _Part(NamedTuple):
    """Where a block lies in a whole mask; broadcast axes have size 1."""

    whole: tuple[int, ...]
    shape: tuple[int, ...]
    start: tuple[Index, ...] | None


def _part(
    shape: tuple[int, ...],
    broadcast_dims: Sequence[int],
    start: Sequence[Index] | None,
    global_shape: Sequence[int] | None,
) -> _Part:
    shared = _checks.check_broadcast_dims(broadcast_dims, len(shape))
    first, whole = _checks.check_block(start, global_shape, shape)

    def unshared(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(1 if axis in shared else size for axis, size in enumerate(sizes))

    return _Part(unshared(whole), unshared(shape), first)


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
    """The mask with the explicit sharding of x."""
    return placed_like(x, functools.partial(keep, mask=mask), operands)


def placed_like(
    x: jax.Array,
    make: Callable[[Operands], jax.Array],
    operands: Operands,
    spec: PartitionSpec | None = None,
) -> jax.Array:
    """What is made is placed by the compiler, by default as x is, and no device gathers it."""
    sharding = jax.typeof(x).sharding
    explicit = sharding.mesh.explicit_axes
    if not explicit:
        return make(operands)
    out = sharding if spec is None else spec
    return jax.sharding.auto_axes(make, axes=explicit, out_sharding=out)(operands)


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


@functools.partial(jax.jit, static_argnames="mask")
def uniform(operands: Operands, mask: Mask) -> jax.Array:
    """uint32 numbers of the mask's shape, uniform in units of 2^-32."""
    if 0 in mask.full_shape:
        return jnp.zeros(mask.full_shape, jnp.uint32)
    assert isinstance(operands.key, jax.Array)
    bits = _law.uniform(operands.key, mask.layout, operands.origin)
    return jnp.broadcast_to(lax.reshape(bits, mask.shape), mask.full_shape)


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


def drop_probability(operands: Operands, mask: Mask, dtype: np.dtype) -> jax.Array:
    """The effective rate; NaN for a traced one outside [0, 1]."""
    if operands.rate is None:
        assert mask.threshold is not None
        return jnp.asarray(float(1 - _threshold.keep_probability(mask.threshold)), dtype)
    rate = operands.rate
    threshold = _threshold.traced_threshold(rate, mask.precision)
    dropped = _threshold.traced_drop_probability(threshold).astype(dtype)
    return jnp.where((rate >= 0) & (rate <= 1), dropped, jnp.nan)


def select_scaled(kept: jax.Array, x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x * factor`` where kept, else 0, in the factor's dtype and then rounded to that of x."""
    if jnp.iscomplexobj(x):  # a complex product would turn an infinite part into NaN
        product = lax.complex(lax.real(x) * factor, lax.imag(x) * factor)
    else:
        product = x.astype(factor.dtype) * factor
    # Select before rounding: XLA:CPU has no bfloat16 select, and would round twice.
    return lax.select(kept, product, jnp.zeros_like(product)).astype(x.dtype)
