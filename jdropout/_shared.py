"""Dropout whose mask is shared along axes: channels, time steps, examples, rows of a table."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jdropout import _checks, _values
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
    """Drops whole channels of a feature map.

    Neighbouring elements of a feature map are too similar to be worth dropping one by one.
    There is one decision per example and channel; kept channels are scaled by ``1 / (1 - r)``
    with ``r = effective_rate(rate)``, which keeps the mean. Any number and order of axes works:
    (batch, length, channels), (batch, height, width, channels), or channels first.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      x: array with at least two axes, with a floating-point or complex dtype.
      rate: probability of dropping a channel, in [0, 1]; a number or a (traced) floating-point
        scalar.
      channel_axis: axis of the channels; 1 for channels-first layouts.
      batch_axes: axes along which masks are independent; () drops the same channels in every
        example.
      deterministic: if True, return `x` unchanged; a bool or a (traced) boolean scalar.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      An array of x's shape and dtype; `x` itself if `deterministic` is True or a static rate
      rounds to 0.

    Raises:
      TypeError: if `x` is not a floating-point or complex array, or another argument has the
        wrong type, such as a boolean rate.
      ValueError: if an axis does not exist or is given two roles, the rate is not a scalar in
        [0, 1] (a traced one outside gives NaN, and an error under ``checkify``), the key is
        missing or a batch of keys, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> jdropout.spatial_dropout(jax.random.key(0), jnp.ones((1, 2, 6)), 0.5)
      Array([[[0., 2., 2., 2., 2., 2.],
              [0., 2., 2., 2., 2., 2.]]], dtype=float32)

    References:
      Tompson, Goroshin, Jain, LeCun and Bregler, "Efficient object localization using
      convolutional networks" (CVPR 2015), section 3.2.
    """
    x = _checks.check_input(x)
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
    """Drops the same units at every time step: variational dropout for recurrent networks.

    One decision per example and feature, scaled as in `dropout`. In a network that runs step by
    step, calling `dropout` on each step's (batch, features) with one key for all steps is
    equivalent.

    Args:
      key: PRNG key, typed or raw; use a new one for every sequence. May be None if no mask is
        drawn (``deterministic=True``, or a static rate of 0 or 1).
      x: array of shape (batch, time, features), or with time on another axis; floating-point or
        complex.
      rate: probability of dropping, in [0, 1]; a number or a (traced) floating-point scalar.
      time_axis: axis of the time steps, along which the mask is shared.
      deterministic: if True, return `x` unchanged; a bool or a (traced) boolean scalar.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      An array of x's shape and dtype; `x` itself if `deterministic` is True or a static rate
      rounds to 0.

    Raises:
      TypeError: if `x` is not a floating-point or complex array, or another argument has the
        wrong type, such as a boolean rate.
      ValueError: if the axis does not exist, the rate is not a scalar in [0, 1] (a traced one
        outside gives NaN, and an error under ``checkify``), the key is missing or a batch of
        keys, or the part at `start` does not fit into `global_shape`.

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
    x = _checks.check_input(x)
    time = _values.check_axis("time_axis", time_axis, jnp.ndim(x))
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

    Use it as ``residual + drop_path(key, branch(residual), rate)``. Kept branches are scaled by
    ``1 / (1 - r)`` with ``r = effective_rate(rate)``, which keeps the mean. To skip the
    branch's computation as well, use `layer_drop`.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      x: array with at least one axis, with a floating-point or complex dtype.
      rate: probability of dropping, in [0, 1]; a number or a (traced) floating-point scalar.
        For one rate per layer, see `drop_path_rates`.
      mode: ``'row'`` decides for each example, ``'batch'`` once for all examples.
      scale_by_keep: if True, scale kept branches by ``1 / (1 - r)``. The paper does not, and
        multiplies by ``1 - r`` in evaluation instead.
      batch_axis: axis of the examples.
      deterministic: if True, return `x` unchanged; a bool or a (traced) boolean scalar.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      An array of x's shape and dtype; `x` itself if `deterministic` is True or a static rate
      rounds to 0.

    Raises:
      TypeError: if `x` is not a floating-point or complex array, or another argument has the
        wrong type, such as a boolean rate.
      ValueError: if the mode is unknown, the axis does not exist, the rate is not a scalar in
        [0, 1] (a traced one outside gives NaN, and an error under ``checkify``), the key is
        missing or a batch of keys, or the part at `start` does not fit into `global_shape`.

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
    x = _checks.check_input(x)
    _values.check_option("mode", mode, ("row", "batch"))
    ndim = jnp.ndim(x)
    batch = _values.check_axis("batch_axis", batch_axis, ndim)
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
        scaled=_values.check_flag("scale_by_keep", scale_by_keep),
        batch_axis=batch,
    )


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Returns the stochastic-depth rates of all layers: linear from 0 up to `rate`.

    Early layers, whose output every later layer needs, are dropped less.

    Args:
      rate: rate of the last layer, in [0, 1].
      depth: number of layers, at least 1.

    Returns:
      A list of `depth` floats; ``[rate]`` for a single layer.

    Raises:
      TypeError: if an argument is not a number.
      ValueError: if the rate is outside [0, 1], or the depth is below 1.

    Example:
      >>> import jdropout
      >>> jdropout.drop_path_rates(0.5, 3)
      [0.0, 0.25, 0.5]

    References:
      Huang et al., "Deep networks with stochastic depth" (ECCV 2016), section 3, "survival
      probabilities", which counts from the input and so starts at rate / depth; later vision
      models start at 0, as here.
    """
    checked = _checks.check_rate(rate)
    if isinstance(checked, jax.core.Tracer):
        raise TypeError(
            f"rate must be a Python number here, got {rate!r}. Multiply it by "
            "jnp.linspace(0, 1, depth) for traced rates."
        )
    last = float(checked)
    depth = _values.check_size("depth", depth, bits=20)  # a list of more layers is a mistake
    if depth == 1:
        return [last]
    return [last * (layer / (depth - 1)) for layer in range(depth)]  # the last one is exact


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
    """Drops whole rows of an embedding table, so that a word disappears wherever it occurs.

    Kept rows are scaled as in `dropout`. Apply it to the table, before the lookup.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      table: array of shape (vocabulary, features), with a floating-point or complex dtype.
      rate: probability of dropping a word, in [0, 1]; a number or a (traced) floating-point
        scalar.
      deterministic: if True, return `table` unchanged; a bool or a (traced) boolean scalar.
      start: index of table's first element within a table of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole table; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      An array of table's shape and dtype; `table` itself if `deterministic` is True or a static
      rate rounds to 0.

    Raises:
      TypeError: if the table is not a floating-point or complex array, or another argument has
        the wrong type, such as a boolean rate.
      ValueError: if the table does not have two axes, the rate is not a scalar in [0, 1] (a
        traced one outside gives NaN, and an error under ``checkify``), the key is missing or a
        batch of keys, or the part at `start` does not fit into `global_shape`.

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
    table = _checks.check_input(table, "table")
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
        batch_axis=None,
    )


def _check_ndim(name: str, x: Any, ndim: int, axes: str) -> None:
    if np.ndim(x) != ndim:
        raise ValueError(
            f"{name} must have the axes {axes}, got shape {np.shape(x)}."
            " Reshape it, or use jdropout.dropout with broadcast_dims."
        )
