"""Embedding dropout around an nnx embedding."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jdropout._shared import embedding_dropout
from jdropout._typing import Flag
from jdropout.nnx._drop_connect import with_params
from jdropout.nnx._dropout import Dropout


class EmbeddingDropout(Dropout):
    """An embedding whose words are dropped in training, wherever they occur.

    Looks up in, and attends to, the table that `jdropout.embedding_dropout` makes of the
    embedding's own. Every call of either method takes a key: for one mask in both pass them one
    key as ``rngs``.

    Args:
      embed: an `nnx.Embed`.
      rate: probability of dropping a word, a number in [0, 1].
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
      >>> rngs = nnx.Rngs(0)
      >>> ones = nnx.initializers.ones
      >>> embed = nnx.Embed(8, 2, embedding_init=ones, rngs=rngs)
      >>> layer = jdropout.nnx.EmbeddingDropout(embed, 0.5, rngs=rngs)
      >>> layer(jnp.array([[1, 5, 1], [5, 2, 0]]))[..., 0]
      Array([[2., 0., 2.],
             [0., 2., 2.]], dtype=float32)

    References:
      As for `jdropout.embedding_dropout`.
    """

    _arguments = "embed, rate"

    def __init__(
        self,
        embed: Any,
        rate: float,
        *,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.embed = embed

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """Looks tokens up.

        Args:
          inputs: array of integers of any shape.
          deterministic: as for `Dropout`.
          rngs: as for `Dropout`.
          **kwargs: further arguments of the embedding.

        Returns:
          An array of shape (*inputs.shape, features).

        Raises:
          ValueError: as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        return self._dropped(lambda embed: embed(inputs, **kwargs), deterministic, rngs)

    def attend(
        self,
        query: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """Products of queries with all words; those with dropped ones are 0.

        Args:
          query: array of shape (..., features).
          deterministic: as for `Dropout`.
          rngs: as for `Dropout`.
          **kwargs: further arguments of the embedding's method.

        Returns:
          An array of shape (..., vocabulary).

        Raises:
          ValueError: as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        return self._dropped(lambda embed: embed.attend(query, **kwargs), deterministic, rngs)

    def _dropped(
        self, use: Callable[[Any], Any], deterministic: Flag | None, rngs: Any
    ) -> jax.Array:
        flag, key = self._resolve(deterministic, rngs)

        def drop(params: Any) -> Any:
            return jax.tree.map(
                lambda table: embedding_dropout(key, table, self.rate, deterministic=flag), params
            )

        return with_params(drop, self.embed, use)
