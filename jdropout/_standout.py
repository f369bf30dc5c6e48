"""Standout: every element has its own probability of being kept, given by a network."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdropout import _checks, _noise
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
    """Dropout in which every element has its own probability of being kept, by a network.

    ``y = x * m`` with ``m ~ Bernoulli(q)``, ``q = sigmoid(alpha * preactivation + beta)``, and in
    evaluation ``y = x * q``; nothing is divided. Kept is where the law's uniform number, of 32
    bits, is below q, so that a constant q has the mask ``keep_mask(key, 1 - q, x.shape,
    precision=32)``.

    In training m is a constant: preactivation, alpha and beta have a gradient of zero through it.
    In evaluation they have that of the product. The backward pass stores the key and the
    preactivation, which a layer has anyway, and no mask.

    Args:
      key: a PRNG key, as for `dropout`.
      x: array of any shape, of a real floating-point dtype; activations.
      preactivation: what decides on q, often the argument of the activation function: a
        floating-point scalar, or an array with as many axes as x, each of size 1 or of x's size.
      alpha: factor of the preactivation: a number, or a (traced) floating-point scalar.
      beta: log(q / (1 - q)) at preactivation 0, likewise.
      deterministic: whether to return the expectation; may be traced.
      start: as for `dropout`.
      global_shape: as for `dropout`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: if x or the preactivation is not a real floating-point array, or as for `dropout`.
      ValueError: if the preactivation does not broadcast to x, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> a = jnp.array([[-2.0, -1.0, 1.0, 2.0]])
      >>> print(standout(jax.random.key(0), jax.nn.relu(a), a))
      [[0. 0. 1. 2.]]
      >>> standout(None, jax.nn.relu(a), a, deterministic=True)
      Array([[0.       , 0.       , 0.7310586, 1.761594 ]], dtype=float32)

    References:
      Ba and Frey, "Adaptive dropout for training deep neural networks" (NeurIPS 2013), sections 3
      and 4.
    """
    _checks.check_real("x", x)
    return _noise.noisy(
        "standout",
        _as_bits,
        _standing_out,
        key,
        x,
        (
            _checks.check_parameter("preactivation", preactivation, jnp.shape(x)),
            _checks.check_scalar("alpha", alpha),
            _checks.check_scalar("beta", beta),
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
    # 2^32 is no uint32: there everything is kept.
    threshold = jnp.round(lax.stop_gradient(_probability(strength)) * 2.0**32)
    always = threshold >= 2.0**32
    kept = always | (bits < jnp.where(always, 0, threshold).astype(jnp.uint32))
    return jnp.where(kept, x, 0)


def _times_probability(x: jax.Array, strength: Any) -> jax.Array:
    return x * _probability(strength)


def _probability(strength: Any) -> jax.Array:
    preactivation, alpha, beta = strength
    return jax.nn.sigmoid(alpha * preactivation + beta)
