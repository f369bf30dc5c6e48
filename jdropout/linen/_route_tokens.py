"""Token routing as a linen module."""

from typing import Any

import jax
from flax import linen

from jdropout._flax import check_positions
from jdropout._subset import route_tokens
from jdropout._typing import Key
from jdropout.linen._wrapper import SubsetWrapper


class RouteTokens(SubsetWrapper):
    """Layer of `jdropout.route_tokens`: a part of the tokens goes through a module.

    The module may contain dropout and variables of its own.

    Attributes:
      layer: module of tokens, with its residual connections; often several blocks of a
        transformer, such as a `linen.Sequential`.
      rate: fraction of tokens that go around it, a number in [0, 1].
      deterministic: if True, send all tokens through the layer. Set it here or in the call, not in
        both. It must not be traced.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      num_prefix_tokens: number of leading tokens that always go through it, 0 by default.
      axis: axis of the tokens, 1 by default. The axes before it count examples.
      positions_argument: name of the layer's keyword argument for the positions of its tokens;
        None, the default, if it takes none.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> layer = jdropout.linen.RouteTokens(linen.Dense(4), 0.5, deterministic=False)
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> variables = layer.init(keys, jnp.ones((2, 10, 4)))
      >>> layer.apply(variables, jnp.ones((2, 10, 4)), rngs=keys).shape
      (2, 10, 4)

    References:
      Yao, Wu, Li, Holmes, Zhang, Li and He, "Random-LTD: random and layerwise token dropping
      brings efficient training for large-scale transformers" (2022), section 3.
    """

    num_prefix_tokens: int = 0
    axis: int = 1
    positions_argument: str | None = None

    @linen.compact
    def __call__(
        self,
        inputs: jax.Array,
        *args: Any,
        positions: Any = None,
        deterministic: bool | None = None,
        rng: Key | None = None,
        **options: Any,
    ) -> Any:
        """Sends the kept tokens through the layer, and puts them back. In initialisation, all.

        Args:
          inputs: array such as (batch, tokens, features).
          *args: further arguments of the layer, passed as they are.
          positions: what belongs to the tokens, of which the layer gets the kept tokens' part as
            `positions_argument`; None for their indices.
          deterministic: if True, send all tokens through the layer. Set it here or in the
            constructor, not in both. It is not passed to the layer.
          rng: PRNG key to use instead of one from the stream.
          **options: keyword arguments of the layer.

        Returns:
          An array of the shape and dtype of `inputs`.

        Raises:
          ValueError: if the layer returns another shape, the flag was set both here
            and in the constructor or in neither, or the rate is outside [0, 1].
          TypeError: if the rate is not a number, or it or the flag is traced.
        """
        flag, key = self._static(deterministic, rng)
        check_positions(positions, self.positions_argument)

        def layers(x: jax.Array, where: Any) -> Any:
            named = {self.positions_argument: where} if self.positions_argument else {}
            return self.layer(x, *args, **named, **options)

        return route_tokens(
            key,
            layers,
            inputs,
            self.rate,
            num_prefix_tokens=self.num_prefix_tokens,
            axis=self.axis,
            positions=positions,
            deterministic=flag,
        )
