"""DropBlock as a linen module."""

from collections.abc import Sequence
from typing import Literal

from jdropout._drop_block import drop_block
from jdropout._flax import Applied
from jdropout.linen._dropout import Dropping


class DropBlock(Dropping, kw_only=True):
    """Layer of `jdropout.drop_block`: drops contiguous blocks of a feature map.

    Flags, keys and random streams work as in `Dropout`.

    Attributes:
      rate: expected fraction of elements to drop, a number in [0, 1] or a (traced)
        floating-point scalar.
      deterministic: if True, return the input unchanged. Set it here or in the call, not in
        both.
      rng_collection: name of the random stream that keys are taken from, ``'dropout'`` by
        default.
      block_size: size of a block in elements; one number for all spatial axes, or one for each.
        Pass this and the following attributes by keyword.
      spatial_axes: axes of the map, (1, 2) by default; ``(1,)`` for a sequence, ``(1, 2, 3)``
        for a volume.
      channel_axis: axis of the channels, -1 by default.
      shared_channels: if True, the default, all channels of an example get the same blocks.
      scale: ``'expected'``, the default, multiplies kept elements by ``1 / (1 - rate)``;
        ``'realised'`` by the ratio of all elements to those that this particular mask keeps.

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
      Ghiasi, Lin and Le, "DropBlock: a regularization method for convolutional networks"
      (NeurIPS 2018), section 3 and equation 1.
    """

    _applies = Applied(
        drop_block, ("block_size", "spatial_axes", "channel_axis", "shared_channels", "scale")
    )

    block_size: int | Sequence[int]
    spatial_axes: Sequence[int] = (1, 2)
    channel_axis: int = -1
    shared_channels: bool = True
    scale: Literal["expected", "realised"] = "expected"
