"""Dropout that is shared along axes: which elements share a fate, and all that dropout promises."""

import functools
import logging
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
KINDS = ["spatial_dropout", "locked_dropout", "drop_path", "embedding_dropout"]
# Name: function, options, shape, the axes that share a fate.
CALLS = {
    "spatial": (jdropout.spatial_dropout, {}, (8, 5, 6, 8), (1, 2)),
    "spatial, channels first": (
        jdropout.spatial_dropout,
        dict(channel_axis=1),
        (8, 16, 5, 6),
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


@pytest.fixture(params=SOME)
def one_of_some(request):
    return CALLS[request.param]


def normal(shape):
    """Not of `jax.random`, whose normal numbers take longer to compile than a test."""
    return np.random.default_rng(1).standard_normal(shape, np.float32)


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


def test_the_mask_is_that_of_the_numpy_twin(call, key):
    assert_is_the_twin(call, RATE, None, key)


@pytest.mark.parametrize(("rate", "precision"), [(0.5, 32), (1e-4, None)])
def test_the_mask_of_two_digits_is_that_of_the_numpy_twin(one_of_some, rate, precision, key):
    assert_is_the_twin(one_of_some, rate, precision, key)


def assert_is_the_twin(call, rate, precision, key):
    x = normal(call[2])
    y = bound(call)(key, x, rate, precision=precision)
    kept = twin(key, call, rate, precision=precision)
    factor = scale_of(call, rate, precision=precision)
    np.testing.assert_array_equal(y, np.where(kept, np.asarray(x) * factor, 0))


@functools.lru_cache
def samples(name):
    """Of ones with 2^13 keys, without repetition, after a check that all who share a fate do."""
    shape, shared = CALLS[name][2:]
    keys = jax.random.split(jax.random.key(7), 1 << 13)
    drop = jax.vmap(lambda key: bound(CALLS[name])(key, jnp.ones(shape), RATE))
    y = np.asarray(jax.jit(drop)(keys))
    first = tuple(slice(0, 1) if axis in shared else slice(None) for axis in range(len(shape)))
    once = y[(slice(None), *first)]
    assert (y == once).all()
    return once.reshape(len(keys), -1)


def p_values(fates, keep):
    """Of the number kept, of the number kept per key, and of the correlations of all fates."""
    keys, count = fates.shape
    total = stats.binomtest(int(fates.sum()), fates.size, keep).pvalue
    if count == 1:
        return [total]
    centred = (fates - keep) / np.sqrt(keep * (1 - keep))
    correlations = (centred.T @ centred)[np.triu_indices(count, 1)] / np.sqrt(keys)
    together = stats.chi2(len(correlations))
    per_key = fates.sum(axis=1)
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
def test_fates_are_shared_along_the_right_axes_and_independent_along_the_others(name):
    """n = 2^13 keys; false alarm 1e-6 for each of four statistics.

    Controls: a rate that is off by 0.05, and fates of which two are one.
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


# --- limits, evaluation, dtypes ---------------------------------------------------------------


def test_rate_zero_and_evaluation_return_the_input_itself_without_a_key(call):
    for x in (jnp.ones(call[2]), np.ones(call[2], np.float32)):
        for rate in (0, 0.0, 1e-12):
            assert bound(call)(None, x, rate) is x
        assert bound(call)(None, x, RATE, deterministic=True) is x


def test_rate_one_gives_exact_zeros_and_zero_gradients_without_a_key(call):
    x = jnp.full(call[2], jnp.nan)
    y, pullback = jax.vjp(lambda x: bound(call)(None, x, 1.0), x)
    np.testing.assert_array_equal(y, np.zeros(call[2]))
    np.testing.assert_array_equal(pullback(x)[0], np.zeros(call[2]))


def test_a_traced_rate_and_flag_equal_static_ones(call, key):
    x = normal(call[2])
    f = jax.jit(lambda rate, flag: bound(call)(key, x, rate, deterministic=flag))
    np.testing.assert_array_equal(f(0.0, False), x)
    np.testing.assert_array_equal(f(1.0, False), np.zeros(call[2]))
    for rate in (0.25, 0.5):
        kept = twin(key, call, rate)
        expected = np.where(kept, np.asarray(x) * scale_of(call, rate), 0)
        np.testing.assert_array_equal(f(rate, False), expected)
        np.testing.assert_array_equal(f(rate, True), x)
    assert f._cache_size() == 1


def test_a_traced_rate_outside_its_range_gives_nan_and_an_error_under_checkify(one_of_some, key):
    call = one_of_some
    f = jax.jit(lambda rate: bound(call)(key, jnp.ones(call[2]), rate))
    checked = checkify.checkify(f, errors=checkify.user_checks)
    for bad in (1.5, -0.1, jnp.nan):
        assert jnp.isnan(f(bad)).all()
        with pytest.raises(checkify.JaxRuntimeError, match=r"rate must be in \[0, 1\]"):
            checked(bad)[0].throw()
    checked(RATE)[0].throw()


def test_the_gradient_with_respect_to_the_rate_is_zero(one_of_some, key):
    call = one_of_some
    assert jax.grad(lambda rate: bound(call)(key, jnp.ones(call[2]), rate).sum())(RATE) == 0


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.float16,
        jnp.bfloat16,
        jnp.float8_e4m3fn,
        jnp.float8_e5m2,
        jnp.float64,
        jnp.complex64,
        jnp.complex128,
    ],
)
@pytest.mark.parametrize("kind", ["locked", "rows, unscaled"])
def test_every_dtype_is_kept_and_rounded_once(kind, dtype, key):
    call = CALLS[kind]
    kept = twin(key, call)
    with jax.enable_x64(True):
        x = jnp.asarray(normal(call[2])).astype(dtype)
        y = bound(call)(key, x, RATE)
        assert y.dtype == dtype
        wide = np.complex128 if np.iscomplexobj(x) else np.float64
        if scale_of(call) == 1:
            factor = 1.0
        elif jnp.finfo(dtype).bits == 64:
            factor = 1 / (1 - jdropout.effective_rate(RATE))
        else:
            factor = np.float64(scale_of(call))
        expected = np.where(kept, np.asarray(x).astype(wide) * factor, 0)
        if jnp.finfo(dtype).bits < 32:
            expected = expected.astype(np.float32)  # rounded as the product is
        np.testing.assert_array_equal(y, expected.astype(dtype))


def test_dropped_nan_and_infinity_become_zero(one_of_some, key):
    call = one_of_some
    for bad in (jnp.nan, jnp.inf):
        x = jnp.full(call[2], bad)
        y = bound(call)(key, x, RATE)
        np.testing.assert_array_equal(y, np.where(twin(key, call), np.asarray(x), 0))


# --- transformations --------------------------------------------------------------------------


def test_both_passes_are_the_mask_and_store_the_key_alone(call, key):
    x = jnp.ones(call[2])

    @jax.jit
    def passes(x):
        f = functools.partial(bound(call), key, rate=RATE)
        y, pullback = jax.vjp(jax.checkpoint(f), x)
        return y, *pullback(x), jax.jvp(f, (x,), (x,))[1]

    for result in passes(x):
        np.testing.assert_array_equal(result, np.where(twin(key, call), scale_of(call), 0))
    (leaf,) = jax.tree.leaves(jax.vjp(lambda x: bound(call)(key, x, RATE), x)[1])
    np.testing.assert_array_equal(leaf, jax.random.key_data(key))


def test_a_stored_mask_would_be_seen():
    """The control for the test above."""
    mask = jnp.ones((8, 1)) > 0
    leaves = jax.tree.leaves(jax.vjp(lambda x: jnp.where(mask, x, 0), jnp.ones((8, 6)))[1])
    assert max(leaf.size for leaf in leaves) > 2


def test_vmap_equals_the_loop(one_of_some):
    call = one_of_some
    keys = jax.random.split(jax.random.key(5), 3)
    x = normal((3, *call[2]))
    rates = jnp.array([0.1, 0.5, 0.9])
    batched = jax.jit(jax.vmap(bound(call)))(keys, x, rates)
    one = jax.jit(bound(call))
    for i in range(3):
        np.testing.assert_array_equal(batched[i], one(keys[i], x[i], rates[i]))


def test_a_block_equals_the_block_of_the_whole(call, key):
    x = normal(call[2])
    whole = np.where(twin(key, call), np.asarray(x) * scale_of(call), 0)
    start = [size // 2 - (axis == 0) for axis, size in enumerate(call[2])]
    where = tuple(slice(first, None) for first in start)
    f = functools.partial(bound(call), rate=RATE, global_shape=call[2])
    traced = jax.jit(lambda start: f(key, x[where], start=start))
    np.testing.assert_array_equal(traced(start), whole[where])


def test_a_block_at_a_static_start_equals_the_block_of_the_whole(one_of_some, key):
    shape = one_of_some[2]
    start = [size // 2 - (axis == 0) for axis, size in enumerate(shape)]
    where = tuple(slice(first, None) for first in start)
    x = jnp.ones(shape)[where]
    y = bound(one_of_some)(key, x, RATE, start=start, global_shape=shape)
    np.testing.assert_array_equal(np.asarray(y) != 0, twin(key, one_of_some)[where])


@pytest.mark.parametrize("kind", ["spatial", "locked", "rows", "embedding"])
def test_an_eager_call_is_one_compiled_function(kind, key, caplog):
    x = jnp.ones(CALLS[kind][2])
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        bound(CALLS[kind])(key, x, RATE)
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation of" in r.getMessage()]
    assert len(compiled) == 1, compiled


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharding_changes_no_bit_and_needs_no_collective(one_of_some, axis_type, key):
    function, options, shape, shared = one_of_some
    shape = tuple(-(-size // 8) * 8 for size in shape)
    call = (function, options, shape, shared)
    x, y_bar = normal((2, *shape))
    f = functools.partial(bound(call), key, rate=RATE)
    devices = jax.make_mesh((2, 4), ("a", "b"), axis_types=(axis_type,) * 2)
    last = len(shape) - 1
    with jax.set_mesh(devices):
        for axes in ({1: ("a", "b")}, {0: "a", last: "b"}):
            sharding = NamedSharding(devices, P(*(axes.get(a) for a in range(len(shape)))))

            @jax.jit
            def passes(x, y_bar):
                y, pullback = jax.vjp(f, x)
                return y, *pullback(y_bar)

            placed = jax.device_put((x, y_bar), sharding)
            compiled = passes.lower(*placed).compile()
            for result, array in zip(compiled(*placed), (x, y_bar), strict=True):
                kept = np.where(twin(key, call), array * scale_of(call), 0)
                np.testing.assert_array_equal(result, kept)
                assert result.sharding.is_equivalent_to(sharding, len(shape))
            assert not any(name in compiled.as_text() for name in COLLECTIVES)


@pytest.mark.parametrize("kind", SOME)
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
    x = normal((4, 9, 16))
    steps = [jdropout.dropout(key, x[:, t], RATE) for t in range(x.shape[1])]
    np.testing.assert_array_equal(jdropout.locked_dropout(key, x, RATE), jnp.stack(steps, 1))


def test_a_dropped_word_is_zero_wherever_it_occurs_and_has_no_gradient(key):
    table = normal((50, 6))
    words = jnp.array([[3, 7, 3], [7, 7, 40]])

    def look_up(table):
        return jdropout.embedding_dropout(key, table, 0.5)[words]

    kept = twin(key, (None, None, (50, 6), (1,)), 0.5)
    np.testing.assert_array_equal(look_up(table), np.where(kept, np.asarray(table) * 2, 0)[words])
    gradient = jax.grad(lambda table: look_up(table).sum())(table)
    occurrences = np.bincount(np.asarray(words).reshape(-1), minlength=50)[:, None]
    np.testing.assert_array_equal(gradient, np.where(kept, 2 * occurrences, 0))


def test_unscaled_drop_path_has_the_mask_of_the_scaled_one_and_its_input_untouched(key):
    x = jnp.asarray(normal((16, 5))).astype(jnp.bfloat16)
    scaled = jdropout.drop_path(key, x, RATE)
    unscaled = jdropout.drop_path(key, x, RATE, scale_by_keep=False)
    np.testing.assert_array_equal(unscaled, jnp.where(scaled == 0, 0, x))


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

    return jdropout.audit(step, jax.random.key(0), jnp.ones(shape))


def test_an_audit_names_the_kind_and_the_axes(call):
    function, options, shape, shared = call
    (site,) = audited(function, shape, **options).sites
    assert site.kind == function.__name__
    assert site.kind in KINDS
    assert site.shape == shape
    assert site.shared_axes == shared
    assert site.stored_bytes == 8
    assert (site.rate, site.effective_rate) == (0.1, jdropout.effective_rate(0.1))


def test_an_audit_reports_one_fate_for_all_examples_and_nothing_else(call):
    function, options, shape, _shared = call
    codes = [finding.code for finding in audited(function, shape, **options).findings]
    all_alike = options.get("mode") == "batch" or options.get("batch_axes") == ()
    assert codes == (["shared-over-batch"] if all_alike else [])


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
    (SPATIAL, dict(x=[1.0]), TypeError, "x must be an array, got list"),
    (SPATIAL, dict(x=jnp.ones((2, 3), int)), TypeError, "got dtype int32"),
    (SPATIAL, dict(key=None), ValueError, "Pass key=jax.random.key(seed)"),
    (LOCKED, dict(time_axis=-4), ValueError, "time_axis is -4, but the array has 3 axes"),
    (LOCKED, dict(time_axis=None), TypeError, "time_axis must be an integer, got None"),
    (LOCKED, dict(x=None), TypeError, "x must be an array, got NoneType"),
    (LOCKED, dict(rate=1.5), ValueError, "rate must be in [0, 1], got 1.5"),
    (PATH, dict(mode="rows"), ValueError, "mode must be 'row' or 'batch', got 'rows'"),
    (PATH, dict(batch_axis=3), ValueError, "batch_axis is 3, but the array has 3 axes"),
    (PATH, dict(mode="batch", batch_axis=3), ValueError, "batch_axis is 3"),
    (PATH, dict(x=jnp.float32(1)), ValueError, "batch_axis is 0, but the array has 0 axes"),
    (PATH, dict(x=[1.0]), TypeError, "x must be an array, got list"),
    (PATH, dict(deterministic=None), TypeError, "deterministic must be True, False"),
    (TABLE, dict(x=X), ValueError, "table must have the axes (vocabulary, features), got shape"),
    (TABLE, dict(x=jnp.ones((2, 3), int)), TypeError, "table must be a floating-point"),
    (TABLE, dict(x=[[1.0]]), TypeError, "table must be an array, got list"),
    (TABLE, dict(x=jnp.ones((2, 3)), start=(0, 0)), ValueError, "without global_shape"),
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
