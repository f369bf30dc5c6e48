"""Concrete dropout: the formula, its gradients, and that the rate learns what it should.

References are in float64 NumPy, from the uniform numbers of the law's twin.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import Draw, differences
from scipy import integrate, special

import jdropout


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


SHAPE = (24, 16)
KEY = jax.random.key(2017)
X, LOGITS = normal(SHAPE, 1), normal((1, 16), 2)


def as_float(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def uniform(shape):
    return Draw(KEY).uniform(shape)


def concrete(x, logit, temperature, u):
    """As the paper has it."""
    p = special.expit(logit)
    argument = (np.log(p) - np.log(1 - p) + np.log(u) - np.log(1 - u)) / temperature
    return x * (1 - special.expit(argument)) / (1 - p)


@pytest.mark.parametrize("logit", [LOGITS, jnp.float32(-2.2), -2.2, X / 4], ids=lambda a: None)
def test_concrete_dropout_is_the_formula_of_the_paper(logit):
    for temperature in (0.1, 2 / 3):
        y = jdropout.concrete_dropout(KEY, X, logit, temperature=temperature)
        expected = concrete(*as_float(X, logit), temperature, uniform(SHAPE))
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_concrete_dropout_and_its_gradients_are_exact_in_float64():
    x, logit, factor = as_float(X[:4, :4], LOGITS[:, :4], X[4:8, :4])
    u = uniform((4, 4))

    def reference(x, logit, temperature):
        return (np.sin(concrete(x, logit, temperature, u)) * factor).sum()

    with jax.enable_x64(True):

        def loss(x, logit, temperature):
            y = jdropout.concrete_dropout(KEY, x, logit, temperature=temperature)
            return (jnp.sin(y) * factor).sum()

        @jax.jit
        def passes(*arguments):
            value, ours = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arguments)
            return value, ours, jax.jvp(loss, arguments, arguments)[1]

        value, ours, tangent = passes(x, logit, 0.5)
    np.testing.assert_allclose(value, reference(x, logit, 0.5), rtol=1e-12)
    for gradient, numeric in zip(ours, differences(reference, x, logit, 0.5), strict=True):
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8)
    pairs = zip(ours, (x, logit, 0.5), strict=True)
    np.testing.assert_allclose(tangent, sum((np.asarray(g) * a).sum() for g, a in pairs), rtol=1e-9)


def test_a_low_temperature_gives_the_masks_of_the_law():
    for rate in (0.1, 0.5, 0.9):
        logit = special.logit(rate)
        y = jdropout.concrete_dropout(KEY, jnp.ones((64, 64)), logit, temperature=1e-5)
        keep = Draw(KEY, precision=32).keep(rate, (64, 64))
        undecided = np.abs(uniform((64, 64)) - (1 - rate)) < 1e-4
        error = np.abs(y - keep / (1 - rate))
        assert undecided.mean() < 1e-3
        assert (error < 1e-5 / (1 - rate))[~undecided].all()


def test_the_mean_of_concrete_dropout_is_off_by_what_is_documented():
    """By integration over the logistic distribution; and 2^20 elements agree to 5 sigma."""

    def mean(p, temperature):
        logit = special.logit(p)

        def integrand(v):
            return special.expit(-(logit + v) / temperature) * special.expit(v) * special.expit(-v)

        knots = [-logit - 1, -logit, -logit + 1, 0]
        return integrate.quad(integrand, -99, 99, points=knots, limit=500)[0] / (1 - p)

    for p in (0.05, 0.1, 0.3, 0.5):
        assert abs(mean(p, 0.1) - 1) < 0.002
        assert abs(mean(p, 2 / 3) - 1) < 0.06
    y = jdropout.concrete_dropout(KEY, jnp.ones((1024, 1024)), special.logit(0.1))
    y = np.asarray(y, np.float64)
    standard_error = y.std() / 1024
    assert abs(y.mean() - mean(0.1, 0.1)) < 5 * standard_error
    assert abs(y.mean() - mean(0.05, 0.1) * 0.99) > 5 * standard_error  # the control


def test_concrete_dropout_is_finite_for_large_logits():
    @jax.jit
    def passes(logit):
        y, pullback = jax.vjp(lambda x, a: jdropout.concrete_dropout(KEY, x, a), X, logit)
        return y, pullback(jnp.ones_like(X))

    for logit in (-1e4, -200.0, -100.0, 100.0, 200.0, 1e4):
        y, gradients = passes(np.float32(logit))
        np.testing.assert_allclose(y, X if logit < 0 else 0 * X, rtol=1e-5, atol=1e-30)
        assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_the_regularizer_is_the_formula_of_the_paper():
    logit = np.linspace(-12, 12, 25)
    p = special.expit(logit)
    entropy = -(special.xlogy(p, p) + special.xlog1py(1 - p, -p))
    expected = 1e-6 * 50 / (1 - p) - 1e-5 * 128 * entropy
    ours = jdropout.concrete_regularizer(jnp.float32(logit), 50.0, 128)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9)
    expected = 0.3 * 50 / (1 - p) - 0.2 * 128 * entropy
    options = dict(weight_regularizer=0.3, dropout_regularizer=0.2)
    with jax.enable_x64(True):
        ours = jdropout.concrete_regularizer(logit, 50.0, 128, **options)
        np.testing.assert_allclose(ours, expected, rtol=1e-10)
        gradient = jax.grad(
            lambda a, s: jdropout.concrete_regularizer(a, s, 128, **options).sum(), (0, 1)
        )(jnp.asarray(logit), jnp.float64(50))
    slope = 0.3 * 50 * np.exp(logit) + 0.2 * 128 * logit * p * (1 - p)
    np.testing.assert_allclose(gradient[0], slope, rtol=1e-10)
    np.testing.assert_allclose(gradient[1], (0.3 / (1 - p)).sum(), rtol=1e-10)


def test_the_regularizer_is_finite_for_large_logits():
    logit = jnp.array([-1e30, -1000.0, -100.0, 88.0])
    value, slope = jax.vmap(
        jax.value_and_grad(lambda a: jdropout.concrete_regularizer(a, 50.0, 128))
    )(logit)
    assert np.isfinite(value).all()
    assert np.isfinite(slope).all()
    entropy_alone = functools.partial(
        jdropout.concrete_regularizer, weight_sum_of_squares=0.0, num_inputs=1
    )
    np.testing.assert_allclose(jax.vmap(entropy_alone)(logit), 0, atol=1e-12)
    naive = jax.nn.sigmoid(logit)  # the control
    assert np.isnan(naive * jnp.log(naive) + (1 - naive) * jnp.log(1 - naive)).any()


def learned_rate(num_samples):
    """Of a network with one hidden layer on the toy data y = 2 x + 8 + noise, as in the paper."""
    x = normal((num_samples, 1), 1)
    y = 2 * x + 8 + normal(x.shape, 2)
    params = {
        "hidden": normal((1, 32), 3),
        "shift": jnp.zeros((1, 32)),
        "out": normal((32, 1), 4) / 6,
        "mean": jnp.zeros((1, 1)),
        "logit": jnp.float32(special.logit(0.1)),
    }

    def loss(params, key):
        hidden = jax.nn.relu(x @ params["hidden"] + params["shift"])
        hidden = jdropout.concrete_dropout(key, hidden, params["logit"])
        squared = jnp.square(hidden @ params["out"] + params["mean"] - y).mean()
        return squared + jdropout.concrete_regularizer(
            params["logit"],
            jnp.square(params["out"]).sum(),
            32,
            weight_regularizer=0.01 / num_samples,
            dropout_regularizer=2 / num_samples,
        )

    optimizer = optax.adam(0.02)

    def step(i, state):
        params, optimizer_state = state
        gradient = jax.grad(loss)(params, jax.random.fold_in(KEY, i))
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return optax.apply_updates(params, updates), optimizer_state

    train = jax.jit(lambda state: jax.lax.fori_loop(0, 1000, step, state))
    with jax.numpy_dtype_promotion("standard"):  # which Optax needs
        return float(jax.nn.sigmoid(train((params, optimizer.init(params)))[0]["logit"]))


@pytest.mark.examples
def test_the_learned_rate_falls_as_the_data_grow():
    """Gal et al. (2017), section 4.1: what the data explain away is the model's uncertainty."""
    rates = [learned_rate(num_samples) for num_samples in (16, 256)]
    assert rates[0] > 2 * rates[1]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: jdropout.concrete_dropout(KEY, X, 0.0, temperature=0),
            ValueError,
            "temperature must be above 0",
        ),
        (
            lambda: jdropout.concrete_dropout(KEY, X, 0.0, temperature=-1),
            ValueError,
            "temperature must be a finite number",
        ),
        (
            lambda: jdropout.concrete_regularizer(0.0, 1.0, 0),
            ValueError,
            "num_inputs must be at least 1, got 0",
        ),
        (
            lambda: jdropout.concrete_regularizer(0.0, 1.0, 1, weight_regularizer=-1),
            ValueError,
            "weight_regularizer must be a finite number of at least 0",
        ),
    ],
)
def test_errors_name_the_argument_and_the_value(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()
