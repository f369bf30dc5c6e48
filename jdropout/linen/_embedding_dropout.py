"""Embedding dropout around a linen embedding."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import linen

from jdropout._flax import check_module
from jdropout._shared import embedding_dropout
from jdropout._typing import Flag, Key
from jdropout.linen._drop_connect import with_params
from jdropout.linen._dropout import RateLayer


class EmbeddingDropout(RateLayer, linen.Module):
    """Wraps an embedding so that words are dropped in training, wherever they occur.

    `__call__` and `attend` use the table that `jdropout.embedding_dropout` makes from the
    embedding's own. Every call of either method takes a key: to use one mask in both, pass the
    same key to both as `rng`.

    Attributes:
      embed: embedding to wrap, a `linen.Embed`.
      rate: probability of dropping a word, a number in [0, 1] or a (traced) floating-point
        scalar.
      deterministic: if True, use the table as it is. Set it here or in the call, not in both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.

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
      Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
      networks" (NeurIPS 2016), section 4.2; Merity et al. (ICLR 2018), section 4.3.
    """

    drawing_methods: ClassVar[tuple[str, ...]] = ("__call__", "attend")

    embed: linen.Module
    rate: float
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @linen.nowrap
    def _check_attributes(self) -> None:
        super()._check_attributes()
        check_module("embed", self.embed, linen.Module)

    def __call__(
        self, inputs: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Looks up tokens, in training in a table with dropped words.

        Args:
          inputs: integer array of any shape.
          deterministic: if True, use the table as it is; a bool or a (traced) boolean scalar.
            Set it here or in the constructor, not in both.
          rng: PRNG key to use instead of one from the stream.

        Returns:
          An array of shape (*inputs.shape, features).

        Raises:
          ValueError: if the flag was set both here and in the constructor or in neither, or the
            rate is outside [0, 1].
          TypeError: if the rate is not a number.
        """
        return self._dropped(lambda embed: embed(inputs), deterministic, rng)

    def attend(
        self, query: jax.Array, deterministic: Flag | None = None, rng: Key | None = None
    ) -> jax.Array:
        """Multiplies queries with all words; products with dropped words are 0.

        Args:
          query: array of shape (..., features).
          deterministic: if True, use the table as it is; a bool or a (traced) boolean scalar.
            Set it here or in the constructor, not in both.
          rng: PRNG key to use instead of one from the stream.

        Returns:
          An array of shape (..., vocabulary).

        Raises:
          ValueError: if the flag was set both here and in the constructor or in neither, or the
            rate is outside [0, 1].
          TypeError: if the rate is not a number.
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
