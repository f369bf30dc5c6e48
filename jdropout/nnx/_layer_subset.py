"""LayerDrop of an exact number of stacked layers as an nnx module."""

from typing import Any

import jax
from flax import nnx

from jdropout._flax import check_module
from jdropout._subset._layer_subset import scan_subset
from jdropout.nnx._wrapper import SubsetWrapper


class LayerSubset(SubsetWrapper):
    """Layer of `jdropout.layer_subset`: runs k of L stacked layers.

    The layers may have dropout and state of their own; a skipped layer's stays as it is.

    Args:
      layer: stacked residual layers, as `nnx.vmap` makes them: every array of the module has the
        layers along axis 0.
      rate: fraction of layers to skip, a Python number in [0, 1].
      groups: number of groups of neighbouring layers, of which each keeps the same number.
      unbiased: if True, multiply the update of a kept layer by ``L / k``.
      deterministic: if True, run all layers. A call and
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
      >>> @nnx.split_rngs(splits=6)
      ... @nnx.vmap(axis_size=6)
      ... def stack(rngs):
      ...     return nnx.Linear(8, 8, rngs=rngs)
      >>> layer = jdropout.nnx.LayerSubset(stack(nnx.Rngs(0)), 0.5, rngs=nnx.Rngs(1))
      >>> layer(jnp.ones((2, 8))).shape
      (2, 8)

    References:
      Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout"
      (ICLR 2020), section 3.
    """

    def __init__(
        self,
        layer: nnx.Module,
        rate: float,
        *,
        groups: int = 1,
        unbiased: bool = False,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        check_module("layer", layer, nnx.Module)
        super().__init__(
            layer, rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.groups = groups
        self.unbiased = unbiased

    def __call__(
        self,
        inputs: Any,
        *args: Any,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Runs the kept layers in order.

        Args:
          inputs: input of the first layer, an array or a tree of arrays.
          *args: further arguments, the same for all layers, such as a mask.
          deterministic: overrides the constructor's flag. It is not passed to the layer.
          rngs: overrides the constructor's source of keys. It is not passed to the layer.
          **options: keyword arguments of the layer, the same for all layers.

        Returns:
          The result of the last layer that runs.

        Raises:
          ValueError: if a layer returns another shape or dtype, or neither the call nor the
            constructor gave a flag, or a source of keys.
          TypeError: if the flag is traced, or `rngs` has the wrong type.
        """
        flag, key = self._static(deterministic, rngs)
        parts: Any = nnx.split(self.layer, nnx.Param, ...)
        structure, params, state = parts

        def run(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
            layer = nnx.merge(structure, params, state)
            y = layer(x, *args, **options)
            return y, nnx.state(layer, nnx.Not(nnx.Param))

        y, state = scan_subset(
            key,
            run,
            params,
            state,
            inputs,
            self.rate,
            groups=self.groups,
            unbiased=self.unbiased,
            deterministic=flag,
            name="layer",
        )
        nnx.update(self.layer, state)
        return y
