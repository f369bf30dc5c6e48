"""Biases and masks of attention that depend on positions, evaluated block by block.

Pass them to `jdropout.dot_product_attention` as ``bias_fn`` and ``mask_fn``. Nothing of the size of
the attention matrix is stored, and blocks that a mask leaves empty are skipped.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _arrays, _values
from jdropout._typing import ArrayLike

__all__ = [
    "PositionFunction",
    "alibi",
    "alibi_slopes",
    "document",
    "prefix_lm",
    "relative_bias",
    "sliding_window",
]


@jax.tree_util.register_pytree_node_class
class PositionFunction:
    """A function of the positions of a query and a key, with its arrays.

    It is a pytree of its arrays, so it can be made inside or outside of a jitted function, and
    gradients with respect to the arrays are exact.

    Args:
      function: called as ``function(query_position, key_position, head, *arrays)`` with three
        int32 scalars; returns a scalar, floating-point for a bias and boolean for a mask. It is
        vectorised with `jax.vmap`. It must be finite, with finite derivatives, at all positions,
        also where a mask forbids to attend.
      *arrays: arrays of any shape.
      key_range: for a mask, the keys that some of several neighbouring queries may attend to:
        ``key_range(first_query, last_query, *arrays)`` returns the first and the last one, and
        blocks outside are skipped. None finds the blocks to skip by evaluating the mask at all
        positions, once more in each pass.
      per_example: if True, every array has a leading batch axis, and the functions get the
        arrays of their example.

    Example:
      >>> import jax.numpy as jnp, jdropout
      >>> from jdropout.by_position import PositionFunction
      >>> def nearby(query, key, head, strength):
      ...     return -strength[head] * jnp.log1p(abs(query - key))
      >>> bias = PositionFunction(nearby, jnp.ones(4))
      >>> x = jnp.ones((2, 16, 4, 8))
      >>> y = jdropout.dot_product_attention(
      ...     x, x, x, dropout_key=None, dropout_rate=0.0, bias_fn=bias
      ... )
      >>> y.shape
      (2, 16, 4, 8)

    References:
      He et al., "FlexAttention: a programming model for generating optimized attention kernels"
      (2024), for functions of positions in place of arrays.
    """

    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    key_range: Callable[..., Any] | None
    per_example: bool

    def __init__(
        self,
        function: Callable[..., Any],
        *arrays: ArrayLike,
        key_range: Callable[..., Any] | None = None,
        per_example: bool = False,
    ) -> None:
        _values.check_function("function", function)
        if key_range is not None:
            _values.check_function("key_range", key_range)
        self.function = function
        self.arrays = arrays
        self.key_range = key_range
        self.per_example = _values.check_flag("per_example", per_example) and bool(arrays)

    def tree_flatten(self) -> tuple[Any, Any]:
        """Returns the arrays, and what is static."""
        return self.arrays, (self.function, self.key_range, self.per_example)

    @classmethod
    def tree_unflatten(cls, static: Any, arrays: Any) -> "PositionFunction":
        """Undoes `tree_flatten`, for leaves of any type."""
        made = object.__new__(cls)
        made.arrays = tuple(arrays)
        made.function, made.key_range, made.per_example = static
        return made


_HEAD_BITS = 20
"""More heads than any model has are a mistake, and their slopes would take minutes."""

# --- biases -------------------------------------------------------------------------------


def alibi(slopes: ArrayLike | int) -> PositionFunction:
    """Makes the bias ``-slope * |query - key|`` of attention with linear biases.

    Args:
      slopes: array of one slope per head, which may be learned; or the number of heads, for
        `alibi_slopes`.

    Returns:
      A `PositionFunction` for ``bias_fn``.

    Raises:
      TypeError: if `slopes` is neither a whole number nor a floating-point array.
      ValueError: if it has another shape than (heads,), or there is no head.

    Example:
      >>> import jax.numpy as jnp, jdropout
      >>> from jdropout import by_position
      >>> x = jnp.ones((2, 16, 4, 8))
      >>> y = jdropout.dot_product_attention(
      ...     x, x, x, dropout_key=None, dropout_rate=0.0, is_causal=True,
      ...     bias_fn=by_position.alibi(4),
      ... )

    References:
      Press, Smith and Lewis, "Train short, test long: attention with linear biases enables input
      length extrapolation" (2022), section 3.
    """
    number = (
        None
        if _values.as_integer(slopes) is None
        else _values.check_size("slopes", slopes, _HEAD_BITS)
    )
    array = _arrays.check_floating_array(
        "slopes", slopes if number is None else alibi_slopes(number)
    )
    if array.ndim != 1:
        raise ValueError(
            f"slopes must have one number per head, got shape {array.shape}. Pass an "
            "array of one axis."
        )
    return PositionFunction(_alibi, array)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Returns the slopes of the paper: ``2 ** (-8 * i / n)`` for head i = 1, ..., n.

    Args:
      num_heads: number of heads. If it is no power of two, slopes of twice the next smaller power
        fill up those of that power, as in the authors' code.

    Returns:
      A float32 array of shape (num_heads,).

    Raises:
      TypeError: if the number is no whole number.
      ValueError: if it is below 1.

    Example:
      >>> from jdropout import by_position
      >>> by_position.alibi_slopes(4)
      array([0.25      , 0.0625    , 0.015625  , 0.00390625], dtype=float32)

    References:
      Press, Smith and Lewis, "Train short, test long" (2022), section 3.
    """
    number = _values.check_size("num_heads", num_heads, _HEAD_BITS)
    power = 2 ** (number.bit_length() - 1)
    exact = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-4 * np.arange(1, 2 * (number - power), 2) / power)
    return np.concatenate([exact, between]).astype(np.float32)


