"""Gathers the rows of a subset and puts them back, both without a scatter in either pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jdropout._dropout import wide_product
from jdropout._dtypes import wide_dtype
from jdropout._subset._indices import Order, local_spec, varying_like

# The transpose that JAX derives for a gather is a scatter, which on a CPU takes 1.5 times as long
# as a copy and as much memory. As no row is taken twice, a gather by the inverse permutation does
# the same. custom_linear_solve is the public way to say so that keeps forward mode, batching and
# higher derivatives.
#
# jax.checkpoint leaves nothing but the order for the backward pass: without it, route_tokens also
# stored a mask of x's shape.
_rematerialised = functools.partial(jax.checkpoint, prevent_cse=False)


def take(x: jax.Array, order: Order, count: int, axis: int) -> jax.Array:
    """The kept rows of x along an axis: (..., groups * count, ...).

    Args:
      x: array with ``groups * group_size`` rows along the axis.
      order: the rows of each group, kept ones first. Its axes before the groups are x's axes
        before the rows; without any, all of x shares it.
      count: number of kept rows in a group.
      axis: axis of the rows.
    """
    groups = order.rows.shape[-2]

    @_rematerialised
    def taken(x: jax.Array, order: Order) -> jax.Array:
        grouped = _split(x, axis, groups)
        if jnp.issubdtype(x.dtype, jnp.inexact):
            kept = _taken(grouped, order, count, axis)
        else:
            kept = _gathered(grouped, order.rows[..., :count], axis)
        return _merge(kept, axis)

    return _placed(taken, x, axis, groups)(x, order)


def add(x: jax.Array, order: Order, rows: jax.Array, axis: int) -> jax.Array:
    """Adds rows to the kept rows of x; the arguments are as in `put`."""
    groups = order.rows.shape[-2]

    @_rematerialised
    def added(x: jax.Array, order: Order, rows: jax.Array) -> jax.Array:
        return x + _merge(_spread(_split(rows, axis, groups), order, axis), axis)

    return _placed(added, x, axis, groups)(x, order, rows)


def put(x: jax.Array, order: Order, rows: jax.Array, axis: int) -> jax.Array:
    """Replaces the kept rows of x.

    Args:
      x: array with ``groups * group_size`` rows along the axis.
      order: as in `take`.
      rows: the new rows, as `take` returns them.
      axis: axis of the rows.
    """
    groups = order.rows.shape[-2]

    @_rematerialised
    def replaced(x: jax.Array, order: Order, rows: jax.Array) -> jax.Array:
        grouped, rows = _split(x, axis, groups), _split(rows, axis, groups)
        count = rows.shape[axis + 1]
        if jnp.issubdtype(x.dtype, jnp.inexact):
            spread = _spread(rows, order, axis)
        else:
            spread = _gathered(rows, jnp.minimum(order.places, count - 1), axis)
        kept = order.places < count
        lead = kept.ndim - 2
        shape = (*kept.shape[:lead], *[1] * (axis - lead), *kept.shape[lead:])
        shape += (1,) * (grouped.ndim - len(shape))
        return _merge(jnp.where(kept.reshape(shape), spread, grouped), axis)

    return _placed(replaced, x, axis, groups)(x, order, rows)


def _taken(x: jax.Array, order: Order, count: int, axis: int) -> jax.Array:
    """The kept rows."""
    return _first(_selected(x, order, count, axis, transposed=False), count, axis)


def _spread(rows: jax.Array, order: Order, axis: int) -> jax.Array:
    """The kept rows in their places, zeros in the others."""
    count, size = rows.shape[axis + 1], order.rows.shape[-1]
    return _selected(_padded(rows, size, axis), order, count, axis, transposed=True)


def _selected(x: jax.Array, order: Order, count: int, axis: int, transposed: bool) -> jax.Array:
    """The kept rows and then zeros; or the transpose, which puts the first rows in their places."""
    size = order.rows.shape[-1]
    order = Order(varying_like(x, order.rows), varying_like(x, order.places))
    x = varying_like(order.rows, x)

    def select(_: Any, x: jax.Array) -> jax.Array:
        return _padded(_gathered(x, order.rows[..., :count], axis), size, axis)

    def put_back(_: Any, x: jax.Array) -> jax.Array:
        return _gathered(_padded(_first(x, count, axis), size, axis), order.places, axis)

    # The identity stands for the operator, which is used only where it is differentiated itself: it
    # has no parameters. Both maps must keep the shape, so they add zeros, which XLA cuts off again.
    maps = (put_back, select) if transposed else (select, put_back)
    return lax.custom_linear_solve(lambda x: x, x, *maps)


def _first(x: jax.Array, count: int, axis: int) -> jax.Array:
    return lax.slice_in_dim(x, 0, count, axis=axis + 1)


def _padded(x: jax.Array, size: int, axis: int) -> jax.Array:
    widths = [(0, 0, 0)] * x.ndim
    widths[axis + 1] = (0, size - x.shape[axis + 1], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def _gathered(x: jax.Array, rows: jax.Array, axis: int) -> jax.Array:
    """Rows of each group; x has the groups on ``axis`` and their rows on the next one."""
    lead = rows.ndim - 2
    inner = axis - lead
    before = (slice(None),) * inner

    def gathered(x: jax.Array, rows: jax.Array) -> jax.Array:
        return x.at[(*before, rows)].get(mode="promise_in_bounds")

    gathered = jax.vmap(gathered, in_axes=(inner, 0), out_axes=inner)
    for _ in range(lead):
        gathered = jax.vmap(gathered)
    return gathered(x, rows)


def _split(x: jax.Array, axis: int, groups: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])


def _merge(x: jax.Array, axis: int) -> jax.Array:
    groups, size = x.shape[axis : axis + 2]
    return x.reshape(*x.shape[:axis], groups * size, *x.shape[axis + 2 :])


def _placed(fn: Any, x: jax.Array, axis: int, groups: int) -> Any:
    """The function with its result explicitly sharded like x, where each shard has whole groups."""
    sharding = jax.typeof(x).sharding
    explicit = sharding.mesh.explicit_axes
    if not explicit:
        return fn
    names = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    names[axis] = local_spec(x, axis, groups)
    return jax.sharding.auto_axes(fn, axes=explicit, out_sharding=PartitionSpec(*names))


def scaled(y: jax.Array, factor: float) -> jax.Array:
    """``y * factor``, rounded once to y's dtype."""
    return wide_product(y, jnp.asarray(factor, wide_dtype(y))).astype(y.dtype)
