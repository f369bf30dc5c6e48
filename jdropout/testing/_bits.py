"""Asserts that masks and whole trainings have the same bits in every run."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdropout._dropout import keep_mask
from jdropout._typing import Index, Key, Rate
from jdropout._values import check_flag, check_function, type_name
from jdropout.testing import _compare
from jdropout.testing._checks import check_any_leaves
from jdropout.testing._explain import explain, record_small


def mask_fingerprint(
    key: Key | None,
    rate: Rate,
    shape: Sequence[int],
    *,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> str:
    """Returns a short text that stands for every bit of a mask, to write into a test.

    It is the same on every device and sharding, and with every version of JAX and of this
    library. Two different masks have the same fingerprint by chance once in 2**64.

    Args:
      key: PRNG key, typed or raw; not a traced one. May be None for a static rate of 0 or 1.
      rate: probability of dropping, in [0, 1]; a number or a (traced) floating-point scalar.
      shape: shape of the mask; of the part at `start` if `global_shape` is given.
      broadcast_dims: axes along which the mask is shared.
      start: index of the part's first element within a mask of `global_shape`, for code that
        sees one part of it, as in `shard_map`.
      global_shape: shape of the whole mask; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      The first 16 hexadecimal digits of the SHA-256 of the shape, written as in ``2,8:``,
      followed by the bits in row-major order: the first bit is the highest of its byte, and
      zeros fill the last byte.

    Raises:
      TypeError: if an argument has the wrong type, such as a boolean rate.
      ValueError: if the rate is not a scalar in [0, 1], the key is missing or a batch of keys,
        an axis does not exist, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax
      >>> from jdropout.testing import mask_fingerprint
      >>> mask_fingerprint(jax.random.key(0), 0.5, (2, 8))
      'aae942fea3edaa67'

    References:
      The mask law, in the documentation; FIPS 180-4, "Secure hash standard", for SHA-256.
    """
    mask = keep_mask(
        key,
        rate,
        shape,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=precision,
    )
    head = ",".join(map(str, mask.shape)) + ":"
    return hashlib.sha256(head.encode() + np.packbits(np.asarray(mask)).tobytes()).hexdigest()[:16]


def assert_reproducible(
    train: Callable[[], Any], *, runs: int = 2, clear_caches: bool = False
) -> None:
    """Asserts that a training run ends with the same bits every time.

    The results of `train` are compared leaf by leaf: path, dtype, shape and all bits, so -0.0
    differs from 0.0 and a NaN equals itself. Typed keys are compared by their words.

    Args:
      train: function without arguments that trains from scratch and returns a pytree:
        parameters, optimizer state, losses.
      runs: number of times to call it, at least 2.
      clear_caches: if True, call ``jax.clear_caches()`` before every run, so that each compiles
        everything again.

    Raises:
      AssertionError: if a run differs from the first one; names the leaf and the element, and the
        line if `train` can be traced as a whole, in which case it is recorded twice more.
      TypeError: if a leaf is not an array, a number or a string.
      ValueError: if there are no leaves, or `runs` is less than 2.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> from jdropout.keys import site_key
      >>> from jdropout.testing import assert_reproducible
      >>> def train():
      ...     root, w = jax.random.key(0), jnp.ones(8)
      ...     for step in range(3):
      ...         w += jdropout.dropout(site_key(root, step=step, site="w"), w, 0.5)
      ...     return {"w": w}
      >>> assert_reproducible(train)

    References:
      Bouthillier, Laurent and Vincent, "Unreproducible research is reproducible" (ICML 2019),
      for what else changes from one training run to the next.
    """
    check_function("train", train)
    clear_caches = check_flag("clear_caches", clear_caches)
    _check_runs(runs)
    first: dict[str, _compare.Leaf] | None = None
    for run in range(1, runs + 1):
        if clear_caches:
            jax.clear_caches()
        result = _compare.on_host(train())
        if first is None:
            first = result
            check_any_leaves("train()", first)
        elif difference := _compare.difference(first, result, "in run 1"):
            line = explain(
                functools.partial(record_small, train), functools.partial(record_small, train)
            )
            raise AssertionError(f"train() is not reproducible: in run {run}, {difference}.{line}")


def _check_runs(runs: Any) -> None:
    if isinstance(runs, bool) or not isinstance(runs, int | np.integer):
        raise TypeError(
            f"runs must be an integer, got {runs!r} of type {type_name(runs)}."
            " Convert it with int(runs)."
        )
    if runs >= 2**31:
        raise ValueError(f"runs must be below 2**31, got {runs}. Two runs usually tell.")
    if runs < 2:
        raise ValueError(
            f"runs must be at least 2, got {runs}: one run has nothing to equal. Pass 2 or more."
        )