def relative_bias(
    table: ArrayLike, *, bidirectional: bool = True, max_distance: int = 128
) -> PositionFunction:
    """Makes the learned bias of T5: one number per head and bucket of ``key - query``.

    Half of the buckets hold one distance each, the others grow geometrically up to
    `max_distance`; all larger distances share the last one.

    Args:
      table: floating-point array of shape (buckets, heads), learned.
      bidirectional: if True, keys before and after a query have different buckets, half of them
        each; else all keys after it share the bucket of distance 0, as in a causal decoder.
      max_distance: distance from which all keys share a bucket.

    Returns:
      A `PositionFunction` for ``bias_fn``.

    Raises:
      TypeError: if an argument has the wrong type or dtype.
      ValueError: if the table has other axes, or there are too few buckets, or a `max_distance`
        that is not above half of the buckets of a direction.

    Example:
      >>> import jax.numpy as jnp, jdropout
      >>> from jdropout import by_position
      >>> x = jnp.ones((2, 16, 4, 8))
      >>> y = jdropout.dot_product_attention(
      ...     x, x, x, dropout_key=None, dropout_rate=0.0, scale=1.0,
      ...     bias_fn=by_position.relative_bias(jnp.zeros((32, 4))),
      ... )

    References:
      Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text
      transformer" (2020), section 2.1.
    """
    array = _arrays.check_floating_array("table", table)
    directions = 2 if _values.check_flag("bidirectional", bidirectional) else 1
    distance = _values.check_size("max_distance", max_distance)
    if array.ndim != 2 or array.shape[0] % directions or array.shape[0] < 2 * directions:
        raise ValueError(
            "table must have the axes (buckets, heads), with an even number of buckets of at least "
            f"4, or at least 2 if not bidirectional, got shape {array.shape}. Use 32 buckets."
        )
    buckets = array.shape[0] // directions
    if distance <= buckets // 2:
        raise ValueError(
            f"max_distance must be above {buckets // 2}, the number of buckets with one distance, "
            f"got {distance}. Use a larger distance or fewer buckets."
        )
    function = _bias_of_two_directions if directions == 2 else _bias_of_one_direction
    return PositionFunction(function, array, _bucket_starts(buckets, distance))


def _alibi(query: jax.Array, key: jax.Array, head: jax.Array, slopes: jax.Array) -> jax.Array:
    return -slopes[head] * abs(query - key).astype(slopes.dtype)


def _bias_of_one_direction(
    query: jax.Array, key: jax.Array, head: jax.Array, table: jax.Array, starts: jax.Array
) -> jax.Array:
    return table[_bucket(jnp.maximum(query - key, 0), starts), head]


