"""Stochastic depth that runs a branch on the kept examples only."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp

from jdropout import _arrays, _batch, _checks, _values
from jdropout._subset import _rows
from jdropout._subset._indices import Subset
from jdropout._typing import Index, Key

_Tree = TypeVar("_Tree")


def stochastic_depth(
    key: Key | None,
    branch: Callable[..., _Tree],
    x: _Tree,
    rate: float,
    *,
    args: tuple[Any, ...] = (),
    groups: int = 1,
    batch_axis: int = 0,
    deterministic: bool = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
) -> _Tree:
    """Adds a residual branch that runs on part of the batch, and saves the work of the rest.

    ``y = x + branch(x)`` where, of every group of n neighbouring examples, only k pass through the
    branch: ``n * (1 - rate)`` to the nearest integer, at least 1. What the branch returns is
    multiplied by ``n / k``, so ``E[y] = x + branch(x)``; the other examples stay as they are. This
    is `drop_path` with an exact number of examples, except that `drop_path` computes the branch of
    every example before it drops some: here the branch, its backward pass and its activations take
    k / n of their time and memory. Two examples of a group are not kept independently; see
    `keep_indices`.

    The branch must treat examples independently: statistics over the batch, as in batch
    normalization, become those of the kept examples.

    Args:
      key: PRNG key, typed or raw; use a new one for every branch and step. May be None if all
        examples are kept.
      branch: function of `x` and `args` without the residual connection, such as a Flax module
        or ``lambda x, mask: attention(norm(x), mask)``. It returns arrays with the structure and
        shapes of the `x` that it is given. It may have parameters, dropout and state of its own.
      x: array, or a tree of arrays, with the examples along `batch_axis`.
      rate: fraction of examples to drop, a number in [0, 1]. Shapes depend on it, so it must not
        be traced.
      args: further arguments of the branch: arrays, or trees of arrays, that belong to the
        examples, such as masks or conditioning, gathered along `batch_axis` too. An array with a
        single example is passed as it is.
      groups: number of groups of neighbouring examples, a divisor of the batch. If the batch is
        sharded, a multiple of the number of shards keeps all of it local to each device. With a key
        from `jdropout.keys.in_batch`, the groups of the whole batch, of which each part has some.
      batch_axis: axis of the examples, in all arrays.
      deterministic: if True, return ``x + branch(x)``. It must not be traced.
      start: one-element sequence, the index of the first example within a batch of
        `global_shape`, for code that sees one part of it, as in `shard_map`; an integer or
        (traced) integer scalar.
      global_shape: one-element sequence, the number of examples in the whole batch; required
        with `start`.

    Returns:
      A tree with x's structure and shapes, and the dtypes of ``x + branch(x)``.

    Raises:
      TypeError: if the branch is not a function, the rate or flag is traced, or another argument
        has the wrong type.
      ValueError: if the arrays differ in their number of examples, the branch returns another
        shape, `groups` does not divide the batch, the rate is outside [0, 1], or the key is
        missing or a batch of keys.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> def branch(x):
      ...     print("computes", x.shape)
      ...     return 3 * x
      >>> jdropout.stochastic_depth(jax.random.key(0), branch, jnp.ones((5, 1)), 0.4)[:, 0]
      computes (3, 1)
      Array([1., 6., 6., 6., 1.], dtype=float32)

    References:
      Oquab et al., "DINOv2: learning robust visual features without supervision" (TMLR 2024),
      section 5; Huang, Sun, Liu, Sedra and Weinberger, "Deep networks with stochastic depth"
      (ECCV 2016), section 3.
    """
    _values.check_function("branch", branch)
    x, args = _arrays.as_arrays("x", x), _arrays.as_arrays("args", _check_args(args))
    first, axis, size = _arrays.check_common_axis("x", x, "batch_axis", batch_axis)
    groups = _values.check_positive("groups", groups)
    if not _checks.check_static_flag(deterministic):
        groups = _batch.own_tiles(key, size, groups)
    subset = Subset(
        "stochastic_depth",
        key,
        rate,
        (size,),
        groups=groups,
        deterministic=deterministic,
        start=start,
        global_shape=global_shape,
        batch_axis=0,
    )

    def at(leaf: jax.Array) -> int:
        return _values.check_axis("batch_axis", batch_axis, leaf.ndim)

    shared = jax.tree.map(lambda leaf: _is_shared(leaf, size, batch_axis), args)
    if subset.whole:
        y = branch(x, *args)
        _check_branch(x, y)
        return cast("_Tree", subset.draw.result(jax.tree.map(jnp.add, x, y)))
    order = subset.order(first, axis)

    def taken(leaf: jax.Array, shared: bool = False) -> jax.Array:
        return leaf if shared else _rows.take(leaf, order, subset.count, at(leaf))

    kept = jax.tree.map(taken, x)
    y = branch(kept, *jax.tree.map(taken, args, shared))
    _check_branch(kept, y)

    def added(x: jax.Array, y: jax.Array) -> jax.Array:
        dtype = jnp.result_type(x, y)
        rows = _rows.scaled(y, subset.factor).astype(dtype)
        return _rows.add(x.astype(dtype), order, rows, at(x))

    return cast("_Tree", subset.draw.result(jax.tree.map(added, x, y)))


def _is_shared(leaf: jax.Array, size: int, batch_axis: int) -> bool:
    """Whether an argument has a single example, not one for each of x's."""
    exists = -leaf.ndim <= batch_axis < leaf.ndim
    if not exists or leaf.shape[batch_axis] not in (1, size):
        raise ValueError(
            f"args must have the {size} examples of x on axis {batch_axis}, or a single one, "
            f"got shape {leaf.shape}. Pass what all examples share in a closure."
        )
    return bool(leaf.shape[batch_axis] == 1)


def _check_args(args: Any) -> tuple[Any, ...]:
    if not isinstance(args, tuple | list):
        raise TypeError(
            f"args must be a tuple of arguments, got {_values.type_name(args)}. Write (mask,) for "
            "one."
        )
    return tuple(args)


def _check_branch(x: Any, y: Any) -> None:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (x, y)]
    shapes = [[jnp.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (x, y)]
    if structures[0] != structures[1] or shapes[0] != shapes[1]:
        raise ValueError(
            f"branch must return arrays of the shapes of its input, {shapes[0]}, got {shapes[1]}. "
            "It is added to the input: leave the residual connection out of it, and keep the shape."
        )
    _arrays.check_scalable("branch's result", y)
