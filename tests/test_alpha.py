"""Alpha dropout: the moments that it keeps, and its limits.

The formula, its gradient and all that functions of the family have in common are in
test_contract.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import SELU_FLOOR, Draw, alpha_formula

import jdropout


def test_the_floor_is_the_limit_of_selu():
    assert float(jax.nn.selu(jnp.float32(-1000))) == pytest.approx(SELU_FLOOR, rel=1e-6)


@pytest.mark.parametrize(("rate", "precision"), [(0.9, 32), (0.002, 16)])
def test_mean_zero_and_variance_one_are_kept_at_the_effective_rate(rate, precision):
    """The moments of the two outcomes, exactly: no sampling of the mask at all."""
    key, r = jax.random.key(0), jdropout.effective_rate(rate, precision=precision)
    keep = np.asarray(jdropout.keep_mask(key, rate, (256, 1024), precision=precision))
    with jax.enable_x64(True):

        def outcome(x):
            x = np.full(keep.shape, x)
            y = np.asarray(jdropout.alpha_dropout(key, x, rate, precision=precision))
            (kept,), (dropped,) = np.unique(y[keep]), np.unique(y[~keep])
            return kept, dropped

        (at_zero, floor), (at_one, _) = outcome(0.0), outcome(1.0)
    a = at_one - at_zero
    # Of inputs with E[x] = 0 and E[x^2] = 1.
    mean = (1 - r) * at_zero + r * floor
    square = (1 - r) * (a**2 + at_zero**2) + r * floor**2
    assert mean == pytest.approx(0, abs=1e-14)
    assert square == pytest.approx(1, rel=1e-14)
    if rate != r:  # the control: the rate that was asked for is not quite the effective one
        assert abs((1 - rate) * at_zero + rate * floor) > 1e-10


def test_the_moments_of_a_deep_selu_network_are_kept(key):
    """20 layers of 512 units, rate 0.1; dropout at the same rate, the control, does not."""
    x = np.random.default_rng(1).standard_normal((128, 512), np.float32)
    ws = np.random.default_rng(2).standard_normal((20, 512, 512), np.float32) / 512**0.5

    def through(drop):
        @jax.jit
        def network(key, x, ws):
            def layer(y, inputs):
                i, w = inputs
                return drop(jax.random.fold_in(key, i), jax.nn.selu(y @ w), 0.1), None

            y, _ = jax.lax.scan(layer, x, (jnp.arange(20), ws))
            return y.mean(), y.var()

        return map(float, network(key, x, ws))

    mean, variance = through(jdropout.alpha_dropout)
    assert abs(mean) < 0.1
    assert abs(variance - 1) < 0.1
    _, variance = through(jdropout.dropout)
    assert abs(variance - 1) > 0.2


def test_feature_alpha_dropout_drops_whole_channels_of_any_axis(key):
    x = np.random.default_rng(1).standard_normal((8, 32, 5, 7), np.float32)
    y = jdropout.feature_alpha_dropout(key, x, 0.4, channel_axis=1)
    np.testing.assert_allclose(y, alpha_formula((2, 3))(Draw(key), x, 0.4), atol=3e-6)


@pytest.mark.parametrize(
    "function", [jdropout.alpha_dropout, jdropout.feature_alpha_dropout], ids=lambda f: f.__name__
)
def test_a_rate_in_bfloat16_has_its_own_value(function, key):
    x, rate = jnp.ones((24, 16)), jnp.bfloat16(0.9)
    static = function(key, x, float(rate))
    np.testing.assert_allclose(function(key, x, rate), static, rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(function(key, x, np.asarray(rate)), static, rtol=3e-6, atol=1e-6)


def test_what_is_dropped_tends_to_zero_near_rate_one(key):
    x = np.random.default_rng(1).standard_normal((64, 64), np.float32)
    drop = jax.jit(functools.partial(jdropout.alpha_dropout, key, x, precision=32))
    for rate in (0.99, 0.9999):
        dropped = ~Draw(key, precision=32).keep(rate, x.shape)
        assert (np.abs(np.asarray(drop(rate))[dropped]) < 2 * (1 - rate) ** 0.5).all()


def test_feature_alpha_dropout_names_a_bad_axis(key):
    for options, text in [
        (dict(channel_axis=3), "channel_axis is 3, but the array has 2 axes"),
        (dict(batch_axes=(2,)), "batch_axes is 2"),
    ]:
        with pytest.raises(ValueError, match=text):
            jdropout.feature_alpha_dropout(key, jnp.ones((2, 3)), 0.5, **options)