def _bias_of_two_directions(
    query: jax.Array, key: jax.Array, head: jax.Array, table: jax.Array, starts: jax.Array
) -> jax.Array:
    bucket = _bucket(abs(query - key), starts)
    return table[bucket + jnp.where(key > query, table.shape[0] // 2, 0), head]


def _bucket(distance: jax.Array, starts: jax.Array) -> jax.Array:
    return (distance >= starts).sum(dtype=jnp.int32)


def _bucket_starts(buckets: int, max_distance: int) -> np.ndarray:
    """The smallest distance of every bucket but the first."""
    exact = buckets // 2
    growth = (max_distance / exact) ** (1 / (buckets - exact)) if exact else 0.0
    # A little less than the exact power, so that a whole number is not rounded up to the next.
    grown = [math.ceil(exact * growth**i - 1e-6) for i in range(1, buckets - exact)]
    return np.array([*range(1, exact + 1), *grown], np.int32)


# --- masks --------------------------------------------------------------------------------


def sliding_window(before: int | ArrayLike, after: int | ArrayLike = 0) -> PositionFunction:
    """Makes the mask of a window around each query: ``query - before <= key <= query + after``.

    In contrast to ``local_window_size`` the sizes may be traced, and it can be combined with other
    masks.

    Args:
      before: number of keys before the query's position.
      after: number of keys after it.

    Returns:
      A `PositionFunction` for ``mask_fn``.

    Raises:
      TypeError: if a size is no whole number.

    Example:
      >>> from jdropout import by_position
      >>> mask = by_position.sliding_window(128)

    References:
      Beltagy, Peters and Cohan, "Longformer: the long-document transformer" (2020), section 3.1.
    """
    sizes = (_check_integers("before", before, 0), _check_integers("after", after, 0))
    return PositionFunction(_in_window, *sizes, key_range=_window_range)


def prefix_lm(prefix_length: int | ArrayLike) -> PositionFunction:
    """Makes the mask of a prefix language model: all see the prefix, and what comes before them.

    Args:
      prefix_length: number of tokens of the prefix, or an array of shape (B,) with one for each
        example.

    Returns:
      A `PositionFunction` for ``mask_fn``.

    Raises:
      TypeError: if the length is no whole number.
      ValueError: if it has more than one axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import by_position
      >>> mask = by_position.prefix_lm(jnp.array([3, 5]))

    References:
      Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text
      transformer" (2020), section 3.2.1.
    """
    length = _check_integers("prefix_length", prefix_length, 1)
    return PositionFunction(
        _in_prefix, length, key_range=_prefix_range, per_example=jnp.ndim(length) == 1
    )


def document(segment_ids: ArrayLike) -> PositionFunction:
    """Makes the mask of packed documents: a query attends to the keys of its own document.

    ``query_segment_ids`` of `jdropout.dot_product_attention` does the same for queries and keys
    that are parts of a sequence; this one can be evaluated at any position of the whole.

    Args:
      segment_ids: array of integers of shape (length,), or (B, length) for each example; tokens
        with equal numbers belong together.

    Returns:
      A `PositionFunction` for ``mask_fn``.

    Raises:
      TypeError: if the array has no integer dtype.
      ValueError: if it has no axis or more than two.

    Example:
      >>> import jax.numpy as jnp
      >>> from jdropout import by_position
      >>> mask = by_position.document(jnp.array([0, 0, 0, 1, 1, 2]))

    References:
      Krell et al., "Efficient sequence packing without cross-contamination" (2021), section 3.2.
    """
    ids = _check_integers("segment_ids", segment_ids, 2)
    if ids.ndim == 0:
        raise ValueError(
            "segment_ids must have one number per position, got a scalar. Pass an array."
        )
    return PositionFunction(_in_document, ids, per_example=ids.ndim == 2)


def _in_window(query: Any, key: Any, head: Any, before: Any, after: Any) -> Any:
    return (key >= query - before) & (key <= query + after)


def _window_range(first: Any, last: Any, before: Any, after: Any) -> Any:
    return first - before, last + after


def _in_prefix(query: Any, key: Any, head: Any, length: Any) -> Any:
    return (key <= query) | (key < length)


def _prefix_range(first: Any, last: Any, length: Any) -> Any:
    return jnp.zeros_like(first), jnp.maximum(last, length - 1)


def _in_document(query: Any, key: Any, head: Any, ids: Any) -> Any:
    return ids[query] == ids[key]


def _check_integers(name: str, numbers: Any, most_axes: int) -> jax.Array:
    array = _arrays.as_array(name, numbers)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"{name} must be whole numbers, got dtype {array.dtype}. Convert it with "
            f"{name}.astype(jnp.int32)."
        )
    if array.ndim > most_axes:
        raise ValueError(
            f"{name} must have at most {most_axes} axes, got shape {array.shape}. Reshape it."
        )
    return array
