"""Where the parts of a batch are, so that masks do not depend on how it is cut.

A mask is a function of the key and the position. The position of an example is the one in the
whole batch, and a microbatch does not know it: its keys do, see `_key_kinds.py`.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _checks, _values
from jdropout._key_kinds import Part, apart, part_of, replaced, together, typed_key
from jdropout._typing import Index, Key, Site

KEYS_AXIS: Any = object()
"""The batch axis of a function that does not know it: the key says which, axis 0 by default."""

_Block = tuple[Key, tuple[Index, ...] | None, tuple[int, ...]]


def in_batch(
    key: Key, first: Index, size: int, *, count: int | None = None, axis: int = 0
) -> jax.Array:
    """Returns the key for a part of a batch, whose masks are those of its examples in the whole.

    With it, a function of this library treats the examples of its array as number `first` and the
    following of `size` examples. The masks of an example then do not depend on how the batch is cut
    into microbatches: each is the part of the whole batch's mask, bit for bit. This also holds for
    the noise, the subsets and the attention of this library. Arrays without examples, such as
    weights, get the same mask in every part, as they do with `key` itself. So do arrays in which
    all examples share a mask (`broadcast_dims`).

    The result is an ordinary typed key: `jax.random.split` and `fold_in`, `at_site` and Flax's
    streams derive keys for the same part from it. `jax.random.bits` and what is made from it, such
    as Flax's own dropout, differ from part to part, but depend on the cut.

    Args:
      key: PRNG key, typed or raw. The part of a key that has one is replaced.
      first: index of the part's first example, an integer or a (traced) integer scalar.
      size: number of examples in the whole batch.
      count: number of examples in the part. Required if some arrays have several rows for each
        example, one example after the other, such as ``(examples * tokens, features)``, or a
        single row that all examples share. None if all have one row for each example.
      axis: axis of the examples in the arrays of functions without an argument for it, such as 1 in
        time-major arrays of shape (time, examples, features).

    Returns:
      A typed key.

    Raises:
      TypeError: if an argument has the wrong type.
      ValueError: if the part is not inside the batch, or the key is missing or a batch of keys.
        Functions raise it if the rows of an array do not fit the part.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> from jdropout.keys import in_batch
      >>> key, x = jax.random.key(0), jnp.ones((4, 6))
      >>> whole = jdropout.dropout(key, x, 0.5)
      >>> parts = [
      ...     jdropout.dropout(in_batch(key, first, 4), x[first : first + 2], 0.5)
      ...     for first in (0, 2)
      ... ]
      >>> bool((jnp.concatenate(parts) == whole).all())
      True

    References:
      The mask law, in the documentation.
    """
    key = _checks.check_parent_key(key, "key")
    size = _values.check_positive("size", size)
    if size >= 2**32:
        raise ValueError(f"size must be below 2**32, got {size}. Cut it into several batches.")
    count = None if count is None else _values.check_positive("count", count)
    axis = _check_axis(axis)
    index = _check_first(first, size, 1 if count is None else count)
    if part_of(key):
        key, _ = apart(key)
    key = typed_key(key)
    return together(key, index, Part(jax.random.key_impl(key), size, count, axis))


def with_count(key: Any, count: int) -> Any:
    """The key with the number of examples in its part, if it has a part and lacks the number."""
    part = part_of(key)
    return replaced(key, part, examples=count) if part and part.examples is None else key


def in_part(key: jax.Array, batch: Any, microbatch: Any) -> jax.Array:
    """The key for the part of a batch that a whole model sees, if it is told one."""
    if batch is None:
        return key
    if not isinstance(batch, tuple) or len(batch) not in (2, 3):
        raise TypeError(
            f"batch must be (first, size) or (first, size, count), got {batch!r}. Pass the index "
            "of the first example, and the number of examples in the whole batch."
        )
    if isinstance(microbatch, jax.core.Tracer) or microbatch != 0:
        raise ValueError(
            f"microbatch must not be given with batch, got {microbatch!r}: masks would depend on "
            "how the batch is cut. Leave it out."
        )
    return in_batch(key, *batch[:2], count=batch[2] if len(batch) == 3 else None)


def at_axis(key: Any, axis: int | Callable[[Site], int], path: Site) -> Any:
    """The key for arrays with their examples on another axis, if it is for a part of a batch."""
    part = part_of(key)
    if part is None:
        return key
    number = _check_axis(axis(path) if callable(axis) else axis)
    return key if number == part.axis else replaced(key, part, axis=number)


def own_tiles(key: Key | None, rows: int, tiles: int) -> int:
    """How many of the equal tiles of a whole batch are in the part that a key is for.

    Args:
      key: a key; without a part it is for the whole.
      rows: number of rows along the batch axis.
      tiles: number of tiles in the whole batch.
    """
    part = part_of(key)
    if part is None:
        return tiles
    whole = part.size * _rows_per_example(part, rows)
    size, rest = divmod(whole, tiles)
    if rest or rows % size:
        raise ValueError(
            f"groups and tiles of examples are parts of the whole batch: {tiles} of {whole} "
            f"examples do not also divide its part of {rows}. Choose a number of them that each "
            "microbatch has an equal share of."
        )
    first = apart(cast("jax.Array", key))[1]
    if not isinstance(first, jax.core.Tracer) and int(first) * whole // part.size % size:
        raise ValueError(
            f"this part of the batch begins at row {int(first) * whole // part.size}, within a "
            f"group or tile of {size} examples. Begin it at a multiple."
        )
    return rows // size


def for_tiles(key: Key, rows: int, tiles: int) -> Key:
    """The key for arrays with one row for each tile; the arguments are as in `own_tiles`."""
    part = part_of(key)
    if part is None:
        return key
    original, first = apart(cast("jax.Array", key))
    rows_per_example = _rows_per_example(part, rows)
    tile = part.size * rows_per_example // tiles
    first = first * np.uint32(rows_per_example) // np.uint32(tile)
    return together(original, first, part._replace(size=tiles, examples=None))


def located(
    key: Key,
    part: Part,
    shape: tuple[int, ...],
    start: tuple[Index, ...] | None,
    whole: tuple[int, ...],
    batch_axis: int | None,
    shared: frozenset[int],
) -> _Block:
    """Places an array, which may be a block of a larger one, in the whole batch.

    Returns:
      The original key, and the block's start and the shape of the whole, as `check_block` does.
    """
    original, first = apart(cast("jax.Array", key), spent=True)
    axis = part.axis if batch_axis is KEYS_AXIS else batch_axis
    if axis is None or not shape:
        return original, start, whole
    if axis >= len(shape):
        raise ValueError(
            f"the key is for a batch along axis {axis}, but the array has shape {shape}. Name the "
            "axis of its examples: jdropout.keys.in_batch(..., axis=...), or batch_axis."
        )
    rows = whole[axis]
    if axis in shared or (rows == 1 and part.examples not in (None, 1)) or 0 in shape:
        return original, start, whole
    rows_per_example = _rows_per_example(part, rows)
    index: Index = first * np.uint32(rows_per_example)
    if not isinstance(index, jax.core.Tracer):
        index = int(index)
        if index + rows > part.size * rows_per_example:
            raise ValueError(
                f"the batch ends before the array: its {rows} rows along axis {axis} begin at row "
                f"{index} of {part.size * rows_per_example}. Check first and size of the batch"
                f"{_COUNT if part.examples is None else '.'}"
            )
    starts, sizes = list(start or [0] * len(shape)), list(whole)
    own = starts[axis]
    starts[axis] = index + (own.astype(jnp.uint32) if isinstance(own, jax.Array) else own)
    sizes[axis] = part.size * rows_per_example
    return original, *_checks.check_block(starts, sizes, shape)


_COUNT = (
    ", or tell it how many examples the part has: batch=(first, size, count), or in_batch(..., "
    "count=count)."
)


def _rows_per_example(part: Part, rows: int) -> int:
    if part.examples is None:
        if rows > part.size:
            raise ValueError(
                f"the array has {rows} rows along its batch axis, but by its key the batch has "
                f"{part.size} examples. Check the size{_COUNT}"
            )
        return 1
    if part.size * rows >= 2**32 * part.examples:
        raise ValueError(
            f"a batch has fewer than 2**32 rows, got {part.size} examples with {rows} rows for "
            f"{part.examples} of them. Cut it into smaller ones with keys of their own."
        )
    if rows % part.examples:
        raise ValueError(
            f"the array has {rows} rows along its batch axis, which is not a multiple of the "
            f"{part.examples} examples in its key's part of the batch. Name the axis of the "
            "examples: jdropout.keys.in_batch(..., axis=...), or batch_axis."
        )
    return rows // part.examples


def check_batch_axis(axis: Any) -> None:
    """Checks an axis, or a function from a path to one, before there is a part of a batch."""
    if not callable(axis) and (_values.as_integer(axis) is None or axis < 0):
        raise ValueError(
            f"batch_axis must be an integer of at least 0, or a function of a path that returns "
            f"one, got {axis!r}. Count from the first axis."
        )


def _check_axis(axis: Any) -> int:
    number = _values.as_integer(axis)
    if number is None or number < 0:
        raise ValueError(
            f"the axis of a batch must be an integer of at least 0, got {axis!r}. Count from the "
            "first axis."
        )
    return number


def _check_first(first: Any, size: int, count: int) -> jax.Array | np.uint32:
    number = _values.check_index("first", first)
    if isinstance(number, jax.Array):
        return number.astype(jnp.uint32)
    if not 0 <= number <= size - count:
        raise ValueError(
            f"first must be at least 0 and at most {size - count}, where a part of {count} "
            f"example(s) ends with the batch of {size}, got {number}. Count examples from 0."
        )
    return np.uint32(number)
