"""Dropout as Flax linen modules."""

import jax

try:
    from flax import linen
except ImportError as error:
    raise ImportError(
        "jdropout.linen needs Flax. Install it with: pip install 'jdropout[flax]'"
    ) from error

from jdropout._dropout import dropout
from jdropout._flax import check_module_flag, draws_mask
from jdropout._typing import Flag, Key

__all__ = ["Dropout"]


class Dropout(linen.Dropout):
    """`flax.linen.Dropout` with the mask law of this library.

    Attributes, call and random streams are Flax's own (it is a subclass): to migrate, change
    the import. Every call that draws a mask takes one key from the stream.

    Attributes:
      rate: probability of dropping, a number in [0, 1].
      broadcast_dims: axes along which all elements share their fate.
      deterministic: whether to return the input as it is; given here or in the call.
      rng_collection: name of the stream that keys are taken from, ``'dropout'`` by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.Dropout(0.5, deterministic=False)
      >>> layer.apply({}, jnp.ones((1, 8)), rngs={"dropout": jax.random.key(0)})
      Array([[2., 0., 0., 0., 0., 2., 2., 2.]], dtype=float32)

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting",
      JMLR 15 (2014), section 4.
    """

    @linen.compact
    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Drops and scales; the identity if deterministic.

        Args:
          inputs: array of any shape, of a floating-point or complex dtype.
          deterministic: whether to return the input as it is; may be traced.
          rng: a key to use instead of one from the stream.

        Returns:
          An array of the same shape and dtype.

        Raises:
          ValueError: if the flag was given neither or both here and in the constructor, or the
            rate is outside [0, 1].
          TypeError: if the rate is not a number, or the input's dtype an integer.
        """
        flag = check_module_flag(
            linen.merge_param("deterministic", self.deterministic, deterministic)
        )
        key = rng
        if key is None and draws_mask(self.rate, flag):
            key = self.make_rng(self.rng_collection)
        return dropout(
            key, inputs, self.rate, deterministic=flag, broadcast_dims=self.broadcast_dims
        )
