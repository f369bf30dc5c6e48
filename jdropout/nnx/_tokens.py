"""Dropout of tokens as an nnx module."""

from typing import Any

import jax
from flax import nnx

from jdropout._checks import check_static_flag
from jdropout._flax import Applied
from jdropout._tokens import patch_dropout
from jdropout._typing import Key
from jdropout.nnx._dropout import Dropout


class PatchDropout(Dropout):
    """`jdropout.patch_dropout` as a module: leaves a fixed number of tokens out.

    Call, random streams and flags are those of `Dropout`, but for a flag that must not be traced:
    the shape of the result depends on it.

    Args:
      rate: fraction of tokens to leave out, a number in [0, 1).
      axis: the axis of the tokens. The axes before it count examples.
      num_prefix_tokens: number of tokens at the begin that always stay.
      ordered: whether the tokens that stay are in the order that they had.
      return_indices: whether a call returns a pair: the tokens that stay, and their indices.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: as for `Dropout`.
      ValueError: as for `Dropout`.

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
      As for `jdropout.patch_dropout`.
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
        self.return_indices = return_indices

    def _drop(self, key: Key | None, x: jax.Array, flag: bool | jax.Array) -> Any:
        kept, indices = super()._drop(key, x, check_static_flag(flag))
        return (kept, indices) if self.return_indices else kept
