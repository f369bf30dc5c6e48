"""linen modules whose mask is shared along axes."""

from collections.abc import Sequence
from typing import Literal

from jdropout._flax import Applied
from jdropout._shared import drop_path, locked_dropout, spatial_dropout
from jdropout.linen._dropout import Dropping


class SpatialDropout(Dropping):
    """Layer of `jdropout.spatial_dropout`: drops whole channels of feature maps.

    Flags, keys and random streams work as in `Dropout`.

    Attributes:
      rate: probability of dropping a channel, a number in [0, 1] or a (traced) floating-point
        scalar.
      deterministic: if True, return the input unchanged. Set it here or in the call, not in
        both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      channel_axis: axis of the channels, -1 by default; 1 for channels-first layouts.
      batch_axes: axes along which masks are independent, (0,) by default; () drops the same
        channels in every example.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.SpatialDropout(0.5, deterministic=False)
      >>> layer.apply({}, jnp.ones((1, 2, 8)), rngs={"dropout": jax.random.key(0)})
      Array([[[2., 0., 0., 0., 0., 2., 2., 2.],
              [2., 0., 0., 0., 0., 2., 2., 2.]]], dtype=float32)

    References:
      Tompson, Goroshin, Jain, LeCun and Bregler, "Efficient object localization using
      convolutional networks" (CVPR 2015), section 3.2.
    """

    _applies = Applied(spatial_dropout, ("channel_axis", "batch_axes"))

    channel_axis: int = -1
    batch_axes: Sequence[int] = (0,)


class LockedDropout(Dropping):
    """Layer of `jdropout.locked_dropout`: drops the same units at every time step.

    Flags, keys and random streams work as in `Dropout`.

    Attributes:
      rate: probability of dropping, a number in [0, 1] or a (traced) floating-point scalar.
      deterministic: if True, return the input unchanged. Set it here or in the call, not in
        both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      time_axis: axis of the time steps, along which the mask is shared; 1 by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.LockedDropout(0.5, deterministic=False)
      >>> layer.apply({}, jnp.ones((1, 2, 8)), rngs={"dropout": jax.random.key(0)})
      Array([[[2., 0., 0., 0., 0., 2., 2., 2.],
              [2., 0., 0., 0., 0., 2., 2., 2.]]], dtype=float32)

    References:
      Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
      networks" (NeurIPS 2016), section 4; Merity, Keskar and Socher, "Regularizing and
      optimizing LSTM language models" (ICLR 2018), section 4.2.
    """

    _applies = Applied(locked_dropout, ("time_axis",))

    time_axis: int = 1


class DropPath(Dropping):
    """Layer of `jdropout.drop_path`: stochastic depth, used as ``x + drop_path(branch(x))``.

    Flags, keys and random streams work as in `Dropout`.

    Attributes:
      rate: probability of dropping the branch, a number in [0, 1] or a (traced) floating-point
        scalar.
      deterministic: if True, return the input unchanged. Set it here or in the call, not in
        both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      mode: ``'row'``, the default, decides for each example, ``'batch'`` once for all examples.
      scale_by_keep: if True, the default, scale kept branches by ``1 / (1 - rate)``.
      batch_axis: axis of the examples, 0 by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.DropPath(0.5, deterministic=False)
      >>> layer.apply({}, jnp.ones((4, 2)), rngs={"dropout": jax.random.key(0)})
      Array([[2., 2.],
             [0., 0.],
             [0., 0.],
             [0., 0.]], dtype=float32)

    References:
      Huang, Sun, Liu, Sedra and Weinberger, "Deep networks with stochastic depth" (ECCV 2016),
      section 3.
    """

    _applies = Applied(drop_path, ("mode", "scale_by_keep", "batch_axis"))

    mode: Literal["row", "batch"] = "row"
    scale_by_keep: bool = True
    batch_axis: int = 0
