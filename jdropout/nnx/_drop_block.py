"""DropBlock as an nnx module."""

from collections.abc import Sequence
from typing import Literal

from flax import nnx

from jdropout._drop_block import drop_block
from jdropout._flax import Applied
from jdropout.nnx._dropout import Dropout


class DropBlock(Dropout):
    """`jdropout.drop_block` as a module: drops contiguous blocks of a feature map.

    Call, random streams and flags are those of `Dropout`.

    Args:
      rate: expected fraction of elements to drop, a number in [0, 1].
      block_size: of a block, in elements: one number, or one for each spatial axis.
      spatial_axes: the axes of the map.
      channel_axis: the axis of the channels.
      shared_channels: whether all channels of an example have the same blocks.
      scale: ``'expected'`` or ``'realised'``, as for the function.
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
      >>> layer = jdropout.nnx.DropBlock(0.2, block_size=2, rngs=nnx.Rngs(3))
      >>> (layer(jnp.ones((1, 4, 8, 1)))[0, :, :, 0] > 0).astype(int)
      Array([[1, 1, 1, 0, 0, 1, 1, 1],
             [1, 1, 1, 0, 0, 1, 1, 1],
             [1, 1, 1, 1, 1, 1, 1, 1],
             [1, 1, 1, 1, 1, 1, 1, 1]], dtype=int32)

    References:
      As for `jdropout.drop_block`.
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
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.block_size = block_size if isinstance(block_size, int) else tuple(block_size)
        self.spatial_axes = tuple(spatial_axes)
        self.channel_axis = channel_axis
        self.shared_channels = shared_channels
        self.scale = scale
