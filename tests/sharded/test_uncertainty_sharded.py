"""Monte Carlo prediction of sharded inputs."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

import jdropout
from jdropout import mc_predict


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"batch_size": 1}, AxisType.Explicit),
        ({"consistent": True}, AxisType.Auto),
        ({"sampling": "stratified"}, AxisType.Explicit),
    ],
)
def test_shardings_of_the_inputs_change_nothing(options, kind, key):
    x = np.ones((8, 12), np.float32) + np.arange(8, dtype=np.float32)[:, None]
    fn = functools.partial(jdropout.dropout, rate=0.5)
    expected = mc_predict(fn, key, x, num_samples=10, **options)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.P("data")))
        prediction = mc_predict(fn, key, placed, num_samples=10, **options)
    np.testing.assert_allclose(prediction.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(prediction.variance, expected.variance, rtol=1e-5)


@pytest.mark.parametrize("sampling", ["independent", "stratified"])
def test_a_shard_can_be_predicted_alone(sampling, key):
    x = np.ones((8, 12), np.float32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data"))
    def predict(x):
        start = (2 * jax.lax.axis_index("data"), 0)
        fn = functools.partial(jdropout.dropout, rate=0.5, start=start, global_shape=(8, 12))
        return mc_predict(fn, key, x, num_samples=10, sampling=sampling).mean

    fn = functools.partial(jdropout.dropout, rate=0.5)
    whole = mc_predict(fn, key, x, num_samples=10, sampling=sampling)
    np.testing.assert_allclose(jax.jit(predict)(x), whole.mean, rtol=1e-6)
