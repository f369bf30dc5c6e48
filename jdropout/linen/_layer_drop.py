"""LayerDrop as a linen module."""

from typing import Any, ClassVar

from flax import linen

from jdropout._layer_drop import skip
from jdropout._typing import Flag, Key
from jdropout._values import check_function
from jdropout.linen._dropout import RateLayer


class LayerDrop(RateLayer, linen.Module):
    """Layer of `jdropout.layer_drop`: skips a residual layer, which may have variables.

    The layer may contain dropout and batch statistics of its own: if it is skipped they stay as
    they are. It must return arrays with the shape and dtype of its input.

    Attributes:
      layer: module to skip.
      rate: probability of skipping the layer, a number in [0, 1] or a (traced) floating-point
        scalar.
      unbiased: if True, scale the update of a kept layer by ``1 / (1 - r)``.
      deterministic: if True, always run the layer. Set it here or in the call, not in both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> block = linen.Sequential([linen.Dense(8), linen.Dropout(0.1, deterministic=False)])
      >>> layer = jdropout.linen.LayerDrop(block, 0.2, deterministic=False)
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> layer.init_with_output(keys, jnp.ones((2, 8)))[0].shape
      (2, 8)

    References:
      Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout"
      (ICLR 2020), section 3.
    """

    rng_position: ClassVar[int | None] = None

    layer: linen.Module
    rate: float
    unbiased: bool = False
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    @linen.nowrap
    def _check_attributes(self) -> None:
        super()._check_attributes()
        check_function("layer", self.layer)

    def __call__(
        self,
        inputs: Any,
        *args: Any,
        deterministic: Flag | None = None,
        rng: Key | None = None,
        **options: Any,
    ) -> Any:
        """Runs the layer, or returns its input. In initialisation the layer always runs.

        Args:
          inputs: input of the layer, an array or a tree of arrays.
          *args: further arrays for the layer, such as a mask.
          deterministic: if True, always run the layer; a bool or a (traced) boolean scalar. Set it
            here or in the constructor, not in both. It is not passed to the layer.
          rng: PRNG key to use instead of one from the stream.
          **options: keyword arguments of the layer, static.

        Returns:
          The result of the layer, or `inputs`.

        Raises:
          ValueError: if the result has another shape or dtype, the flag was set both here and in
            the constructor or in neither, or the rate is outside [0, 1].
          TypeError: if the rate is not a number.
        """
        if self.is_initializing():
            return self.layer(inputs, *args, **options)
        flag, key = self._resolve(deterministic, rng)

        def run(module: Any, *operands: Any) -> Any:
            *args, x = operands
            return module.layer(x, *args, **options)

        return skip(
            key,
            run,
            (self, *args),
            inputs,
            self.rate,
            deterministic=flag,
            unbiased=self.unbiased,
            cond=linen.cond,
        )
