"""nnx modules whose mask is shared along axes."""

from collections.abc import Sequence
from typing import Literal

from flax import nnx

from jdropout._flax import Applied
from jdropout._shared import drop_path, locked_dropout, spatial_dropout
from jdropout._values import check_sequence
from jdropout.nnx._dropout import Dropout


class SpatialDropout(Dropout):
    """Layer of `jdropout.spatial_dropout`: drops whole channels of feature maps.

    Flags, keys and random streams work as in `Dropout`.

    Args:
      rate: probability of dropping a channel, a Python number in [0, 1].
      channel_axis: axis of the channels; 1 for channels-first layouts.
      batch_axes: axes along which masks are independent; () drops the same channels in every
        example.
      deterministic: if True, return the input unchanged. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the rate is not a Python number, or `rngs` has the wrong type.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.SpatialDropout(0.5, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 2, 8)))
      Array([[[2., 2., 2., 2., 0., 0., 2., 2.],
              [2., 2., 2., 2., 0., 0., 2., 2.]]], dtype=float32)

    References:
      Tompson, Goroshin, Jain, LeCun and Bregler, "Efficient object localization using
      convolutional networks" (CVPR 2015), section 3.2.
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
        check_sequence("batch_axes", batch_axes)
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.channel_axis = channel_axis
        self.batch_axes: tuple[int, ...] = tuple(batch_axes)


class LockedDropout(Dropout):
    """Layer of `jdropout.locked_dropout`: drops the same units at every time step.

    Flags, keys and random streams work as in `Dropout`.

    Args:
      rate: probability of dropping, a Python number in [0, 1].
      time_axis: axis of the time steps, along which the mask is shared.
      deterministic: if True, return the input unchanged. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the rate is not a Python number, or `rngs` has the wrong type.
      ValueError: if the rate is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import jdropout.nnx
      >>> layer = jdropout.nnx.LockedDropout(0.5, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((1, 2, 8)))
      Array([[[2., 2., 2., 2., 0., 0., 2., 2.],
              [2., 2., 2., 2., 0., 0., 2., 2.]]], dtype=float32)

    References:
      Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
      networks" (NeurIPS 2016), section 4; Merity, Keskar and Socher, "Regularizing and
      optimizing LSTM language models" (ICLR 2018), section 4.2.
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
    """Layer of `jdropout.drop_path`: stochastic depth, used as ``x + drop_path(branch(x))``.

    Flags, keys and random streams work as in `Dropout`.

    Args:
      rate: probability of dropping the branch, a Python number in [0, 1].
      mode: ``'row'`` decides for each example, ``'batch'`` once for all examples.
      scale_by_keep: if True, scale kept branches by ``1 / (1 - rate)``.
      batch_axis: axis of the examples.
      deterministic: if True, return the input unchanged. A call and
        ``nnx.view(model, deterministic=...)`` override it; None requires one of them.
      rng_collection: name of the random stream that keys are taken from.
      rngs: source of keys, an `nnx.Rngs` or `nnx.RngStream`, forked here; None if every call is
        given one.

    Raises:
      TypeError: if the rate is not a Python number, or `rngs` has the wrong type.
      ValueError: if the rate is outside [0, 1].

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
      Huang, Sun, Liu, Sedra and Weinberger, "Deep networks with stochastic depth" (ECCV 2016),
      section 3.
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
