"""Token routing as an nnx module."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jdropout._flax import check_positions
from jdropout._subset import route_tokens
from jdropout.nnx._wrapper import SubsetWrapper


class RouteTokens(SubsetWrapper):
    """Layer of `jdropout.route_tokens`: a part of the tokens goes through a module.

    The module may contain dropout and state of its own.

    Args:
      layer: module, or function, of tokens, with its residual connections; often several blocks
        of a transformer, such as an `nnx.Sequential`.
      rate: fraction of tokens that go around it, a Python number in [0, 1].
      num_prefix_tokens: number of leading tokens that always go through it.
      axis: axis of the tokens. The axes before it count examples.
      positions_argument: name of the layer's keyword argument for the positions of its tokens;
        None if it takes none.
      deterministic: if True, send all tokens through the layer. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them. The flag
        must not be traced.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the layer cannot be called, the rate is not a Python number, or `rngs` has the
        wrong type.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = jdropout.nnx.RouteTokens(nnx.Linear(4, 4, rngs=rngs), 0.5, rngs=rngs)
      >>> layer(jnp.ones((2, 10, 4))).shape
      (2, 10, 4)

    References:
      Yao, Wu, Li, Holmes, Zhang, Li and He, "Random-LTD: random and layerwise token dropping
      brings efficient training for large-scale transformers" (2022), section 3.
    """

    def __init__(
        self,
        layer: Callable[..., Any],
        rate: float,
        *,
        num_prefix_tokens: int = 0,
        axis: int = 1,
        positions_argument: str | None = None,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            layer, rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.num_prefix_tokens = num_prefix_tokens
        self.axis = axis
        self.positions_argument = positions_argument

    def __call__(
        self,
        inputs: jax.Array,
        *args: Any,
        positions: Any = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Sends the kept tokens through the layer, and puts them back.

        Args:
          inputs: array such as (batch, tokens, features).
          *args: further arguments of the layer, passed as they are.
          positions: what belongs to the tokens, of which the layer gets the kept tokens' part as
            `positions_argument`; None for their indices.
          deterministic: overrides the constructor's flag. It is not passed to the layer.
          rngs: overrides the constructor's source of keys. It is not passed to the layer.
          **options: keyword arguments of the layer.

        Returns:
          An array of the shape and dtype of `inputs`.

        Raises:
          ValueError: if the layer returns another shape, or neither the call nor the
            constructor gave a flag, or a source of keys.
          TypeError: if the flag is traced, or `rngs` has the wrong type.
        """
        flag, key = self._static(deterministic, rngs)
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
