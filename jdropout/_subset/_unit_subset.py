"""Dropout of hidden units, or of heads, that computes the kept ones only."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jdropout import _arrays, _batch, _checks, _key_kinds, _values
from jdropout._subset import _rows
from jdropout._subset._indices import Order, Subset
from jdropout._typing import Index, Key

_Tree = TypeVar("_Tree")


def unit_subset(
    key: Key | None,
    block: Callable[[Any, Any, Any], _Tree],
    incoming: Any,
    outgoing: Any,
    x: Any,
    rate: float,
    *,
    incoming_axis: int = -1,
    outgoing_axis: int = 0,
    groups: int = 1,
    tiles: int = 1,
    batch_axis: int = 0,
    deterministic: bool = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
) -> _Tree:
    """Drops units between two layers by leaving them out of both: smaller matrices, same result.

    Of every group of n neighbouring units, k are computed: ``n * (1 - rate)`` to the nearest
    integer, at least 1. Their part of the weights is gathered, and that of the outgoing weights
    multiplied by ``n / k``, so the expectation of the outgoing sum is exact. The block takes k / n
    of its time. The units are hidden units of an MLP, or heads of attention (DropHead).

    Unlike in `dropout`, all examples of a tile drop the same units: this regularizes less evenly
    than a mask for each example. With more tiles there are more subsets and smaller products.

    Args:
      key: PRNG key, typed or raw; use a new one for every block and step. May be None if all
        units are kept.
      block: function ``block(incoming, outgoing, x)`` that works with any number of units, such
        as ``lambda w, v, x: jax.nn.gelu(x @ w["kernel"] + w["bias"]) @ v["kernel"] + bias``.
      incoming: array, or a tree of arrays, that make the units: kernels and biases, also of
        gates, with the units along `incoming_axis`.
      outgoing: array, or a tree of arrays, that take the units, along `outgoing_axis`; without
        the bias that is added after the sum.
      x: input of the block, an array or a tree of arrays.
      rate: fraction of units to drop, a number in [0, 1]. Shapes depend on it, so it must not be
        traced.
      incoming_axis: axis of the units in all incoming arrays; -2 for heads in kernels of shape
        (features, heads, head_features) and biases of shape (heads, head_features).
      outgoing_axis: axis of the units in all outgoing arrays.
      groups: number of groups of neighbouring units, a divisor of their number. If they are
        sharded, a multiple of the number of shards keeps all of it local to each device.
      tiles: number of parts of the batch, of equal size, that drop units of their own. With a key
        from `jdropout.keys.in_batch`, the tiles of the whole batch, of which each part has some.
      batch_axis: axis of the examples in x and in the result; used for tiles only.
      deterministic: if True, compute all units. It must not be traced.
      start: index of the first tile and of the first unit within an array of `global_shape`, for
        code that sees one part of them, as in `shard_map`; two integers or (traced) integer
        scalars.
      global_shape: number of tiles and of units in the whole; required with `start`.

    Returns:
      The result of the block.

    Raises:
      TypeError: if the block is not a function, the rate or flag is traced, or another argument
        has the wrong type.
      ValueError: if the arrays differ in their number of units, `groups` does not divide it or
        `tiles` the batch, the rate is outside [0, 1], or the key is missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> def mlp(w, v, x):
      ...     print("computes", w.shape, v.shape)
      ...     return jax.nn.relu(x @ w) @ v
      >>> w, v, x = jnp.ones((4, 10)), jnp.ones((10, 3)), jnp.ones((2, 4))
      >>> jdropout.unit_subset(jax.random.key(0), mlp, w, v, x, 0.5)
      computes (4, 5) (5, 3)
      Array([[40., 40., 40.],
             [40., 40., 40.]], dtype=float32)

    References:
      Zhou, Ge, Wei, Zhou and Xu, "Scheduled DropHead: a regularization method for transformer
      models" (Findings of EMNLP 2020), section 3, for heads; Graham, Reizenstein and Robinson,
      "Efficient batchwise dropout training using submatrices" (2015), section 2, for units.
    """
    _values.check_function("block", block)
    incoming = _arrays.as_arrays("incoming", incoming)
    outgoing = _arrays.as_arrays("outgoing", outgoing)
    tiles = _values.check_positive("tiles", tiles)
    _values.check_integer("batch_axis", batch_axis)
    first, first_axis, size = _arrays.check_common_axis(
        "incoming", incoming, "incoming_axis", incoming_axis
    )
    _, _, taken = _arrays.check_common_axis("outgoing", outgoing, "outgoing_axis", outgoing_axis)
    if taken != size:
        raise ValueError(
            f"outgoing must have the {size} units of incoming on outgoing_axis {outgoing_axis}, "
            f"got {taken}. Check incoming_axis and outgoing_axis."
        )
    _arrays.check_scalable("outgoing", outgoing)
    tiled = tiles > 1
    if tiled and not _checks.check_static_flag(deterministic):
        key, tiles = _own_tiles(key, x, batch_axis, tiles)
    subset = Subset(
        "unit_subset",
        key,
        rate,
        (tiles, size),
        groups=groups,
        deterministic=deterministic,
        start=start,
        global_shape=global_shape,
        batch_axis=0 if tiled else None,
    )
    if subset.whole:
        return cast("_Tree", subset.draw.result(block(incoming, outgoing, x)))

    def chosen(order: Order, x: Any) -> Any:
        def taken(leaf: jax.Array, axis: int) -> jax.Array:
            at = _values.check_axis("axis", axis, leaf.ndim)
            return _rows.take(leaf, order, subset.count, at)

        def taken_and_scaled(leaf: jax.Array) -> jax.Array:
            return _rows.scaled(taken(leaf, outgoing_axis), subset.factor)

        sources = jax.tree.map(lambda leaf: taken(leaf, incoming_axis), incoming)
        return block(sources, jax.tree.map(taken_and_scaled, outgoing), x)

    if not tiled:
        order = subset.order(first, first_axis)
        y = chosen(Order(order.rows[0], order.places[0]), x)
    else:
        x = jax.tree.map(lambda leaf: _split(leaf, tiles, batch_axis), _arrays.as_arrays("x", x))
        specs = {jax.typeof(leaf).sharding.spec[:1] for leaf in jax.tree.leaves(x)}
        around = specs.pop() if len(specs) == 1 else ()
        incoming, outgoing = (_spared(weights, around) for weights in (incoming, outgoing))
        order = subset.order(jax.tree.leaves(incoming)[0], first_axis, around)
        y = jax.tree.map(lambda leaf: _merge(leaf, batch_axis), jax.vmap(chosen)(order, x))
    return cast("_Tree", subset.draw.result(y))


def _own_tiles(key: Key | None, x: Any, batch_axis: int, tiles: int) -> tuple[Key | None, int]:
    """The key for the tiles in a part of a batch, and their number."""
    if key is None or _key_kinds.part_of(key) is None:
        return key, tiles
    _, _, rows = _arrays.check_common_axis("x", _arrays.as_arrays("x", x), "batch_axis", batch_axis)
    return _batch.for_tiles(key, rows, tiles), _batch.own_tiles(key, rows, tiles)


def _spared(weights: Any, around: tuple[Any, ...]) -> Any:
    """Weights that are not explicitly split over the devices that the tiles are split over."""

    def spared(weight: jax.Array) -> jax.Array:
        spec = [*jax.typeof(weight).sharding.spec]
        kept = [None if _names(part) & _names(around) else part for part in spec]
        return weight if kept == spec else jax.sharding.reshard(weight, PartitionSpec(*kept))

    return jax.tree.map(spared, weights)


def _names(part: Any) -> set[str]:
    """The axes of the mesh in a part of a spec."""
    if isinstance(part, str):
        return {part}
    return {name for inner in part or () for name in _names(inner)}


def _split(x: jax.Array, tiles: int, batch_axis: int) -> jax.Array:
    """Splits the batch into tiles, on a new leading axis."""
    axis = _values.check_axis("batch_axis", batch_axis, x.ndim)
    if x.shape[axis] % tiles:
        raise ValueError(
            f"tiles must divide the {x.shape[axis]} examples of x, got {tiles}. Pass a divisor."
        )
    size = x.shape[axis] // tiles
    parts = x.reshape(*x.shape[:axis], tiles, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(parts, axis, 0)


def _merge(x: jax.Array, batch_axis: int) -> jax.Array:
    axis = _values.check_axis("batch_axis", batch_axis, x.ndim - 1)
    parts = jnp.moveaxis(x, 0, axis)
    tiles, size = parts.shape[axis : axis + 2]
    return parts.reshape(*parts.shape[:axis], tiles * size, *parts.shape[axis + 2 :])
