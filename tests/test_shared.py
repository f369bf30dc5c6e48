"""Dropout that is shared along axes: which elements are dropped together."""

import functools
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from cheap import normal
from scipy import stats

import jdropout

RATE = 0.3
# Name: function, options, shape, the axes along which elements are dropped together.
CALLS = {
    "spatial": (jdropout.spatial_dropout, {}, (8, 2, 3, 8), (1, 2)),
    "spatial, channels first": (
        jdropout.spatial_dropout,
        dict(channel_axis=1),
        (8, 16, 2, 3),
        (2, 3),
    ),
    "spatial, sequence": (jdropout.spatial_dropout, {}, (8, 5, 16), (1,)),
    "spatial, volume": (jdropout.spatial_dropout, {}, (4, 2, 3, 2, 8), (1, 2, 3)),
    "spatial, examples alike": (jdropout.spatial_dropout, dict(batch_axes=()), (4, 5, 8), (0, 1)),
    "spatial, two batch axes": (
        jdropout.spatial_dropout,
        dict(batch_axes=(0, -3)),
        (2, 8, 5, 8),
        (2,),
    ),
    "locked": (jdropout.locked_dropout, {}, (8, 5, 16), (1,)),
    "locked, time first": (jdropout.locked_dropout, dict(time_axis=0), (5, 8, 16), (0,)),
    "rows": (jdropout.drop_path, {}, (16, 5, 6), (1, 2)),
    "rows, second axis": (jdropout.drop_path, dict(batch_axis=1), (5, 16, 6), (0, 2)),
    "batch": (jdropout.drop_path, dict(mode="batch"), (8, 5, 6), (0, 1, 2)),
    "rows, unscaled": (jdropout.drop_path, dict(scale_by_keep=False), (16, 5, 6), (1, 2)),
    "batch, unscaled": (
        jdropout.drop_path,
        dict(mode="batch", scale_by_keep=False),
        (8, 5, 6),
        (0, 1, 2),
    ),
    "embedding": (jdropout.embedding_dropout, {}, (64, 6), (1,)),
}


SOME = ["spatial, channels first", "locked", "rows, unscaled", "batch", "embedding"]


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


def bound(call):
    function, options, _shape, _shared = call
    return functools.partial(function, **options)


def scale_of(call, rate=RATE, **options):
    if not call[1].get("scale_by_keep", True):
        return np.float32(1)
    return np.float32(1 / (1 - jdropout.effective_rate(rate, **options)))


def twin(key, call, rate=RATE, **options):
    _function, _options, shape, shared = call
    words = np.asarray(jax.random.key_data(key))
    return law_twin.keep_mask(words, rate, shape, broadcast_dims=shared, **options)


