"""What every function of the family promises, row by row of the table in contract.py.

A row's programs are compiled once and serve all its promises: one for both passes at a static
strength, one for a batch of traced strengths and flags, with their gradients and with checkify's
errors, and one each for blocks and dtypes. Pytest runs the tests of a row together. Where a row
does not have a capability, its test shows that instead.
"""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import law_twin
import numpy as np
import pytest
from contract import PROTECTED, RATE, ROWS, UNKNOWN, Draw
from jax.experimental import checkify

import jdropout
from jdropout.keys import in_batch, stratified_key

KEY = jax.random.key(20140614)
BAD_RATES = (1.5, -0.1, np.nan)


class Case:
    """A row, its inputs and its compiled programs."""

    def __init__(self, row):
        self.row = row
        self.x, self.y_bar = row.inputs(), None
        if row.differentiable:
            self.y_bar = row.inputs(self.expected(self.x).shape, seed=7)

    def expected(self, x, strength=None, key=KEY, **draw):
        strength = self.row.strength if strength is None else strength
        return self.row.formula(self.draw(key, **draw), x, strength)

    def gradient(self, x, y_bar, strength=None, key=KEY, **draw):
        strength = self.row.strength if strength is None else strength
        return self.row.gradient(self.draw(key, **draw), x, strength, y_bar)

    def draw(self, key=KEY, **draw):
        return Draw(key, **dict(site=self.row.site, precision=self.row.precision) | draw)

    @property
    def traced_bits(self):
        """A traced rate has 16 bits unless more are asked for."""
        return dict(precision=self.row.precision or 16)

    def assert_equal(self, y, expected):
        assert np.shape(y) == np.shape(expected)
        if self.row.rtol == 0:
            np.testing.assert_array_equal(y, expected)
        else:
            np.testing.assert_allclose(y, expected, rtol=self.row.rtol, atol=self.row.atol)

    @property
    def strengths(self):
        if not self.row.is_rate:
            return self.row.strengths
        ends = (0.0,) if self.row.function is jdropout.gaussian_dropout else (0.0, 1.0)
        return (*ends, 0.25, RATE, 0.5)

    def batch(self, strengths):
        """Arguments of `traced`: the strengths in training, and then in evaluation."""
        count, row = len(strengths), self.row
        xs = np.stack([row.inputs(seed=seed) for seed in range(2 * count)])
        y_bars = None
        if row.differentiable:
            y_bars = row.inputs((2 * count, *self.y_bar.shape), seed=7)
        strengths = np.stack([np.float32(strength) for strength in (*strengths, *strengths)])
        return (
            jax.random.split(KEY, 2 * count),
            xs,
            strengths,
            np.arange(2 * count) >= count,
            y_bars,
        )

    @functools.cached_property
    def traced(self):
        """Of a batch of (key, x, strength, flag, y_bar): results, gradients of x and strength."""
        call = self.row.call

        def passes(key, x, strength, flag, y_bar):
            if y_bar is None:
                return call(key, x, strength, deterministic=flag), None, None
            y, pullback = jax.vjp(lambda x, s: call(key, x, s, deterministic=flag), x, strength)
            return y, *pullback(y_bar)

        return jax.jit(checkify.checkify(jax.vmap(passes), errors=checkify.user_checks))

    @functools.cached_property
    def static(self):
        """Of (key, x, y_bar): both passes, also of remat, a tangent, what is stored, a sample."""
        row = self.row

        @jax.jit
        def passes(key, x, y_bar):
            def f(x):
                return row.call(key, x, row.strength)

            sample = row.call(stratified_key(key, 3, 10), x, row.strength)
            if y_bar is None:
                return dict(y=f(x), sample=sample)
            y, tangent = jax.jvp(f, (x,), (x,))
            x_bar = jax.vjp(jax.checkpoint(f), x)[1](y_bar)[0]
            stored = jax.tree.leaves(jax.vjp(f, x)[1])
            return dict(y=y, tangent=tangent, x_bar=x_bar, stored=stored, sample=sample)

        return passes


