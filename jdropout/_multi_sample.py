"""The average of a function over several masks."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _checks
from jdropout._dtypes import sum_dtype
from jdropout._typing import Key
from jdropout.keys import at_site

_Result = TypeVar("_Result")


def multi_sample(
    fn: Callable[[Any, Any], _Result],
    key: Key,
    x: Any,
    num_samples: int,
    *,
    batch_size: int | None = None,
) -> _Result:
    """Averages a function over several masks: ``mean over i of fn(at_site(key, i), x)``.

    The mean is that of one mask, and a linear function's variance from dropout is ``num_samples``
    times smaller. For multi-sample dropout of a classifier, `fn` is dropout, the last layer and
    the loss, which costs little next to the layers that made `x`.

    All samples at once (``batch_size=None``) take the time of one batched evaluation, and the
    memory of all. With a batch size so many are computed together, one batch after the other in a
    `jax.lax.scan` whose backward pass computes `fn` again: the memory is that of one batch. The
    samples of a batch are under `jax.vmap`; with a batch size of 1 there is none, so that a
    `layer_drop` in `fn` really skips.

    Args:
      fn: a function of a key and `x` that returns an array or a tree of arrays, of floating-point
        or complex dtypes; without side effects. It is traced once.
      key: a PRNG key, as for `dropout`. Sample i has the key ``jdropout.keys.at_site(key, i)``,
        whatever the batch size.
      x: what `fn` takes: an array, a tree, or anything else.
      num_samples: number of masks, at least 1.
      batch_size: how many samples to compute together, at most; None for all. Batches are made
        equally large; where that does not come out even, the last one repeats a sample, which then
        does not count.

    Returns:
      The mean, of the structure, shapes and dtypes that `fn` returns; summed in float32 or wider.

    Raises:
      TypeError: if a number is no integer, `fn` is no function or returns integers.
      ValueError: if a number is below 1, or as for `jdropout.keys.at_site`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> def head(key, x):
      ...     return jdropout.dropout(key, x, 0.5)
      >>> jdropout.multi_sample(head, jax.random.key(0), jnp.ones(6), 4)
      Array([1.5, 1.5, 1. , 0.5, 1. , 0.5], dtype=float32)

    References:
      Inoue, "Multi-sample dropout for accelerated training and better generalization" (2019),
      section 3, which averages the losses of the samples.
    """
    _checks.check_function("fn", fn)
    count = _checks.check_positive("num_samples", num_samples)
    most = count if batch_size is None else _checks.check_positive("batch_size", batch_size)
    _checks.check_parent_key(key, "key")

    def sample(index: Any) -> _Result:
        return fn(at_site(key, index), x)

    num_batches = -(-count // most)
    size = -(-count // num_batches)
    if num_batches == 1:
        samples = jax.vmap(sample)(np.arange(count, dtype=np.int32))
        sums = jax.tree.map(lambda y: y.sum(0, dtype=sum_dtype(y)), samples)
        return cast("_Result", jax.tree.map(lambda s, y: _mean(s, count, y), sums, samples))

    # Compiled, so that the shapes of its result and the loop share one trace of it.
    sample = jax.jit(sample)
    shapes = jax.eval_shape(sample, jax.ShapeDtypeStruct((), jnp.int32))

    def add(sums: Any, first: jax.Array) -> tuple[Any, None]:
        index = first + np.arange(size, dtype=np.int32)
        if size == 1:
            return jax.tree.map(lambda s, y: s + y.astype(s.dtype), sums, sample(first)), None
        samples = jax.vmap(sample)(jnp.minimum(index, np.int32(count - 1)))

        def add_counted(total: jax.Array, y: jax.Array) -> jax.Array:
            counted = jnp.expand_dims(index < count, range(1, y.ndim))
            return total + jnp.where(counted, y.astype(total.dtype), 0).sum(0)

        return jax.tree.map(add_counted, sums, samples), None

    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, sum_dtype(y)), shapes)
    firsts = np.arange(num_batches, dtype=np.int32) * np.int32(size)
    sums, _ = lax.scan(jax.checkpoint(add, prevent_cse=False), zeros, firsts)
    return cast("_Result", jax.tree.map(lambda s, y: _mean(s, count, y), sums, shapes))


def _mean(total: jax.Array, count: int, like: Any) -> jax.Array:
    return (total / np.asarray(count, total.dtype)).astype(like.dtype)
