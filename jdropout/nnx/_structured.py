"""nnx modules whose mask is shared along axes or regions."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
from flax import nnx

from jdropout._checks import check_static_flag
from jdropout._drop_block import drop_block
from jdropout._shared import drop_path, locked_dropout, spatial_dropout
from jdropout._tokens import patch_dropout
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

    def _drop(self, key: jax.Array | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return spatial_dropout(
            key,
            x,
            self.rate,
            channel_axis=self.channel_axis,
            batch_axes=self.batch_axes,
            deterministic=flag,
        )


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

    def _drop(self, key: jax.Array | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return locked_dropout(key, x, self.rate, time_axis=self.time_axis, deterministic=flag)


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

    def _drop(self, key: jax.Array | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
        return drop_path(
            key,
            x,
            self.rate,
            mode=self.mode,
            scale_by_keep=self.scale_by_keep,
            batch_axis=self.batch_axis,
            deterministic=flag,
        )


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

    def _drop(self, key: jax.Array | None, x: jax.Array, flag: bool | jax.Array) -> jax.Array:
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


class PatchDropout(Dropout):
    """`jdropout.patch_dropout` as a module: leaves a fixed number of tokens out.

    Call, random streams and flags are those of `Dropout`, but for a flag that must not be traced:
    the shape of the result depends on it.

    Args:
      rate: fraction of tokens to leave out, a number in [0, 1).
      axis: the axis of the tokens. The axes before it count examples.
      num_prefix_tokens: number of tokens at the begin that always stay.
      ordered: whether the tokens that stay are in the order that they had.
      return_indices: whether a call returns a pair: the tokens that stay, and their indices.
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
      >>> layer = jdropout.nnx.PatchDropout(0.5, ordered=True, rngs=nnx.Rngs(2))
      >>> layer(jnp.arange(9.0).reshape(1, 9, 1))[..., 0]
      Array([[0., 2., 5., 7., 8.]], dtype=float32)
      >>> layer(jnp.ones((1, 9, 1)), deterministic=True).shape
      (1, 9, 1)

    References:
      As for `jdropout.patch_dropout`.
    """

    def __init__(
        self,
        rate: float,
        *,
        axis: int = 1,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        return_indices: bool = False,
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> None:
        super().__init__(
            rate, deterministic=deterministic, rng_collection=rng_collection, rngs=rngs
        )
        self.axis = axis
        self.num_prefix_tokens = num_prefix_tokens
        self.ordered = ordered
        self.return_indices = return_indices

    def _drop(self, key: jax.Array | None, x: jax.Array, flag: bool | jax.Array) -> Any:
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
