"""Bits that are the same in every run: of masks, and of whole trainings."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdropout._checks import type_name
from jdropout._dropout import keep_mask
from jdropout._typing import Index, Key, Rate
from jdropout.testing import _compare
from jdropout.testing._checks import check_any_leaves


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
    """A short text that stands for every bit of a mask, to be written into a test.

    It is the same on every device and sharding, and with every version of JAX and of this library.
    Two different masks have the same one by chance once in 2**64.

    Args:
      key: a PRNG key, as for `keep_mask`; not a traced one.
      rate: probability of dropping, as for `keep_mask`.
      shape: shape of the mask.
      broadcast_dims: axes along which all elements share their fate.
      start: index of the block's first element in the whole mask.
      global_shape: shape of the whole mask.
      precision: bits of the rate, as for `keep_mask`.

    Returns:
      The first 16 hexadecimal digits of the SHA-256 of the shape, as in ``2,8:``, followed by the
      bits in row-major order: the first one is the highest of its byte, zeros fill the last byte.

    Raises:
      TypeError: as for `keep_mask`.
      ValueError: as for `keep_mask`.

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
    """Asserts that a training ends in the same bits every time.

    What ``train`` returns is compared leaf by leaf: path, dtype, shape and all bits, so that -0.0
    is not 0.0, and a NaN equals itself. Typed keys are compared by their words.

    Args:
      train: a function without arguments that trains from the beginning, and returns a pytree:
        parameters, optimizer state, losses.
      runs: how often to call it, at least 2.
      clear_caches: whether every run compiles everything anew, after ``jax.clear_caches()``.

    Raises:
      AssertionError: if a run differs from the first one; names the leaf and the element.
      TypeError: if a leaf is neither an array, nor a number, nor a string.
      ValueError: if there are no leaves, or ``runs`` is less than 2.

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
      Bouthillier, Laurent and Vincent, "Unreproducible research is reproducible", ICML 2019, for
      what else changes from one training to the next.
    """
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
            raise AssertionError(f"train() is not reproducible: in run {run}, {difference}.")


def _check_runs(runs: Any) -> None:
    if isinstance(runs, bool) or not isinstance(runs, int | np.integer):
        raise TypeError(
            f"runs must be an integer, got {runs!r} of type {type_name(runs)}."
            " Convert it with int(runs)."
        )
    if runs < 2:
        raise ValueError(
            f"runs must be at least 2, got {runs}: one run has nothing to equal. Pass 2 or more."
        )
