"""The average of a function over several masks."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _arrays, _checks, _values
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

    The mean is the same as with one mask; for a linear function, the variance due to dropout is
    ``num_samples`` times smaller. For multi-sample dropout of a classifier, `fn` is dropout,
    the last layer and the loss, which are cheap compared with the layers that produced `x`.

    Computing all samples at once (``batch_size=None``) takes the time of one batched
    evaluation, and memory for all of them. With a batch size, the batches run one after the
    other in a `jax.lax.scan` whose backward pass recomputes `fn`, so the memory is one batch's.
    The samples of a batch run under `jax.vmap`; a batch size of 1 avoids it, so a `layer_drop`
    in `fn` does skip its layer.

    Args:
      fn: function of a key and `x` that returns an array, or a tree of arrays, with
        floating-point or complex dtypes; without side effects. It is traced once.
      key: PRNG key, typed or raw; use a new one for every call. Sample i gets the key
        ``jdropout.keys.at_site(key, i)``, whatever the batch size.
      x: second argument of `fn`: an array, a tree, or anything else.
      num_samples: number of masks, at least 1.
      batch_size: largest number of samples to compute together; None for all. Batches are
        equally large; if that does not divide evenly, the last one repeats a sample, which is
        not counted.

    Returns:
      The mean, with the structure, shapes and dtypes that `fn` returns; summed in float32 or
      wider.

    Raises:
      TypeError: if a number is not an integer, or `fn` is not a function or returns integers.
      ValueError: if a number is below 1, or the key is missing or a batch of keys.

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
    _values.check_function("fn", fn)
    count = _values.check_size("num_samples", num_samples)
    most = count if batch_size is None else _values.check_positive("batch_size", batch_size)
    _checks.check_parent_key(key, "key")

    def sample(index: Any) -> _Result:
        return fn(at_site(key, index), x)

    num_batches = -(-count // most)
    size = -(-count // num_batches)
    if num_batches == 1:
        samples = jax.vmap(sample)(np.arange(count, dtype=np.int32))
        _arrays.check_averaged(samples)
        sums = jax.tree.map(lambda y: y.sum(0, dtype=sum_dtype(y)), samples)
        return cast("_Result", jax.tree.map(lambda s, y: _mean(s, count, y), sums, samples))

    # jit makes eval_shape and the loop share one trace.
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

    _arrays.check_averaged(shapes)
    zeros = jax.tree.map(lambda y: jnp.zeros_like(y, dtype=sum_dtype(y)), shapes)
    firsts = np.arange(num_batches, dtype=np.int32) * np.int32(size)
    sums, _ = lax.scan(jax.checkpoint(add, prevent_cse=False), zeros, firsts)
    return cast("_Result", jax.tree.map(lambda s, y: _mean(s, count, y), sums, shapes))


def _mean(total: jax.Array, count: int, like: Any) -> jax.Array:
    return (total / np.asarray(count, total.dtype)).astype(like.dtype)
