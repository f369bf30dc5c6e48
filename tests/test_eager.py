"""Programs that other code keeps and sends: one for all rates, without effects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.experimental import checkify

import jdropout
from jdropout import schedules

KEY = jax.random.key(0)
X = np.linspace(-1, 1, 96, dtype=np.float32).reshape(2, 6, 8)
CALLS = {
    "dropout": lambda rate, key=KEY, x=X: jdropout.dropout(key, x, rate),
    "keep_mask": lambda rate, key=KEY, x=X: jdropout.keep_mask(key, rate, x.shape),
    "drop_block": lambda rate, key=KEY, x=X: jdropout.drop_block(
        key, x, rate, block_size=2, spatial_axes=(1,)
    ),
    "zoneout": lambda rate, key=KEY, x=X: jdropout.zoneout(key, x, -x, rate),
    "zoneout in evaluation": lambda rate, key=KEY, x=X: jdropout.zoneout(
        None, x, -x, rate, deterministic=True
    ),
    "layer_drop": lambda rate, key=KEY, x=X: jdropout.layer_drop(key, lambda x: x, x, rate),
    "attention": lambda rate, key=KEY, x=X: jdropout.dot_product_attention(
        x[:, :, None], x[:, :, None], x[:, :, None], dropout_key=key, dropout_rate=rate
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_eager_call_compiles_once_for_all_rates(name):
    call = CALLS[name]
    compiled = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(duration)

    call(0.5), call(1e-6)  # one digit, and two
    monitoring.register_event_duration_secs_listener(listen)
    results = {rate: np.asarray(call(rate)) for rate in (0.1, 0.25, 0.37, 0.9, 2e-6)}
    assert not compiled
    for rate in (0.37, 2e-6):
        constant = jax.jit(lambda key, x, rate=rate: call(rate, key, x))(KEY, X)
        np.testing.assert_allclose(
            constant, results[rate], rtol=1e-6 * ("zoneout in" in name or name == "attention")
        )
    assert compiled  # the listener does listen


def test_a_traced_rate_leaves_no_effect_in_the_program():
    schedule = schedules.early(0.1, cutoff_step=1000)
    step = jax.jit(lambda i, x: jdropout.dropout(KEY, x, schedule(i)))
    exported = jax.export.export(step)(jax.ShapeDtypeStruct((), jnp.int32), X)
    assert not exported.ordered_effects
    assert not exported.unordered_effects
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(np.int32(3), X), step(3, X))
    assert not jax.make_jaxpr(step)(3, X).effects


def test_checkify_still_reports_a_rate():
    error, _ = checkify.checkify(jax.jit(lambda rate: jdropout.dropout(KEY, X, rate)))(1.5)
    with pytest.raises(checkify.JaxRuntimeError, match=r"rate must be in \[0, 1\], got 1\.5"):
        error.throw()
