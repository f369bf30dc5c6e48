"""Dropout whose mask is shared along axes: channels, time steps, examples, rows of a table."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _checks
from jdropout._dropout import masked
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate


def spatial_dropout(
    key: Key | None,
    x: ArrayLike,
    rate: Rate,
    *,
    channel_axis: int = -1,
    batch_axes: Sequence[int] = (0,),
    deterministic: Flag = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> jax.Array:
    """Drops whole channels: neighbours in a feature map are too alike to be dropped alone.

    One decision for each example and channel; what is kept is scaled by ``1 / (1 - r)`` with
    ``r = effective_rate(rate)``, so that the mean stays. Any number and order of axes: (batch,
    length, channels), (batch, height, width, channels), or channels first.

    Args:
      key: a PRNG key, as for `dropout`.
      x: array of two axes or more, of a floating-point or complex dtype.
      rate: probability of dropping a channel, as for `dropout`.
      channel_axis: the axis of the channels; 1 for channels first.
      batch_axes: axes along which decisions are independent as well; () to drop a channel in all
        examples alike.
      deterministic: whether to return `x` as it is; may be traced.
      start: as for `dropout`.
      global_shape: as for `dropout`.
      precision: bits of the rate, as for `dropout`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: as for `dropout`.
      ValueError: if an axis does not exist or has two roles, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> jdropout.spatial_dropout(jax.random.key(0), jnp.ones((1, 2, 6)), 0.5)
      Array([[[0., 2., 2., 2., 2., 2.],
              [0., 2., 2., 2., 2., 2.]]], dtype=float32)

    References:
      Tompson, Goroshin, Jain, LeCun and Bregler, "Efficient object localization using
      convolutional networks" (CVPR 2015), section 3.2.
    """
    _checks.check_input(x)
    ndim = jnp.ndim(x)
    shared = _checks.check_channels(channel_axis, batch_axes, ndim)
    return masked(
        "spatial_dropout",
        key,
        x,
        rate,
        deterministic=deterministic,
        broadcast_dims=shared,
        start=start,
        global_shape=global_shape,
        precision=precision,
        batch_axis=batch_axes[0] % ndim if batch_axes else 0,
    )


def locked_dropout(
    key: Key | None,
    x: ArrayLike,
    rate: Rate,
    *,
    time_axis: int = 1,
    deterministic: Flag = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> jax.Array:
    """Drops the same units at every time step: variational dropout of recurrent networks.

    One decision for each example and feature, scaled as in `dropout`. In a network that runs step
    by step, `dropout` of every step's (batch, features) with one key for all of them is the same.

    Args:
      key: a PRNG key, as for `dropout`; a new one for every sequence.
      x: array of shape (batch, time, features), or with time on another axis.
      rate: probability of dropping, as for `dropout`.
      time_axis: the axis of time.
      deterministic: whether to return `x` as it is; may be traced.
      start: as for `dropout`.
      global_shape: as for `dropout`.
      precision: bits of the rate, as for `dropout`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: as for `dropout`.
      ValueError: if the axis does not exist, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> jdropout.locked_dropout(jax.random.key(0), jnp.ones((1, 2, 6)), 0.5)
      Array([[[0., 2., 2., 2., 2., 2.],
              [0., 2., 2., 2., 2., 2.]]], dtype=float32)

    References:
      Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
      networks" (NeurIPS 2016), section 4; Merity, Keskar and Socher, "Regularizing and
      optimizing LSTM language models" (ICLR 2018), section 4.2.
    """
    _checks.check_input(x)
    time = _checks.check_axis("time_axis", time_axis, jnp.ndim(x))
    return masked(
        "locked_dropout",
        key,
        x,
        rate,
        deterministic=deterministic,
        broadcast_dims=[time],
        start=start,
        global_shape=global_shape,
        precision=precision,
        batch_axis=1 if time == 0 else 0,
    )


def drop_path(
    key: Key | None,
    x: ArrayLike,
    rate: Rate,
    *,
    mode: Literal["row", "batch"] = "row",
    scale_by_keep: bool = True,
    batch_axis: int = 0,
    deterministic: Flag = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> jax.Array:
    """Drops the whole output of a residual branch: stochastic depth.

    ``residual + drop_path(key, branch(residual), rate)``. To skip the work of the branch as well,
    see `layer_drop`.

    Args:
      key: a PRNG key, as for `dropout`.
      x: array of one axis or more, of a floating-point or complex dtype.
      rate: probability of dropping, as for `dropout`; see `drop_path_rates`.
      mode: ``'row'`` decides for each example, ``'batch'`` once for all.
      scale_by_keep: whether to scale what is kept by ``1 / (1 - r)``, which keeps the mean. The
        paper does not, and multiplies by ``1 - r`` in evaluation instead.
      batch_axis: the axis of the examples.
      deterministic: whether to return `x` as it is; may be traced.
      start: as for `dropout`.
      global_shape: as for `dropout`.
      precision: bits of the rate, as for `dropout`.

    Returns:
      An array of x's shape and dtype.

    Raises:
      TypeError: as for `dropout`.
      ValueError: if the mode or the axis does not exist, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> jdropout.drop_path(jax.random.key(0), jnp.ones((4, 2)), 0.5)
      Array([[0., 0.],
             [2., 2.],
             [2., 2.],
             [2., 2.]], dtype=float32)

    References:
      Huang, Sun, Liu, Sedra and Weinberger, "Deep networks with stochastic depth" (ECCV 2016),
      section 3.
    """
    _checks.check_input(x)
    _checks.check_option("mode", mode, ("row", "batch"))
    ndim = jnp.ndim(x)
    batch = _checks.check_axis("batch_axis", batch_axis, ndim)
    return masked(
        "drop_path",
        key,
        x,
        rate,
        deterministic=deterministic,
        broadcast_dims=[axis for axis in range(ndim) if axis != batch or mode == "batch"],
        start=start,
        global_shape=global_shape,
        precision=precision,
        scaled=scale_by_keep,
        batch_axis=batch,
    )


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Rates of stochastic depth for the layers of a network: from 0, linearly, up to `rate`.

    Early layers make what all others need, and are dropped less.

    Args:
      rate: that of the last layer, in [0, 1].
      depth: number of layers.

    Returns:
      A list of `depth` rates; for one layer it is ``[rate]``.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if the rate is outside [0, 1], or the depth below 1.

    Example:
      >>> import jdropout
      >>> jdropout.drop_path_rates(0.5, 3)
      [0.0, 0.25, 0.5]

    References:
      Huang et al., "Deep networks with stochastic depth" (ECCV 2016), section 3, "survival
      probabilities", counts from the input and so begins at rate / depth; this form, from 0, is
      that of later vision models.
    """
    last = float(_checks.check_rate(rate))
    depth = _checks.check_positive("depth", depth)
    if depth == 1:
        return [last]
    return [last * (layer / (depth - 1)) for layer in range(depth)]  # the last one exactly


