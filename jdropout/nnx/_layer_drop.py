"""LayerDrop as an nnx module."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jdropout._layer_drop import skip
from jdropout._typing import Flag
from jdropout.nnx._wrapper import Wrapper


class LayerDrop(Wrapper):
    """Layer of `jdropout.layer_drop`: skips a residual layer, which may have a state.

    The layer may contain dropout, batch statistics and random streams of its own: if it is skipped
    they stay as they are. It must return arrays with the shape and dtype of its input.

    Args:
      layer: module, or function, to skip.
      rate: probability of skipping the layer, a Python number in [0, 1].
      unbiased: if True, scale the update of a kept layer by ``1 / (1 - r)``.
      deterministic: if True, always run the layer. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
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
      >>> block = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.1, rngs=rngs))
      >>> layer = jdropout.nnx.LayerDrop(block, 0.2, rngs=rngs)
      >>> layer(jnp.ones((2, 8))).shape
      (2, 8)

    References:
      Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout"
      (ICLR 2020), section 3.
    """

    def __init__(
        self,
        layer: Callable[..., Any],
        rate: float,
        *,
        unbiased: bool = False,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            layer, rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.unbiased = unbiased

    def __call__(
        self,
        inputs: Any,
        *args: Any,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | Any = None,
        **options: Any,
    ) -> Any:
        """Runs the layer, or returns its input.

        Args:
          inputs: input of the layer, an array or a tree of arrays.
          *args: further arrays for the layer, such as a mask.
          deterministic: overrides the constructor's flag; a bool or a (traced) boolean scalar. It
            is not passed to the layer.
          rngs: overrides the constructor's source of keys. It is not passed to the layer.
          **options: keyword arguments of the layer, static.

        Returns:
          The result of the layer, or `inputs`.

        Raises:
          ValueError: if the result has another shape or dtype, or neither the call nor the
            constructor gave a flag, or a source of keys.
          TypeError: if `rngs` has the wrong type.
        """
        flag, key = self._resolve(deterministic, rngs)

        def run(layer: Any, *operands: Any) -> Any:
            *args, x = operands
            return layer(x, *args, **options)

        return skip(
            key,
            run,
            (self.layer, *args),
            inputs,
            self.rate,
            deterministic=flag,
            unbiased=self.unbiased,
            cond=nnx.cond,
        )
