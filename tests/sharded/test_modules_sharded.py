"""Flax layers on eight devices: the bits of one device, and the sharding of the input."""

import jax
import numpy as np
import pytest
from cheap import normal
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jdropout
import jdropout.linen
import jdropout.nnx


def call_nnx(x, key, **options):
    return jdropout.nnx.Dropout(0.5, **options)(x, rngs=key)


def call_linen(x, key, **options):
    layer = jdropout.linen.Dropout(0.5, deterministic=False, **options)
    return layer.apply({}, x, rng=key)


CASES = [
    (call_nnx, ("data",), (1,), "jit"),
    (call_nnx, ("data", None, "model"), (0, 2), "eager"),
    (call_linen, ("data",), (0,), "eager"),
    (call_linen, ("data", None, "model"), (1,), "jit"),
]
"""Both ways to call, and shared axes that are sharded and that are not."""


@pytest.mark.parametrize(("call", "spec", "broadcast_dims", "way"), CASES)
def test_explicitly_sharded_input_keeps_sharding_and_bits(call, spec, broadcast_dims, way):
    key = jax.random.key(3)
    x = np.asarray(normal(8, 12, 16))
    expected = jdropout.dropout(key, x, 0.5, broadcast_dims=broadcast_dims)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P(*spec)))

        def typed_call(x, key):
            y = call(x, key, broadcast_dims=broadcast_dims)
            assert jax.typeof(y) == jax.typeof(x)
            return y

        y = (jax.jit(typed_call) if way == "jit" else typed_call)(sharded, key)
    assert y.sharding.is_equivalent_to(sharded.sharding, 3)
    assert len(y.sharding.device_set) == 8
    np.testing.assert_array_equal(y, expected)


def test_explicitly_sharded_input_under_nnx_jit_takes_the_key_of_the_stream():
    layer = jdropout.nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    x = np.asarray(normal(8, 16))
    expected = [
        jdropout.dropout(jax.random.fold_in(layer.rngs.key[...], i), x, 0.5) for i in (0, 1)
    ]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
        call = nnx.jit(lambda layer, x: layer(x))
        for y in expected:
            actual = call(layer, sharded)
            assert jax.typeof(actual) == jax.typeof(sharded)
            np.testing.assert_array_equal(actual, y)
    assert int(layer.rngs.count[...]) == 2


def test_attention_layers_keep_the_sharding_and_the_mask():
    """Batch over the devices: every device drops its own part of the whole mask."""
    inputs = [np.asarray(normal(8, 4, 2, 4, seed=seed)) for seed in range(3)]
    options = dict(dropout_rng=jax.random.key(5), dropout_rate=0.5, broadcast_dropout=False)

    @jax.jit
    def both(*inputs):
        apis = jdropout.nnx, jdropout.linen
        return [api.dot_product_attention(*inputs, **options) for api in apis]

    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharded = both(*jax.device_put(inputs, NamedSharding(mesh, P("data"))))
    for y, expected in zip(sharded, both(*inputs), strict=True):
        assert y.sharding.spec[0] == "data"
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(y) == 0, np.asarray(expected) == 0)
        assert np.isfinite(y).all()