# --- the mask ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOME)
def test_blocks_at_a_traced_start_are_those_of_the_twins_mask(name, key):
    call = CALLS[name]
    x = normal(*call[2])
    start = [size // 2 - (axis == 0) for axis, size in enumerate(call[2])]
    where = tuple(slice(first, None) for first in start)

    @jax.jit
    def block(key, x, start):
        return bound(call)(key, x[where], RATE, start=start, global_shape=call[2])

    expected = np.where(twin(key, call), x * scale_of(call), 0)
    np.testing.assert_array_equal(block(key, x, start), expected[where])


@functools.lru_cache
def samples(name):
    """Of ones with 2^13 keys, once for all elements that are dropped together."""
    call = CALLS[name]
    shape, shared = call[2:]
    keys = jax.random.split(jax.random.key(7), 1 << 13)
    drop = jax.vmap(lambda key: bound(call)(key, jnp.ones(shape), RATE))
    y = np.asarray(jax.jit(drop)(keys))
    for key, one in zip(keys[:3], y, strict=False):
        np.testing.assert_array_equal(one, np.where(twin(key, call), scale_of(call), 0))
    first = tuple(slice(0, 1) if axis in shared else slice(None) for axis in range(len(shape)))
    once = y[(slice(None), *first)]
    assert (y == once).all()
    return once.reshape(len(keys), -1)


def p_values(kept, keep):
    """Of the number kept, of the number kept per key, and of all correlations."""
    keys, count = kept.shape
    total = stats.binomtest(int(kept.sum()), kept.size, keep).pvalue
    if count == 1:
        return [total]
    centred = (kept - keep) / np.sqrt(keep * (1 - keep))
    correlations = (centred.T @ centred)[np.triu_indices(count, 1)] / np.sqrt(keys)
    together = stats.chi2(len(correlations))
    per_key = kept.sum(axis=1)
    # The variance of a binomial's sample variance, by its fourth central moment.
    variance = count * keep * (1 - keep)
    fourth = variance * (1 + 3 * (count - 2) * keep * (1 - keep))
    z = (((per_key - count * keep) ** 2).mean() - variance) / np.sqrt((fourth - variance**2) / keys)
    square = (correlations**2).sum()
    return [
        total,
        2 * min(together.cdf(square), together.sf(square)),
        2 * stats.norm.sf(np.abs(correlations).max()) * len(correlations),
        2 * stats.norm.sf(abs(z)),
    ]


@pytest.mark.parametrize("name", CALLS)
def test_decisions_are_the_twins_shared_and_independent_along_the_right_axes(name):
    """n = 2^13 keys; false alarm 1e-6 for each of four statistics.

    Controls: a rate that is off by 0.05, and two decisions that are the same.
    """
    kept = samples(name) != 0
    keep = 1 - jdropout.effective_rate(RATE)
    _function, _options, shape, shared = CALLS[name]
    count = np.prod([size for axis, size in enumerate(shape) if axis not in shared], dtype=int)
    assert kept.shape[1] == count
    assert min(p_values(kept, keep)) > 1e-6
    assert min(p_values(kept, keep - 0.05)) < 1e-6
    if count > 1:
        paired = kept.copy()
        paired[:, 1] = paired[:, 0]
        assert min(p_values(paired, keep)) < 1e-6


@pytest.mark.parametrize("name", CALLS)
def test_mean_and_variance_are_those_of_the_formula(name):
    """n = 2^13 keys, one element; |z| < 5, false alarm 6e-7 each; control: a rate of 0.4."""
    y = samples(name)[:, -1].astype(np.float64)
    scaled = scale_of(CALLS[name]) != 1

    def z_values(rate):
        keep = 1 - jdropout.effective_rate(rate)
        value = 1 / keep if scaled else 1.0  # of what is kept
        mean, variance = (1.0, rate / (1 - rate)) if scaled else (keep, keep * (1 - keep))
        fourth = variance * value**2 * (1 - 3 * keep * (1 - keep))
        spread = (fourth - variance**2) / len(y)
        return [
            (y.mean() - mean) / np.sqrt(variance / len(y)),
            (((y - mean) ** 2).mean() - variance) / np.sqrt(spread),
        ]

    assert np.abs(z_values(RATE)).max() < 5
    assert np.abs(z_values(0.4)).max() > 5


# --- cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["spatial, channels first", "embedding"])
def test_gradient_temporaries_are_no_bit_per_element(kind, key):
    function, options, shape, _shared = CALLS[kind]
    shape = tuple(4 * size for size in shape)
    shape = (shape[0] << 20, *shape[1:]) if len(shape) == 2 else (shape[0] * 64, *shape[1:])

    def loss(x, key):
        return jnp.sin(function(key, jnp.cos(x), RATE, **options)).sum()

    compiled = (
        jax.jit(jax.grad(loss)).lower(jax.ShapeDtypeStruct(shape, jnp.float32), key).compile()
    )
    n = np.prod(shape, dtype=np.int64)
    assert compiled.memory_analysis().temp_size_in_bytes <= n / 8 + 2**20


# --- what is each one's own -------------------------------------------------------------------


def test_locked_dropout_is_dropout_of_every_step_with_one_key(key):
    x = normal(4, 3, 16)
    steps = [jdropout.dropout(key, x[:, t], RATE) for t in range(x.shape[1])]
    np.testing.assert_array_equal(jdropout.locked_dropout(key, x, RATE), np.stack(steps, 1))


def test_a_dropped_word_is_zero_wherever_it_occurs_and_has_no_gradient(key):
    table = normal(50, 6)
    words = np.array([[3, 7, 3], [7, 7, 40]])

    @jax.jit
    def look_up(table):
        y, pullback = jax.vjp(lambda t: jdropout.embedding_dropout(key, t, 0.5)[words], table)
        return y, *pullback(jnp.ones_like(y))

    y, gradient = look_up(table)

    kept = twin(key, (None, None, (50, 6), (1,)), 0.5)
    np.testing.assert_array_equal(y, np.where(kept, np.asarray(table) * 2, 0)[words])
    occurrences = np.bincount(words.reshape(-1), minlength=50)[:, None]
    np.testing.assert_array_equal(gradient, np.where(kept, 2 * occurrences, 0))


def test_unscaled_drop_path_has_the_mask_of_the_scaled_one_and_its_input_untouched(key):
    x = np.asarray(normal(16, 5), jnp.bfloat16)
    scaled = jdropout.drop_path(key, x, RATE)
    unscaled = jdropout.drop_path(key, x, RATE, scale_by_keep=False)
    np.testing.assert_array_equal(unscaled, np.where(np.asarray(scaled) == 0, 0, x))


def test_rates_of_depth_grow_linearly_from_zero_and_end_exactly():
    for rate in (0.0, 0.1, 0.2, 0.3, 0.7, 1.0):
        for depth in range(2, 50):
            rates = jdropout.drop_path_rates(rate, depth)
            np.testing.assert_allclose(rates, np.linspace(0, rate, depth), rtol=1e-15, atol=0)
            assert rates[0] == 0
            assert rates[-1] == rate
    assert jdropout.drop_path_rates(0.1, 1) == [0.1]
    assert jdropout.drop_path_rates(jnp.float32(0.5), 3) == [0.0, 0.25, 0.5]


# --- the audit --------------------------------------------------------------------------------


def audited(function, shape, **options):
    def step(key, x):
        return function(key, x, 0.1, **options)

    return jdropout.audit(step, KEY, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_an_audit_names_the_axes_and_reports_what_all_examples_share(call):
    function, options, shape, shared = call
    report = audited(function, shape, **options)
    (site,) = report.sites
    assert (site.kind, site.shape, site.shared_axes) == (function.__name__, shape, shared)
    all_alike = options.get("mode") == "batch" or options.get("batch_axes") == ()
    assert [f.code for f in report.findings] == (["shared-over-batch"] if all_alike else [])


# --- errors -----------------------------------------------------------------------------------

X = jnp.ones((4, 6, 8))
KEY = jax.random.key(0)
SPATIAL, LOCKED = jdropout.spatial_dropout, jdropout.locked_dropout
PATH, TABLE = jdropout.drop_path, jdropout.embedding_dropout
ERRORS = [
    (SPATIAL, dict(channel_axis=3), ValueError, "channel_axis is 3, but the array has 3 axes"),
    (SPATIAL, dict(channel_axis=1.0), TypeError, "channel_axis must be an integer, got 1.0"),
    (SPATIAL, dict(batch_axes=(0, 5)), ValueError, "batch_axes is 5, but the array has 3 axes"),
    (SPATIAL, dict(batch_axes=0), TypeError, "batch_axes must be a sequence of axes, got 0"),
    (SPATIAL, dict(batch_axes=(0, -3)), ValueError, "batch_axes names an axis twice"),
    (SPATIAL, dict(batch_axes=(0, 2)), ValueError, "channel_axis is axis 2, which batch_axes"),
    (SPATIAL, dict(x=jnp.ones(3)), ValueError, "Give each axis one role"),
    (LOCKED, dict(time_axis=-4), ValueError, "time_axis is -4, but the array has 3 axes"),
    (LOCKED, dict(time_axis=None), TypeError, "time_axis must be an integer, got None"),
    (PATH, dict(mode="rows"), ValueError, "mode must be 'row' or 'batch', got 'rows'"),
    (PATH, dict(batch_axis=3), ValueError, "batch_axis is 3, but the array has 3 axes"),
    (PATH, dict(mode="batch", batch_axis=3), ValueError, "batch_axis is 3"),
    (PATH, dict(x=jnp.float32(1)), ValueError, "batch_axis is 0, but the array has 0 axes"),
    (TABLE, dict(x=X), ValueError, "table must have the axes (vocabulary, features), got shape"),
]


@pytest.mark.parametrize(
    ("function", "changes", "error", "text"), ERRORS, ids=[case[3] for case in ERRORS]
)
def test_errors_name_the_argument_and_the_value(function, changes, error, text):
    arguments = dict(key=KEY, x=X, rate=0.5) | changes
    with pytest.raises(error, match=re.escape(text)):
        function(arguments.pop("key"), arguments.pop("x"), arguments.pop("rate"), **arguments)


@pytest.mark.parametrize(
    ("rate", "depth", "error", "text"),
    [
        (1.5, 3, ValueError, "rate must be in [0, 1], got 1.5"),
        ("a", 3, TypeError, "rate must be a number"),
        (0.1, 0, ValueError, "depth must be at least 1, got 0"),
        (0.1, 2.0, TypeError, "depth must be an integer, got 2.0"),
    ],
)
def test_errors_of_depth_rates(rate, depth, error, text):
    with pytest.raises(error, match=re.escape(text)):
        jdropout.drop_path_rates(rate, depth)
