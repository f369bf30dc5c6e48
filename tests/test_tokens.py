"""Dropout of tokens: which words are replaced, and which patches stay."""

import functools
import itertools
import logging
import math
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import stats

import jdropout

RATE = 0.3
UNKNOWN = 3
SHAPE = (12, 40)


@pytest.fixture
def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, 9, SHAPE), jnp.int32)


def normal(shape):
    """Not of `jax.random`, whose normal numbers take longer to compile than a test."""
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def words_of(key):
    return np.asarray(jax.random.key_data(key))


def replaced(key, tokens, rate=RATE, protected=(), **options):
    """The definition, with the twin's mask."""
    tokens = np.asarray(tokens)
    kept = law_twin.keep_mask(words_of(key), rate, tokens.shape, **options)
    return np.where(kept | np.isin(tokens, list(protected)), tokens, UNKNOWN)


word_dropout = functools.partial(jdropout.word_dropout, replacement=UNKNOWN)

# --- words ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protected", [(), (0,), [0, 5], frozenset({0, 1, 8}), {2}, range(4)])
@pytest.mark.parametrize(("rate", "precision"), [(RATE, None), (0.5, 32)])
def test_words_are_replaced_where_the_twin_drops_and_they_are_not_protected(
    protected, rate, precision, key, tokens
):
    y = word_dropout(key, tokens, rate, protected=protected, precision=precision)
    assert y.dtype == tokens.dtype
    expected = replaced(key, tokens, rate, protected, precision=precision)
    np.testing.assert_array_equal(y, expected)
    assert (expected != tokens).any()


@pytest.mark.parametrize(
    "dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, jnp.int32, jnp.uint32, jnp.int64]
)
def test_words_of_every_integer_dtype_have_the_same_mask(dtype, key, tokens):
    with jax.enable_x64(True):
        y = word_dropout(key, tokens.astype(dtype), RATE, protected=(0,))
        assert y.dtype == dtype
        np.testing.assert_array_equal(y, replaced(key, tokens, protected=(0,)))


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


def test_words_stay_themselves_without_a_key_at_rate_zero_and_in_evaluation(tokens):
    for x in (tokens, np.asarray(tokens)):
        for rate in (0, 0.0, 1e-12):
            assert word_dropout(None, x, rate) is x
        assert word_dropout(None, x, 0.5, deterministic=True) is x


def test_at_rate_one_all_but_protected_words_are_replaced_without_a_key(tokens):
    y = word_dropout(None, tokens, 1.0, protected=(0, 7))
    np.testing.assert_array_equal(y, np.where(np.isin(tokens, [0, 7]), tokens, UNKNOWN))
    assert (word_dropout(None, tokens, 1.0) == UNKNOWN).all()


def test_words_with_a_traced_rate_and_flag_equal_those_with_static_ones(key, tokens):
    f = jax.jit(lambda r, d: word_dropout(key, tokens, r, protected=(0,), deterministic=d))
    for rate in (0.0, 0.25, 1.0):
        np.testing.assert_array_equal(f(rate, False), replaced(key, tokens, rate, (0,)))
        np.testing.assert_array_equal(f(rate, True), tokens)
    for bad in (1.5, -0.1, jnp.nan):
        np.testing.assert_array_equal(f(bad, False), replaced(key, tokens, 1.0, (0,)))
        np.testing.assert_array_equal(f(bad, True), tokens)
    assert f._cache_size() == 1
    checked = checkify.checkify(f, errors=checkify.user_checks)
    with pytest.raises(checkify.JaxRuntimeError, match=r"rate must be in \[0, 1\]"):
        checked(1.5, False)[0].throw()
    checked(RATE, False)[0].throw()


