"""DropBlock as an nnx module."""

from collections.abc import Sequence
from typing import Literal

from flax import nnx

from jdropout._drop_block import drop_block
from jdropout._flax import Applied
from jdropout._values import check_sequence
from jdropout.nnx._dropout import Dropout


class DropBlock(Dropout):
    """Layer of `jdropout.drop_block`: drops contiguous blocks of a feature map.

    Flags, keys and random streams work as in `Dropout`.

    Args:
      rate: expected fraction of elements to drop, a Python number in [0, 1].
      block_size: size of a block in elements; one number for all spatial axes, or one for each.
      spatial_axes: axes of the map; ``(1,)`` for a sequence, ``(1, 2, 3)`` for a volume.
      channel_axis: axis of the channels.
      shared_channels: if True, all channels of an example get the same blocks.
      scale: ``'expected'`` multiplies kept elements by ``1 / (1 - rate)``; ``'realised'`` by
        the ratio of all elements to those that this particular mask keeps.
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
      >>> layer = jdropout.nnx.DropBlock(0.2, block_size=2, rngs=nnx.Rngs(3))
      >>> (layer(jnp.ones((1, 4, 8, 1)))[0, :, :, 0] > 0).astype(int)
      Array([[1, 1, 1, 0, 0, 1, 1, 1],
             [1, 1, 1, 0, 0, 1, 1, 1],
             [1, 1, 1, 1, 1, 1, 1, 1],
             [1, 1, 1, 1, 1, 1, 1, 1]], dtype=int32)

    References:
      Ghiasi, Lin and Le, "DropBlock: a regularization method for convolutional networks"
      (NeurIPS 2018), section 3 and equation 1.
    """

    _applies = Applied(
        drop_block, ("block_size", "spatial_axes", "channel_axis", "shared_channels", "scale")
    )

    def __init__(
        self,
        rate: float,
        *,
        block_size: int | Sequence[int],
        spatial_axes: Sequence[int] = (1, 2),
        channel_axis: int = -1,
        shared_channels: bool = True,
        scale: Literal["expected", "realised"] = "expected",
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        check_sequence("spatial_axes", spatial_axes)
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.block_size: int | tuple[int, ...] = (
            tuple(block_size) if isinstance(block_size, Sequence) else block_size
        )
        self.spatial_axes: tuple[int, ...] = tuple(spatial_axes)
        self.channel_axis = channel_axis
        self.shared_channels = shared_channels
        self.scale = scale