# Rows whose function, formula or operations of JAX another row has: one version is enough.
VARIANTS = {
    "alpha_dropout",
    "concrete_dropout",
    "drop_connect",
    "drop_path",
    "gaussian_noise",
    "standout",
    "zoneout",
    "spatial",
    "locked",
    "drop_path, batch",
    "drop_path, unscaled",
    "embedding",
    "drop_block, realised",
    "uniform_noise",
    "feature_alpha_dropout",
    "drop_connect_tree",
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[pytest.mark.one_version] if name in VARIANTS else [])
        for name in ROWS
    ],
)
def case(request):
    return Case(ROWS[request.param])


# --- values -------------------------------------------------------------------------------


def test_the_result_is_the_formula_with_the_twins_numbers(case):
    results = case.static(KEY, case.x, case.y_bar)
    case.assert_equal(results["y"], case.expected(case.x))
    case.assert_equal(results["sample"], case.expected(case.x, sample=(3, 10)))


def test_an_eager_call_is_one_compiled_program(case, caplog):
    row = case.row
    if not row.programs:
        return
    x, strength = jnp.asarray(row.inputs(row.other)), row.strength_for(row.other)
    if isinstance(strength, np.ndarray):
        strength = jnp.asarray(strength)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        y = row.call(KEY, x, strength)
    compiled = [r.getMessage() for r in caplog.records if "XLA compilation of" in r.getMessage()]
    # none at all, if another function has compiled the same before
    assert len(compiled) <= row.programs, compiled
    case.assert_equal(y, case.expected(np.asarray(x), np.asarray(strength)[()]))


def test_strength_zero_and_evaluation_return_the_input_itself_without_a_key(case):
    row = case.row
    for x in (jnp.asarray(case.x), case.x):
        for zero in row.zeros:
            assert row.call(None, x, zero) is x
        y = row.call(None, x, row.strength, deterministic=True)
        if row.evaluated is None:
            assert y is x
        else:
            np.testing.assert_allclose(y, row.evaluated(case.x, row.strength), rtol=1e-5, atol=1e-5)


@pytest.mark.one_version
def test_rate_one_is_the_limit_of_the_formula_without_a_key(case):
    row = case.row
    if not row.is_rate:
        return
    if row.function is jdropout.gaussian_dropout:
        for rate in (1, 1.0, np.float32(1), jnp.float32(1)):
            with pytest.raises(ValueError, match="rate must be below 1, got 1"):
                row.call(KEY, case.x, rate)
        return
    x, y_bar, key = case.x.copy(), case.y_bar, None
    if row.differentiable:
        x.flat[:2] = np.nan, np.inf
        y_bar = y_bar.copy()
        y_bar.flat[:2] = np.nan, np.inf
    if row.key_at_one:
        key = KEY
    for rate in (1, 1 - 1e-12):
        if y_bar is None:
            case.assert_equal(row.call(key, x, rate), case.expected(x, rate))
            continue
        y, pullback = jax.vjp(lambda x, rate=rate: row.call(key, x, rate), jnp.asarray(x))
        case.assert_equal(y, case.expected(x, rate))
        if row.elementwise:
            case.assert_equal(pullback(jnp.asarray(y_bar))[0], case.gradient(x, y_bar, rate))


# --- traced strengths and flags -----------------------------------------------------------


def test_one_program_serves_a_batch_of_traced_rates_and_flags(case):
    row = case.row
    if not row.traceable:
        with pytest.raises(TypeError, match=r"rate must be a number here.*static"):
            jax.jit(lambda r: row.call(KEY, case.x, r))(0.5)
        with pytest.raises(TypeError, match=r"deterministic must be True or False here.*static"):
            jax.jit(lambda d: row.call(KEY, case.x, 0.5, deterministic=d))(False)
        keys, xs = jax.random.split(KEY, 3), np.stack([row.inputs(seed=seed) for seed in (1, 2, 3)])
        y = jax.jit(jax.vmap(lambda key, x: row.call(key, x, row.strength)))(keys, xs)
        for i in range(3):
            case.assert_equal(y[i], case.expected(xs[i], key=keys[i]))
        return
    batch = case.batch(case.strengths)
    error, results = case.traced(*batch)
    error.throw()
    for key, x, strength, flag, y_bar, y, x_bar, strength_bar in examples(*batch, *results):
        if flag:
            evaluated, atol = row.in_evaluation(x, strength), 1e-5 * (row.evaluated is not None)
            np.testing.assert_allclose(y, evaluated, rtol=1e-5, atol=atol)
            if row.evaluated is None:
                np.testing.assert_array_equal(x_bar, y_bar)
            continue
        # A traced rate is read as float32.
        case.assert_equal(y, case.expected(x, strength, key, **case.traced_bits))
        if row.differentiable:
            expected = case.gradient(x, y_bar, strength, key, **case.traced_bits)
            np.testing.assert_allclose(x_bar, expected, rtol=max(row.rtol, 1e-6), atol=row.atol)
        if row.is_rate:
            assert not strength_bar


