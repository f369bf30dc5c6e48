"""Stochastic depth of kept examples as an nnx module."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jdropout._subset import stochastic_depth
from jdropout.nnx._wrapper import SubsetWrapper


class StochasticDepth(SubsetWrapper):
    """Layer of `jdropout.stochastic_depth`: ``x + layer(x)``, computed for a part of the batch.

    The layer may contain dropout and state of its own. Batch statistics are those of the kept
    examples.

    Args:
      layer: module, or function, without the residual connection.
      rate: fraction of examples to drop, a Python number in [0, 1].
      groups: number of groups of neighbouring examples, of which each keeps the same number.
      batch_axis: axis of the examples.
      deterministic: if True, compute all examples. A call and
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
      >>> mlp = nnx.Sequential(nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs))
      >>> layer = jdropout.nnx.StochasticDepth(mlp, 0.4, rngs=rngs)
      >>> layer(jnp.ones((5, 8))).shape
      (5, 8)

    References:
      Oquab et al., "DINOv2: learning robust visual features without supervision" (TMLR 2024),
      section 5.
    """

    def __init__(
        self,
        layer: Callable[..., Any],
        rate: float,
        *,
        groups: int = 1,
        batch_axis: int = 0,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            layer, rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.groups = groups
        self.batch_axis = batch_axis

    def __call__(
        self,
        inputs: Any,
        *args: Any,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Adds what the layer computes of the kept examples.

        Args:
          inputs: input of the layer, an array or a tree of arrays.
          *args: further arguments of the layer: arrays, or trees of arrays, that belong to the
            examples, such as masks. An array with a single example is passed as it is.
          deterministic: overrides the constructor's flag. It is not passed to the layer.
          rngs: overrides the constructor's source of keys. It is not passed to the layer.
          **options: keyword arguments of the layer.

        Returns:
          The sum, with the shape of `inputs`.

        Raises:
          ValueError: if the arrays differ in their number of examples, or neither the call nor the
            constructor gave a flag, or a source of keys.
          TypeError: if the flag is traced, or `rngs` has the wrong type.
        """
        flag, key = self._static(deterministic, rngs)
        return stochastic_depth(
            key,
            lambda x, *args: self.layer(x, *args, **options),
            inputs,
            self.rate,
            args=args,
            groups=self.groups,
            batch_axis=self.batch_axis,
            deterministic=flag,
        )
