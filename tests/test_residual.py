"""bias_dropout_add and dropout_add_norm: equal to their parts, and what they store."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jdropout

SHAPE = (3, 10, 64)


def arrays(dtype=jnp.float32):
    x, residual = np.random.default_rng(1).standard_normal((2, *SHAPE), np.float32)
    vector = np.linspace(0.5, 2, SHAPE[-1], dtype=np.float32)
    return tuple(array.astype(dtype) for array in (x, residual, vector))


def test_bias_dropout_add_is_the_sum_of_its_parts(key):
    full, brain, half = jnp.float32, jnp.bfloat16, jnp.float16
    cases = [
        (x, bias, r.astype(residual_dtype))
        for dtype, residual_dtype in [(full, full), (brain, brain), (brain, full), (half, half)]
        for x, r, bias in [arrays(dtype)]
    ]

    @jax.jit
    def sums(key, cases):
        add = functools.partial(jdropout.bias_dropout_add, key, rate=0.3)
        return [
            (add(x, bias=bias, residual=r), add(x, bias=None, residual=r)) for x, bias, r in cases
        ]

    @jax.jit
    def parts(key, cases):
        drop = functools.partial(jdropout.dropout, key, rate=0.3)
        return [
            (drop(x + jnp.broadcast_to(bias, x.shape)).astype(r.dtype), drop(x).astype(r.dtype))
            for x, bias, r in cases
        ]

    rounding = {jnp.float32: 1e-6, jnp.bfloat16: 2**-7, jnp.float16: 2**-10}
    for (_, _, r), *pairs in zip(cases, sums(key, cases), parts(key, cases), strict=True):
        for y, dropped in zip(*pairs, strict=True):
            assert y.dtype == r.dtype
            expected = np.asarray(r, np.float64) + np.asarray(dropped, np.float64)
            # Rounded once, at the end; what is added is of the sum's size at most times 4.
            tolerance = rounding[r.dtype.type] * np.maximum(1, np.abs(expected))
            assert (np.abs(np.asarray(y, np.float64) - expected) <= tolerance).all()


def test_the_gradients_of_bias_dropout_add(key):
    x, residual, bias = arrays()
    g = np.cos(x)

    @jax.jit
    def passes(key, x, bias, residual):
        f = functools.partial(jdropout.bias_dropout_add, key, rate=0.3)
        _, pullback = jax.vjp(lambda x, b, r: f(x, bias=b, residual=r), x, bias, residual)
        return pullback(g), jax.tree.leaves(pullback)

    (dx, dbias, dresidual), stored = passes(key, x, bias, residual)
    expected = jdropout.dropout(key, g, 0.3)
    np.testing.assert_array_equal(dx, expected)
    np.testing.assert_allclose(dbias, np.sum(expected, (0, 1)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dresidual, g)
    assert [leaf.shape for leaf in stored] == [(2,)]


def flax_norm(norm, scale, bias, x):
    if norm == "rms":
        return nnx.RMSNorm(x.shape[-1], rngs=nnx.Rngs(0))(x) * scale[None, None] + bias[None, None]
    layer = nnx.LayerNorm(x.shape[-1], rngs=nnx.Rngs(0))
    return layer(x) * scale[None, None] + bias[None, None]


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_dropout_add_norm_is_flax_norm_of_the_sum_and_stores_the_sum_alone(norm, key):
    x, residual, vector = arrays()

    def ours(key, x, residual, scale, bias):
        return jdropout.dropout_add_norm(key, x, residual, 0.3, scale=scale, bias=bias, norm=norm)

    def parts(key, x, residual, scale, bias):
        total = residual + jdropout.dropout(key, x, 0.3)
        return flax_norm(norm, scale, bias, total), total

    @functools.partial(jax.jit, static_argnums=0)
    def passes(f, key, *arguments):
        outputs, pullback = jax.vjp(functools.partial(f, key), *arguments)
        stored = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size > SHAPE[-1]]
        return outputs, pullback((jnp.cos(x), jnp.sin(x))), stored

    arguments = (key, x, residual, vector, np.sin(vector))
    outputs, gradients, stored = passes(ours, *arguments)
    expected, expected_gradients, stored_by_parts = passes(parts, *arguments)
    np.testing.assert_allclose(outputs[1], expected[1], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(outputs[0], expected[0], atol=1e-5)
    for gradient, theirs in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, theirs, atol=2e-5, rtol=1e-4)
    (leaf,) = stored
    np.testing.assert_array_equal(leaf, outputs[1])
    assert len(stored_by_parts) > 1  # the control: a norm that is left to itself stores more


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_norm_in_half_precision_is_computed_in_float32(norm, key):
    x, residual, vector = arrays(jnp.bfloat16)
    residual = residual.astype(jnp.float32) + 300  # a mean that bfloat16 sums would drown in
    f = functools.partial(jdropout.dropout_add_norm, rate=0.3, norm=norm)
    # Eager: in one program, XLA may leave the narrow sum in float32.
    for dtype in (jnp.float32, jnp.bfloat16):
        y, total = f(key, x, residual.astype(dtype), scale=vector)
        wide = np.asarray(total, np.float64)
        centred = wide - wide.mean(-1, keepdims=True) if norm == "layer" else wide
        expected = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
        expected *= np.asarray(vector, np.float64)
        assert (y.dtype, total.dtype) == (jnp.bfloat16, dtype)
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-4)


def test_options_of_dropout_are_passed_on(key):
    x, residual, bias = arrays()
    options = {
        "broadcast_dims": (1,),
        "precision": 32,
        "start": (1, 0, 3),
        "global_shape": (9, 10, 80),
    }

    @jax.jit
    def sums(key, x, residual):
        dropped = jdropout.dropout(key, x, 0.3, **options)
        y = jdropout.bias_dropout_add(key, x, None, residual, 0.3, **options)
        _, total = jdropout.dropout_add_norm(key, x, residual, 0.3, **options)
        return residual + dropped, y, total

    expected, *results = sums(key, x, residual)
    for result in results:
        np.testing.assert_array_equal(result, expected)
    y = jdropout.bias_dropout_add(None, x, bias, residual, 0.3, deterministic=True)
    np.testing.assert_array_equal(y, residual + (x + bias))
    _, total = jdropout.dropout_add_norm(None, x, residual, 0.3, deterministic=True)
    np.testing.assert_array_equal(total, residual + x)


def test_a_larger_epsilon_shrinks_the_result(key):
    x, residual, _ = arrays()

    @jax.jit
    def normalised(key, x, residual, epsilon):
        return jdropout.dropout_add_norm(key, x, residual, 0.3, epsilon=epsilon)[0]

    small, large = (normalised(key, x, residual, epsilon) for epsilon in (1e-6, 3.0))
    assert (np.abs(large) < np.abs(small)).mean() > 0.99


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
    x, residual, bias = arrays()
    arguments = {"key": key, "x": x, "bias": bias, "residual": residual, "rate": 0.3} | change
    with pytest.raises(error, match=message):
        jdropout.bias_dropout_add(**arguments)
    with pytest.raises(error, match=message):
        jdropout.dropout_add_norm(**arguments)


def test_errors_of_the_norm(key):
    x, residual, _ = arrays()
    with pytest.raises(ValueError, match="norm must be 'layer' or 'rms', got 'batch'"):
        jdropout.dropout_add_norm(key, x, residual, 0.3, norm="batch")
    with pytest.raises(ValueError, match=r"scale must have the shape \(64,\)"):
        jdropout.dropout_add_norm(key, x, residual, 0.3, scale=jnp.ones((1, 64)))
