"""linen modules whose mask is shared along axes."""

from collections.abc import Sequence
from typing import Literal

from jdropout._flax import Applied
from jdropout._shared import drop_path, locked_dropout, spatial_dropout
from jdropout.linen._dropout import Dropping


class SpatialDropout(Dropping):
    """`jdropout.spatial_dropout` as a module: drops whole channels of feature maps.

    Call, random streams and flags are those of `Dropout`.

    Attributes:
      rate: probability of dropping a channel, a number in [0, 1].
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      channel_axis: the axis of the channels, -1 by default; 1 for channels first.
      batch_axes: axes along which decisions are independent as well, (0,) by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.SpatialDropout(0.5, deterministic=False)
      >>> layer.apply({}, jnp.ones((1, 2, 8)), rngs={"dropout": jax.random.key(0)})
      Array([[[2., 0., 0., 0., 0., 2., 2., 2.],
              [2., 0., 0., 0., 0., 2., 2., 2.]]], dtype=float32)

    References:
      As for `jdropout.spatial_dropout`.
    """

    _applies = Applied(spatial_dropout, ("channel_axis", "batch_axes"))

    channel_axis: int = -1
    batch_axes: Sequence[int] = (0,)


class LockedDropout(Dropping):
    """`jdropout.locked_dropout` as a module: drops the same units at every time step.

    Call, random streams and flags are those of `Dropout`.

    Attributes:
      rate: probability of dropping, a number in [0, 1].
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      time_axis: the axis of time, 1 by default.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.LockedDropout(0.5, deterministic=False)
      >>> layer.apply({}, jnp.ones((1, 2, 8)), rngs={"dropout": jax.random.key(0)})
      Array([[[2., 0., 0., 0., 0., 2., 2., 2.],
              [2., 0., 0., 0., 0., 2., 2., 2.]]], dtype=float32)

    References:
      As for `jdropout.locked_dropout`.
    """

    _applies = Applied(locked_dropout, ("time_axis",))

    time_axis: int = 1


class DropPath(Dropping):
    """`jdropout.drop_path` as a module: stochastic depth.

    ``x + drop_path(branch(x))``. Call, random streams and flags are those of `Dropout`.

    Attributes:
      rate: probability of dropping the branch, a number in [0, 1].
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      mode: ``'row'``, the default, decides for each example, ``'batch'`` once for all.
      scale_by_keep: whether to scale what is kept by ``1 / (1 - rate)``; True by default.
      batch_axis: the axis of the examples, 0 by default.

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
      As for `jdropout.drop_path`.
    """

    _applies = Applied(drop_path, ("mode", "scale_by_keep", "batch_axis"))

    mode: Literal["row", "batch"] = "row"
    scale_by_keep: bool = True
    batch_axis: int = 0