def test_words_under_vmap_and_in_blocks_are_those_of_the_loop_and_the_whole(key, tokens):
    keys = jax.random.split(key, 3)
    batch = jnp.stack([tokens, tokens + 1, tokens * 2])
    y = jax.jit(jax.vmap(lambda k, x: word_dropout(k, x, RATE)))(keys, batch)
    for i in range(3):
        np.testing.assert_array_equal(y[i], replaced(keys[i], batch[i]))
    whole = replaced(key, tokens)
    block = functools.partial(word_dropout, key, tokens[5:, 7:], RATE, global_shape=SHAPE)
    np.testing.assert_array_equal(block(start=(5, 7)), whole[5:, 7:])
    traced = jax.jit(lambda row: block(start=(row, 7)))
    np.testing.assert_array_equal(traced(5), whole[5:, 7:])


@pytest.mark.parametrize("rate", [RATE, 1.0])
def test_an_eager_call_is_one_compiled_function(rate, key, tokens, caplog):
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        word_dropout(key, tokens, rate, protected=(0, 1))
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation of" in r.getMessage()]
    assert len(compiled) == 1, compiled


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
AXIS_TYPES = pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"]
)


def on_eight_devices(axis_type):
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)


@AXIS_TYPES
@pytest.mark.parametrize("spec", [P(("a", "b")), P("a", "b"), P(None, ("a", "b"))], ids=str)
def test_sharded_words_have_the_same_mask_without_a_collective(axis_type, spec, key):
    tokens = np.arange(16 * 24, dtype=np.int32).reshape(16, 24) % 9
    f = jax.jit(lambda x: word_dropout(key, x, RATE, protected=(0, 1)))
    devices = on_eight_devices(axis_type)
    with jax.set_mesh(devices):
        placed = jax.device_put(tokens, NamedSharding(devices, spec))
        compiled = f.lower(placed).compile()
        y = compiled(placed)
        np.testing.assert_array_equal(y, replaced(key, tokens, protected=(0, 1)))
        assert y.sharding.is_equivalent_to(placed.sharding, 2)
        assert not any(name in compiled.as_text() for name in COLLECTIVES)


# --- patches ----------------------------------------------------------------------------------

# Name: options, shape.
PATCHES = {
    "one class token": ({}, (4, 17, 6)),
    "no prefix": (dict(num_prefix_tokens=0), (4, 16, 6)),
    "long prefix": (dict(num_prefix_tokens=5), (4, 21, 6)),
    "ordered": (dict(ordered=True), (4, 17, 6)),
    "no batch": (dict(axis=0, num_prefix_tokens=0), (16, 6)),
    "two batch axes": (dict(axis=-2, ordered=True), (2, 3, 17, 6)),
    "two feature axes": ({}, (4, 17, 3, 2)),
    "no feature axis": (dict(axis=-1), (4, 17)),
}


def indices_of(key, shape, rate=0.5, *, axis=1, num_prefix_tokens=1, ordered=False):
    """The definition, with the twin's uniform numbers."""
    axis %= len(shape)
    length = shape[axis] - num_prefix_tokens
    count = max(1, math.floor(round(length * (1 - rate), 6)))
    numbers = law_twin.uniform(words_of(key), (*shape[:axis], length))
    chosen = np.argsort(numbers, axis=-1, kind="stable")[..., :count]
    chosen = np.sort(chosen, axis=-1) if ordered else chosen
    prefix = np.broadcast_to(np.arange(num_prefix_tokens), (*shape[:axis], num_prefix_tokens))
    return np.concatenate([prefix, chosen + num_prefix_tokens], axis=-1)


def take(x, indices, axis):
    x, axis = np.asarray(x), axis % np.ndim(x)
    return np.take_along_axis(x, indices.reshape(indices.shape + (1,) * (x.ndim - axis - 1)), axis)


