"""nnx modules whose mask is shared along axes."""

from collections.abc import Sequence
from typing import Literal

from flax import nnx

from jdropout._flax import Applied
from jdropout._shared import drop_path, locked_dropout, spatial_dropout
from jdropout.nnx._dropout import Dropout


class SpatialDropout(Dropout):
    """`jdropout.spatial_dropout` as a module: drops whole channels of feature maps.

    Call, random streams and flags are those of `Dropout`.

    Args:
      rate: probability of dropping a channel, a number in [0, 1].
      channel_axis: the axis of the channels; 1 for channels first.
      batch_axes: axes along which decisions are independent as well.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: as for `Dropout`.
      ValueError: as for `Dropout`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.SpatialDropout(0.5, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 2, 8)))
      Array([[[2., 2., 2., 2., 0., 0., 2., 2.],
              [2., 2., 2., 2., 0., 0., 2., 2.]]], dtype=float32)

    References:
      As for `jdropout.spatial_dropout`.
    """

    _applies = Applied(spatial_dropout, ("channel_axis", "batch_axes"))

    def __init__(
        self,
        rate: float,
        *,
        channel_axis: int = -1,
        batch_axes: Sequence[int] = (0,),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.channel_axis = channel_axis
        self.batch_axes = tuple(batch_axes)


class LockedDropout(Dropout):
    """`jdropout.locked_dropout` as a module: drops the same units at every time step.

    Call, random streams and flags are those of `Dropout`.

    Args:
      rate: probability of dropping, a number in [0, 1].
      time_axis: the axis of time.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: as for `Dropout`.
      ValueError: as for `Dropout`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.LockedDropout(0.5, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 2, 8)))
      Array([[[2., 2., 2., 2., 0., 0., 2., 2.],
              [2., 2., 2., 2., 0., 0., 2., 2.]]], dtype=float32)

    References:
      As for `jdropout.locked_dropout`.
    """

    _applies = Applied(locked_dropout, ("time_axis",))

    def __init__(
        self,
        rate: float,
        *,
        time_axis: int = 1,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.time_axis = time_axis


class DropPath(Dropout):
    """`jdropout.drop_path` as a module: stochastic depth.

    ``x + drop_path(branch(x))``. Call, random streams and flags are those of `Dropout`.

    Args:
      rate: probability of dropping the branch, a number in [0, 1].
      mode: ``'row'`` decides for each example, ``'batch'`` once for all.
      scale_by_keep: whether to scale what is kept by ``1 / (1 - rate)``.
      batch_axis: the axis of the examples.
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      rngs: as for `Dropout`.

    Raises:
      TypeError: as for `Dropout`.
      ValueError: as for `Dropout`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout, jdropout.nnx
      >>> rngs = nnx.Rngs(0)
      >>> layers = [
      ...     jdropout.nnx.DropPath(rate, rngs=rngs) for rate in jdropout.drop_path_rates(0.5, 3)
      ... ]
      >>> layers[2](jnp.ones((4, 2)))
      Array([[0., 0.],
             [0., 0.],
             [0., 0.],
             [2., 2.]], dtype=float32)

    References:
      As for `jdropout.drop_path`.
    """

    _applies = Applied(drop_path, ("mode", "scale_by_keep", "batch_axis"))

    def __init__(
        self,
        rate: float,
        *,
        mode: Literal["row", "batch"] = "row",
        scale_by_keep: bool = True,
        batch_axis: int = 0,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.mode = mode
        self.scale_by_keep = scale_by_keep
        self.batch_axis = batch_axis
