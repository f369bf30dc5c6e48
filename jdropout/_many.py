"""Many masks for one input: their average, and how far two of them disagree."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _checks
from jdropout._typing import ArrayLike, Key
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


def sum_dtype(y: Any) -> np.dtype:
    """The dtype to add up arrays of the dtype of one."""
    _checks.check_averaged(y.dtype)
    return y.dtype if jnp.finfo(y.dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _mean(total: jax.Array, count: int, like: Any) -> jax.Array:
    return (total / np.asarray(count, total.dtype)).astype(like.dtype)


def r_drop_loss(logits_a: ArrayLike, logits_b: ArrayLike, *, axis: int = -1) -> jax.Array:
    """How far two passes with different masks disagree: R-Drop's regulariser.

    ``(KL(a || b) + KL(b || a)) / 2`` of the distributions ``softmax(logits_a)`` and
    ``softmax(logits_b)``, one number for each example, computed as half the sum of
    ``(p_a - p_b) * (log p_a - log p_b)``, no term of which is negative. Equal logits give exactly
    0 and gradient 0; large ones neither overflow nor give NaN. Both passes are differentiated.

    The loss of R-Drop is ``cross_entropy(logits_a) + cross_entropy(logits_b) + alpha * r_drop``,
    with two keys for the two passes over the same input.

    Args:
      logits_a: array of shape (..., classes, ...), of a real floating-point dtype.
      logits_b: array of the same shape. A class whose logit is -inf in both has no part in it; in
        one alone it makes the loss infinite.
      axis: the axis of the classes.

    Returns:
      An array without that axis, float32 (float64 for 64-bit logits).

    Raises:
      TypeError: if logits are no floating-point arrays.
      ValueError: if shapes differ, or the axis does not exist.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> x, root = jnp.array([[2.0, 1.0, 0.0]]), jax.random.key(0)
      >>> a, b = (jdropout.dropout(key, x, 0.5) for key in jax.random.split(root))
      >>> print(jdropout.r_drop_loss(a, b), jdropout.r_drop_loss(a, a))
      [0.09964201] [0.]

    References:
      Liang, Wu, Li, Wang, Meng, Qin, Chen, Zhang and Liu, "R-Drop: regularized dropout for neural
      networks" (NeurIPS 2021), section 2.1, equations 2 to 4.
    """
    a, b = _checks.check_logits(logits_a, logits_b)
    return _divergence(a, b, _checks.check_axis("axis", axis, a.ndim))


@functools.partial(jax.jit, static_argnums=2)
def _divergence(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    wide = jnp.float64 if jnp.float64 in (a.dtype, b.dtype) else jnp.float32
    log_a, log_b = (jax.nn.log_softmax(x.astype(wide), axis=axis) for x in (a, b))
    # Where both are impossible their difference would be NaN, and so would its gradient.
    impossible = jnp.isneginf(log_a) & jnp.isneginf(log_b)
    difference = jnp.where(impossible, 0, log_a) - jnp.where(impossible, 0, log_b)
    terms = (jnp.exp(log_a) - jnp.exp(log_b)) * difference
    return jnp.where(jnp.isinf(difference), jnp.inf, terms).sum(axis) / 2
