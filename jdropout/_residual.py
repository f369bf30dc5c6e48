"""Dropout together with the bias, residual and norm around it."""

from collections.abc import Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax import lax

from jdropout import _checks
from jdropout._dropout import dropout
from jdropout._dtypes import wide_dtype
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
) -> jax.Array:
    """``residual + dropout(x + bias)``: the end of an attention or feed-forward layer.

    Under ``jit`` it is one pass over the arrays. The backward pass needs the key alone.

    Args:
      key: a PRNG key, as for `dropout`.
      x: array of any shape, of a floating-point dtype.
      bias: added to `x`; shape (features,), the size of x's last axis. None for no bias.
      residual: array of x's shape; its dtype may be another one, such as float32.
      rate: probability of dropping, as for `dropout`.
      deterministic: whether to leave dropout out; may be traced.
      broadcast_dims: as for `dropout`.
      start: as for `dropout`.
      global_shape: as for `dropout`.
      precision: bits of the rate, as for `dropout`.

    Returns:
      An array of the shape and dtype of ``residual``.

    Raises:
      TypeError: as for `dropout`.
      ValueError: if shapes do not fit, or as for `dropout`.

    Example:
      >>> import jax, jax.numpy as jnp, jdropout
      >>> x, residual, bias = jnp.ones((2, 4)), jnp.ones((2, 4)), jnp.ones(4)
      >>> jdropout.bias_dropout_add(jax.random.key(0), x, bias, residual, 0.5)
      Array([[1., 5., 5., 1.],
             [5., 5., 5., 5.]], dtype=float32)

    References:
      Vaswani et al., "Attention is all you need" (2017), section 5.4; Korthikanti et al.,
      "Reducing activation recomputation in large transformer models" (2022), section 4.1, for
      what such layers store otherwise.
    """
    x, residual = _check_same_shape(x, residual)
    bias = _check_features("bias", bias, x)
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
    """``norm(residual + dropout(x))``, and the sum that it normalises.

    For a model with normalisation before its layers the sum is the residual stream and the
    first result the next layer's input; for one with normalisation after them, the first
    result is both. The norm is over the last axis, computed in float32 (float64 for 64-bit
    input). For the backward pass nothing is stored but the key and the sum.

    Args:
      key: a PRNG key, as for `dropout`.
      x: array of shape (..., features), of a floating-point dtype.
      residual: array of x's shape; its dtype may be another one, such as float32.
      rate: probability of dropping, as for `dropout`.
      scale: the normalised array is multiplied by it; shape (features,). None for 1.
      bias: added after that; shape (features,). None for 0.
      norm: ``'layer'`` subtracts the mean and divides by the standard deviation, ``'rms'``
        divides by the root of the mean square.
      epsilon: added to the variance or mean square.
      deterministic: whether to leave dropout out; may be traced.
      broadcast_dims: as for `dropout`.
      start: as for `dropout`.
      global_shape: as for `dropout`.
      precision: bits of the rate, as for `dropout`.

    Returns:
      The normalised array, of x's dtype, and the sum, of the dtype of ``residual``; both of
      x's shape.

    Raises:
      TypeError: as for `dropout`.
      ValueError: if shapes do not fit, the norm is unknown, or as for `dropout`.

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
    _checks.check_option("norm", norm, ("layer", "rms"))
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
    return normalise(total, scale, bias, norm, epsilon).astype(x.dtype), total


def _normalise(
    x: jax.Array, scale: jax.Array | None, bias: jax.Array | None, norm: str, epsilon: float
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
    x = _checks.check_floating_array("x", x)
    residual = _checks.check_floating_array("residual", residual)
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
    vector = _checks.check_floating_array(name, vector)
    if vector.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} must have the shape {x.shape[-1:]} of x's last axis, got {vector.shape}. Pass "
            "one number per feature."
        )
    return cast("jax.Array", vector.reshape((1,) * (x.ndim - 1) + vector.shape))
