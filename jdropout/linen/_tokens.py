"""Dropout of tokens as a linen module."""

from typing import Any

import jax
from flax import linen

from jdropout._checks import check_static_flag
from jdropout._flax import Applied
from jdropout._tokens import patch_dropout
from jdropout._typing import Flag, Key
from jdropout._values import check_flag
from jdropout.linen._dropout import Dropping


class PatchDropout(Dropping):
    """Layer of `jdropout.patch_dropout`: removes a fixed number of tokens.

    Flags, keys and random streams work as in `Dropout`, except that the flag must not be
    traced, because the shape of the result depends on it.

    Attributes:
      rate: fraction of tokens to remove, a number in [0, 1).
      deterministic: if True, keep all tokens. Set it here or in the call, not in both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      axis: axis of the tokens, 1 by default. The axes before it count examples.
      num_prefix_tokens: number of leading tokens that are always kept, such as a class token; 1
        by default.
      ordered: if True, kept tokens stay in their original order; if False, the default, their
        order is random.
      return_indices: if True, a call returns a pair: the kept tokens, and their indices in the
        input. False by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.PatchDropout(0.5, ordered=True, deterministic=False)
      >>> x = jnp.arange(9.0).reshape(1, 9, 1)
      >>> layer.apply({}, x, rngs={"dropout": jax.random.key(0)})[..., 0]
      Array([[0., 1., 6., 7., 8.]], dtype=float32)

    References:
      Liu, Matsoukas, Strand, Azizpour and Smith, "PatchDropout: economizing vision transformers
      using patch dropout" (WACV 2023), section 3.
    """

    _applies = Applied(patch_dropout, ("axis", "num_prefix_tokens", "ordered"))

    axis: int = 1
    num_prefix_tokens: int = 1
    ordered: bool = False
    return_indices: bool = False

    @linen.nowrap
    def _draws(self, flag: bool | jax.Array) -> bool:
        # A rate of 1 leaves one token, at random; a traced rate is an error of the function's.
        return flag is not True and (isinstance(self.rate, jax.Array) or self.rate != 0)

    @linen.compact
    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> Any:
        """Removes tokens of `inputs`; returns them all if deterministic.

        Args:
          inputs: array with an axis of tokens, with any dtype.
          deterministic: if True, keep all tokens; a bool, not traced. Set it here or in the
            constructor, not in both.
          rng: PRNG key to use instead of one from the stream.

        Returns:
          The kept tokens; with ``return_indices`` a pair, of them and their indices.

        Raises:
          ValueError: if the flag was set both here and in the constructor or in neither, or the
            rate is outside [0, 1].
          TypeError: if the rate is not a number, or the flag is traced.
        """
        with_indices = check_flag("return_indices", self.return_indices)
        flag, key = self._resolve(deterministic, rng)
        kept, indices = self._drop(key, inputs, check_static_flag(flag))
        return (kept, indices) if with_indices else kept
