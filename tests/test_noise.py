"""Noise from the uniform numbers of the law.

In float64 `uniform_noise` around 0 with amplitude 1 is exact, so that the uniform numbers, all 32
bits of them, can be read off its result.

Statistical tests have fixed keys. FALSE_ALARM = 1e-6 is how likely a perfect generator would be to
fail any of at most TESTS = 40 p-values (a Bonferroni correction); each has a control that it must
reject.
"""

import functools
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from contract import ROWS, Draw
from scipy import special, stats

import jdropout

FALSE_ALARM = 1e-6
TESTS = 40
WITH_STRENGTH = {
    "gaussian_dropout": jdropout.gaussian_dropout,
    "gaussian_noise": jdropout.gaussian_noise,
    "uniform_noise": jdropout.uniform_noise,
}


def rejected(p_value):
    """Whether a perfect generator does as badly with probability FALSE_ALARM / TESTS or less."""
    return bool(p_value <= FALSE_ALARM / TESTS)


def words(key):
    return np.asarray(jax.random.key_data(key))


def read_uniform(y):
    """The uniform numbers in a float64 result of `uniform_noise` of amplitude 1 around 0."""
    return ((np.asarray(y) + 1) * 2**31 - 0.5).astype(np.uint64)


def drawn(key, shape, **options):
    with jax.enable_x64(True):
        return read_uniform(jdropout.uniform_noise(key, np.zeros(shape), 1.0, **options))


# --- the uniform numbers ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (9,), (37, 10)])
def test_uniform_numbers_are_bitwise_the_twins(shape, key):
    twin = law_twin.uniform(words(key), shape)
    np.testing.assert_array_equal(drawn(key, shape), twin)
    if twin.size > 9:
        assert (drawn(jax.random.key(1), shape) != twin).any()


def test_uniform_numbers_are_the_twins_for_another_key_implementation():
    key = jax.random.key(3, impl="rbg")
    twin = law_twin.uniform(words(key).reshape(-1), (24, 16))
    np.testing.assert_array_equal(drawn(key, (24, 16)), twin)
    np.testing.assert_array_equal(drawn(jax.random.key_data(key), (24, 16)), twin)


@pytest.mark.parametrize("dims", [(0,), (0, -1)])
def test_shared_noise_is_the_twins(dims, key):
    twin = law_twin.uniform(words(key), (3, 6, 5), dims)
    np.testing.assert_array_equal(drawn(key, (3, 6, 5), broadcast_dims=dims), twin)


def test_masks_are_where_the_uniform_numbers_are_below_the_threshold(key):
    bits = drawn(key, (24, 16))
    for rate in (0.25, 0.1):
        mask = jdropout.keep_mask(key, rate, (24, 16), precision=32)
        np.testing.assert_array_equal(mask, bits < round((1 - rate) * 2**32))


# --- the transform ------------------------------------------------------------------------


def exact_normal(bits):
    """SciPy's quantiles, of the upper half by symmetry: probabilities near 1 have few digits."""
    half = np.minimum(bits, ~bits).astype(np.float64)
    return np.copysign(special.ndtri((half + 0.5) / 2**32), bits.astype(np.float64) - 2**31 + 0.5)


