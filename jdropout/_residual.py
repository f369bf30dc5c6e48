"""Dropout together with the bias, residual and norm around it."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import lax

from jdropout import _arrays, _values
from jdropout._draw import Draw
from jdropout._dropout import dropout
from jdropout._dtypes import wide_dtype
from jdropout._implementation import Implementation, check_implementation, check_supported
from jdropout._new_draw import new_draw
from jdropout._typing import ArrayLike, Flag, Index, Key, Rate


def bias_dropout_add(
    key: Key | None,
    x: ArrayLike,
    bias: ArrayLike | None,
    residual: ArrayLike,
    rate: Rate,
    *,
    deterministic: Flag = False,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Computes ``residual + dropout(x + bias)``, the end of an attention or feed-forward layer.

    Under `jax.jit` it is a single pass over the arrays. The backward pass needs only the key.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      x: array of any shape, with a floating-point dtype.
      bias: vector added to `x`, of shape (features,), the size of x's last axis; None for no
        bias.
      residual: array of x's shape; its dtype may differ from x's, for example float32.
      rate: probability of dropping, in [0, 1]; a number or a (traced) floating-point scalar.
      deterministic: if True, leave dropout out; a bool or a (traced) boolean scalar.
      broadcast_dims: axes along which the mask is shared.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.
      implementation: "pallas" runs one Pallas kernel, with the limits that `dropout` states; "xla"
        and None leave it to the compiler.

    Returns:
      An array with the shape and dtype of `residual`.

    Raises:
      TypeError: if an array is not floating-point, or another argument has the wrong type, such
        as a boolean rate.
      ValueError: if shapes do not match, the rate is not a scalar in [0, 1] (a traced one
        outside gives NaN, and an error under ``checkify``), the key is missing or a batch of
        keys, an axis does not exist, or the part at `start` does not fit into `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> x, residual, bias = jnp.ones((2, 4)), jnp.ones((2, 4)), jnp.ones(4)
      >>> jdropout.bias_dropout_add(jax.random.key(0), x, bias, residual, 0.5)
      Array([[1., 5., 5., 1.],
             [5., 5., 5., 5.]], dtype=float32)

    References:
      Vaswani et al., "Attention is all you need" (2017), section 5.4; Korthikanti et al.,
      "Reducing activation recomputation in large transformer models" (2022), section 4.1, for
      what such layers otherwise store.
    """
    x, residual = _check_same_shape(x, residual)
    bias = _check_features("bias", bias, x)
    if check_implementation(implementation):
        from jdropout._dropout_kernel import kernel_formula

        draw = new_draw(
            "dropout",
            key,
            rate,
            deterministic,
            jnp.shape(x),
            broadcast_dims=broadcast_dims,
            start=start,
            global_shape=global_shape,
            precision=precision,
        )
        check_supported({"x": x, "residual": residual, "bias": bias}, draw)
        y = draw.apply(kernel_formula, x, bias, residual, kept=_without_dropout, dropped=_residual)
        return cast("jax.Array", y)
    if bias is not None:
        x = x + bias.astype(x.dtype)
    dropped = dropout(
        key,
        x,
        rate,
        deterministic=deterministic,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=precision,
    )
    return residual + dropped.astype(residual.dtype)


