"""Embedding dropout around a linen embedding."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen

from jdropout._shared import embedding_dropout
from jdropout._typing import Flag, Key
from jdropout.linen._drop_connect import with_params
from jdropout.linen._dropout import RateLayer


class EmbeddingDropout(RateLayer, linen.Module):
    """An embedding whose words are dropped in training, wherever they occur.

    Looks up in, and attends to, the table that `jdropout.embedding_dropout` makes of the
    embedding's own. Every call of either method takes a key: for one mask in both pass them one
    key as ``rng``.

    Attributes:
      embed: a `linen.Embed`.
      rate: probability of dropping a word, a number in [0, 1].
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> embed = linen.Embed(8, 2, embedding_init=linen.initializers.ones)
      >>> layer = jdropout.linen.EmbeddingDropout(embed, 0.5, deterministic=False)
      >>> tokens = jnp.array([[1, 5, 1], [5, 2, 0]])
      >>> params = layer.init(jax.random.key(0), tokens)
      >>> layer.apply(params, tokens, rngs={"dropout": jax.random.key(0)})[..., 0]
      Array([[0., 2., 0.],
             [2., 0., 2.]], dtype=float32)

    References:
      As for `jdropout.embedding_dropout`.
    """

    drawing_methods = ("__call__", "attend")

    embed: linen.Module
    rate: float
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Looks tokens up.

        Args:
          inputs: array of integers of any shape.
          deterministic: as for `Dropout`.
          rng: as for `Dropout`.

        Returns:
          An array of shape (*inputs.shape, features).

        Raises:
          ValueError: as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        return self._dropped(lambda embed: embed(inputs), deterministic, rng)

    def attend(
        self, query: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Products of queries with all words; those with dropped ones are 0.

        Args:
          query: array of shape (..., features).
          deterministic: as for `Dropout`.
          rng: as for `Dropout`.

        Returns:
          An array of shape (..., vocabulary).

        Raises:
          ValueError: as for `Dropout`.
          TypeError: as for `Dropout`.
        """
        return self._dropped(lambda embed: embed.attend(query), deterministic, rng)

    @linen.nowrap
    def _dropped(self, use: Callable[[Any], Any], deterministic: Any, rng: Any) -> Any:
        if self.is_initializing():
            return use(self.embed)
        flag, key = self._resolve(deterministic, rng)

        def drop(params: Any) -> Any:
            return jax.tree.map(
                lambda table: embedding_dropout(key, table, self.rate, deterministic=flag), params
            )

        return with_params(self, drop, self.embed, use)