def test_normal_deviates_are_scipys_to_rounding_in_both_tails(key):
    shape = (256, 1024)
    bits = law_twin.uniform(words(key), shape).astype(np.uint32)
    exact = exact_normal(bits)
    single = jdropout.gaussian_noise(key, np.zeros(shape, np.float32), 1.0)
    np.testing.assert_allclose(single, exact, rtol=2e-6, atol=3e-7)
    with jax.enable_x64(True):
        double = jdropout.gaussian_noise(key, np.zeros(shape), 1.0)
    np.testing.assert_allclose(double, exact, rtol=1e-13, atol=1e-16)
    # The control: probabilities in float32 have no digits to spare in the upper tail.
    naive = special.ndtri((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(naive, exact, rtol=2e-6, atol=3e-7)


def test_the_smallest_and_the_largest_uniform_number_have_opposite_normal_deviates():
    """At two places, found by a search, where all 32 bits are 0 and where all are 1."""
    key, shape = jax.random.key(0), (1 << 18, 1 << 16)
    first, last = (32838, 17727), (3294, 4402)

    @jax.jit
    def at(key, row, column, x):
        options = dict(start=(row, column), global_shape=shape)
        mask = functools.partial(jdropout.keep_mask, key, shape=(1, 1), precision=32, **options)
        ends = mask(1 - 2.0**-32), ~mask(2.0**-32)  # kept only at 0, dropped only at 2^32 - 1
        return jdropout.gaussian_noise(key, x, 1.0, **options), ends

    for dtype, rtol in ((np.float32, 1e-6), (np.float64, 1e-13)):
        with jax.enable_x64(dtype == np.float64):
            low, is_first = at(key, *first, np.zeros((1, 1), dtype))
            high, is_last = at(key, *last, np.zeros((1, 1), dtype))
        assert is_first == (True, False)
        assert is_last == (False, True)
        assert low == -high
        np.testing.assert_allclose(high, 6.3379577545537895, rtol=rtol)


def test_results_are_the_documented_formulas_in_float64(key):
    x = np.random.default_rng(1).standard_normal((24, 16))
    z, u = Draw(key).normal(x.shape), Draw(key).uniform(x.shape)
    with jax.enable_x64(True):
        results = jax.jit(
            lambda key, x: (
                jdropout.gaussian_dropout(key, x, 0.2),
                jdropout.gaussian_noise(key, x, 0.7),
                jdropout.uniform_noise(key, x, 0.7),
            )
        )(key, x)
    formulas = x * (1 + 0.5 * z), x + 0.7 * z, x + 0.7 * (2 * u - 1)
    for y, formula in zip(results, formulas, strict=True):
        np.testing.assert_allclose(y, formula, rtol=1e-13, atol=1e-15)


# --- distributions ------------------------------------------------------------------------

N = 1 << 20


def standardised_normal(kind, key):
    """A million deviates that are standard normal if the function is right."""
    ones = np.ones((1024, 1024), np.float32)
    if kind == "gaussian_dropout":
        return (np.asarray(jdropout.gaussian_dropout(key, ones, 0.2)) - 1) / 0.5
    return (np.asarray(jdropout.gaussian_noise(key, ones, 0.5)) - 1) / 0.5


@pytest.mark.parametrize("kind", ["gaussian_dropout", "gaussian_noise"])
def test_normal_noise_is_normal(kind, key):
    """Kolmogorov-Smirnov over 2^20 deviates, and chi-squared of the counts beyond 4; 4 p-values.

    The controls are deviates 2 % too wide, and tails cut off at 4.
    """
    z = standardised_normal(kind, key).reshape(-1).astype(float)
    assert not rejected(stats.kstest(z, "norm").pvalue)
    assert rejected(stats.kstest(1.02 * z, "norm").pvalue)

    def tail_p_value(z):
        count, tail = np.count_nonzero(np.abs(z) > 4), stats.binom(N, 2 * stats.norm.sf(4))
        return min(1, 2 * min(tail.cdf(count), tail.sf(count - 1)))

    assert not rejected(tail_p_value(z))
    assert rejected(tail_p_value(np.clip(z, -4, 4)))


def test_uniform_noise_is_uniform(key):
    """Kolmogorov-Smirnov over 2^20 numbers; the control is off-centre by 1 % of the width."""
    y = np.asarray(jdropout.uniform_noise(key, np.zeros((1024, 1024), np.float32), 3.0)).reshape(-1)
    expected = stats.uniform(-3, 6)
    assert not rejected(stats.kstest(y, expected.cdf).pvalue)
    assert rejected(stats.kstest(y + 0.06, expected.cdf).pvalue)
    assert -3 <= y.min() < -2.9999
    assert 2.9999 < y.max() <= 3


@jax.jit
def gaussian_and_dropout(key, rate):
    ones = jnp.ones((1024, 1024))
    return jdropout.gaussian_dropout(key, ones, rate), jdropout.dropout(key, ones, rate)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_mean_and_variance_of_gaussian_dropout_are_those_of_dropout(rate, key):
    """z-values of the mean and the second moment over 2^20 deviates; 2 p-values for each rate.

    The control is the noise of a rate a tenth further from 0.
    """
    variance = rate / (1 - rate)

    def p_values(y):
        centred = y.astype(np.float64) - 1
        mean_z = centred.mean() / np.sqrt(variance / N)
        square_z = ((centred**2).mean() - variance) / (variance * np.sqrt(2 / N))
        return 2 * stats.norm.sf(np.abs([mean_z, square_z]))

    noisy, dropped = map(np.asarray, gaussian_and_dropout(key, rate))
    assert not any(map(rejected, p_values(noisy)))
    noisier, _ = map(np.asarray, gaussian_and_dropout(key, min(1.1 * rate, (1 + rate) / 2)))
    assert any(map(rejected, p_values(noisier)))
    assert dropped.astype(np.float64).var() == pytest.approx(variance, rel=0.02)


# --- strengths, gradients, cost -----------------------------------------------------------


def test_a_strength_in_bfloat16_has_its_own_value(key):
    x, strength = np.ones((24, 16), np.float32), jnp.bfloat16(0.9)

    @jax.jit
    def results(key, x):
        strengths = strength, np.asarray(strength)
        return {name: [f(key, x, s) for s in strengths] for name, f in WITH_STRENGTH.items()}

    for name, of_types in results(key, x).items():
        expected = ROWS[name].formula(Draw(key), x, float(strength))
        for y in of_types:
            np.testing.assert_allclose(y, expected, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gaussian_noise", "uniform_noise"])
def test_derivatives_with_respect_to_the_strength_are_right_in_both_orders(name, key):
    x = np.random.default_rng(1).standard_normal((24, 16))
    noise = ROWS[name].formula(Draw(key), np.zeros_like(x), 1.0)
    with jax.enable_x64(True):

        def loss(s, key):
            return jnp.sin(WITH_STRENGTH[name](key, x, s)).sum()

        first, second = jax.jit(jax.value_and_grad(jax.grad(loss)))(0.6, key)
    np.testing.assert_allclose(first, (np.cos(x + 0.6 * noise) * noise).sum(), rtol=1e-10)
    np.testing.assert_allclose(second, -(np.sin(x + 0.6 * noise) * noise**2).sum(), rtol=1e-10)


@pytest.mark.parametrize("name", ["gaussian_noise", "uniform_noise"])
def test_no_residual_of_the_strengths_gradient_grows_with_the_input(name, key):
    def residuals(key, x, strength, flag):
        f = functools.partial(WITH_STRENGTH[name], key, deterministic=flag)
        return jax.tree.leaves(jax.vjp(lambda x, s: f(x, s), x, strength)[1])

    leaves = jax.eval_shape(residuals, key, np.ones((64, 48), jnp.bfloat16), 0.3, False)
    assert sum(leaf.size for leaf in leaves) <= 4 + 1 + 1  # the keys of two digits


def test_values_and_gradients_are_right_in_cond_in_scan_in_vmap(key):
    xs = np.random.default_rng(1).standard_normal((2, 24, 16)).astype(np.float32)
    keys = jax.random.split(key)

    def squares(x, key, on):
        def body(x, _):
            f = functools.partial(jdropout.gaussian_dropout, key, rate=0.2)
            return jax.lax.cond(on, f, lambda x: x, x), None

        return (jax.lax.scan(body, x, length=1)[0] ** 2).sum()

    f = jax.jit(jax.vmap(jax.value_and_grad(squares), in_axes=(0, 0, None)))
    for key, x, value, gradient in zip(keys, xs, *f(xs, keys, True), strict=True):
        factor = 1 + 0.5 * Draw(key).normal(x.shape)
        np.testing.assert_allclose(value, ((x * factor) ** 2).sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient, 2 * x * factor**2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (0, 4)])
@pytest.mark.parametrize("name", WITH_STRENGTH)
def test_scalars_and_empty_arrays_are_served(name, shape, key):
    assert WITH_STRENGTH[name](key, np.ones(shape, np.float32), 0.3).shape == shape


# --- errors -------------------------------------------------------------------------------

ERRORS = {
    "vector": (np.ones(3, np.float32), (TypeError, ValueError), "scalar"),
    "integer array": (jnp.int32(1), TypeError, "floating-point scalar"),
    "bool": (True, TypeError, "must be a number"),
    "complex": (np.complex64(0.5), TypeError, "must be a number"),
    "string": ("0.5", TypeError, "got '0.5' of type str"),
    "negative": (-0.1, ValueError, "got -0.1"),
    "negative array": (jnp.float32(-0.5), ValueError, "got -0.5"),
    "NaN": (float("nan"), ValueError, "got nan"),
    "infinite": (float("inf"), ValueError, "got inf"),
}
NAMES = {"gaussian_dropout": "rate", "gaussian_noise": "stddev", "uniform_noise": "amplitude"}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("name", NAMES)
def test_errors_name_the_strength_and_its_value(name, case, key):
    strength, error, text = ERRORS[case]
    with pytest.raises(error, match=re.escape(text)) as raised:
        WITH_STRENGTH[name](key, np.ones(3, np.float32), strength)
    assert str(raised.value).startswith(NAMES[name])
