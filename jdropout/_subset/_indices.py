"""The subset law: exactly so many of every group, those with the smallest uniforms."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jdropout import _checks, _values
from jdropout._draw import Draw, Outcome
from jdropout._new_draw import UNIFORM, new_draw
from jdropout._typing import Index, Key

_INDEX = 4
"""Bytes of an index, of which an `Order` has two for each element."""


def keep_indices(
    key: Key | None,
    rate: float,
    size: int,
    *,
    groups: int = 1,
    shape: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
) -> jax.Array:
    """Returns the indices of a random subset of exact size, in order.

    Of every group of ``n = size // groups`` neighbours it keeps exactly ``k``, the integer
    nearest to ``n * (1 - rate)`` but at least 1: the elements with the smallest uniforms of the
    mask law. All subsets of a group are equally probable, and independent of other groups and of
    other indices of `shape`. Each element is kept with probability ``p = k / n``, so a sum over
    the kept elements, multiplied by ``n / k``, has the sum over all as its expectation. Two
    elements of a group are not independent: their indicators have the covariance
    ``-p (1 - p) / (n - 1)``.

    Shapes are static, so the rate must be a number: each ``k`` compiles a program of its own.

    Args:
      key: PRNG key, typed or raw; use a new one for every subset. May be None if everything is
        kept.
      rate: fraction to drop, a number in [0, 1]. A rate of 1 keeps one of each group.
      size: number of elements to choose from, at least 1.
      groups: number of groups of neighbours, a divisor of `size`. Along a sharded axis, a
        multiple of the number of shards keeps the choice local to each device.
      shape: shape of an array of independent subsets, such as ``(batch,)``.
      start: index of the first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`; one integer or (traced) integer scalar for each axis of
        ``(*shape, size)``. The last one must be the beginning of a group.
      global_shape: shape of the whole ``(*shape, size)``; required with `start`.

    Returns:
      int32 of shape ``(*shape, groups * k)``: increasing indices into the `size` elements, of
      which each group has `k`.

    Raises:
      TypeError: if the rate is traced, or another argument has the wrong type.
      ValueError: if the rate is outside [0, 1], `groups` does not divide `size`, the part at
        `start` does not fit into `global_shape`, or the key is missing or a batch of keys.

    Example:
      >>> import jax, jdropout
      >>> jdropout.keep_indices(jax.random.key(0), 0.4, 10)
      Array([1, 3, 5, 7, 8, 9], dtype=int32)
      >>> jdropout.keep_indices(jax.random.key(0), 0.5, 8, groups=2, shape=(2,))
      Array([[1, 2, 5, 6],
             [1, 2, 4, 5]], dtype=int32)

    References:
      The subset law, in the documentation; Fan, Muller and Rezucha, "Development of sampling
      plans by using sequential (item by item) selection techniques and digital computers"
      (JASA 1962), for sampling without replacement by sorting.
    """
    lead = _values.check_shape("shape", shape)
    subset = Subset(
        "keep_indices",
        key,
        rate,
        (*lead, _values.check_positive("size", size)),
        groups=groups,
        start=start,
        global_shape=global_shape,
        batch_axis=0 if lead else None,
        indices_alone=True,
    )
    return cast("jax.Array", subset.draw.result(subset.indices()))


_CHOSEN_FROM = {
    "keep_indices": "size",
    "layer_subset": "stacked_params",
    "unit_subset": "incoming",
}


class Subset:
    """The choice of one call: what is drawn, and a permutation with the kept elements first.

    Attributes:
      draw: the draw of the uniforms; its outcome is KEPT if nothing is dropped.
      shape: shape of the uniforms, with the elements to choose from on the last axis.
      groups: number of groups of neighbours.
      group_size: number of elements in a group.
      count: number of kept elements in a group.

    With ``indices_alone``, an audit reports that differentiation stores the indices, not an order.
    """

    def __init__(
        self,
        kind: str,
        key: Key | None,
        rate: float,
        shape: tuple[int, ...],
        *,
        groups: int = 1,
        deterministic: Any = False,
        start: Sequence[Index] | None = None,
        global_shape: Sequence[int] | None = None,
        batch_axis: int | None = 0,
        indices_alone: bool = False,
    ) -> None:
        rate = check_fixed_rate(rate)
        flag = _checks.check_static_flag(deterministic)
        size = shape[-1]
        _values.check_indexable(_CHOSEN_FROM.get(kind, "x"), size)
        self.shape = shape
        # In evaluation the last batch may be smaller.
        groups = _values.check_positive("groups", groups)
        self.groups = 1 if flag else _check_groups(groups, size)
        self.group_size = size // self.groups
        # The double closest to 0.95 is less, so that 10 * (1 - 0.95) is above 0.5.
        count = max(1, round(round(self.group_size * (1 - Fraction(rate)), 6)))
        self.count = min(count, self.group_size)  # of nothing, nothing is kept
        off = self.count == self.group_size
        places = self.groups * self.count if indices_alone else 2 * size
        self.draw = new_draw(
            kind,
            key,
            UNIFORM,
            flag,
            shape,
            off=off,
            start=start,
            global_shape=global_shape,
            batch_axis=batch_axis,
            reported_rate=rate,
            kept_fraction=1.0 if off else self.count / self.group_size,
            saves_work=True,
            stored_bytes=0 if off or flag else _INDEX * places * math.prod(shape[:-1]),
        )
        if start is not None and not off and not flag:
            _check_group_start(start, self.group_size)

    @property
    def whole(self) -> bool:
        """Whether everything is kept."""
        return self.draw.outcome is Outcome.KEPT

    @property
    def factor(self) -> float:
        """What keeps the expectation: the number of elements over the number of kept ones."""
        return 1.0 if self.whole else self.group_size / self.count

    def order(
        self, like: jax.Array | None = None, axis: int = 0, around: tuple[Any, ...] = ()
    ) -> "Order":
        """The elements of each group, kept ones first and in order.

        Args:
          like: array whose explicit sharding the groups follow; None for a replicated result.
          axis: its axis that has the elements.
          around: explicit sharding of the axes before the groups; empty if they have none.
        """
        spec = None
        if like is not None:
            before = [*around, *[None] * (len(self.shape) - 1 - len(around))]
            spec = PartitionSpec(*before, local_spec(like, axis, self.groups), None)
        made = self.draw.apply(_order, groups=self.groups, count=self.count, spec=spec)
        return cast("Order", made)

    def indices(self) -> jax.Array:
        """The kept elements, as indices into all elements."""
        if self.whole:
            everything = jnp.arange(self.shape[-1], dtype=jnp.int32)
            return jnp.broadcast_to(everything, self.shape)
        lead = self.shape[:-1]
        first = np.arange(self.groups, dtype=np.int32) * np.int32(self.group_size)
        rows = self.draw.apply(_kept_first, groups=self.groups, count=self.count)
        chosen = rows[..., : self.count] + first.reshape(*[1] * len(lead), -1, 1)
        return chosen.reshape(*lead, self.groups * self.count)


class Order(NamedTuple):
    """A permutation of each group and its inverse: int32 of shape (..., groups, group_size)."""

    rows: jax.Array
    """The elements, kept ones first."""
    places: jax.Array
    """The place of each element among the rows."""

    @classmethod
    def of(cls, rows: jax.Array) -> "Order":
        places = jnp.argsort(rows, axis=-1).astype(rows.dtype)
        return cls(rows, varying_like(rows, places))


def _order(draw: Draw, *, groups: int, count: int, spec: Any) -> Order:
    def order(draw: Draw) -> Order:
        return Order.of(_kept_first(draw, groups=groups, count=count))

    explicit = () if spec is None else jax.sharding.get_abstract_mesh().explicit_axes
    if explicit:
        order = jax.sharding.auto_axes(order, axes=explicit, out_sharding=Order(spec, spec))
    return order(draw)


def _kept_first(draw: Draw, *, groups: int, count: int) -> jax.Array:
    uniform = draw.uniform()
    *lead, size = uniform.shape
    return kept_first(uniform.reshape(*lead, groups, size // groups), count)


def kept_first(uniform: jax.Array, count: int, ordered: bool = True) -> jax.Array:
    """Positions along the last axis, those of the smallest uniforms first; ties by position.

    Args:
      uniform: uniforms.
      count: number of kept positions.
      ordered: whether the kept positions increase; otherwise their uniforms do.
    """
    order = jnp.argsort(uniform, axis=-1, stable=True).astype(jnp.int32)
    order = varying_like(uniform, order)
    if not ordered:
        return order
    kept = jnp.sort(order[..., :count], axis=-1)
    return jnp.concatenate([kept, order[..., count:]], axis=-1)


def varying_like(other: jax.Array, x: jax.Array) -> jax.Array:
    """Returns x, which inside shard_map JAX then takes to vary over devices as `other` does.

    JAX loses this in argsort, and does not match it among the operands of custom_linear_solve.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return x
    always = jnp.full_like(other, True, jnp.bool_, shape=())  # the public way to copy its type
    return jnp.where(always, x, jnp.zeros_like(x))


def local_spec(x: jax.Array, axis: int, groups: int) -> Any:
    """The explicit sharding of an axis, if each shard has whole groups; else None, replicated."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    if names is None:
        return None
    names = names if isinstance(names, tuple) else (names,)
    shards = int(np.prod([sharding.mesh.shape[name] for name in names]))
    return None if groups % shards else names


def check_fixed_rate(rate: Any) -> float:
    checked = _checks.check_rate(rate)
    if isinstance(checked, jax.core.Tracer):
        raise TypeError(
            "rate must be a number here, since the shape of the result depends on it, got "
            f"{checked!r}. Mark it as static, such as jax.jit(f, static_argnames=...)."
        )
    return float(checked)


def _check_groups(groups: Any, size: int) -> int:
    number = _values.check_positive("groups", groups)
    if size % number:
        raise ValueError(
            f"groups must divide the {size} elements to choose from, got {number}. Pass a divisor, "
            "such as the number of devices that share the axis."
        )
    return number


def _check_group_start(start: Sequence[Index], group_size: int) -> None:
    first = _values.as_integer(start[-1])
    if first is not None and first % group_size:
        raise ValueError(
            f"start must be the beginning of a group of {group_size} elements on its last axis, "
            f"got {first}. Split the axis between groups."
        )
