"""bias_dropout_add and dropout_add_norm: equal to their parts, and what they store."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdropout

SHAPE = (3, 10, 64)


def arrays(key, dtype=jnp.float32):
    x, residual = (jax.random.normal(k, SHAPE, dtype) for k in jax.random.split(key))
    vector = jnp.linspace(0.5, 2, SHAPE[-1]).astype(dtype)
    return x, residual, vector


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("residual_dtype", [None, jnp.float32])
def test_bias_dropout_add_is_the_sum_of_its_parts(dtype, residual_dtype, key):
    x, residual, bias = arrays(key, dtype)
    residual = residual.astype(residual_dtype or dtype)
    y = jdropout.bias_dropout_add(key, x, bias, residual, 0.3)
    dropped = jdropout.dropout(key, x + jnp.broadcast_to(bias, x.shape), 0.3)
    assert y.dtype == residual.dtype
    np.testing.assert_array_equal(y, residual + dropped.astype(residual.dtype))
    without_bias = jdropout.bias_dropout_add(key, x, None, residual, 0.3)
    dropped = jdropout.dropout(key, x, 0.3)
    np.testing.assert_array_equal(without_bias, residual + dropped.astype(residual.dtype))


def test_the_gradients_of_bias_dropout_add(key):
    x, residual, bias = arrays(key)
    g = jnp.cos(x)
    _, pullback = jax.vjp(
        lambda x, bias, residual: jdropout.bias_dropout_add(key, x, bias, residual, 0.3),
        x,
        bias,
        residual,
    )
    dx, dbias, dresidual = pullback(g)
    expected = jdropout.dropout(key, g, 0.3)
    np.testing.assert_array_equal(dx, expected)
    np.testing.assert_allclose(dbias, expected.sum((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(dresidual, g)
    assert [leaf.shape for leaf in jax.tree.leaves(pullback)] == [(2,)]


def flax_norm(norm, scale, bias, x):
    if norm == "rms":
        return nnx.RMSNorm(x.shape[-1], rngs=nnx.Rngs(0))(x) * scale[None, None] + bias[None, None]
    layer = nnx.LayerNorm(x.shape[-1], rngs=nnx.Rngs(0))
    return layer(x) * scale[None, None] + bias[None, None]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_dropout_add_norm_is_flax_norm_of_the_sum(norm, key):
    x, residual, vector = arrays(key)

    def ours(x, residual, scale, bias):
        return jdropout.dropout_add_norm(key, x, residual, 0.3, scale=scale, bias=bias, norm=norm)

    def parts(x, residual, scale, bias):
        total = residual + jdropout.dropout(key, x, 0.3)
        return flax_norm(norm, scale, bias, total), total

    arguments = (x, residual, vector, jnp.sin(vector))
    outputs, pullback = jax.vjp(ours, *arguments)
    expected, expected_pullback = jax.vjp(parts, *arguments)
    np.testing.assert_array_equal(outputs[1], expected[1])
    np.testing.assert_allclose(outputs[0], expected[0], atol=1e-5)
    cotangents = (jnp.cos(x), jnp.sin(x))
    for ours_, theirs in zip(pullback(cotangents), expected_pullback(cotangents), strict=True):
        np.testing.assert_allclose(ours_, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_dropout_add_norm_stores_the_sum_alone(norm, key):
    x, residual, vector = arrays(key)

    def f(x, residual, scale, bias):
        return jdropout.dropout_add_norm(key, x, residual, 0.3, scale=scale, bias=bias, norm=norm)

    (_, total), pullback = jax.vjp(f, x, residual, vector, vector)
    large = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size > SHAPE[-1]]
    assert len(large) == 1
    np.testing.assert_array_equal(large[0], total)

    _, pullback = jax.vjp(
        lambda x: flax_norm(norm, vector, vector, residual + jdropout.dropout(key, x, 0.3)), x
    )
    large = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size > SHAPE[-1]]
    assert len(large) > 1  # the control: a norm that is left to itself stores more


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_norm_in_half_precision_is_computed_in_float32(norm, key):
    x, residual, vector = arrays(key, jnp.bfloat16)
    residual = residual.astype(jnp.float32) + 300  # a mean that bfloat16 sums would drown in
    y, total = jdropout.dropout_add_norm(key, x, residual, 0.3, scale=vector, norm=norm)
    wide = np.asarray(total, np.float64)
    centred = wide - wide.mean(-1, keepdims=True) if norm == "layer" else wide
    expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    expected *= np.asarray(vector, np.float64)
    assert (y.dtype, total.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-4)


def test_options_of_dropout_are_passed_on(key):
    x, residual, bias = arrays(key)
    options = {
        "broadcast_dims": (1,),
        "precision": 32,
        "start": (1, 0, 3),
        "global_shape": (9, 10, 80),
    }
    dropped = jdropout.dropout(key, x, 0.3, **options)
    y = jdropout.bias_dropout_add(key, x, None, residual, 0.3, **options)
    np.testing.assert_array_equal(y, residual + dropped)
    _, total = jdropout.dropout_add_norm(key, x, residual, 0.3, **options)
    np.testing.assert_array_equal(total, residual + dropped)
    y = jdropout.bias_dropout_add(None, x, bias, residual, 0.3, deterministic=True)
    np.testing.assert_array_equal(y, residual + (x + jnp.broadcast_to(bias, x.shape)))
    _, total = jdropout.dropout_add_norm(None, x, residual, 0.3, deterministic=True)
    np.testing.assert_array_equal(total, residual + x)


def test_a_larger_epsilon_shrinks_the_result(key):
    x, residual, _ = arrays(key)
    small, _ = jdropout.dropout_add_norm(key, x, residual, 0.3)
    large, _ = jdropout.dropout_add_norm(key, x, residual, 0.3, epsilon=3.0)
    assert (jnp.abs(large) < jnp.abs(small)).mean() > 0.99


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"residual": jnp.ones((3, 10, 1))}, ValueError, "x and residual must have the same shape"),
        ({"residual": jnp.ones(SHAPE, jnp.int32)}, TypeError, "residual must be a floating-point"),
        ({"x": "text"}, TypeError, "x must be an array"),
        ({"bias": jnp.ones(3)}, ValueError, r"bias must have the shape \(64,\)"),
        ({"bias": jnp.ones(64, bool)}, TypeError, "bias must be a floating-point array"),
        ({"rate": 1.5}, ValueError, r"rate must be in \[0, 1\]"),
        ({"key": None}, ValueError, "key is None"),
    ],
)
def test_errors_name_the_argument(change, error, message, key):
    x, residual, bias = arrays(key)
    arguments = {"key": key, "x": x, "bias": bias, "residual": residual, "rate": 0.3} | change
    with pytest.raises(error, match=message):
        jdropout.bias_dropout_add(**arguments)
    with pytest.raises(error, match=message):
        jdropout.dropout_add_norm(**arguments)


def test_errors_of_the_norm(key):
    x, residual, _ = arrays(key)
    with pytest.raises(ValueError, match="norm must be 'layer' or 'rms', got 'batch'"):
        jdropout.dropout_add_norm(key, x, residual, 0.3, norm="batch")
    with pytest.raises(ValueError, match=r"scale must have the shape \(64,\)"):
        jdropout.dropout_add_norm(key, x, residual, 0.3, scale=jnp.ones((1, 64)))
