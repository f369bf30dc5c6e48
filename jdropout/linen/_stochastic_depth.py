"""Stochastic depth of kept examples as a linen module."""

from typing import Any

from flax import linen

from jdropout._subset import stochastic_depth
from jdropout._typing import Key
from jdropout.linen._wrapper import SubsetWrapper


class StochasticDepth(SubsetWrapper):
    """Layer of `jdropout.stochastic_depth`: ``x + layer(x)``, computed for a part of the batch.

    The layer may contain dropout and variables of its own. Batch statistics are those of the kept
    examples.

    Attributes:
      layer: module without the residual connection.
      rate: fraction of examples to drop, a number in [0, 1].
      deterministic: if True, compute all examples. Set it here or in the call, not in both. It must
        not be traced.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      groups: number of groups of neighbouring examples, of which each keeps the same number; 1 by
        default.
      batch_axis: axis of the examples, 0 by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> mlp = linen.Sequential([linen.LayerNorm(), linen.Dense(8)])
      >>> layer = jdropout.linen.StochasticDepth(mlp, 0.4, deterministic=False)
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> variables = layer.init(keys, jnp.ones((5, 8)))
      >>> layer.apply(variables, jnp.ones((5, 8)), rngs=keys).shape
      (5, 8)

    References:
      Oquab et al., "DINOv2: learning robust visual features without supervision" (TMLR 2024),
      section 5.
    """

    groups: int = 1
    batch_axis: int = 0

    @linen.compact
    def __call__(
        self,
        inputs: Any,
        *args: Any,
        deterministic: bool | None = None,
        rng: Key | None = None,
        **options: Any,
    ) -> Any:
        """Adds what the layer computes of the kept examples. In initialisation it keeps all.

        Args:
          inputs: input of the layer, an array or a tree of arrays.
          *args: further arguments of the layer: arrays, or trees of arrays, that belong to the
            examples, such as masks. An array with a single example is passed as it is.
          deterministic: if True, compute all examples. Set it here or in the constructor, not in
            both. It is not passed to the layer.
          rng: PRNG key to use instead of one from the stream.
          **options: keyword arguments of the layer.

        Returns:
          The sum, with the shape of `inputs`.

        Raises:
          ValueError: if the arrays differ in their number of examples, the flag was set both here
            and in the constructor or in neither, or the rate is outside [0, 1].
          TypeError: if the rate is not a number, or it or the flag is traced.
        """
        flag, key = self._static(deterministic, rng)
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
