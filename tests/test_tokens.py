"""Dropout of tokens: which words are replaced, and which patches stay."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from cheap import normal, users_jit
from contract import Draw, patch_indices, put_back, take
from scipy import stats

import jdropout

RATE = 0.3
UNKNOWN = 3
SHAPE = (12, 40)


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 9, SHAPE), jnp.int32)


def words_of(key):
    return np.asarray(jax.random.key_data(key))


def replaced(key, tokens, rate=RATE, protected=(), **options):
    """The definition, with the twin's mask."""
    tokens = np.asarray(tokens)
    kept = law_twin.keep_mask(words_of(key), rate, tokens.shape, **options)
    return np.where(kept | np.isin(tokens, list(protected)), tokens, UNKNOWN)


word_dropout = functools.partial(jdropout.word_dropout, replacement=UNKNOWN)

# --- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protected", "rate", "precision"),
    [((), RATE, None), (frozenset({0, 1, 8}), 0.1, 32), (range(4), 0.5, None)],
)
def test_words_are_replaced_where_the_twin_drops_and_they_are_not_protected(
    protected, rate, precision, key, tokens
):
    y = word_dropout(key, tokens, rate, protected=protected, precision=precision)
    assert y.dtype == tokens.dtype
    expected = replaced(key, tokens, rate, protected, precision=precision)
    np.testing.assert_array_equal(y, expected)
    assert (expected != tokens).any()


def test_a_word_is_replaced_at_the_rate_and_independently_of_the_others():
    """n = 2^12 keys, 32 words; false alarm 1e-6 each; controls: another rate, pairs of words."""
    keys = jax.random.split(jax.random.key(2), 1 << 12)
    drop = jax.jit(jax.vmap(lambda key: word_dropout(key, jnp.zeros(32, jnp.int32), RATE)))
    dropped = np.asarray(drop(keys)) == UNKNOWN
    rate = jdropout.effective_rate(RATE)

    def p_values(dropped, rate):
        centred = (dropped - rate) / math.sqrt(rate * (1 - rate))
        z = (centred.T @ centred)[np.triu_indices(32, 1)] / math.sqrt(len(dropped))
        together = stats.chi2(z.size)
        return [
            stats.binomtest(int(dropped.sum()), dropped.size, rate).pvalue,
            2 * min(together.cdf((z**2).sum()), together.sf((z**2).sum())),
        ]

    assert min(p_values(dropped, rate)) > 1e-6
    assert p_values(dropped, rate + 0.02)[0] < 1e-6
    paired = dropped.copy()
    paired[:, 1] = paired[:, 0]
    assert p_values(paired, rate)[1] < 1e-6


# --- patches ----------------------------------------------------------------------------------

# Name: options, shape.
PATCHES = {
    "one class token": ({}, (4, 17, 6)),
    "no batch and no prefix": (dict(axis=0, num_prefix_tokens=0), (16, 6)),
    "ordered, two batch axes": (dict(axis=-2, ordered=True), (2, 3, 17, 6)),
    "long prefix, two feature axes": (dict(num_prefix_tokens=5), (4, 21, 3, 2)),
    "no feature axis": (dict(axis=-1), (4, 17)),
}


@pytest.mark.parametrize("kind", PATCHES)
def test_patches_are_the_twins_in_both_passes(kind, key):
    options, shape = PATCHES[kind]
    x = normal(*shape)
    axis = options.get("axis", 1)

    @jax.jit
    def passes(key, x):
        drop = functools.partial(jdropout.patch_dropout, key, rate=0.5, **options)
        y, pullback, indices = jax.vjp(lambda x: drop(x), x, has_aux=True)
        return y, indices, *pullback(y)

    y, indices, x_bar = passes(key, x)
    expected = patch_indices(Draw(key), shape, **options)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(y, take(x, expected, axis))
    np.testing.assert_array_equal(x_bar, put_back(x, expected, axis, np.asarray(y)))


@pytest.mark.parametrize(
    ("length", "rate", "count"),
    [
        (100, 0.9, 10),  # in floating point 1 - 0.9 is less than 0.1
        (7, 0.5, 3),
        (5, 0.99, 1),
        (5, 1.0, 1),
        (5, 1e-9, 5),
    ],
)
def test_the_number_of_patches_is_rounded_down_but_at_least_one(length, rate, count, key):
    x = jax.ShapeDtypeStruct((2, length + 1, 3), jnp.float32)
    drop = functools.partial(jdropout.patch_dropout, key, rate=rate)
    y, indices = jax.eval_shape(lambda x: drop(x), x)
    assert y.shape == (2, count + 1, 3)
    assert indices.shape == (2, count + 1)


def test_all_subsets_and_all_orders_are_equally_probable():
    """n = 2^15 examples, 60 ordered and 10 unordered choices of 3 in 5; chi-squared, 1e-6.

    The control has numbers of four bits: ties, which favour the first.
    """
    x = jnp.zeros((1 << 15, 5, 1))
    drop = functools.partial(jdropout.patch_dropout, jax.random.key(6), x, 0.4)
    free, ordered = jax.jit(
        lambda: [drop(num_prefix_tokens=0, ordered=ordered)[1] for ordered in (False, True)]
    )()
    np.testing.assert_array_equal(np.sort(free, axis=-1), ordered)

    def p_value(indices, choices):
        counts = [(indices == np.array(choice)).all(axis=-1).sum() for choice in choices]
        assert sum(counts) == len(indices)
        return stats.chisquare(counts).pvalue

    permutations = list(itertools.permutations(range(5), 3))
    combinations = list(itertools.combinations(range(5), 3))
    assert p_value(np.asarray(free), permutations) > 1e-6
    assert p_value(np.asarray(ordered), combinations) > 1e-6
    coarse = np.random.default_rng(0).integers(0, 16, (1 << 15, 5))
    control = np.argsort(coarse, axis=-1, kind="stable")[:, :3]
    assert p_value(control, permutations) < 1e-6
    assert p_value(np.sort(control, axis=-1), combinations) < 1e-6