@pytest.mark.parametrize("kind", PATCHES)
def test_patches_are_those_of_the_numpy_twin_in_both_passes(kind, key):
    options, shape = PATCHES[kind]
    x = normal(shape)
    axis = options.get("axis", 1)

    @jax.jit
    def passes(x):
        drop = functools.partial(jdropout.patch_dropout, key, rate=0.5, **options)
        y, pullback, indices = jax.vjp(lambda x: drop(x), x, has_aux=True)
        _, pushed, _ = jax.jvp(lambda x: drop(x), (x,), (x,), has_aux=True)
        return y, indices, *pullback(y), pushed

    y, indices, x_bar, pushed = passes(x)
    expected = indices_of(key, shape, **options)
    assert indices.dtype == jnp.int32
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(y, take(x, expected, axis))
    np.testing.assert_array_equal(pushed, y)
    staying = (np.arange(shape[axis]) == expected[..., None]).any(axis=-2)
    staying = staying.reshape(staying.shape + (1,) * (len(shape) - staying.ndim))
    np.testing.assert_array_equal(x_bar, np.where(staying, x, 0))


@pytest.mark.parametrize(
    ("length", "rate", "count"),
    [
        (100, 0.9, 10),  # in floating point 1 - 0.9 is less than 0.1
        (20, 0.9, 2),
        (10, 0.7, 3),
        (7, 0.5, 3),
        (196, 0.5, 98),
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
    _, free = jax.jit(functools.partial(drop, num_prefix_tokens=0))()
    _, ordered = jax.jit(functools.partial(drop, num_prefix_tokens=0, ordered=True))()
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
    np.testing.assert_array_equal(indices, indices_of(key, (3, 9, 2), 1.0, num_prefix_tokens=2))
    assert y.shape == (3, 3, 2)


@pytest.mark.parametrize(
    "dtype", [jnp.float8_e5m2, jnp.bfloat16, jnp.float64, jnp.complex64, jnp.int32, jnp.bool_]
)
def test_patches_of_every_dtype_are_the_same(dtype, key):
    with jax.enable_x64(True):
        x = (jnp.arange(2 * 9 * 4) % 7).reshape(2, 9, 4).astype(dtype)
        y, indices = jdropout.patch_dropout(key, x, 0.5)
        assert (y.dtype, indices.dtype) == (dtype, jnp.int32)
        np.testing.assert_array_equal(indices, indices_of(key, x.shape))
        np.testing.assert_array_equal(y, take(x, np.asarray(indices), 1))


def test_patches_store_the_key_alone(key):
    x = jnp.ones((4, 17, 64))
    (leaf,) = jax.tree.leaves(
        jax.vjp(lambda x: jdropout.patch_dropout(key, x, 0.5), x, has_aux=True)[1]
    )
    np.testing.assert_array_equal(leaf, jax.random.key_data(key))


def test_temporaries_of_patches_are_those_of_taking_them(key):
    """Of what is scattered back XLA holds a copy; the numbers and indices come to no megabyte."""
    shape, indices = (64, 65, 256), jnp.zeros((64, 33, 1), jnp.int32)

    def temporaries(take):
        gradient = jax.jit(jax.grad(lambda x, key: jnp.sin(take(key, jnp.cos(x))).sum()))
        compiled = gradient.lower(jax.ShapeDtypeStruct(shape, jnp.float32), key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporaries(lambda key, x: jdropout.patch_dropout(key, x, 0.5)[0])
    theirs = temporaries(
        lambda key, x: jnp.take_along_axis(x, indices, axis=1, mode="promise_in_bounds")
    )
    assert ours <= theirs + 2**20


def test_patches_under_vmap_are_those_of_the_loop(key):
    keys = jax.random.split(key, 3)
    x = normal((3, 2, 9, 4))
    y, indices = jax.jit(jax.vmap(lambda k, x: jdropout.patch_dropout(k, x, 0.5)))(keys, x)
    for i in range(3):
        expected = indices_of(keys[i], x.shape[1:])
        np.testing.assert_array_equal(indices[i], expected)
        np.testing.assert_array_equal(y[i], take(x[i], expected, 1))


@AXIS_TYPES
@pytest.mark.parametrize(
    "spec", [P(("a", "b")), P("a", None, "b"), P(None, None, ("a", "b"))], ids=str
)
def test_sharded_patches_are_the_same_without_a_collective(axis_type, spec, key):
    x = normal((16, 9, 8))
    devices = on_eight_devices(axis_type)
    drop = functools.partial(jdropout.patch_dropout, key, rate=0.5)

    @jax.jit
    def passes(x):
        y, pullback, indices = jax.vjp(lambda x: drop(x), x, has_aux=True)
        return y, indices, *pullback(y)

    expected = indices_of(key, x.shape)
    with jax.set_mesh(devices):
        placed = jax.device_put(x, NamedSharding(devices, spec))
        compiled = passes.lower(placed).compile()
        y, indices, x_bar = compiled(placed)
        np.testing.assert_array_equal(indices, expected)
        np.testing.assert_array_equal(y, take(x, expected, 1))
        staying = (np.arange(9) == expected[..., None]).any(axis=-2)
        np.testing.assert_array_equal(x_bar, np.where(staying[..., None], x, 0))
        assert y.sharding.is_equivalent_to(placed.sharding, 3)
        assert not any(name in compiled.as_text() for name in COLLECTIVES)


# --- the audit and errors ---------------------------------------------------------------------


def test_an_audit_names_both_and_has_nothing_against_them(key, tokens):
    def step(key, tokens, x):
        first, second = jax.random.split(key)
        word_dropout(first, tokens, 0.1)
        return jdropout.patch_dropout(second, x, 0.5)

    report = jdropout.audit(step, key, tokens, jnp.ones((2, 9, 4)))
    words, patches = report.sites
    assert (words.kind, words.shape, words.rate) == ("word_dropout", SHAPE, 0.1)
    assert words.effective_rate == jdropout.effective_rate(0.1)
    assert (patches.kind, patches.shape, patches.rate) == ("patch_dropout", (2, 8), 0.5)
    assert words.shared_axes == patches.shared_axes == ()
    assert words.stored_bytes == patches.stored_bytes == 8
    assert report.findings == ()


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
    (dict(rate=1.5), ValueError, "rate must be in [0, 1], got 1.5"),
    (dict(key=None), ValueError, "Pass key=jax.random.key(seed)"),
    (dict(start=(0, 0)), ValueError, "start was given without global_shape"),
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
    (dict(rate=-0.1), ValueError, "rate must be in [0, 1], got -0.1"),
    (dict(rate="half"), TypeError, "rate must be a number in [0, 1], got 'half'"),
    (dict(x=[1.0]), TypeError, "x must be an array, got list"),
    (dict(key=None), ValueError, "Pass key=jax.random.key(seed)"),
    (dict(deterministic=None), TypeError, "deterministic must be True, False"),
]


@pytest.mark.parametrize(
    ("changes", "error", "text"), PATCH_ERRORS, ids=[case[2] for case in PATCH_ERRORS]
)
def test_errors_about_patches_name_the_argument_and_the_value(changes, error, text, key):
    arguments = dict(key=key, x=jnp.ones((2, 9, 4)), rate=0.5) | changes
    positional = [arguments.pop(name) for name in ("key", "x", "rate")]
    with pytest.raises(error, match=re.escape(text)):
        jdropout.patch_dropout(*positional, **arguments)


def test_a_traced_rate_or_flag_of_patches_is_an_error_that_says_to_make_it_static(key):
    x = jnp.ones((2, 9, 4))
    with pytest.raises(TypeError, match=r"rate must be a number here.*static"):
        jax.jit(lambda r: jdropout.patch_dropout(key, x, r))(0.5)
    with pytest.raises(TypeError, match=r"deterministic must be True or False here.*static"):
        jax.jit(lambda d: jdropout.patch_dropout(key, x, 0.5, deterministic=d))(False)
    y, _ = jdropout.patch_dropout(key, x, jnp.float32(0.5), deterministic=jnp.array(False))
    assert y.shape == (2, 5, 4)
