"""Dropout of tokens as an nnx module."""

from typing import Any

import jax
from flax import nnx

from jdropout._checks import check_static_flag
from jdropout._flax import Applied
from jdropout._tokens import patch_dropout
from jdropout._typing import Flag
from jdropout._values import check_flag
from jdropout.nnx._dropout import Dropout


class PatchDropout(Dropout):
    """Layer of `jdropout.patch_dropout`: removes a fixed number of tokens.

    Flags, keys and random streams work as in `Dropout`, except that the flag must not be
    traced, because the shape of the result depends on it.

    Args:
      rate: fraction of tokens to remove, a Python number in [0, 1).
      axis: axis of the tokens. The axes before it count examples.
      num_prefix_tokens: number of leading tokens that are always kept, such as a class token.
      ordered: if True, kept tokens stay in their original order; otherwise their order is
        random.
      return_indices: if True, a call returns a pair: the kept tokens, and their indices in the
        input.
      deterministic: if True, return the input unchanged. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the rate is not a Python number, or `rngs` has the wrong type.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.PatchDropout(0.5, ordered=True, rngs=nnx.Rngs(2))
      >>> layer(jnp.arange(9.0).reshape(1, 9, 1))[..., 0]
      Array([[0., 2., 5., 7., 8.]], dtype=float32)
      >>> layer(jnp.ones((1, 9, 1)), deterministic=True).shape
      (1, 9, 1)

    References:
      Liu, Matsoukas, Strand, Azizpour and Smith, "PatchDropout: economizing vision transformers
      using patch dropout" (WACV 2023), section 3.
    """

    _applies = Applied(patch_dropout, ("axis", "num_prefix_tokens", "ordered"))

    def __init__(
        self,
        rate: float,
        *,
        axis: int = 1,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        return_indices: bool = False,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.axis = axis
        self.num_prefix_tokens = num_prefix_tokens
        self.ordered = ordered
        self.return_indices = check_flag("return_indices", return_indices)

    def _draws(self, flag: bool | jax.Array) -> bool:
        return flag is not True and self.rate != 0  # a rate of 1 leaves one token, at random

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> Any:
        """Removes tokens of `inputs`; returns them all if deterministic.

        Args:
          inputs: array with an axis of tokens, with any dtype.
          deterministic: overrides the constructor's flag; a bool, not traced.
          rngs: overrides the constructor's source of keys; an `nnx.Rngs`, an `nnx.RngStream` or
            a key.

        Returns:
          The kept tokens; with ``return_indices`` a pair, of them and their indices.

        Raises:
          ValueError: if neither the call nor the constructor gave a flag, or a source of keys.
          TypeError: if the flag is traced, or `rngs` has the wrong type.
        """
        flag, key = self._resolve(deterministic, rngs)
        kept, indices = self._drop(key, inputs, check_static_flag(flag))
        return (kept, indices) if self.return_indices else kept
