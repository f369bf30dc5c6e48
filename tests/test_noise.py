"""Noise from the uniform numbers of the law, and dropout for self-normalising networks.

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
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import special, stats

import jdropout
from jdropout import _mask, _noise

FALSE_ALARM = 1e-6
TESTS = 40
FLOOR = -1.7580993408473766
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")

ADDED_OR_MULTIPLIED = {
    "gaussian_dropout": functools.partial(jdropout.gaussian_dropout, rate=0.3),
    "gaussian_noise": functools.partial(jdropout.gaussian_noise, stddev=0.7),
    "uniform_noise": functools.partial(jdropout.uniform_noise, amplitude=0.7),
}
ALL = ADDED_OR_MULTIPLIED | {
    "alpha_dropout": functools.partial(jdropout.alpha_dropout, rate=0.3),
    "feature_alpha_dropout": functools.partial(jdropout.feature_alpha_dropout, rate=0.3),
}
WITH_TRACED_STRENGTH = {
    "gaussian_dropout": lambda key, x, s, **options: jdropout.gaussian_dropout(
        key, x, s, **options
    ),
    "gaussian_noise": lambda key, x, s, **options: jdropout.gaussian_noise(key, x, s, **options),
    "uniform_noise": lambda key, x, s, **options: jdropout.uniform_noise(key, x, s, **options),
    "alpha_dropout": lambda key, x, s, **options: jdropout.alpha_dropout(key, x, s, **options),
    "feature_alpha_dropout": lambda key, x, s, **options: jdropout.feature_alpha_dropout(
        key, x, s, **options
    ),
}


def rejected(p_value):
    """Whether a perfect generator does as badly with probability FALSE_ALARM / TESTS or less."""
    return bool(p_value <= FALSE_ALARM / TESTS)


def words(key):
    return np.asarray(jax.random.key_data(key))


def uniform(key, shape, **options):
    """The uniform numbers in (0, 1) of the twin, in float64: exact."""
    return (law_twin.uniform(words(key), shape, **options).astype(np.float64) + 0.5) / 2**32


def normal(key, shape, **options):
    """SciPy's normal deviates of the twin's uniform numbers."""
    return special.ndtri(uniform(key, shape, **options))


def read_uniform(y):
    """The uniform numbers in a float64 result of `uniform_noise` of amplitude 1 around 0."""
    return ((np.asarray(y) + 1) * 2**31 - 0.5).astype(np.uint64)


def drawn(key, shape, **options):
    with jax.enable_x64(True):
        return read_uniform(jdropout.uniform_noise(key, jnp.zeros(shape), 1.0, **options))


# The first three share their code, and so do the last two.
REPRESENTATIVES = ["gaussian_dropout", "alpha_dropout"]


# --- the uniform numbers ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (9,), (37, 10), (3, 6, 5)])
def test_uniform_numbers_are_bitwise_those_of_the_twin(shape, key):
    twin = law_twin.uniform(words(key), shape)
    np.testing.assert_array_equal(drawn(key, shape), twin)
    if twin.size > 9:
        assert (drawn(jax.random.key(1), shape) != twin).any()


def test_uniform_numbers_do_not_depend_on_64_bit_types(key):
    mask, operands = _mask.describe_uniform(key, (24, 16), (), None, None)
    bits = _mask.uniform(_mask.with_words(operands), mask)
    assert bits.dtype == jnp.uint32
    np.testing.assert_array_equal(bits, law_twin.uniform(words(key), (24, 16)))
    np.testing.assert_array_equal(bits, drawn(key, (24, 16)))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_uniform_numbers_are_those_of_the_twin_for_every_key_implementation(impl):
    key = jax.random.key(3, impl=impl)
    twin = law_twin.uniform(words(key).reshape(-1), (24, 16))
    np.testing.assert_array_equal(drawn(key, (24, 16)), twin)
    np.testing.assert_array_equal(drawn(jax.random.key_data(key), (24, 16)), twin)


@pytest.mark.parametrize("dims", [(0,), (0, -1)])
def test_shared_noise_is_that_of_the_twin(dims, key):
    twin = law_twin.uniform(words(key), (3, 6, 5), dims)
    np.testing.assert_array_equal(drawn(key, (3, 6, 5), broadcast_dims=dims), twin)


@pytest.mark.parametrize(
    ("shape", "start", "whole"),
    [((5, 3), (6, 1), (11, 4)), ((2, 3, 4), (1, 5, 2), (4, 9, 8))],
)
def test_a_block_is_a_part_of_the_whole(shape, start, whole, key):
    block = drawn(key, shape, start=start, global_shape=whole)
    part = tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
    np.testing.assert_array_equal(block, drawn(key, whole)[part])
    np.testing.assert_array_equal(block, law_twin.uniform(words(key), shape, (), start, whole))
    with jax.enable_x64(True):
        traced = jax.jit(
            lambda *start: jdropout.uniform_noise(
                key, jnp.zeros(shape), 1.0, start=start, global_shape=whole
            )
        )(*map(jnp.int32, start))
    np.testing.assert_array_equal(read_uniform(traced), block)


def test_masks_are_where_the_uniform_numbers_are_below_the_threshold(key):
    bits = drawn(key, (24, 16))
    for rate in (0.25, 0.1):
        mask = jdropout.keep_mask(key, rate, (24, 16), precision=32)
        np.testing.assert_array_equal(mask, bits < round((1 - rate) * 2**32))


def test_float32_and_float64_results_have_the_same_uniform_numbers(key):
    for function in ADDED_OR_MULTIPLIED.values():
        narrow = function(key, jnp.ones((24, 16)))
        with jax.enable_x64(True):
            wide = function(key, jnp.ones((24, 16)))
            assert wide.dtype == jnp.float64
        np.testing.assert_allclose(narrow, wide, rtol=1e-6, atol=2e-6)


# --- the transform ------------------------------------------------------------------------

EDGES = [0, 1, 2, 3, 2**8, 2**16 - 1, 2**31 - 2**20, 2**31 - 1]
EDGES += [2**32 - 1 - edge for edge in EDGES]


def test_normal_deviates_are_those_of_scipy_to_rounding_in_both_tails(key):
    bits = np.concatenate([EDGES, law_twin.uniform(words(key), (50_000,))]).astype(np.uint32)
    # The exact quantile of the upper half by that of its complement, as probabilities near 1 have
    # no digits to spare even in float64.
    half = np.minimum(bits, ~bits).astype(np.float64)
    exact = np.copysign(special.ndtri((half + 0.5) / 2**32), bits.astype(np.float64) - 2**31 + 0.5)
    single = np.asarray(_noise.normal(jnp.asarray(bits), jnp.dtype(jnp.float32)))
    np.testing.assert_allclose(single, exact, rtol=2e-6, atol=3e-7)
    with jax.enable_x64(True):
        double = np.asarray(_noise.normal(jnp.asarray(bits), jnp.dtype(jnp.float64)))
    assert double.dtype == np.float64
    np.testing.assert_allclose(double, exact, rtol=1e-13, atol=1e-16)
    for values in (single, double):
        assert values.min() == -values.max()
        assert np.isclose(values.max(), 6.3379577545537895, rtol=1e-6)
        np.testing.assert_array_equal(values[:8], -values[8:16])


def test_the_naive_transform_in_float32_loses_the_upper_tail():
    """The control for the test above."""
    bits = jnp.asarray(EDGES, jnp.uint32)
    naive = jax.scipy.special.ndtri((bits.astype(jnp.float32) + 0.5) * 2.0**-32)
    assert not np.isfinite(naive).all()


def test_results_are_the_documented_formulas(key):
    shape = (24, 16)
    x = jax.random.normal(jax.random.key(1), shape)
    z, u, wide = normal(key, shape), uniform(key, shape), np.asarray(x, np.float64)
    close = functools.partial(np.testing.assert_allclose, rtol=3e-6, atol=3e-6)
    close(jdropout.gaussian_dropout(key, x, 0.2), wide * (1 + 0.5 * z))
    close(jdropout.gaussian_noise(key, x, 0.7), wide + 0.7 * z)
    close(jdropout.uniform_noise(key, x, 0.7), wide + 0.7 * (2 * u - 1))
    keep = np.asarray(jdropout.keep_mask(key, 0.3, shape))
    close(jdropout.alpha_dropout(key, x, 0.3), alpha_formula(wide, keep, 0.3))
    with jax.enable_x64(True):
        exact = functools.partial(np.testing.assert_allclose, rtol=1e-13, atol=1e-15)
        x = jnp.asarray(wide)
        exact(jdropout.gaussian_dropout(key, x, 0.2), wide * (1 + 0.5 * z))
        exact(jdropout.gaussian_noise(key, x, 0.7), wide + 0.7 * z)
        exact(jdropout.uniform_noise(key, x, 0.7), wide + 0.7 * (2 * u - 1))
        exact(jdropout.alpha_dropout(key, x, 0.3), alpha_formula(wide, keep, 0.3))


def alpha_formula(x, keep, rate, **options):
    """As Klambauer et al. have it, with the effective rate."""
    q = 1 - jdropout.effective_rate(rate, **options)
    a = (q + FLOOR**2 * q * (1 - q)) ** -0.5
    return a * np.where(keep, x, FLOOR) - a * (1 - q) * FLOOR


def test_the_floor_is_the_limit_of_selu():
    assert float(jax.nn.selu(jnp.float32(-1000))) == pytest.approx(FLOOR, rel=1e-6)


# --- distributions ------------------------------------------------------------------------

N = 1 << 20


def standardised_normal(kind, key):
    """Two million deviates that are standard normal if the function is right."""
    ones = jnp.ones((1024, 1024))
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
    y = np.asarray(jdropout.uniform_noise(key, jnp.zeros((1024, 1024)), 3.0)).reshape(-1)
    expected = stats.uniform(-3, 6)
    assert not rejected(stats.kstest(y, expected.cdf).pvalue)
    assert rejected(stats.kstest(y + 0.06, expected.cdf).pvalue)
    assert -3 <= y.min() < -2.9999
    assert 2.9999 < y.max() <= 3


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

    def gaussian(rate):
        return np.asarray(jdropout.gaussian_dropout(key, jnp.ones((1024, 1024)), rate))

    assert not any(map(rejected, p_values(gaussian(rate))))
    assert any(map(rejected, p_values(gaussian(min(1.1 * rate, (1 + rate) / 2)))))
    dropped = np.asarray(jdropout.dropout(key, jnp.ones((1024, 1024)), rate), np.float64)
    assert dropped.var() == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize(("rate", "precision"), [(0.1, None), (0.9, 32), (0.002, 16)])
def test_alpha_dropout_keeps_mean_zero_and_variance_one_at_the_effective_rate(rate, precision):
    """The moments of the two outcomes, exactly: no sampling of the mask at all."""
    r = jdropout.effective_rate(rate, precision=precision)
    with jax.enable_x64(True):

        def outcome(x):
            x = jnp.full((256, 1024), x)
            keep = jdropout.keep_mask(jax.random.key(0), rate, x.shape, precision=precision)
            y = jdropout.alpha_dropout(jax.random.key(0), x, rate, precision=precision)
            assert np.unique(y[keep]).size == 1
            return float(y[keep][0]), float(y[~keep][0])

        (at_zero, floor), (at_one, _) = outcome(0.0), outcome(1.0)
    a = at_one - at_zero
    # Of inputs with E[x] = 0 and E[x^2] = 1.
    mean = (1 - r) * at_zero + r * floor
    square = (1 - r) * (a**2 + at_zero**2) + r * floor**2
    assert mean == pytest.approx(0, abs=1e-14)
    assert square == pytest.approx(1, rel=1e-14)
    if rate != r:  # the control: the rate that was asked for is not quite the one it has
        assert abs((1 - rate) * at_zero + rate * floor) > 1e-10


def test_alpha_dropout_keeps_the_moments_of_a_deep_selu_network(key):
    """20 layers of 512 units, rate 0.1; dropout at the same rate, the control, does not."""
    x = jax.random.normal(jax.random.key(1), (512, 512))

    def through(drop):
        y = x
        for i in range(20):
            w = jax.random.normal(jax.random.fold_in(jax.random.key(2), i), (512, 512)) / 512**0.5
            y = drop(jax.random.fold_in(key, i), jax.nn.selu(y @ w), 0.1)
        return float(y.mean()), float(y.var())

    mean, variance = through(jdropout.alpha_dropout)
    assert abs(mean) < 0.1
    assert abs(variance - 1) < 0.1
    assert abs(through(jdropout.dropout)[1] - 1) > 0.2


def test_feature_alpha_dropout_has_one_fate_for_a_channel(key):
    x = jax.random.normal(jax.random.key(1), (8, 5, 7, 32))
    y = jdropout.feature_alpha_dropout(key, x, 0.4)
    keep = np.asarray(jdropout.keep_mask(key, 0.4, x.shape, broadcast_dims=(1, 2)))
    assert (keep == keep[:, :1, :1]).all()
    np.testing.assert_allclose(y, alpha_formula(np.asarray(x, float), keep, 0.4), atol=3e-6)
    first = jnp.moveaxis(x, -1, 1)
    keep = np.asarray(jdropout.keep_mask(key, 0.4, first.shape, broadcast_dims=(2, 3)))
    y = jdropout.feature_alpha_dropout(key, first, 0.4, channel_axis=1)
    np.testing.assert_allclose(y, alpha_formula(np.asarray(first, float), keep, 0.4), atol=3e-6)


# --- limits, flags and traced strengths ---------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_deterministic_and_strength_zero_return_the_input_itself_without_a_key(name):
    for x in (jnp.ones((3, 4)), np.ones((3, 4), np.float32)):
        assert ALL[name](None, x, deterministic=True) is x
        assert WITH_TRACED_STRENGTH[name](None, x, 0.0) is x
        assert WITH_TRACED_STRENGTH[name](None, x, 0) is x


@pytest.mark.parametrize("name", ALL)
def test_traced_flags_and_strengths_equal_the_static_ones(name, key):
    function = WITH_TRACED_STRENGTH[name]
    x = jax.random.normal(jax.random.key(1), (24, 16))
    traced = jax.jit(lambda s, flag: function(key, x, s, deterministic=flag))
    np.testing.assert_array_equal(traced(0.5, True), x)
    for strength in (0.25, 0.5, 0.9):
        static = function(key, x, strength)
        np.testing.assert_allclose(traced(strength, False), static, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(
            function(key, x, jnp.float32(strength)), static, rtol=2e-6, atol=1e-6
        )
    np.testing.assert_array_equal(traced(0.0, False), x)
    assert traced._cache_size() == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("name", ALL)
def test_a_strength_of_any_float_dtype_has_its_own_value(name, dtype, key):
    function, x, strength = WITH_TRACED_STRENGTH[name], jnp.ones((24, 16)), dtype(0.9)
    static = function(key, x, float(strength))
    np.testing.assert_allclose(function(key, x, strength), static, rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(function(key, x, np.asarray(strength)), static, rtol=3e-6, atol=1e-6)


def test_gaussian_dropout_at_rate_one_is_an_error_and_a_traced_one_gives_nan(key):
    x = jnp.array([0.0, 1.0, -2.0])
    for rate in (1, 1.0, jnp.float32(1), np.float32(1)):
        with pytest.raises(ValueError, match="rate must be below 1, got 1"):
            jdropout.gaussian_dropout(key, x, rate)
    for rate in (1.0, 1.5, -0.5, jnp.nan):
        assert np.isnan(jax.jit(lambda r: jdropout.gaussian_dropout(key, x, r))(rate)).all()


@pytest.mark.parametrize("name", ["alpha_dropout", "feature_alpha_dropout"])
def test_alpha_dropout_at_rate_one_is_zero_and_outside_the_range_nan(name, key):
    function = WITH_TRACED_STRENGTH[name]
    x = jnp.array([[0.0, 1.0, -2.0, jnp.inf, jnp.nan]])
    for rate in (1.0, 1 - 1e-12):
        y, pullback = jax.vjp(lambda x, rate=rate: function(None, x, rate), x)
        np.testing.assert_array_equal(y, jnp.zeros_like(x))
        np.testing.assert_array_equal(pullback(x)[0], jnp.zeros_like(x))
    y, pullback = jax.vjp(jax.jit(lambda r, x: function(key, x, r)), 1.0, x)
    np.testing.assert_array_equal(y, jnp.zeros_like(x))
    rate_bar, x_bar = pullback(jnp.ones_like(x))
    assert rate_bar == 0
    np.testing.assert_array_equal(x_bar, jnp.zeros_like(x))
    for rate in (1.5, -0.5, jnp.nan):
        assert np.isnan(jax.jit(lambda r: function(key, x, r))(rate)).all()


def test_alpha_dropout_near_rate_one_tends_to_zero(key):
    x = jax.random.normal(key, (64, 64))
    for rate in (0.99, 0.9999):
        y = np.asarray(jdropout.alpha_dropout(key, x, rate, precision=32))
        keep = np.asarray(jdropout.keep_mask(key, rate, x.shape, precision=32))
        assert (np.abs(y[~keep]) < 2 * (1 - rate) ** 0.5).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_alpha_dropout_drops_never_reaches_the_output(bad, key):
    x = jnp.full((64, 8), bad)
    keep = np.asarray(jdropout.keep_mask(key, 0.5, x.shape))
    y, pullback = jax.vjp(lambda x: jdropout.alpha_dropout(key, x, 0.5), x)
    assert np.isfinite(np.asarray(y)[~keep]).all()
    assert not np.isfinite(np.asarray(y)[keep]).any()
    assert (np.asarray(pullback(jnp.ones_like(x))[0])[~keep] == 0).all()


# --- gradients and cost -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gaussian_dropout", "gaussian_noise", "alpha_dropout"])
def test_gradients_with_respect_to_x_are_those_of_finite_differences(name, key):
    with jax.enable_x64(True):
        x = np.asarray(jax.random.normal(jax.random.key(1), (24, 16)))
        function = jax.jit(lambda x: jnp.sin(ALL[name](key, x)))
        numeric = (np.asarray(function(x + 1e-6)) - np.asarray(function(x - 1e-6))) / 2e-6
        reverse = jax.jit(jax.grad(lambda x: function(x).sum()))(x)
        forward = jax.jit(lambda x: jax.jvp(function, (x,), (x,))[1])(x)
    np.testing.assert_allclose(reverse, numeric, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(forward, numeric * x, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["gaussian_noise", "uniform_noise"])
def test_gradients_with_respect_to_the_strength_are_those_of_finite_differences(name, key):
    with jax.enable_x64(True):
        x = np.asarray(jax.random.normal(jax.random.key(1), (24, 16)))
        function = jax.jit(lambda s: jnp.sin(WITH_TRACED_STRENGTH[name](key, x, s)).sum())
        slope = jax.jit(jax.grad(function))
        near = (0.6 + 1e-6, 0.6 - 1e-6)
        values, slopes = ([float(f(s)) for s in near] for f in (function, slope))
        first, second = float(slope(0.6)), float(jax.jit(jax.grad(slope))(0.6))
    np.testing.assert_allclose(first, (values[0] - values[1]) / 2e-6, rtol=1e-6)
    np.testing.assert_allclose(second, (slopes[0] - slopes[1]) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["gaussian_dropout", "alpha_dropout", "feature_alpha_dropout"])
def test_the_gradient_with_respect_to_the_rate_is_zero(name, key):
    function, x = WITH_TRACED_STRENGTH[name], jnp.ones((5, 4))
    for rate in (0.0, 0.5):
        assert jax.grad(lambda r: function(key, x, r).sum())(rate) == 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_no_residual_grows_with_the_input(name, dtype, key):
    function, x = WITH_TRACED_STRENGTH[name], jnp.ones((64, 48), dtype)
    static = jax.tree.leaves(jax.vjp(lambda x: function(key, x, 0.3), x)[1])
    assert sum(leaf.size for leaf in static) <= 3  # two words, and the static strength
    traced = jax.jit(lambda x, s, flag: function(key, x, s, deterministic=flag))
    leaves = jax.tree.leaves(jax.vjp(lambda x: traced(x, 0.3, False), x)[1])
    assert sum(leaf.size for leaf in leaves) <= 2 + 1 + 1
    if name in ("gaussian_noise", "uniform_noise"):
        leaves = jax.tree.leaves(jax.vjp(lambda x, s: traced(x, s, False), x, 0.3)[1])
        assert sum(leaf.size for leaf in leaves) <= 2 + 1 + 1


def test_noise_of_another_library_is_stored():
    """The control for the test above."""
    x = jnp.ones((64, 48))

    def flax_style(x):
        return x * (1 + jax.random.normal(jax.random.key(0), x.shape))

    assert max(leaf.size for leaf in jax.tree.leaves(jax.vjp(flax_style, x)[1])) == x.size


WRAPPERS = {
    "checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
    "scan": lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, length=1)[0],
    "cond": lambda f: lambda x: jax.lax.cond(x[0, 0] > -9, f, lambda x: x, x),
}


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_values_and_gradients_are_the_same_under_every_transformation(name, wrap, key):
    x = jax.random.normal(jax.random.key(1), (24, 16))

    @functools.partial(jax.jit, static_argnums=0)
    def results(f):
        y, pullback = jax.vjp(f, x)
        return y, pullback(x)[0], jax.jvp(f, (x,), (x,))[1]

    def function(x):
        return ALL[name](key, x)

    for ours, plain in zip(results(WRAPPERS[wrap](function)), results(function), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_vmap_over_keys_strengths_and_flags_equals_the_loop(name):
    keys = jax.random.split(jax.random.key(1), 3)
    strengths, flags = jnp.array([0.1, 0.5, 0.9]), jnp.array([False, True, False])
    x = jax.random.normal(jax.random.key(2), (3, 24, 16))

    def one(key, x, strength, flag):
        return WITH_TRACED_STRENGTH[name](key, x, strength, deterministic=flag)

    both = jax.jit(jax.value_and_grad(lambda *a: (one(*a) ** 2).sum(), argnums=1))
    batched = jax.jit(jax.vmap(both))(keys, x, strengths, flags)
    for i in range(3):
        value, gradient = both(keys[i], x[i], strengths[i], flags[i])
        np.testing.assert_allclose(batched[0][i], value, rtol=1e-5)
        np.testing.assert_allclose(batched[1][i], gradient, rtol=1e-5, atol=1e-5)


def test_vmap_over_keys_has_the_uniform_numbers_of_the_loop():
    keys = jax.random.split(jax.random.key(1), 3)
    with jax.enable_x64(True):
        y = jax.vmap(lambda key: jdropout.uniform_noise(key, jnp.zeros((24, 16)), 1.0))(keys)
    for key, one in zip(keys, y, strict=True):
        np.testing.assert_array_equal(read_uniform(one), law_twin.uniform(words(key), (24, 16)))


# --- dtypes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_narrow_dtypes_are_a_float32_result_rounded_once(name, dtype, key):
    x = jax.random.normal(jax.random.key(1), (24, 16)).astype(dtype)
    y = ALL[name](key, x)
    assert y.dtype == dtype
    wide = ALL[name](key, x.astype(jnp.float32))
    difference = np.abs(np.asarray(y, np.float64) - np.asarray(wide, np.float64))
    step = np.maximum(np.abs(np.asarray(wide)), float(jnp.finfo(dtype).tiny)) * float(
        jnp.finfo(dtype).eps
    )
    assert (difference <= 0.51 * step).all()


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (0, 4)])
@pytest.mark.parametrize("name", ADDED_OR_MULTIPLIED)
def test_scalars_and_empty_arrays_are_served(name, shape, key):
    assert ALL[name](key, jnp.ones(shape)).shape == shape


# --- sharding -----------------------------------------------------------------------------


def mesh(axis_type):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)


SPECS = [P("a", "b"), P(("a", "b"), None)]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_uniform_numbers_are_bitwise_the_same_on_eight_devices_without_a_collective(axis_type, key):
    with jax.enable_x64(True):
        function = jax.jit(lambda x: jdropout.uniform_noise(key, x, 1.0))
        x, devices = np.zeros((24, 16)), mesh(axis_type)
        for spec in SPECS:
            with jax.set_mesh(devices):
                placed = jax.device_put(x, NamedSharding(devices, spec))
                compiled = function.lower(placed).compile()
                y = compiled(placed)
            assert not any(name in compiled.as_text() for name in COLLECTIVES), spec
            assert y.sharding.is_equivalent_to(placed.sharding, 2)
            np.testing.assert_array_equal(read_uniform(y), law_twin.uniform(words(key), x.shape))


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_both_passes_are_the_same_on_eight_devices_without_a_collective(name, key):
    x = np.asarray(jax.random.normal(jax.random.key(1), (24, 16)))

    @jax.jit
    def passes(x, strength, flag):
        function = WITH_TRACED_STRENGTH[name]
        y, pullback = jax.vjp(lambda x: function(key, x, strength, deterministic=flag), x)
        return y, *pullback(x)

    expected, devices = passes(x, 0.3, False), mesh(AxisType.Explicit)
    for spec in SPECS[:1]:
        with jax.set_mesh(devices):
            placed = jax.device_put(x, NamedSharding(devices, spec))
            compiled = passes.lower(placed, 0.3, False).compile()
            results = compiled(placed, 0.3, False)
        assert not any(name in compiled.as_text() for name in COLLECTIVES), spec
        for result, whole in zip(results, expected, strict=True):
            np.testing.assert_allclose(result, whole, rtol=2e-6, atol=2e-6)
            assert result.sharding.is_equivalent_to(placed.sharding, 2)


def test_shard_map_with_global_positions_equals_the_whole(key):
    spec, shape = P(("a", "b"), None), (24, 16)

    def local(x):
        start = (jax.lax.axis_index(("a", "b")) * x.shape[0], 0)
        return jdropout.uniform_noise(key, x, 1.0, start=start, global_shape=shape)

    with jax.enable_x64(True):
        split = jax.shard_map(local, mesh=mesh(AxisType.Auto), in_specs=spec, out_specs=spec)
        y = jax.jit(split)(jnp.zeros(shape))
    np.testing.assert_array_equal(read_uniform(y), law_twin.uniform(words(key), shape))


# --- errors and the audit -----------------------------------------------------------------

ERRORS = {
    "integer": (dict(x=jnp.arange(3)), TypeError, "x must be a floating-point"),
    "complex": (dict(x=jnp.ones(3, jnp.complex64)), TypeError, "x must be a real floating-point"),
    "no key": (dict(key=None), ValueError, "key is None, but dropout is on"),
    "batch of keys": (dict(key=jax.random.split(jax.random.key(0), 2)), ValueError, "single key"),
    "flag": (dict(deterministic=1), TypeError, "deterministic must be True, False"),
    "start": (dict(start=(0,)), ValueError, "start was given without global_shape"),
    "strength vector": (dict(strength=jnp.ones(3)), (TypeError, ValueError), "scalar"),
    "strength integer array": (dict(strength=jnp.int32(1)), TypeError, "floating-point scalar"),
    "strength bool": (dict(strength=True), TypeError, "must be a number"),
    "strength complex": (dict(strength=np.complex64(0.5)), TypeError, "must be a number"),
    "strength string": (dict(strength="0.5"), TypeError, "got '0.5' of type str"),
    "strength negative": (dict(strength=-0.1), ValueError, "got -0.1"),
    "strength array negative": (dict(strength=jnp.float32(-0.5)), ValueError, "got -0.5"),
    "strength NaN": (dict(strength=float("nan")), ValueError, "got nan"),
    "strength infinite": (dict(strength=float("inf")), ValueError, "got inf"),
}
NAMES = {"gaussian_noise": "stddev", "uniform_noise": "amplitude"}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("name", [name for name in ALL if name != "feature_alpha_dropout"])
def test_errors_name_the_argument_the_value_and_the_fix(name, case):
    changes, error, text = ERRORS[case]
    arguments = dict(key=jax.random.key(0), x=jnp.ones(3), strength=0.5) | changes
    options = {k: v for k, v in arguments.items() if k not in ("key", "x", "strength")}
    positional = (arguments["key"], arguments["x"], arguments["strength"])
    with pytest.raises(error, match=re.escape(text)) as raised:
        WITH_TRACED_STRENGTH[name](*positional, **options)
    if case.startswith("strength"):
        assert str(raised.value).startswith(NAMES.get(name, "rate"))


def test_feature_alpha_dropout_names_a_bad_axis(key):
    for options, text in [
        (dict(channel_axis=3), "channel_axis is 3, but the array has 2 axes"),
        (dict(batch_axes=(2,)), "batch_axes is 2"),
    ]:
        with pytest.raises(ValueError, match=text):
            jdropout.feature_alpha_dropout(key, jnp.ones((2, 3)), 0.5, **options)


@pytest.mark.parametrize("name", ALL)
def test_an_audit_sees_the_call_and_its_key(name, key):
    def loss(key, x):
        x = ALL[name](key, x)
        return ALL[name](key, x).sum()

    report = jdropout.audit(loss, key, jnp.ones((8, 16)))
    kind = "alpha_dropout" if "alpha" in name else name
    assert [site.kind for site in report.sites] == [kind] * 2
    assert [site.shape for site in report.sites] == [(8, 16)] * 2
    assert report.sites[0].key_sources == ("key",)
    assert [finding.code for finding in report.findings] == ["key-reused"]
    off = jdropout.audit(lambda x: ALL[name](None, x, deterministic=True), jnp.ones((8, 16)))
    assert [site.deterministic for site in off.sites] == [True]
