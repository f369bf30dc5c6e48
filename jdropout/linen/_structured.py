"""linen modules whose mask is shared along axes or regions."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import linen

from jdropout._checks import check_static_flag
from jdropout._drop_block import drop_block
from jdropout._shared import drop_path, locked_dropout, spatial_dropout
from jdropout._tokens import patch_dropout
from jdropout._typing import Key
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

    channel_axis: int = -1
    batch_axes: Sequence[int] = (0,)

    @linen.nowrap
    def _drop(self, key: Key | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return spatial_dropout(
            key,
            x,
            self.rate,
            channel_axis=self.channel_axis,
            batch_axes=self.batch_axes,
            deterministic=flag,
        )


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

    time_axis: int = 1

    @linen.nowrap
    def _drop(self, key: Key | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return locked_dropout(key, x, self.rate, time_axis=self.time_axis, deterministic=flag)


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

    mode: Literal["row", "batch"] = "row"
    scale_by_keep: bool = True
    batch_axis: int = 0

    @linen.nowrap
    def _drop(self, key: Key | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return drop_path(
            key,
            x,
            self.rate,
            mode=self.mode,
            scale_by_keep=self.scale_by_keep,
            batch_axis=self.batch_axis,
            deterministic=flag,
        )


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

    block_size: int | Sequence[int]
    spatial_axes: Sequence[int] = (1, 2)
    channel_axis: int = -1
    shared_channels: bool = True
    scale: Literal["expected", "realised"] = "expected"

    @linen.nowrap
    def _drop(self, key: Key | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return drop_block(
            key,
            x,
            self.rate,
            block_size=self.block_size,
            spatial_axes=self.spatial_axes,
            channel_axis=self.channel_axis,
            shared_channels=self.shared_channels,
            scale=self.scale,
            deterministic=flag,
        )


class PatchDropout(Dropping):
    """`jdropout.patch_dropout` as a module: leaves a fixed number of tokens out.

    Call, random streams and flags are those of `Dropout`, but for a flag that must not be traced:
    the shape of the result depends on it.

    Attributes:
      rate: fraction of tokens to leave out, a number in [0, 1).
      deterministic: as for `Dropout`.
      rng_collection: as for `Dropout`.
      axis: the axis of the tokens, 1 by default. The axes before it count examples.
      num_prefix_tokens: number of tokens at the begin that always stay, 1 by default.
      ordered: whether the tokens that stay are in the order that they had; False by default.
      return_indices: whether a call returns a pair: the tokens that stay, and their indices.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import jdropout.linen
      >>> layer = jdropout.linen.PatchDropout(0.5, ordered=True, deterministic=False)
      >>> x = jnp.arange(9.0).reshape(1, 9, 1)
      >>> layer.apply({}, x, rngs={"dropout": jax.random.key(0)})[..., 0]
      Array([[0., 1., 6., 7., 8.]], dtype=float32)

    References:
      As for `jdropout.patch_dropout`.
    """

    axis: int = 1
    num_prefix_tokens: int = 1
    ordered: bool = False
    return_indices: bool = False

    @linen.nowrap
    def _drop(self, key: Key | None, x: jax.Array, flag: bool | jax.Array) -> Any:
        kept, indices = patch_dropout(
            key,
            x,
            self.rate,
            axis=self.axis,
            num_prefix_tokens=self.num_prefix_tokens,
            ordered=self.ordered,
            deterministic=check_static_flag(flag),
        )
        return (kept, indices) if self.return_indices else kept
