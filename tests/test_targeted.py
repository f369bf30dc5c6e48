"""Targeted dropout: which weights are candidates, and that they alone are dropped."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import Draw, candidates
from scipy import stats

import jdropout
from jdropout import targeted_dropout

FALSE_ALARM = 1e-8
"""Probability that a perfect generator fails any one of the statistical tests."""


def normal(shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def binomial_p_value(successes, n, probability):
    law = stats.binom(n, probability)
    return min(1, 2 * min(law.cdf(successes), law.sf(successes - 1)))


SHAPES = [
    ((37, 10), 0, False),
    ((3, 5, 4), 1, False),
    ((1, 6), 1, False),
    ((3, 3, 5, 7), -1, True),
    ((3, 5, 4), 1, True),
]


@pytest.mark.parametrize(("shape", "axis", "whole"), SHAPES)
def test_candidates_that_the_twins_mask_drops_are_zero_in_both_passes(shape, axis, whole, key):
    w, w_bar = normal((2, *shape))
    options = dict(unit_axis=axis) if whole else dict(output_axis=axis)
    shared = [a for a in range(len(shape)) if a != axis % len(shape)] if whole else []
    mask = Draw(key).keep(0.6, shape, shared)
    fractions = (0.25,) if whole else (0.5, 1.0)

    @jax.jit
    def passes(key, w, w_bar):
        results = []
        for fraction in fractions:
            drop = functools.partial(targeted_dropout, target_fraction=fraction, **options)
            y, pullback = jax.vjp(lambda w, drop=drop: drop(key, w, 0.6), w)
            results.append((y, *pullback(w_bar), drop(None, w, 1.0)))
        return results

    for fraction, (y, gradient, pruned) in zip(fractions, passes(key, w, w_bar), strict=True):
        chosen = candidates(w, fraction, **options)
        np.testing.assert_array_equal(y, np.where(chosen & ~mask, 0, w))
        np.testing.assert_array_equal(gradient, np.where(chosen & ~mask, 0, w_bar))
        np.testing.assert_array_equal(pruned, np.where(chosen, 0, w))


@pytest.mark.parametrize("n", [7, 100])
def test_exactly_the_stated_number_of_candidates_even_among_equals(n):
    fractions = [0.0, 0.29, 1 / 7, 0.999, 1, np.float32(0.1)]

    @jax.jit
    def pruned(w):
        drop = functools.partial(targeted_dropout, None, w, 1.0)
        return [
            (drop(target_fraction=fraction), drop(target_fraction=fraction, unit_axis=0))
            for fraction in fractions
        ]

    for fraction, (weights, units) in zip(
        fractions, pruned(np.ones((n, 2), np.float32)), strict=True
    ):
        count = math.floor(float(fraction) * n + 1e-6)
        first = np.arange(n) < count  # the first of equals
        np.testing.assert_array_equal(np.asarray(weights) == 0, np.stack([first, first], 1))
        np.testing.assert_array_equal(units, weights)


def test_signs_do_not_count_and_nan_is_no_candidate_before_numbers():
    w = jnp.array([[-1.0], [jnp.nan], [2.0], [-jnp.inf], [0.5]])
    pruned = targeted_dropout(None, w, 1.0, target_fraction=0.6)
    np.testing.assert_array_equal(pruned, [[0], [jnp.nan], [0], [-jnp.inf], [0]])


def test_a_fraction_that_is_no_whole_weight_returns_the_weights_themselves(key):
    w = jnp.full((4, 3), jnp.nan)
    assert targeted_dropout(key, w, 0.5, target_fraction=0.2) is w  # of four


def test_candidates_are_dropped_at_the_rate_and_others_never():
    """n = 2^18 candidates; false alarm 1e-8. Of all weights rate * fraction are dropped."""
    w = normal((1024, 512), seed=3)
    dropped = np.asarray(targeted_dropout(jax.random.key(4), w, 0.3, target_fraction=0.5)) == 0
    chosen = candidates(w, 0.5)
    assert chosen.sum() == 1 << 18
    assert not (dropped & ~chosen).any()
    rate = jdropout.effective_rate(0.3)
    assert binomial_p_value(dropped.sum(), 1 << 18, rate) > FALSE_ALARM
    assert binomial_p_value(dropped.sum(), 1 << 18, rate + 0.007) < FALSE_ALARM  # the control


TARGETED_ERRORS = {
    "fraction above one": (dict(target_fraction=1.5), ValueError, "must be in [0, 1], got 1.5"),
    "fraction NaN": (dict(target_fraction=math.nan), ValueError, "got nan"),
    "fraction bool": (dict(target_fraction=True), TypeError, "must be a number, got True"),
    "fraction array": (dict(target_fraction=jnp.float32(0.5)), TypeError, "Python number"),
    "vector": (dict(w=jnp.ones(4)), ValueError, "pass unit_axis=0"),
    "unit_axis": (dict(unit_axis=2), ValueError, "unit_axis is 2, but the array has 2 axes"),
    "output_axis": (dict(output_axis=-3), ValueError, "output_axis is -3"),
}


@pytest.mark.parametrize("case", TARGETED_ERRORS)
def test_errors_of_targeted_dropout_name_the_argument_and_the_fix(case, key):
    changes, error, text = TARGETED_ERRORS[case]
    arguments = dict(key=key, w=jnp.ones((4, 2)), rate=0.5, target_fraction=0.5) | changes
    with pytest.raises(error, match=re.escape(text)):
        targeted_dropout(**arguments)


def test_one_key_used_twice_is_reported_by_jax():
    with jax.debug_key_reuse(True):
        key = jax.random.key(0)
        targeted_dropout(key, jnp.ones((4, 4)), 0.5, target_fraction=0.5)
        with pytest.raises(jax.errors.KeyReuseError):
            targeted_dropout(key, jnp.ones((4, 4)), 0.5, target_fraction=0.5)
