"""Multi-sample dropout as an nnx module."""

from typing import Any

import jax
from flax import nnx

from jdropout._multi_sample import multi_sample
from jdropout._typing import Flag
from jdropout._values import check_function, check_positive
from jdropout.nnx._dropout import Layer, attach
from jdropout.nnx._model import set_site_keys


class MultiSample(Layer):
    """Layer of `jdropout.multi_sample`: the mean of a module's results over several masks.

    Each sample gives every random stream of the module a key of its own, whatever the module
    drops. In evaluation the module is called once. It must not change other state, such as batch
    statistics: which sample's would remain?

    Args:
      layer: module that drops, such as the last layers of a classifier.
      num_samples: number of masks, at least 1.
      batch_size: number of samples to compute together; None for all.
      deterministic: if True, call the module once. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the layer cannot be called, a number is not an integer, or `rngs` has the
        wrong type.
      ValueError: if a number is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> rngs = nnx.Rngs(0)
      >>> head = nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 2, rngs=rngs))
      >>> jdropout.nnx.MultiSample(head, 4, rngs=rngs)(jnp.ones((3, 8))).shape
      (3, 2)

    References:
      Inoue, "Multi-sample dropout for accelerated training and better generalization" (2019),
      section 3, which averages the losses of the samples.
    """

    _arguments = "layer, num_samples"

    def __init__(
        self,
        layer: nnx.Module,
        num_samples: int,
        *,
        batch_size: int | None = None,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        check_function("layer", layer)
        self.layer = layer
        self.num_samples: int = check_positive("num_samples", num_samples)
        self.batch_size = batch_size
        attach(self, deterministic, rng_collection, rngs)

    def __call__(
        self,
        inputs: Any,
        *,
        deterministic: Flag | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
        **options: Any,
    ) -> Any:
        """Calls the module for each sample, and returns the mean of the results.

        Args:
          inputs: input of the module, an array or a tree of arrays.
          deterministic: overrides the constructor's flag; a bool or a (traced) boolean scalar. It
            is not passed to the module.
          rngs: overrides the constructor's source of keys. It is not passed to the module.
          **options: further keyword arguments of the module.

        Returns:
          The mean of the results, with their dtypes.

        Raises:
          ValueError: if the module has no random stream, changes other state, or neither the
            call nor the constructor gave a flag, or a source of keys.
          TypeError: if the module returns integers, or `rngs` has the wrong type.
        """
        _, key = self._resolve(deterministic, rngs)
        if key is None:
            return self.layer(inputs, **options)
        structure, state = nnx.split(self.layer)

        def sample(key: jax.Array, x: Any) -> Any:
            layer = nnx.merge(structure, jax.tree.map(lambda leaf: leaf, state))
            set_site_keys(layer, key, step=0)
            before = jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.RngState)))
            y = layer(x, **options)
            after = jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.RngState)))
            if any(a is not b for a, b in zip(before, after, strict=True)):
                raise ValueError(
                    "layer changes its state, such as batch statistics, which several samples "
                    "cannot share. Move what changes out of the MultiSample."
                )
            return y

        return multi_sample(sample, key, inputs, self.num_samples, batch_size=self.batch_size)
