"""Standout: a network computes the probability of keeping each element."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _arrays, _checks, _noise, _values
from jdropout._typing import ArrayLike, Flag, Index, Key


def standout(
    key: Key | None,
    x: ArrayLike,
    preactivation: ArrayLike,
    *,
    alpha: float | jax.Array = 1.0,
    beta: float | jax.Array = 0.0,
    deterministic: Flag = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
) -> jax.Array:
    """Drops each element with its own probability, which a network computes.

    ``y = x * m`` with ``m ~ Bernoulli(q)`` and ``q = sigmoid(alpha * preactivation + beta)``;
    in evaluation ``y = x * q``. Nothing is divided by q. An element is kept where the law's
    uniform number, of 32 bits, is below q, so a constant q gives the mask
    ``keep_mask(key, 1 - q, x.shape, precision=32)``.

    In training the mask is a constant: the gradients of `preactivation`, `alpha` and `beta`
    through it are zero. In evaluation they are the gradients of the product. The backward pass
    stores the key and the preactivation, which a layer keeps anyway, and no mask.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``).
      x: array of any shape, with a real floating-point dtype; activations.
      preactivation: array that determines q, often the argument of the activation function; a
        floating-point scalar, or as many axes as `x`, each of size 1 or x's size.
      alpha: factor of the preactivation; a number or a (traced) floating-point scalar.
      beta: log(q / (1 - q)) at preactivation 0; a number or a (traced) floating-point scalar.
      deterministic: if True, return the expectation ``x * q``; a bool or a (traced) boolean
        scalar.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: if `x` or the preactivation is not a real floating-point array, or another
        argument has the wrong type.
      ValueError: if the preactivation does not broadcast to `x`, the key is missing or a batch
        of keys, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> a = jnp.array([[-2.0, -1.0, 1.0, 2.0]])
      >>> print(jdropout.standout(jax.random.key(0), jax.nn.relu(a), a))
      [[0. 0. 1. 2.]]
      >>> jdropout.standout(None, jax.nn.relu(a), a, deterministic=True)
      Array([[0.       , 0.       , 0.7310586, 1.761594 ]], dtype=float32)

    References:
      Ba and Frey, "Adaptive dropout for training deep neural networks" (NeurIPS 2013), sections
      3 and 4.
    """
    x = _checks.check_real("x", x)
    return _noise.apply_noise(
        "standout",
        _as_bits,
        _standing_out,
        key,
        x,
        (
            _arrays.check_parameter("preactivation", preactivation, jnp.shape(x)),
            _values.check_scalar("alpha", alpha),
            _values.check_scalar("beta", beta),
        ),
        evaluate=_times_probability,
        deterministic=deterministic,
        start=start,
        global_shape=global_shape,
        remake=False,
    )


def _as_bits(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    return bits


def _standing_out(x: jax.Array, bits: jax.Array, strength: Any) -> jax.Array:
    # 2^32 keeps everything, and does not fit into a uint32.
    threshold = jnp.round(lax.stop_gradient(_probability(strength)) * 2.0**32)
    always = threshold >= 2.0**32
    kept = always | (bits < jnp.where(always, 0, threshold).astype(jnp.uint32))
    return jnp.where(kept, x, 0)


def _times_probability(x: jax.Array, strength: Any) -> jax.Array:
    return x * _probability(strength)


def _probability(strength: Any) -> jax.Array:
    preactivation, alpha, beta = strength
    return jax.nn.sigmoid(alpha * preactivation + beta)
