"""Dropout of tokens as a linen module."""

from typing import Any

import jax
from flax import linen

from jdropout._checks import check_static_flag
from jdropout._flax import Applied
from jdropout._tokens import patch_dropout
from jdropout._typing import Key
from jdropout.linen._dropout import Dropping


class PatchDropout(Dropping):
    """`jdropout.patch_dropout` as a module: leaves a fixed number of tokens out.

    Call, random streams and flags are those of `Dropout`, but for a flag that must not be traced:
    the shape of the result depends on it.

    Attributes:
      rate: fraction of tokens to leave out, a number in [0, 1).
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      axis: the axis of the tokens, 1 by default. The axes before it count examples.
      num_prefix_tokens: number of tokens at the begin that always stay, 1 by default.
      ordered: whether the tokens that stay are in the order that they had; False by default.
      return_indices: whether a call returns a pair: the tokens that stay, and their indices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.PatchDropout(0.5, ordered=True, deterministic=False)
      >>> x = jnp.arange(9.0).reshape(1, 9, 1)
      >>> layer.apply({}, x, rngs={"dropout": jax.random.key(0)})[..., 0]
      Array([[0., 1., 6., 7., 8.]], dtype=float32)

    References:
      As for `jdropout.patch_dropout`.
    """

    _applies = Applied(patch_dropout, ("axis", "num_prefix_tokens", "ordered"))

    axis: int = 1
    num_prefix_tokens: int = 1
    ordered: bool = False
    return_indices: bool = False

    @linen.nowrap
    def _drop(self, key: Key | None, x: jax.Array, flag: bool | jax.Array) -> Any:
        kept, indices = super()._drop(key, x, check_static_flag(flag))
        return (kept, indices) if self.return_indices else kept
