"""Zoneout: what a unit keeps, what evaluation expects, and states that are trees."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from jax import lax
from scipy import stats

import jdropout
from jdropout import zoneout
from jdropout.keys import at_site

FALSE_ALARM = 1e-8
"""Probability that a perfect generator fails any one of the statistical tests."""


def words(key):
    return np.asarray(jax.random.key_data(key))


def z_scores(samples, mean, variance):
    """Of sample means along the first axis, in float64."""
    samples = np.asarray(samples, np.float64)
    return (samples.mean(0) - mean) / np.sqrt(variance / len(samples))


def bound(count):
    """What the largest of so many z-scores exceeds with probability FALSE_ALARM at most."""
    return stats.norm.isf(FALSE_ALARM / (2 * count))


@pytest.fixture
def states():
    old, new = np.random.default_rng(1).standard_normal((2, 37, 10), np.float32)
    return old, new


def test_dropped_units_keep_their_old_value_by_the_twins_mask(states, key):
    mask = law_twin.keep_mask(words(key), 0.4, (37, 10))
    old, new = states
    np.testing.assert_array_equal(zoneout(key, old, new, 0.4), np.where(mask, new, old))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e5m2, jnp.float32, jnp.complex64])
def test_evaluation_is_the_expectation_with_the_effective_rate_rounded_once(dtype, states):
    old, new = (x.astype(dtype) for x in states)
    y = zoneout(None, old, new, 0.1, deterministic=True)
    assert y.dtype == dtype
    rate = jdropout.effective_rate(0.1)
    wide = np.complex128 if dtype == jnp.complex64 else np.float64
    a, b = np.asarray(old).astype(wide), np.asarray(new).astype(wide)
    expected = (rate * a + (1 - rate) * b).astype(dtype).astype(wide)
    tolerance = 1e-6 if jnp.finfo(dtype).bits == 32 else float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y).astype(wide), expected, rtol=tolerance, atol=1e-6)


def test_both_ends_are_one_of_the_states_itself_without_a_key():
    old, new = jnp.full((2, 3), jnp.nan), jnp.full((2, 3), jnp.inf)
    for deterministic in (False, True):
        assert zoneout(None, old, new, 0.0, deterministic=deterministic) is new
        assert zoneout(None, old, new, 1, deterministic=deterministic) is old
        assert zoneout(None, old, new, 1e-12, deterministic=deterministic) is new


def test_traced_rates_in_evaluation_are_exact_at_both_ends(states):
    old, new = (np.array(state) for state in states)
    new[0, 0], old[1, 1] = np.inf, np.nan

    @jax.jit
    def f(rate, old, new):
        y, pullback = jax.vjp(lambda r: zoneout(None, old, new, r, deterministic=True), rate)
        return y, *pullback(jnp.ones_like(y))

    np.testing.assert_array_equal(f(0.0, old, new)[0], new)
    old[1, 1], new[1, 1] = 0, np.nan
    np.testing.assert_array_equal(f(1.0, old, new)[0], old)
    old, new = map(np.asarray, states)
    y, rate_bar = f(0.25, old, new)
    np.testing.assert_allclose(y, 0.25 * old + 0.75 * new, rtol=1e-5, atol=1e-6)
    assert rate_bar == 0
    for bad in (1.5, -0.5, np.nan):
        assert np.isnan(f(bad, old, new)[0]).all()
    assert f._cache_size() == 1


def test_a_traced_flag_takes_the_expectation_or_the_sample_at_a_static_rate(states, key):
    rates = (0.25, jnp.float32(0.25), 1.0)
    f = jax.jit(lambda key, flag: [zoneout(key, *states, r, deterministic=flag) for r in rates])
    for rate, sample, expectation in zip(rates, f(key, False), f(key, True), strict=True):
        mask = law_twin.keep_mask(words(key), rate, (37, 10))
        np.testing.assert_array_equal(sample, np.where(mask, states[1], states[0]))
        expected = rate * states[0] + (1 - rate) * states[1]
        np.testing.assert_allclose(expectation, expected, rtol=1e-5, atol=1e-6)


def test_gradients_go_to_the_state_that_a_unit_has_and_need_the_key_alone(states, key):
    @jax.jit
    def gradients(key, old, new, cotangent):
        f = functools.partial(zoneout, key, rate=0.4)
        remat = jax.vjp(jax.checkpoint(lambda old, new: f(old, new)), old, new)[1](cotangent)
        evaluation = functools.partial(zoneout, None, rate=0.4, deterministic=True)
        evaluated = jax.vjp(lambda old, new: evaluation(old, new), old, new)[1](cotangent)
        return remat, evaluated, jax.tree.leaves(jax.vjp(lambda a, b: f(a, b), old, new)[1])

    mask = law_twin.keep_mask(words(key), 0.4, (37, 10))
    (to_old, to_new), evaluated, stored = gradients(key, *states, np.ones((37, 10), np.float32))
    np.testing.assert_array_equal(to_new, mask)
    np.testing.assert_array_equal(to_old, ~mask)
    rate = np.float32(jdropout.effective_rate(0.4))
    np.testing.assert_allclose(evaluated[0], jnp.full((37, 10), rate), rtol=1e-6)
    np.testing.assert_allclose(evaluated[1], jnp.full((37, 10), 1 - rate), rtol=1e-6)
    (leaf,) = stored
    np.testing.assert_array_equal(leaf, law_twin.mask_keys(words(key), 1))


def test_trees_have_a_key_and_may_have_a_rate_for_each_array(states, key):
    carry, update = (states[0], states[0] * 2), (states[1], states[1] * 2)  # an LSTM's (c, h)
    rates = (0.5, 0.05)
    y = zoneout(key, carry, update, rates)
    assert isinstance(y, tuple)
    for i in range(2):
        mask = law_twin.keep_mask(words(at_site(key, i)), rates[i], (37, 10))
        np.testing.assert_array_equal(y[i], np.where(mask, update[i], carry[i]))
    one_rate = zoneout(key, carry, update, 0.5)
    np.testing.assert_array_equal(one_rate[0], y[0])
    named = zoneout(key, {"c": carry[0]}, {"c": update[0]}, 0.5)
    np.testing.assert_array_equal(named["c"], zoneout(at_site(key, "c"), carry[0], update[0], 0.5))
    mixed = zoneout(key, carry, update, (0.0, 1.0))
    assert mixed[0] is update[0]
    assert mixed[1] is carry[1]


def test_a_scan_over_time_equals_its_loop(states, key):
    def step(state, t):
        new = jnp.tanh(state + 1)
        return zoneout(at_site(key, t), state, new, 0.5), None

    scanned, _ = jax.jit(lambda state: lax.scan(step, state, jnp.arange(4)))(states[0])
    looped = np.asarray(states[0])
    for t in range(4):
        mask = law_twin.keep_mask(law_twin.at_site(words(key), t), 0.5, (37, 10))
        looped = np.where(mask, np.tanh(looped + 1), looped)
    np.testing.assert_allclose(scanned, looped, rtol=1e-5)


def test_the_mean_over_masks_is_the_evaluation():
    """n = 2^13 masks of 64 units, each mean a z-score; false alarm 1e-8."""
    old, new = (np.linspace(*ends, 64, dtype=np.float32) for ends in ((-1, 1), (3, 2)))
    keys = jax.random.split(jax.random.key(5), 1 << 13)
    samples = jax.jit(jax.vmap(lambda k: zoneout(k, old, new, 0.3)))(keys)
    rate = jdropout.effective_rate(0.3)
    gap = np.asarray(new - old, np.float64)
    variance = rate * (1 - rate) * gap**2
    evaluation = zoneout(None, old, new, 0.3, deterministic=True)
    assert np.abs(z_scores(samples, evaluation, variance)).max() < bound(64)
    swapped = zoneout(None, new, old, 0.3, deterministic=True)  # the control
    assert np.abs(z_scores(samples, swapped, variance)).max() > bound(64)


X = jnp.ones((3, 4))
ZONEOUT_ERRORS = {
    "structure": (dict(old=(X,)), ValueError, "old and new must have the same structure"),
    "shape": (dict(old=X[:2]), ValueError, "got float32[2, 4] and float32[3, 4]"),
    "dtype": (dict(old=X.astype(jnp.bfloat16)), ValueError, "got bfloat16[3, 4] and float32"),
    "integers": (
        dict(old=X.astype(int), new=X.astype(int)),
        TypeError,
        "old must be a floating-point or complex array",
    ),
    "key of a tree": (dict(key=None, old=(X,), new=(X,)), ValueError, "key is None"),
    "rates": (dict(rate=(0.5, 0.5)), ValueError, "rate must be one rate, or a tree of them"),
}


@pytest.mark.parametrize("case", ZONEOUT_ERRORS)
def test_errors_of_zoneout_name_the_argument_and_the_fix(case, key):
    changes, error, text = ZONEOUT_ERRORS[case]
    with pytest.raises(error, match=re.escape(text)):
        zoneout(**(dict(key=key, old=X, new=X, rate=0.5) | changes))


def test_an_audit_sees_every_state_with_its_rate(key):
    def step(key, x):
        return zoneout(key, (x, x), (x, x), (0.5, 0.125))

    report = jdropout.audit(step, key, X)
    assert [(site.kind, site.rate) for site in report.sites] == [
        ("zoneout", 0.5),
        ("zoneout", 0.125),
    ]
    assert not report.findings


def test_statistics_reject_what_they_should():
    """The bound is a normal distribution's: 64 scores exceed it with probability 1e-8."""
    assert math.isclose(64 * 2 * stats.norm.sf(bound(64)), FALSE_ALARM, rel_tol=1e-6)
