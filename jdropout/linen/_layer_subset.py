"""LayerDrop of an exact number of stacked layers as a linen module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen

from jdropout._arrays import as_arrays
from jdropout._flax import check_module
from jdropout._subset._layer_subset import scan_subset
from jdropout._typing import Key
from jdropout._values import check_positive
from jdropout.keys import at_site
from jdropout.linen._wrapper import SubsetWrapper


class LayerSubset(SubsetWrapper, kw_only=True):
    """Layer of `jdropout.layer_subset`: runs k of L layers of one kind.

    Their variables are stacked along axis 0, as by `linen.scan`. The layers may have dropout and
    variables of their own; a skipped layer's stay as they are. Layer i takes its keys from
    ``jdropout.keys.at_site(key, i)`` for the key of each stream.

    Attributes:
      layer: one residual layer, the pattern of all.
      num_layers: number of layers, L.
      rate: fraction of layers to skip, a number in [0, 1].
      deterministic: if True, run all layers. Set it here or in the call, not in both. It must not
        be traced.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      groups: number of groups of neighbouring layers, of which each keeps the same number; 1 by
        default.
      unbiased: if True, multiply the update of a kept layer by ``L / k``; False by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> layer = jdropout.linen.LayerSubset(
      ...     linen.Dense(8), rate=0.5, num_layers=6, deterministic=False
      ... )
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> variables = layer.init(keys, jnp.ones((2, 8)))
      >>> variables["params"]["layer"]["kernel"].shape
      (6, 8, 8)
      >>> layer.apply(variables, jnp.ones((2, 8)), rngs=keys).shape
      (2, 8)

    References:
      Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout"
      (ICLR 2020), section 3.
    """

    num_layers: int
    groups: int = 1
    unbiased: bool = False

    def _check_attributes(self) -> None:
        super()._check_attributes()
        check_module("layer", self.layer, linen.Module)
        check_positive("num_layers", self.num_layers)

    def __call__(
        self,
        inputs: Any,
        *args: Any,
        deterministic: bool | None = None,
        rng: Key | None = None,
        **options: Any,
    ) -> Any:
        """Runs the kept layers in order. In initialisation, all of them.

        Args:
          inputs: input of the first layer, an array or a tree of arrays.
          *args: further arguments, the same for all layers, such as a mask.
          deterministic: if True, run all layers. Set it here or in the constructor, not in both. It
            is not passed to the layer.
          rng: PRNG key to use instead of one from the stream.
          **options: keyword arguments of the layer, the same for all layers.

        Returns:
          The result of the last layer that runs.

        Raises:
          ValueError: if a layer returns another shape or dtype, the flag was set both here
            and in the constructor or in neither, or the rate is outside [0, 1].
          TypeError: if the rate is not a number, or it or the flag is traced.
        """
        flag, key = self._static(deterministic, rng)
        inputs = as_arrays("inputs", inputs)
        num_layers = check_positive("num_layers", self.num_layers)
        if flag or key is None:

            def run_one(module: Any, x: Any, _: None) -> tuple[Any, None]:
                return module.layer(x, *args, **options), None

            run_all = linen.scan(
                run_one,
                variable_axes={True: 0},
                split_rngs={True: True},
                length=num_layers,
            )
            return run_all(self, inputs, None)[0]

        # Not linen.scan, which cannot scan a part of a module's variables.
        variables = dict(self.layer.variables)
        params = variables.pop("params", {})
        sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
        if sizes - {(num_layers,)}:
            raise ValueError(
                f"num_layers is {num_layers}, but the parameters have the sizes "
                f"{sorted(sizes)} on their first axis. Initialize them with as many layers."
            )
        changing = [name for name in variables if self.is_mutable_collection(name)]
        assert self.scope is not None  # a called module is bound
        streams = {name: self.make_rng(name) for name in self.scope.rngs if name != "params"}
        numbers = jnp.arange(num_layers, dtype=jnp.uint32)
        keys = {name: jax.vmap(at_site, (None, 0))(key, numbers) for name, key in streams.items()}
        one = self.layer.clone(parent=None, name=None)

        def run(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
            variables, keys = state
            y, new = one.apply(
                {"params": params, **variables},
                x,
                *args,
                rngs=keys,
                mutable=changing,
                **options,
            )
            return y, ({**variables, **new}, keys)

        y, (variables, _) = scan_subset(
            key,
            run,
            params,
            (variables, keys),
            inputs,
            self.rate,
            groups=self.groups,
            unbiased=self.unbiased,
            deterministic=False,
            name="layer",
        )
        for collection in changing:
            for name, value in variables[collection].items():
                self.layer.put_variable(collection, name, value)
        return y
