"""Embedding dropout around an nnx embedding."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jdropout._shared import embedding_dropout
from jdropout._typing import Flag
from jdropout._values import check_function
from jdropout.nnx._drop_connect import with_params
from jdropout.nnx._dropout import Dropout


class EmbeddingDropout(Dropout):
    """Wraps an embedding so that words are dropped in training, wherever they occur.

    `__call__` and `attend` use the table that `jdropout.embedding_dropout` makes from the
    embedding's own. Every call of either method takes a key: to use one mask in both, pass the
    same key to both as `rngs`.

    Args:
      embed: embedding to wrap, an `nnx.Embed`.
      rate: probability of dropping a word, a Python number in [0, 1].
      deterministic: if True, use the table as it is. A call and
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
      >>> rngs = nnx.Rngs(0)
      >>> ones = nnx.initializers.ones
      >>> embed = nnx.Embed(8, 2, embedding_init=ones, rngs=rngs)
      >>> layer = jdropout.nnx.EmbeddingDropout(embed, 0.5, rngs=rngs)
      >>> layer(jnp.array([[1, 5, 1], [5, 2, 0]]))[..., 0]
      Array([[2., 0., 2.],
             [0., 2., 2.]], dtype=float32)

    References:
      Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
      networks" (NeurIPS 2016), section 4.2; Merity et al. (ICLR 2018), section 4.3.
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
        check_function("embed", embed)
        self.embed = embed

    def __call__(
        self,
        inputs: jax.Array,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **kwargs: Any,
    ) -> jax.Array:
        """Looks up tokens, in training in a table with dropped words.

        Args:
          inputs: integer array of any shape.
          deterministic: overrides the constructor's flag; a bool or a (traced) boolean scalar.
            A traced flag takes a key whatever its value.
          rngs: overrides the constructor's source of keys; an `nnx.Rngs`, an `nnx.RngStream` or
            a key.
          **kwargs: further arguments of the embedding.

        Returns:
          An array of shape (*inputs.shape, features).

        Raises:
          ValueError: if neither the call nor the constructor gave a flag, or a source of keys.
          TypeError: if `rngs` has the wrong type.
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
        """Multiplies queries with all words; products with dropped words are 0.

        Args:
          query: array of shape (..., features).
          deterministic: overrides the constructor's flag; a bool or a (traced) boolean scalar.
            A traced flag takes a key whatever its value.
          rngs: overrides the constructor's source of keys; an `nnx.Rngs`, an `nnx.RngStream` or
            a key.
          **kwargs: further arguments of the embedding's ``attend``.

        Returns:
          An array of shape (..., vocabulary).

        Raises:
          ValueError: if neither the call nor the constructor gave a flag, or a source of keys.
          TypeError: if `rngs` has the wrong type.
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