def examples(*arrays):
    """The members of a batch, in which any of the arrays may be None."""
    count = len(arrays[0])
    return zip(*([None] * count if array is None else array for array in arrays), strict=True)


def test_a_traced_rate_outside_its_range_gives_nan_and_an_error_under_checkify(case):
    row = case.row
    if not (row.is_rate and row.traceable):
        return
    for bad in BAD_RATES + (1.0,) * (row.function is jdropout.gaussian_dropout):
        strengths = (bad, *case.strengths[1:])
        batch = case.batch(strengths)
        error, (y, _, rate_bar) = case.traced(*batch)
        if row.differentiable:
            assert np.isnan(y[0]).all()
            assert not np.isnan(y[1]).any()
            assert not rate_bar[0]
        else:  # integers have no NaN
            x, i = batch[1], len(strengths)
            replaced = np.where(np.isin(x[0], PROTECTED), x[0], UNKNOWN)
            np.testing.assert_array_equal(y[0], replaced)
            np.testing.assert_array_equal(y[i], x[i])
        if bad in BAD_RATES:
            with pytest.raises(checkify.JaxRuntimeError, match=r"rate must be in \[0, 1\]"):
                error.throw()
    assert case.traced._cache_size() == 1


# --- dropped elements, gradients and what is stored ---------------------------------------


def test_the_backward_pass_has_the_mask_of_the_forward_pass(case):
    row = case.row
    if not row.differentiable:
        return
    results = case.static(KEY, case.x, case.y_bar)
    case.assert_equal(results["x_bar"], case.gradient(case.x, case.y_bar))
    if row.elementwise:
        case.assert_equal(results["tangent"], case.gradient(case.x, case.x))
    if row.function is jdropout.patch_dropout:
        np.testing.assert_array_equal(results["tangent"], results["y"])


def test_what_is_not_a_number_reaches_the_output_only_where_it_is_kept(case):
    row = case.row
    if not (row.differentiable and row.elementwise and row.drops):
        return
    for bad in (np.nan, np.inf, -np.inf):
        x, y_bar = np.full_like(case.x, bad), np.full_like(case.y_bar, bad)
        case.assert_equal(case.static(KEY, x, y_bar)["y"], case.expected(x))
        case.assert_equal(case.static(KEY, case.x, y_bar)["x_bar"], case.gradient(case.x, y_bar))


def test_the_backward_pass_stores_the_key_and_nothing_that_grows_unless_the_table_says_so(case):
    row = case.row
    if not row.differentiable:
        return
    stored = case.static(KEY, case.x, case.y_bar)["stored"]
    words = [leaf for leaf in stored if leaf.dtype == jnp.uint32]
    assert len(words) == row.stores_key
    for leaf in words:
        np.testing.assert_array_equal(leaf, law_twin.mask_keys(case.draw().words, row.digits))
    assert sum(leaf.size for leaf in stored) <= 2 * row.digits + row.stores
    if not row.traceable:
        return

    def residuals(key, x, strength, flag):
        # A parameter's evaluation is not x itself, and a traced flag needs both.
        options = {} if np.ndim(row.strength) else dict(deterministic=flag)
        f = functools.partial(row.call, key, **options)
        to_x = jax.vjp(lambda x: f(x, strength), x)[1]
        to_both = jax.vjp(lambda x, s: f(x, s), x, strength)[1]
        return jax.tree.leaves(to_x), jax.tree.leaves(to_both)

    to_x, to_both = jax.eval_shape(residuals, KEY, case.x, np.float32(row.strength), True)
    most = 2 * row.digits + row.stores + row.constants + 2  # the strength and the flag
    assert sum(leaf.size for leaf in to_x) <= most
    assert sum(leaf.size for leaf in to_both) <= most + row.needs_x * case.x.size


