"""R-Drop: how far two passes with different masks disagree."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jdropout import _arrays, _values
from jdropout._dtypes import wide_dtype
from jdropout._typing import ArrayLike


def r_drop_loss(logits_a: ArrayLike, logits_b: ArrayLike, *, axis: int = -1) -> jax.Array:
    """Measures how far two passes with different masks disagree: the R-Drop regulariser.

    ``(KL(a || b) + KL(b || a)) / 2`` between the distributions ``softmax(logits_a)`` and
    ``softmax(logits_b)``, one number per example. Computed as half the sum of
    ``(p_a - p_b) * (log p_a - log p_b)``, no term of which is negative. Equal logits give
    exactly 0 and gradient 0; large ones neither overflow nor give NaN. Gradients flow into both
    passes.

    The R-Drop loss is ``cross_entropy(logits_a) + cross_entropy(logits_b) + alpha * r_drop``,
    with a different key for each of the two passes over the same input.

    Args:
      logits_a: array of shape (..., classes, ...), with a real floating-point dtype.
      logits_b: array of the same shape. A class whose logit is -inf in both is ignored; -inf in
        one alone makes the loss infinite.
      axis: axis of the classes.

    Returns:
      An array without that axis, float32 (float64 for 64-bit logits).

    Raises:
      TypeError: if the logits are not floating-point arrays.
      ValueError: if the shapes differ, or the axis does not exist.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> x, root = jnp.array([[2.0, 1.0, 0.0]]), jax.random.key(0)
      >>> a, b = (jdropout.dropout(key, x, 0.5) for key in jax.random.split(root))
      >>> print(jdropout.r_drop_loss(a, b), jdropout.r_drop_loss(a, a))
      [0.09964201] [0.]

    References:
      Liang, Wu, Li, Wang, Meng, Qin, Chen, Zhang and Liu, "R-Drop: regularized dropout for
      neural networks" (NeurIPS 2021), section 2.1, equations 2 to 4.
    """
    a, b = _check_logits(logits_a, logits_b)
    return _divergence(a, b, _values.check_axis("axis", axis, a.ndim))


@functools.partial(jax.jit, static_argnums=2)
def _divergence(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    wide = wide_dtype(a, b)
    log_a, log_b = (jax.nn.log_softmax(x.astype(wide), axis=axis) for x in (a, b))
    # For a class that is impossible in both, -inf - -inf is NaN, and so is its gradient.
    impossible = jnp.isneginf(log_a) & jnp.isneginf(log_b)
    difference = jnp.where(impossible, 0, log_a) - jnp.where(impossible, 0, log_b)
    terms = (jnp.exp(log_a) - jnp.exp(log_b)) * difference
    return jnp.where(jnp.isinf(difference), jnp.inf, terms).sum(axis) / 2


def _check_logits(logits_a: Any, logits_b: Any) -> tuple[jax.Array, jax.Array]:
    a = _arrays.check_floating_array("logits_a", logits_a)
    b = _arrays.check_floating_array("logits_b", logits_b)
    if a.shape != b.shape:
        raise ValueError(
            f"logits_a and logits_b must have the same shape, got {a.shape} and {b.shape}. Compute "
            "both with the same model and inputs."
        )
    return a, b
