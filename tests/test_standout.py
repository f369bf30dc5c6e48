"""Standout: what is kept by a probability of its own, and its gradients."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Draw
from scipy import special

import jdropout


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


SHAPE = (24, 16)
KEY = jax.random.key(2017)
X = normal(SHAPE, 1)


def as_float(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def uniform(shape):
    return Draw(KEY).uniform(shape)


@pytest.mark.parametrize("probability", [0.25, 0.9, 2.0**-24])
def test_a_constant_probability_gives_the_mask_of_the_law(probability):
    logit = special.logit(probability)
    probability = float(jax.nn.sigmoid(jnp.float32(logit)))  # as rounded
    y = jdropout.standout(KEY, np.ones((64, 32), np.float32), logit)
    mask = Draw(KEY, precision=32).keep(1 - probability, (64, 32))
    np.testing.assert_array_equal(y, np.float32(mask))


def test_standout_keeps_where_the_uniform_number_is_below_the_probability():
    options = dict(alpha=1.5, beta=-0.3)
    preactivation = X[::-1]
    probability = special.expit(1.5 * as_float(preactivation)[0] - 0.3)
    u = uniform(SHAPE)
    assert np.abs(u - probability).min() > 1e-6  # the rounding decides nowhere
    y = jdropout.standout(KEY, X, preactivation, **options)
    np.testing.assert_array_equal(y, np.where(u < probability, X, 0))
    y = jdropout.standout(None, X, preactivation, **options, deterministic=True)
    np.testing.assert_allclose(y, X * probability, rtol=1e-6)
    certain = np.where(X > 0, 200, -200).astype(np.float32)
    np.testing.assert_array_equal(jdropout.standout(KEY, X, certain), np.where(X > 0, X, 0))


def test_gradients_of_standout_are_those_documented():
    preactivation = X[::-1]

    def loss(x, preactivation, alpha, beta, deterministic):
        return jdropout.standout(
            KEY, x, preactivation, alpha=alpha, beta=beta, deterministic=deterministic
        ).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    to_x, *others = gradient(X, preactivation, 1.0, 0.0, False)
    mask = uniform(SHAPE) < special.expit(as_float(preactivation)[0])
    np.testing.assert_array_equal(to_x, mask)
    for other in others:
        np.testing.assert_array_equal(other, jnp.zeros_like(other))
    x, a = as_float(X, preactivation)
    q = special.expit(a)
    for ours, exact in zip(
        gradient(X, preactivation, 1.0, 0.0, True),
        (q, x * q * (1 - q), (x * q * (1 - q) * a).sum(), (x * q * (1 - q)).sum()),
        strict=True,
    ):
        np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-6)


def test_a_slope_that_is_not_a_scalar_is_an_error():
    text = "alpha must be a floating-point scalar"
    with pytest.raises(TypeError, match=re.escape(text)):
        jdropout.standout(KEY, X, 0.0, alpha=jnp.ones(2))
