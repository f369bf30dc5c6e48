"""Multi-sample dropout as a linen module."""

from typing import Any

import jax
from flax import linen

from jdropout._arrays import check_averaged
from jdropout._dtypes import sum_dtype
from jdropout._flax import check_module_flag, check_stream
from jdropout._typing import Flag
from jdropout._values import check_function, check_positive


class MultiSample(linen.Module):
    """Layer of `jdropout.multi_sample`: the mean of a module's results over several masks.

    Each sample has keys of its own, split from the stream. In evaluation and initialisation the
    module is called once. It must not change variables, such as batch statistics.

    Attributes:
      layer: module that drops, such as the last layers of a classifier.
      num_samples: number of masks, at least 1; they are computed together.
      deterministic: if True, call the module once. Set it here or in the call, not in both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> import jdropout.linen
      >>> head = linen.Sequential([linen.Dropout(0.5, deterministic=False), linen.Dense(2)])
      >>> layer = jdropout.linen.MultiSample(head, 4, deterministic=False)
      >>> keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      >>> layer.init_with_output(keys, jnp.ones((3, 8)))[0].shape
      (3, 2)

    References:
      Inoue, "Multi-sample dropout for accelerated training and better generalization" (2019),
      section 3, which averages the losses of the samples.
    """

    layer: linen.Module
    num_samples: int
    deterministic: bool | None = None
    rng_collection: str = "dropout"

    def __call__(self, inputs: Any, deterministic: Flag | None = None, **options: Any) -> Any:
        """Calls the module for each sample, and returns the mean of the results.

        Args:
          inputs: input of the module, an array or a tree of arrays.
          deterministic: if True, call the module once; a bool or a (traced) boolean scalar. Set it
            here or in the constructor, not in both. It is not passed to the module.
          **options: further keyword arguments of the module.

        Returns:
          The mean of the results, with their dtypes.

        Raises:
          ValueError: if the flag was set both here and in the constructor or in neither, or the
            number of samples is below 1.
          TypeError: if the module returns integers.
        """
        check_stream(self.deterministic, self.rng_collection)
        check_function("layer", self.layer)
        flag = linen.merge_param("deterministic", self.deterministic, deterministic)
        count = check_positive("num_samples", self.num_samples)
        if check_module_flag(flag) is True or self.is_initializing():
            return self.layer(inputs, **options)
        samples = linen.vmap(
            lambda module, x: module.layer(x, **options),
            in_axes=None,
            variable_axes={True: None},
            split_rngs={self.rng_collection: True, True: False},
            axis_size=count,
        )(self, inputs)
        check_averaged(samples)
        return jax.tree.map(lambda y: y.mean(0, dtype=sum_dtype(y)).astype(y.dtype), samples)