def test_all_patches_stay_without_a_key_at_rate_zero_and_in_evaluation():
    for x in (jnp.ones((2, 3, 5, 4)), np.ones((2, 3, 5, 4), np.float32)):
        for options in (dict(rate=0.0), dict(rate=0.5, deterministic=True), dict(rate=1e-9)):
            y, indices = jdropout.patch_dropout(None, x, axis=2, **options)
            assert y is x
            assert indices.dtype == jnp.int32
            np.testing.assert_array_equal(indices, np.broadcast_to(np.arange(5), (2, 3, 5)))


def test_at_rate_one_the_prefix_and_one_patch_stay(key):
    y, indices = jdropout.patch_dropout(key, jnp.ones((3, 9, 2)), 1.0, num_prefix_tokens=2)
    expected = patch_indices(Draw(key), (3, 9, 2), 1.0, num_prefix_tokens=2)
    np.testing.assert_array_equal(indices, expected)
    assert y.shape == (3, 3, 2)


def test_the_gradient_of_patches_holds_no_copy_of_the_tokens(key):
    """The control holds the gradient of the patches, which it scatters."""
    shape, indices = (64, 65, 256), jnp.zeros((64, 33, 1), jnp.int32)

    def temporaries(take):
        gradient = users_jit(jax.grad(lambda x, key: jnp.sin(take(key, jnp.cos(x))).sum()))
        compiled = gradient.lower(jax.ShapeDtypeStruct(shape, jnp.float32), key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporaries(lambda key, x: jdropout.patch_dropout(key, x, 0.5)[0])
    theirs = temporaries(
        lambda key, x: jnp.take_along_axis(x, indices, axis=1, mode="promise_in_bounds")
    )
    assert ours < 2**18
    assert theirs >= 4 * 64 * 33 * 256


# --- errors ---------------------------------------------------------------------


TOKENS = jnp.ones((3, 4), jnp.int32)
WORD_ERRORS = [
    (dict(tokens=jnp.ones(3)), TypeError, "tokens must be an array of integers, got dtype float32"),
    (dict(tokens=[1, 2]), TypeError, "tokens must be an array, got list"),
    (dict(replacement=1.0), TypeError, "replacement must be an integer, got 1.0"),
    (dict(replacement=True), TypeError, "replacement must be an integer, got True"),
    (dict(replacement=2**31), ValueError, "replacement 2147483648 does not fit"),
    (
        dict(tokens=TOKENS.astype(jnp.uint8), replacement=-1),
        ValueError,
        "replacement -1 does not fit the tokens' dtype uint8",
    ),
    (dict(protected=0), TypeError, "protected must be a sequence of tokens, got 0. Write (token,)"),
    (dict(protected=(0.5,)), TypeError, "protected must be an integer, got 0.5"),
    (dict(protected=(2**40,)), ValueError, "does not fit the tokens' dtype int32"),
]


@pytest.mark.parametrize(
    ("changes", "error", "text"), WORD_ERRORS, ids=[case[2] for case in WORD_ERRORS]
)
def test_errors_about_words_name_the_argument_and_the_value(changes, error, text, key):
    arguments = dict(key=key, tokens=TOKENS, rate=0.5, replacement=3) | changes
    positional = [arguments.pop(name) for name in ("key", "tokens", "rate")]
    with pytest.raises(error, match=re.escape(text)):
        jdropout.word_dropout(*positional, **arguments)


PATCH_ERRORS = [
    (dict(axis=3), ValueError, "axis is 3, but the array has 3 axes"),
    (dict(axis=1.0), TypeError, "axis must be an integer, got 1.0"),
    (dict(num_prefix_tokens=9), ValueError, "below the 9 tokens, got 9"),
    (dict(num_prefix_tokens=-1), ValueError, "num_prefix_tokens must be at least 0"),
    (dict(num_prefix_tokens=0.5), TypeError, "num_prefix_tokens must be an integer, got 0.5"),
    (dict(x=[1.0]), TypeError, "x must be an array, got list"),
]


@pytest.mark.parametrize(
    ("changes", "error", "text"), PATCH_ERRORS, ids=[case[2] for case in PATCH_ERRORS]
)
def test_errors_about_patches_name_the_argument_and_the_value(changes, error, text, key):
    arguments = dict(key=key, x=jnp.ones((2, 9, 4)), rate=0.5) | changes
    positional = [arguments.pop(name) for name in ("key", "x", "rate")]
    with pytest.raises(error, match=re.escape(text)):
        jdropout.patch_dropout(*positional, **arguments)


def test_rates_and_flags_of_patches_may_be_concrete_arrays(key):
    rate, flag = jnp.float32(0.5), jnp.array(False)
    y = jax.eval_shape(
        lambda x: jdropout.patch_dropout(key, x, rate, deterministic=flag)[0], np.ones((2, 9, 4))
    )
    assert y.shape == (2, 5, 4)