def test_a_stored_mask_would_be_seen():
    """The control for the test above."""

    def elsewhere(key, x):
        mask = jax.random.bernoulli(key, 0.7, x.shape)
        return jax.tree.leaves(jax.vjp(lambda x: jnp.where(mask, x, 0), x)[1])

    x = np.ones((7, 10), np.float32)
    assert max(leaf.size for leaf in jax.eval_shape(elsewhere, KEY, x)) == x.size


# --- blocks, dtypes --------------------------------------------------------------------


def test_a_block_or_a_part_of_a_batch_equals_that_of_the_whole(case):
    row = case.row
    if not row.blocks():
        assert row.takes("start") == row.takes("global_shape")
        return
    whole = case.expected(case.x)
    start = [size // 2 - (axis == 0) for axis, size in enumerate(row.shape)]
    if row.function is jdropout.variational_dense:
        start[1] = 0  # every output needs all inputs
    x = case.x[tuple(slice(first, None) for first in start)]
    strength = row.strength
    if np.ndim(strength) and row.elementwise:
        strength = strength[
            tuple(
                slice(first if size > 1 else 0, None)
                for first, size in zip(start, strength.shape, strict=True)
            )
        ]

    @jax.jit
    def blocks(key, x, traced_strength, traced_start, flag):
        f = functools.partial(row.call, key, x, global_shape=whole.shape)
        static = f(strength, start=start)
        part_key = in_batch(key, traced_start[0], row.shape[0])
        if row.examples:  # where the block begins within the part of the batch
            within = dict(start=[0, *start[1:]], global_shape=(len(x), *whole.shape[1:]))
        else:
            within = dict(start=start, global_shape=whole.shape)
        part = row.call(part_key, x, strength, **within)
        return static, part, f(traced_strength, start=traced_start, deterministic=flag)

    traced_whole = case.expected(case.x, np.float32(row.strength), **case.traced_bits)
    for y, expected in zip(
        blocks(KEY, x, strength, start, False), (whole, whole, traced_whole), strict=True
    ):
        case.assert_equal(y, expected[tuple(slice(first, None) for first in start)])


def wide(dtype):
    if dtype in (jnp.float64, jnp.complex64, jnp.complex128):
        return np.dtype(dtype)
    return np.dtype(dtype if jnp.issubdtype(dtype, jnp.integer) else np.float32)


@pytest.mark.one_version
def test_every_dtype_is_kept_and_computed_in_a_wide_one_and_rounded_once(case):
    row = case.row
    with jax.enable_x64(True):
        xs = [case.x.astype(dtype) for dtype in row.dtypes]
        f = jax.jit(lambda key, xs: [row.call(key, x, row.strength) for x in xs])
        results = zip(xs, f(KEY, xs), strict=True)
        for x, y in results:
            assert y.dtype == x.dtype
            assert_rounded_once(row, np.asarray(y), case.expected(x.astype(wide(x.dtype))))


def assert_rounded_once(row, y, expected):
    narrow = jnp.issubdtype(y.dtype, jnp.floating) and jnp.finfo(y.dtype).bits < 32
    if row.rtol == 0:
        np.testing.assert_array_equal(y, expected.astype(y.dtype))
    elif narrow:
        info = jnp.finfo(y.dtype)
        # Of a sum of products the inputs are rounded as well.
        terms = np.abs(expected).max() / np.abs(expected) if row.function is DENSE else 1
        rtol = 0.51 * float(info.eps) * terms + row.rtol
        error = np.abs(y.astype(np.float64) - expected)
        assert (error <= rtol * np.abs(expected) + row.atol + float(info.tiny)).all()
    else:
        rtol = row.rtol_wide if jnp.finfo(y.dtype).bits == 64 else row.rtol
        np.testing.assert_allclose(y, expected, rtol=rtol, atol=rtol)


DENSE = jdropout.variational_dense


# --- the audit and errors -----------------------------------------------------------------


@pytest.mark.one_version
def test_an_audit_names_the_kind_the_axes_and_the_rate(case):
    row = case.row

    def step(key, x):
        return row.call(key, x, row.strength)

    report = jdropout.audit(step, KEY, jnp.asarray(case.x))
    (site,) = report.sites
    assert site.kind == (row.kind or row.function.__name__)
    assert site.shape == (case.row.shape if row.site_shape is None else row.site_shape)
    assert site.shared_axes == row.shared
    assert site.stored_bytes == (row.audited_bytes or 8 * row.digits)
    assert site.saved_work == (site.effective_rate if row.saves_work else 0)
    assert site.key_sources == ("key",)
    assert site.deterministic is False
    if row.is_rate:
        assert site.rate == RATE
        assert site.effective_rate == row.audited_rate(case.draw())
    assert tuple(finding.code for finding in report.findings) == row.findings


@pytest.mark.one_version
def test_an_audit_finds_a_key_that_two_calls_share_and_names_calls_that_are_off(case):
    row = case.row

    def step(key, x):
        y = row.call(key, x, row.strength)
        return (
            y,
            row.call(key, x, row.strength),
            row.call(None, x, row.strength, deterministic=True),
        )

    report = jdropout.audit(step, KEY, jnp.asarray(case.x))
    assert [site.deterministic for site in report.sites] == [False, False, True]
    assert "key-reused" in [finding.code for finding in report.findings]


def bad_calls(row, x):
    """Changes to the arguments, the type of the error, and what it says."""
    yield dict(key=None), ValueError, "key is None"
    yield dict(key=None), ValueError, "Pass key=jax.random.key(seed)"
    yield dict(key=jax.random.split(KEY, 2)), ValueError, "must be a single key"
    yield dict(key=0), TypeError, "Make one with jax.random.key(seed)"
    yield dict(deterministic=None), TypeError, "deterministic must be True, False"
    yield dict(deterministic=1), TypeError, "deterministic must be True, False"
    if row.is_rate:
        yield dict(strength=1.5), ValueError, "rate must be in [0, 1], got 1.5"
        yield dict(strength=-0.1), ValueError, "rate must be in [0, 1], got -0.1"
        yield dict(strength=-0.1, deterministic=True), ValueError, "rate must be in [0, 1]"
        yield dict(strength=float("nan")), ValueError, "rate must be in [0, 1], got nan"
        yield dict(strength="half"), TypeError, "got 'half'"
        yield dict(strength=True), TypeError, "got True, a boolean"
        yield dict(strength=np.complex64(0.5)), TypeError, "rate must be a number"
    if row.array and np.ndim(row.strength):
        yield dict(strength=np.ones((3, 3), np.float32)), ValueError, "got shape (3, 3)"
        yield dict(strength=np.ones(10, np.float32)), ValueError, "[None, :]"
        yield dict(strength=np.int32(1)), TypeError, "got dtype int32"
        yield dict(strength="0"), TypeError, "must be an array, got str"
    if row.takes("start"):
        yield dict(start=(0,) * x.ndim), ValueError, "start was given without global_shape"
        yield dict(global_shape=x.shape), ValueError, "global_shape was given without start"
    if row.takes("precision"):
        yield dict(precision=8), ValueError, "precision must be None, 16 or 32"
    if row.array:
        yield dict(x=[[1.0]]), TypeError, f"{row.array} must be an array, got list"
        yield dict(x=x.astype(np.int32)), TypeError, f"{row.array} must be a"
        yield dict(x=x.astype(np.int32), deterministic=True), TypeError, "got dtype int32"
    if row.array and not row.complex:
        yield dict(x=x.astype(np.complex64)), TypeError, "must be a real floating-point"


def test_errors_name_the_argument_the_value_and_the_fix(case):
    row = case.row
    for changes, error, text in bad_calls(row, case.x):
        arguments = dict(key=KEY, x=case.x, strength=row.strength) | changes
        positional = [arguments.pop(name) for name in ("key", "x", "strength")]
        with pytest.raises(error, match=re.escape(text)):
            row.call(*positional, **arguments)