def embedding_dropout(
    key: Key | None,
    table: ArrayLike,
    rate: Rate,
    *,
    deterministic: Flag = False,
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> jax.Array:
    """Drops whole rows of an embedding table: a word disappears wherever it occurs.

    The rows that are kept are scaled as in `dropout`. Apply it to the table before the lookup.

    Args:
      key: a PRNG key, as for `dropout`.
      table: array of shape (vocabulary, features).
      rate: probability of dropping a word, as for `dropout`.
      deterministic: whether to return the table as it is; may be traced.
      start: as for `dropout`.
      global_shape: as for `dropout`.
      precision: bits of the rate, as for `dropout`.

    Returns:
      An array of the table's shape and dtype.

    Raises:
      TypeError: as for `dropout`.
      ValueError: if the table does not have two axes, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> table = jdropout.embedding_dropout(jax.random.key(1), jnp.ones((4, 2)), 0.5)
      >>> table[jnp.array([1, 3, 1])]
      Array([[2., 2.],
             [2., 2.],
             [2., 2.]], dtype=float32)

    References:
      Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
      networks" (NeurIPS 2016), section 4.2; Merity et al. (ICLR 2018), section 4.3.
    """
    _checks.check_input(table, "table")
    _check_ndim("table", table, 2, "(vocabulary, features)")
    return masked(
        "embedding_dropout",
        key,
        table,
        rate,
        deterministic=deterministic,
        broadcast_dims=[1],
        start=start,
        global_shape=global_shape,
        precision=precision,
    )


def _check_ndim(name: str, x: Any, ndim: int, axes: str) -> None:
    if np.ndim(x) != ndim:
        raise ValueError(
            f"{name} must have the axes {axes}, got shape {np.shape(x)}."
            " Reshape it, or use jdropout.dropout with broadcast_dims."
        )