def dropout_add_norm(
    key: Key | None,
    x: ArrayLike,
    residual: ArrayLike,
    rate: Rate,
    *,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    norm: Literal["layer", "rms"] = "layer",
    epsilon: float = 1e-6,
    deterministic: Flag = False,
    broadcast_dims: Sequence[int] = (),
    start: Sequence[Index] | None = None,
    global_shape: Sequence[int] | None = None,
    precision: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes ``norm(residual + dropout(x))`` and returns it together with the sum.

    In a pre-norm model the sum is the residual stream and the first result the input of the
    next layer; in a post-norm model the first result serves as both. The norm is over the last
    axis, computed in float32 (float64 for 64-bit input). The backward pass stores only the key
    and the sum.

    Args:
      key: PRNG key, typed or raw; use a new one for every call. May be None if no mask is drawn
        (``deterministic=True``, or a static rate of 0 or 1).
      x: array of shape (..., features), with a floating-point dtype.
      residual: array of x's shape; its dtype may differ from x's, for example float32.
      rate: probability of dropping, in [0, 1]; a number or a (traced) floating-point scalar.
      scale: factor of the normalised array, of shape (features,); None for 1.
      bias: vector added after `scale`, of shape (features,); None for 0.
      norm: ``'layer'`` subtracts the mean and divides by the standard deviation; ``'rms'``
        divides by the root mean square.
      epsilon: number added to the variance or mean square.
      deterministic: if True, leave dropout out; a bool or a (traced) boolean scalar.
      broadcast_dims: axes along which the mask is shared.
      start: index of x's first element within an array of `global_shape`, for code that sees
        one part of it, as in `shard_map`.
      global_shape: shape of the whole array; required with `start`.
      precision: bits of the rate, 16 or 32; None uses 32 only where 16 bits would miss a static
        rate by more than 0.1 %.

    Returns:
      The normalised array, in x's dtype, and the sum, in the dtype of `residual`; both have x's
      shape.

    Raises:
      TypeError: if an array is not floating-point, or another argument has the wrong type, such
        as a boolean rate.
      ValueError: if shapes do not match, `norm` is unknown, the rate is not a scalar in [0, 1]
        (a traced one outside gives NaN, and an error under ``checkify``), the key is missing or
        a batch of keys, an axis does not exist, or the part at `start` does not fit into
        `global_shape`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> x, residual = jnp.ones((1, 4)), jnp.arange(4.0).reshape(1, 4)
      >>> y, total = jdropout.dropout_add_norm(jax.random.key(0), x, residual, 0.5)
      >>> total
      Array([[0., 3., 4., 5.]], dtype=float32)

    References:
      Ba, Kiros and Hinton, "Layer normalization" (2016), section 3; Zhang and Sennrich, "Root
      mean square layer normalization" (2019), section 4.
    """
    x, residual = _check_same_shape(x, residual)
    _values.check_option("norm", norm, ("layer", "rms"))
    checked_epsilon = _values.check_amount("epsilon", epsilon)
    scale = _check_features("scale", scale, x)
    bias = _check_features("bias", bias, x)
    total = bias_dropout_add(
        key,
        x,
        None,
        residual,
        rate,
        deterministic=deterministic,
        broadcast_dims=broadcast_dims,
        start=start,
        global_shape=global_shape,
        precision=precision,
    )
    normalise = jax.checkpoint(_normalise, prevent_cse=False, static_argnums=(3, 4))
    return normalise(total, scale, bias, norm, checked_epsilon).astype(x.dtype), total


def _without_dropout(
    draw: Draw, x: jax.Array, bias: jax.Array | None, residual: jax.Array
) -> jax.Array:
    del draw
    biased = x if bias is None else x + bias.astype(x.dtype)
    return residual + biased.astype(residual.dtype)


def _residual(draw: Draw, x: jax.Array, bias: jax.Array | None, residual: jax.Array) -> jax.Array:
    del draw, x, bias
    return residual


def _normalise(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, norm: str, epsilon: Any
) -> jax.Array:
    x = x.astype(wide_dtype(x))
    if norm == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)
    if scale is not None:
        y = y * scale.astype(y.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    return y


def _check_same_shape(x: Any, residual: Any) -> tuple[jax.Array, jax.Array]:
    x = _arrays.check_floating_array("x", x)
    residual = _arrays.check_floating_array("residual", residual)
    if x.shape != residual.shape:
        raise ValueError(
            f"x and residual must have the same shape, got {x.shape} and {residual.shape}. "
            "Broadcast the smaller one."
        )
    return x, residual


def _check_features(name: str, vector: Any, x: jax.Array) -> jax.Array | None:
    """Checks an optional vector along x's last axis; returns it with as many axes as x."""
    if vector is None:
        return None
    vector = _arrays.check_floating_array(name, vector)
    if vector.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} must have the shape {x.shape[-1:]} of x's last axis, got {vector.shape}. Pass "
            "one number per feature."
        )
    return cast("jax.Array", vector.reshape((1,) * (x.ndim - 1) + vector.shape))
