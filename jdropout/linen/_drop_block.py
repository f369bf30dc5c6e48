"""DropBlock as a linen module."""

from collections.abc import Sequence
from typing import Literal

from jdropout._drop_block import drop_block
from jdropout._flax import Applied
from jdropout.linen._dropout import Dropping


class DropBlock(Dropping, kw_only=True):
    """`jdropout.drop_block` as a module: drops contiguous blocks of a feature map.

    Call, random streams and flags are those of `Dropout`.

    Attributes:
      rate: expected fraction of elements to drop, a number in [0, 1].
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      block_size: of a block, in elements: one number, or one for each spatial axis. By keyword,
        as are the further attributes.
      spatial_axes: the axes of the map, (1, 2) by default.
      channel_axis: the axis of the channels, -1 by default.
      shared_channels: whether all channels of an example have the same blocks; True by default.
      scale: ``'expected'``, the default, or ``'realised'``, as for the function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.DropBlock(0.2, block_size=2, deterministic=False)
      >>> y = layer.apply({}, jnp.ones((1, 4, 8, 1)), rngs={"dropout": jax.random.key(0)})
      >>> (y[0, :, :, 0] > 0).astype(int)
      Array([[1, 1, 1, 1, 1, 0, 0, 1],
             [1, 1, 1, 0, 0, 0, 0, 1],
             [1, 1, 1, 0, 0, 1, 0, 0],
             [1, 1, 1, 1, 1, 1, 0, 0]], dtype=int32)

    References:
      As for `jdropout.drop_block`.
    """

    _applies = Applied(
        drop_block, ("block_size", "spatial_axes", "channel_axis", "shared_channels", "scale")
    )

    block_size: int | Sequence[int]
    spatial_axes: Sequence[int] = (1, 2)
    channel_axis: int = -1
    shared_channels: bool = True
    scale: Literal["expected", "realised"] = "expected"
