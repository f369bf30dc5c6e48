"""Dropout as an Equinox module."""

try:
    import equinox as _eqx
except ImportError as _error:
    raise ImportError(
        "jdropout.equinox needs Equinox. Install it with: pip install 'jdropout[equinox]'"
    ) from _error

import jax

from jdropout._checks import check_deterministic, check_rate
from jdropout._dropout import dropout
from jdropout._typing import Flag, Key, Rate

__all__ = ["Dropout"]


class Dropout(_eqx.Module):
    """Drop-in replacement for `equinox.nn.Dropout` that uses this library's mask law.

    Constructor, call and attributes are Equinox's own, so `equinox.nn.inference_mode` switches it
    off. Under `jax.vmap` over examples each needs a key of its own, as everywhere in Equinox.

    Attributes:
      p: probability of dropping, a number in [0, 1] or a (traced) floating-point scalar.
      inference: if True, return the input unchanged.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.equinox
      >>> layer = jdropout.equinox.Dropout(0.5)
      >>> layer(jnp.ones(8), key=jax.random.key(0))
      Array([0., 2., 2., 2., 2., 2., 0., 2.], dtype=float32)

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 4.
    """

    p: Rate
    inference: Flag

    def __init__(self, p: Rate = 0.5, inference: Flag = False) -> None:
        check_rate(p, "p")
        check_deterministic(inference, "inference")
        self.p = p
        self.inference = inference

    def __call__(
        self, x: jax.Array, *, key: Key | None = None, inference: Flag | None = None
    ) -> jax.Array:
        """Drops and scales `x`; returns it unchanged in inference.

        Args:
          x: array of any shape, with a floating-point or complex dtype.
          key: PRNG key, typed or raw; a new one for every call. May be None in inference, or at a
            static rate of 0 or 1.
          inference: overrides the attribute; a bool or a (traced) boolean scalar.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ValueError: if the rate is outside [0, 1], or the key is missing or a batch of keys.
          TypeError: if `x` has an integer dtype.
        """
        flag = self.inference if inference is None else inference
        return dropout(key, x, self.p, deterministic=flag)
